"""Encrypted and verified disks, by the device-mapper's ioctls. No cryptsetup is needed, and no key leaves this process.

Source: linux/dm-ioctl.h; the tables are those of Documentation/admin-guide/device-mapper/{dm-crypt,verity}.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from utilityvm.agent.faults import Fault

_CONTROL: Final = Path("/dev/mapper/control")
_DEV: Final = "/dev"
_HEAD: Final = struct.Struct("=3I I I I i I I I Q 128s 129s 7x")  # struct dm_ioctl
_SPEC: Final = struct.Struct("=Q Q i I 16s")  # struct dm_target_spec
_BUFFER_BYTES: Final = 4096
_DEV_CREATE, _DEV_REMOVE, _DEV_SUSPEND, _TABLE_LOAD, _TABLE_CLEAR, _TABLE_STATUS = 3, 4, 6, 9, 10, 12
_READONLY, _SUSPEND, _STATUS_TABLE, _SECURE_DATA, _DEFERRED_REMOVE = 1, 2, 1 << 4, 1 << 15, 1 << 17
_SECTOR_BYTES: Final = 512

_VERITY_SUPERBLOCK: Final = struct.Struct("<8s I I 16s 32s I I Q H 6x 256s 168x")  # cryptsetup's on-disk format
_VERITY_SIGNATURE: Final = b"verity\0\0"


def open_crypt(name: str, node: str, size_bytes: int, key: bytes, *, read_only: bool) -> str:
    """Map `node` through aes-xts-plain64 with `key`; give the mapping's device.

    Raises:
        Fault: the kernel refused; nothing is mapped.
    """
    number = _number(node)
    # The key stands in the table in hex; the kernel wipes its copy (SECURE_DATA), and we keep none.
    table = bytearray(b"aes-xts-plain64 " + key.hex().encode() + f" 0 {number} 0 1 allow_discards".encode())
    try:
        return _create(name, "crypt", size_bytes // _SECTOR_BYTES, table, read_only=read_only)
    finally:
        table[:] = bytes(len(table))


def open_verity(name: str, node: str, size_bytes: int, verity: Mapping[str, Any]) -> str:
    """Map `node` so that each block must hash up to the root hash; give the mapping's device.

    Raises:
        Fault: there is no such tree, or the root hash is not that of this disk; nothing is mapped.
    """
    try:
        root_hash = bytes.fromhex(verity["RootHash"])
        offset = int(verity["HashOffset"])
    except (KeyError, TypeError, ValueError):
        raise Fault("dm-verity needs a RootHash in hex and a HashOffset", kind="invalid") from None
    if not 0 <= offset < size_bytes:
        raise Fault(f"the hash offset {offset} is outside the disk of {size_bytes} bytes", kind="invalid")
    if all(word in verity for word in ("DataBlocks", "Salt", "Algorithm", "BlockSize")):
        algorithm, block = str(verity["Algorithm"]), int(verity["BlockSize"])
        data_blocks, salt = int(verity["DataBlocks"]), bytes.fromhex(verity["Salt"])
        version, hash_start = 1, offset // block
    else:
        version, algorithm, block, data_blocks, salt = _superblock(node, offset)
        found = {"DataBlocks": data_blocks, "Salt": salt.hex(), "Algorithm": algorithm, "BlockSize": block}
        for word, value in found.items():
            if word in verity and verity[word] != value:
                raise Fault(f"the hash tree's superblock says {word} {value}, and not {verity[word]}", kind="invalid")
        hash_start = -(-(offset + _VERITY_SUPERBLOCK.size) // block)
    if data_blocks * block > offset:
        raise Fault(
            "the hash tree says that it protects itself: its offset or its data blocks are wrong", kind="invalid"
        )
    number = _number(node)
    words = [
        version,
        number,
        number,
        block,
        block,
        data_blocks,
        hash_start,
        algorithm,
        root_hash.hex(),
        salt.hex() or "-",
    ]
    table = " ".join(map(str, words)).encode()
    mapped = _create(name, "verity", data_blocks * block // _SECTOR_BYTES, bytearray(table), read_only=True)
    try:
        # The first read of any block walks up to the root: a wrong root hash shows now and not at the first file.
        with open(mapped, "rb", buffering=0) as device:
            os.pread(device.fileno(), block, 0)
            os.pread(device.fileno(), block, (data_blocks - 1) * block)
    except OSError as error:
        close(name)
        raise Fault(
            "the disk does not hash up to the root hash given: it is another disk, or it was changed"
        ) from error
    return mapped


def _superblock(node: str, offset: int) -> tuple[int, str, int, int, bytes]:
    with open(node, "rb", buffering=0) as device:
        data = os.pread(device.fileno(), _VERITY_SUPERBLOCK.size, offset)
    if len(data) < _VERITY_SUPERBLOCK.size or not data.startswith(_VERITY_SIGNATURE):
        raise Fault(f"there is no hash tree at byte {offset} of the disk", kind="invalid")
    _, _, hash_type, _, algorithm, block, hash_block, data_blocks, salt_size, salt = _VERITY_SUPERBLOCK.unpack(data)
    if block != hash_block or block not in (512, 1024, 2048, 4096) or salt_size > 256 or not data_blocks:
        raise Fault("the hash tree's superblock makes no sense", kind="invalid")
    return hash_type, algorithm.rstrip(b"\0").decode("ascii", "replace"), block, data_blocks, salt[:salt_size]


def grow(name: str, size_bytes: int) -> bool:
    """Make a crypt mapping as large as its device has become. False: it is of another kind, and stays as it is.

    What a verity mapping shows is as large as its tree says, whatever becomes of the device.

    Raises:
        Fault: the kernel refused, and the mapping is as it was.
    """
    old = _status(name)
    if old.kind != "crypt":
        return False
    table = bytearray(old.table.encode())
    try:
        _load(name, old.kind, size_bytes // _SECTOR_BYTES, table, read_only=old.read_only)
        try:
            _call(_DEV_SUSPEND, name, flags=_SUSPEND)
        except OSError:
            _call(_TABLE_CLEAR, name)
            raise
        finally:
            _call(_DEV_SUSPEND, name)  # resumes it, with the new table if there is one
    except OSError as error:
        raise Fault(f"the mapping {name} does not grow: {error.strerror}") from None
    finally:
        table[:] = bytes(len(table))
    return True


def close(name: str, *, deferred: bool = False) -> None:
    """Remove the mapping; gone before is done. `deferred`: when its last user is gone.

    Raises:
        Fault: something uses it (kind "busy").
    """
    try:
        _call(_DEV_REMOVE, name, flags=_DEFERRED_REMOVE if deferred else 0)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        if error.errno == errno.EBUSY:
            raise Fault(f"the mapping {name} is in use", kind="busy", holders=[f"something uses {name}"]) from None
        raise


def _create(name: str, kind: str, sectors: int, table: bytearray, *, read_only: bool) -> str:
    _ensure_module()
    try:
        answer = _call(_DEV_CREATE, name)
    except OSError as error:
        raise Fault(f"device-mapper: {error.strerror}") from None
    try:
        _load(name, kind, sectors, table, read_only=read_only)
        _call(_DEV_SUSPEND, name, flags=_SECURE_DATA)
    except OSError as error:
        with contextlib.suppress(OSError, Fault):
            close(name)
        raise Fault(f"dm-{kind} refused: {error.strerror}") from None
    device = _HEAD.unpack_from(answer)[10]
    return f"{_DEV}/dm-{os.minor(device)}"


def _load(name: str, kind: str, sectors: int, table: bytes | bytearray, *, read_only: bool) -> None:
    payload = _SPEC.pack(0, sectors, 0, 0, kind.encode()) + table + b"\0"
    flags = _SECURE_DATA | (_READONLY if read_only else 0)
    _call(_TABLE_LOAD, name, flags=flags, payload=payload, targets=1)


class _Status(NamedTuple):
    kind: str
    table: str
    read_only: bool


def _status(name: str) -> _Status:
    answer = _call(_TABLE_STATUS, name, flags=_STATUS_TABLE | _SECURE_DATA)
    head = _HEAD.unpack_from(answer)
    start, flags = head[4], head[7]
    kind = _SPEC.unpack_from(answer, start)[4].rstrip(b"\0").decode()
    begin = start + _SPEC.size
    return _Status(kind, answer[begin : answer.index(b"\0", begin)].decode(), bool(flags & _READONLY))


def _call(command: int, name: str, *, flags: int = 0, payload: bytes = b"", targets: int = 0) -> bytearray:
    buffer = bytearray(_BUFFER_BYTES)
    head = _HEAD.pack(4, 0, 0, len(buffer), _HEAD.size, targets, 0, flags, 0, 0, 0, os.fsencode(name), b"")
    buffer[: len(head)] = head
    buffer[len(head) : len(head) + len(payload)] = payload
    fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 3 << 30 | _HEAD.size << 16 | 0xFD << 8 | command, buffer)
    finally:
        os.close(fd)
    return buffer


def _number(node: str) -> str:
    status = os.stat(node)
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _ensure_module() -> None:
    if not _CONTROL.exists():
        done = subprocess.run(["modprobe", "dm-mod"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode or not _CONTROL.exists():
            raise Fault(f"no device-mapper in this kernel: {done.stderr.decode(errors='replace').strip()}")
