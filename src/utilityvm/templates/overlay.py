"""Makes the file that takes a clone's writes: an empty qcow2 over a disk that stays as it is.

`qemu-img create` would do it in 10 ms; these few blocks take none. The disk under it is named in the header for those
who open the file with other tools. utilityvm itself gives QEMU a descriptor of that disk, and believes no name.

Layout, in clusters of 64 KiB: the header, the table of refcounts, the refcounts, then the first level of the map, all
of it holes.

Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from utilityvm.errors import NotSupported, SetupError
from utilityvm.scsi.ports import DiskFormat
from utilityvm.scsi.slot import Slot

_CLUSTER_BITS: Final = 16
_CLUSTER: Final = 1 << _CLUSTER_BITS
_MAPPED_BY_L1: Final = _CLUSTER * (_CLUSTER // 8)  # bytes of the disk for each entry
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_BYTES: Final = 104
_EXTENSION: Final = struct.Struct(">II")
_BACKING_FORMAT: Final = 0xE2792ACA
_LONGEST_NAME: Final = 1023
_LARGEST_BYTES: Final = 1 << 51  # 32 MiB of first-level map, the most that QEMU loads


def overlay_path(folder: Path, slot: Slot) -> Path:
    """The overlay of the disk at a slot, among those of a clone."""
    return folder / f"{slot.controller}-{slot.lun}.qcow2"


def create(path: Path, *, size_bytes: int, base: Path, base_format: DiskFormat) -> int:
    """Make the file, for its owner alone, and give a descriptor for reading and writing.

    Raises:
        NotSupported: the disk is larger than a qcow2 of this kind can be.
        SetupError: no space or no right; nothing is left.
    """
    if size_bytes > _LARGEST_BYTES:
        raise NotSupported(
            f"{base}: no overlay over a disk of {size_bytes >> 40} TiB", host_path=base, remedy="attach it read-only"
        )
    entries = -(-size_bytes // _MAPPED_BY_L1)
    l1_clusters = max(1, -(-entries * 8 // _CLUSTER))
    clusters = 3 + l1_clusters
    header = _header(size_bytes, entries, str(base), base_format)
    refcounts = struct.pack(">H", 1) * clusters
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(path, error) from error
    try:
        os.ftruncate(fd, clusters * _CLUSTER)
        os.pwrite(fd, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
        os.pwrite(fd, refcounts, 2 * _CLUSTER)
        os.pwrite(fd, header, 0)
    except OSError as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise _failed(path, error) from error
    return fd


def _header(size_bytes: int, l1_entries: int, base: str, base_format: DiskFormat) -> bytes:
    kind = base_format.value.encode()
    extensions = _EXTENSION.pack(_BACKING_FORMAT, len(kind)) + kind.ljust(-(-len(kind) // 8) * 8, b"\0")
    extensions += _EXTENSION.pack(0, 0)
    name = os.fsencode(base)
    if len(name) > _LONGEST_NAME or ":" in base.partition("/")[0]:
        name = b""  # only other tools would read it
    offset = _HEADER_BYTES + len(extensions) if name else 0
    header = _HEADER.pack(
        b"QFI\xfb",
        3,
        offset,
        len(name),
        _CLUSTER_BITS,
        size_bytes,
        0,  # not encrypted
        l1_entries,
        3 * _CLUSTER,
        _CLUSTER,
        1,  # cluster of the table of refcounts
        0,
        0,  # no snapshots
        0,
        0,
        0,  # no features
        4,  # refcounts of 16 bits
        _HEADER_BYTES,
    )
    return header + extensions + name


def _failed(path: Path, error: OSError) -> SetupError:
    return SetupError(
        f"cannot make the overlay {path}: {error.strerror}",
        host_path=path,
        remedy="make room in the state folder, or set UTILITYVM_STATE_DIR to a roomier one",
    )
