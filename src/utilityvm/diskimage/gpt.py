"""In which sectors a GUID partition table counts, where it is not in those that the disk has.

A copy of a disk of 4096-byte sectors has its table at byte 4096, and every number in it is eight times too small for a
disk of 512-byte sectors. Whatever reads it with the wrong size finds no partitions.

Source: UEFI specification 2.10, 5.3.2, GPT header.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from utilityvm.diskimage.image_header import ImageHeader
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.scsi.ports import SECTOR_SIZES, DiskFormat

_SIGNATURE: Final = b"EFI PART"
_HEADER: Final = struct.Struct("<8sIIIIQ")  # signature, revision, header's size, its checksum, reserved, its own sector
_CHECKSUM_AT: Final = 16


def foreign_sectors(image: Source, header: ImageHeader) -> int | None:
    """The size of the sectors of the image's partition table, if that is not 512 and there is none of 512 beside it.

    None also where the disk's bytes do not lie in the file as they are: only QEMU can read those.
    """
    is_plain = header.format is DiskFormat.RAW or (header.format is DiskFormat.VHD and header.subformat == "fixed")
    if not is_plain or _is_header(image, SECTOR):
        return None
    return next((size for size in SECTOR_SIZES if size != SECTOR and _is_header(image, size)), None)


def _is_header(image: Source, sector: int) -> bool:
    """Is there the first header of a table, in the second sector, with the right checksum?"""
    data = image.read_up_to(sector, SECTOR)
    if len(data) < SECTOR:
        return False
    signature, _revision, size, checksum, _reserved, own = _HEADER.unpack_from(data)
    if signature != _SIGNATURE or own != 1 or not _HEADER.size <= size <= SECTOR:
        return False
    return bool(zlib.crc32(data[:_CHECKSUM_AT] + bytes(4) + data[_CHECKSUM_AT + 4 : size]) == checksum)
