"""What is on a device, as Debian's libblkid reads it: every superblock that it finds, and the partition table.

libblkid is C that parses whatever bytes a disk holds. So it runs in a child that can do nothing else: see `apart`.

`blkid_do_safeprobe` would tell one file system, or that there are several, but not which; and of a disk below 1.44 MB
only the first. So the probe is asked for one after the other, and `content` decides, by the same rules.

Source: libblkid 2.38, blkid.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from utilityvm.agent.apart import allow_few_calls, apart, failed
from utilityvm.agent.faults import Fault

LIBRARY: Final = "libblkid.so.1"
UNIT: Final = 512  # bytes, in which libblkid counts, whatever the device's sectors are
_SUBLKS_TYPE, _SUBLKS_USAGE, _SUBLKS_MAGIC, _SUBLKS_BADCSUM = 1 << 5, 1 << 7, 1 << 9, 1 << 10
_PARTS_FORCE_GPT: Final = 1 << 1  # also without a protective MBR
_BLKSSZGET: Final = 0x1268  # linux/fs.h

_MOST: Final = 128  # superblocks, partitions
_SECTOR_SIZES: Final = (512, 4096)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}")
_NUMBERS: Final = range(1 << 63)


class Superblock(NamedTuple):
    """One signature with what belongs to it."""

    kind: str  # libblkid's word: ext4, crypto_LUKS, LVM2_member
    usage: str  # filesystem, raid, crypto, other
    is_damaged: bool = False  # its checksum is wrong


class Partition(NamedTuple):
    number: int
    begin_bytes: int
    size_bytes: int


class Table(NamedTuple):
    """A partition table."""

    kind: str  # gpt, dos, mac, ...
    sector_bytes: int  # the size of the sectors that it counts in
    partitions: tuple[Partition, ...]


class Look(NamedTuple):
    """What libblkid found on a device."""

    superblocks: tuple[Superblock, ...] = ()
    table: Table | None = None  # as a kernel would read it
    hidden: Table | None = None  # one that a kernel would not: in other sectors, or without its protective MBR


def look(node: str, deadline: float) -> Look:
    """What libblkid finds on `node`: a device, or a file.

    Raises:
        Fault: reading it crashed, hung or took too much memory; or libblkid is not in the guest. See `apart`.
        OSError: it cannot be opened.
    """
    library = _load()
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        sector = _sector_bytes(fd)
        answer = apart(lambda: _examine(library, fd, size, sector), keep=fd, deadline=deadline)
    finally:
        os.close(fd)
    try:
        return _read(json.loads(answer))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise failed("answered what is no answer") from None


def sizes(node: str) -> tuple[int, int]:
    """The size of a device and of its sectors, in bytes.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END), _sector_bytes(fd)
    finally:
        os.close(fd)


def _load() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        text = f"{LIBRARY} is not in the guest image, and without it nothing is found out about a disk"
        raise Fault(text, remedy="name the file system, or build the image with the package libblkid1") from None
    for name in ("blkid_new_probe", "blkid_probe_get_partitions", "blkid_partlist_get_table"):
        getattr(library, name).restype = ctypes.c_void_p
    library.blkid_partlist_get_partition.restype = ctypes.c_void_p
    for name in ("blkid_partition_get_start", "blkid_partition_get_size"):
        getattr(library, name).restype = ctypes.c_int64
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.blkid_parttable_get_type.restype = ctypes.c_char_p
    library.blkid_parttable_get_type.argtypes = (ctypes.c_void_p,)
    library.blkid_probe_set_device.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return library


def _sector_bytes(fd: int) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
    except OSError:
        return UNIT  # a file


def _examine(library: Any, fd: int, size: int, sector: int) -> bytes:
    probe = ctypes.c_void_p(library.blkid_new_probe())
    if not probe or library.blkid_probe_set_device(probe, fd, 0, size):  # it reads nothing yet
        return b"{}"
    library.blkid_probe_set_sectorsize(probe, sector)
    allow_few_calls()
    found: dict[str, Any] = {"superblocks": _superblocks(library, probe)}
    found["table"] = _table(library, probe, sector, 0)
    if not found["table"]:
        for other in (sector, *(size for size in _SECTOR_SIZES if size != sector)):
            library.blkid_probe_set_sectorsize(probe, other)
            if table := _table(library, probe, other, _PARTS_FORCE_GPT):
                found["hidden"] = table
                break
    return json.dumps(found).encode()


def _superblocks(library: Any, probe: ctypes.c_void_p) -> list[list[Any]]:
    library.blkid_probe_enable_superblocks(probe, 1)
    library.blkid_probe_enable_partitions(probe, 0)
    wanted = _SUBLKS_TYPE | _SUBLKS_USAGE | _SUBLKS_MAGIC | _SUBLKS_BADCSUM
    library.blkid_probe_set_superblocks_flags(probe, wanted)
    found: list[list[Any]] = []
    while len(found) < _MOST and library.blkid_do_probe(probe) == 0:
        one = [_value(library, probe, b"TYPE"), _value(library, probe, b"USAGE"), _value(library, probe, b"SBBADCSUM")]
        found.append([one[0] or "unknown", one[1] or "other", one[2] is not None])
    return found


def _value(library: Any, probe: ctypes.c_void_p, name: bytes) -> str | None:
    data = ctypes.c_char_p()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(data), None):
        return None
    return (data.value or b"").decode("ascii", "replace")


def _table(library: Any, probe: ctypes.c_void_p, sector: int, flags: int) -> list[Any] | None:
    library.blkid_probe_enable_partitions(probe, 1)
    library.blkid_probe_set_partitions_flags(probe, flags)
    partitions = ctypes.c_void_p(library.blkid_probe_get_partitions(probe))
    if not partitions or not (table := library.blkid_partlist_get_table(partitions)):
        return None
    found = []
    for number in range(min(library.blkid_partlist_numof_partitions(partitions), _MOST)):
        part = ctypes.c_void_p(library.blkid_partlist_get_partition(partitions, number))
        at = library.blkid_partition_get_partno(part)
        begin, size = library.blkid_partition_get_start(part), library.blkid_partition_get_size(part)
        found.append([at, begin * UNIT, size * UNIT])
    return [library.blkid_parttable_get_type(table).decode("ascii", "replace"), sector, found]


# What the child says is the disk's word: it may have taken the child over.


def _read(found: Any) -> Look:
    superblocks = [Superblock(_name(kind), _name(usage), bool(bad)) for kind, usage, bad in found["superblocks"]]
    return Look(tuple(superblocks[:_MOST]), _read_table(found["table"]), _read_table(found.get("hidden")))


def _read_table(found: Sequence[Any] | None) -> Table | None:
    if not found:
        return None
    kind, sector, partitions = found
    return Table(
        _name(kind),
        _number(sector),
        tuple(Partition(_number(at), _number(begin), _number(size)) for at, begin, size in partitions[:_MOST]),
    )


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(value)
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or value not in _NUMBERS:
        raise ValueError(value)
    return value
