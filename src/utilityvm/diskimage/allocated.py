"""Which ranges of a disk may hold data, from what its image has allocated: all else reads as zeros.

Exact in one direction: what is not named is zeros, and what is named may be. True while nobody writes to the disk.

Source: lseek(2), SEEK_DATA; QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
from typing import Final, TypeAlias

from utilityvm.diskimage import headers
from utilityvm.errors import UtilityVMError
from utilityvm.scsi.ports import DiskFormat

Ranges: TypeAlias = list[tuple[int, int]]  # offsets and lengths, in order

_AT_MOST: Final = 256  # ranges; nearer ones are told as one
_EXTENTS_AT_MOST: Final = 4096  # to look at
_L1_AT_MOST: Final = 1 << 16  # entries, of 512 MiB each with clusters of 64 KiB


def allocated(fd: int, image_format: DiskFormat, *, name: str) -> Ranges | None:
    """The ranges of the disk whose image is open as `fd` that may hold data. None: it cannot be told. Blocks."""
    try:
        match image_format:
            case DiskFormat.RAW:
                found = _of_raw(fd)
            case DiskFormat.QCOW2:
                found = _of_qcow2(fd, name)
            case _:
                return None
    except (OSError, UtilityVMError, struct.error):
        return None
    return None if found is None else _joined(found)


def _of_raw(fd: int) -> Ranges | None:
    """By the file system's own account; one that keeps none says that all of it is data."""
    found: Ranges = []
    at = 0
    while True:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found
            raise
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at - begin))
        if len(found) > _EXTENTS_AT_MOST:
            return None


def _of_qcow2(fd: int, name: str) -> Ranges | None:
    """By its first table, each of whose entries stands for many clusters: 512 MiB with clusters of 64 KiB."""
    header = headers.read(fd, name=name, expected=DiskFormat.QCOW2)
    if header.backing is not None or header.data_file is not None or header.dirty or header.corrupt:
        return None
    table = next((table for table in header.tables if table.name == "the L1 table"), None)
    cluster = header.cluster_size_bytes
    if table is None or not cluster or table.size_bytes > _L1_AT_MOST * 8:
        return None
    data = os.pread(fd, table.size_bytes, table.offset)
    if len(data) < table.size_bytes:
        return None
    entry_bytes = 16 if "extended L2" in header.features else 8
    covers = cluster * (cluster // entry_bytes)
    return [(number * covers, covers) for number, (entry,) in enumerate(struct.iter_unpack(">Q", data)) if entry]


def _joined(ranges: Ranges) -> Ranges:
    """The same and more in at most so many ranges: those with the smallest gaps between become one."""
    while len(ranges) > _AT_MOST:
        gaps = sorted(after[0] - sum(before) for before, after in itertools.pairwise(ranges))
        limit = gaps[len(ranges) - _AT_MOST - 1]
        joined: Ranges = ranges[:1]
        for offset, length in ranges[1:]:
            begin, before = joined[-1]
            if offset - (begin + before) <= limit:
                joined[-1] = (begin, offset + length - begin)
            else:
                joined.append((offset, length))
        ranges = joined
    return ranges
