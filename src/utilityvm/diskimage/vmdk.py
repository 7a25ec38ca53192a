"""VMDK: sparse disks of one file (`monolithicSparse`, `streamOptimized`), of VMware and of VirtualBox.

A VMDK can also be a text, or hold one, that names other files as its extents, or one as its parent; QEMU opens
them (CVE-2022-47951). QEMU takes the text for the whole truth when the file starts with no magic, or when it does and
the header says a capacity of 0; otherwise it looks only for `parentFileNameHint` and the content ids, in the twenty
sectors behind the first, wherever the header says that the text is. So the text is read here from where QEMU
reads it, all of it, and anything but one sparse extent without a parent is told.

A stream has its grain directory at the end: then a second header near the end replaces the first.
All numbers are little-endian, all offsets are in sectors of 512 bytes.

Source: VMware, Virtual Disk Format 5.0; QEMU block/vmdk.c (vmdk_open_vmdk4, vmdk_parent_open, vmdk_parse_extents).
"""

from __future__ import annotations

import os
import re
import struct
from typing import Final

from utilityvm.diskimage.image_header import ImageHeader, Table
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.scsi.ports import DiskFormat

MAGIC: Final = b"KDMV"
_MAGIC_ESX: Final = b"COWD"
# What QEMU takes for a descriptor file: comments and blank lines, then a version.
_DESCRIPTOR: Final = re.compile(rb"(?:#[^\n]*\n|[ ]*\r?\n)*version=[123]\r?\n")

# magic, version, flags, capacity, grain, descriptor's offset and size, entries to a grain table, directory's copy and
# directory, overhead, unclean, line ends, compression
_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH433x")
_MARKER: Final = struct.Struct("<QII496x")  # value, size, type

_DIRECTORY_AT_END: Final = 0xFFFF_FFFF_FFFF_FFFF
_HAS_COPY: Final = 1 << 1
_DEFLATE: Final = 1
_FOOTER_MARKER: Final = 3
_TEXT_AT: Final = SECTOR
_TEXT_BYTES: Final = 20 * SECTOR
_MAX_ENTRIES: Final = 512
_MAX_SECTORS: Final = 1 << 32  # 2 TiB
_MAX_GRAIN_SECTORS: Final = 0x200000  # QEMU's limit; check_safe has a lower one
_SUBFORMATS: Final = ("monolithicSparse", "streamOptimized")
_EXTENT: Final = re.compile(r"[ \t]*(?:RW|RDONLY|NOACCESS)[ \t].*")


def starts(image: Source) -> bool:
    """Does the file start with a magic of VMDK, or as a descriptor file does?"""
    head = image.read_up_to(0, SECTOR)
    return head[:4] in (MAGIC, _MAGIC_ESX) or _DESCRIPTOR.match(head) is not None or _is_titled(head)


def _is_titled(head: bytes) -> bool:
    return head.lower().startswith(b"# disk descriptorfile")


def read(image: Source) -> ImageHeader:
    """The header of a file that starts as a VMDK.

    Raises:
        ImageUnsafe: only a descriptor, or an ESX extent: its disk is in other files.
        ImageDamaged: cut short, impossible, or of a version that we do not read.
    """
    if image.read_up_to(0, 4) != MAGIC:
        raise image.unsafe(
            "it is a VMDK descriptor or an ESX extent, whose disk is in other files that it names",
            remedy="convert it on a host that you trust with those files: qemu-img convert -f vmdk -O qcow2",
        )
    first = image.read(0, _HEADER.size, what="the VMDK header")
    if struct.unpack_from("<Q", first, 12)[0] == 0:
        raise image.unsafe(
            "it is a VMDK with a capacity of 0: QEMU would take the files that its descriptor names for its disk",
            remedy="use an image that qemu-img made: qemu-img create -f vmdk -o subformat=monolithicSparse",
        )
    disputes: list[str] = []
    used = first
    if struct.unpack_from("<Q", first, 56)[0] == _DIRECTORY_AT_END:
        used = _read_footer(image)
        if first[12:28] != used[12:28]:
            disputes.append("Its header and its footer disagree about its capacity or grain.")
    (
        _magic, version, flags, capacity, grain, _text_sector, _text_sectors, entries, copy_sector,
        directory_sector, overhead, _unclean, _line_ends, compression,
    ) = _HEADER.unpack(used)  # fmt: skip
    if version not in (1, 2, 3):
        raise image.damaged(f"it is a VMDK of version {version}, and versions 1 to 3 are read")
    if not 0 < capacity <= _MAX_SECTORS:
        raise image.damaged(f"its capacity is {capacity} sectors, not 1 to {_MAX_SECTORS}")
    if not 0 < grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1) or not 0 < entries <= _MAX_ENTRIES:
        raise image.damaged(f"it has grains of {grain} sectors and {entries} to a table")
    if compression > _DEFLATE:
        raise image.damaged(f"its compression {compression} is unknown")
    if overhead * SECTOR > image.sectors_end:
        raise image.damaged(f"it is cut short: its first grain is at {overhead * SECTOR}")
    text_sector, text_sectors = struct.unpack_from("<QQ", first, 28)
    if text_sector != 1 or not 0 < text_sectors <= 20:
        raise image.damaged(f"its descriptor is {text_sectors} sectors at {text_sector}, where QEMU does not read it")

    create_type, parent, needs_parent, extents = _read_descriptor(image)
    if create_type not in _SUBFORMATS or len(extents) != 1 or " SPARSE " not in extents[0]:
        disputes.append(f"Its descriptor says {create_type!r} with {len(extents)} extents, its header one sparse file.")
    directory_bytes = -(-capacity // (grain * entries)) * 4
    tables = [Table("the grain directory", directory_sector * SECTOR, directory_bytes)]
    if flags & _HAS_COPY and copy_sector:
        tables.append(Table("the grain directory's copy", copy_sector * SECTOR, directory_bytes))
    return ImageHeader(
        name=image.name,
        format=DiskFormat.VMDK,
        subformat=_SUBFORMATS[1 if compression else 0],  # what QEMU makes of it, whatever the descriptor says
        file_size_bytes=image.size_bytes,
        virtual_size_bytes=capacity * SECTOR,
        cluster_size_bytes=grain * SECTOR,
        backing=parent,
        backing_format=DiskFormat.VMDK if parent else None,
        needs_parent=needs_parent,
        extents=extents,
        tables=tuple(tables),
        disputes=tuple(disputes),
        write_refusal=_write_refusal(version, compression),
    )


def _read_footer(image: Source) -> bytes:
    """The header near the end of a stream: before it a marker, behind it the end of the stream."""
    data = image.read_up_to(image.sectors_end - 3 * SECTOR, 3 * SECTOR).ljust(3 * SECTOR, b"\0")
    _value, size, kind = _MARKER.unpack_from(data)
    footer = data[SECTOR : 2 * SECTOR]
    ends = _MARKER.unpack_from(data, 2 * SECTOR)
    if size or kind != _FOOTER_MARKER or not footer.startswith(MAGIC) or any(ends):
        raise image.damaged("it is cut short: a stream that does not end in a footer")
    return footer


def _read_descriptor(image: Source) -> tuple[str, str | None, bool, tuple[str, ...]]:
    """createType, parent's name, whether it has one, and the extent lines.

    QEMU stops at the first NUL byte, others do not; what names a file counts on either side of it.
    """
    data = image.read_up_to(_TEXT_AT, _TEXT_BYTES)
    text = data.decode("latin-1")
    own = text.split("\0")[0]
    parent_ids = re.findall(r"(?i)parentCID", text)
    if "CID" not in own or "parentCID" not in own:
        raise image.damaged("its descriptor has no content ids")
    hint = re.search(r'(?i)parentFileNameHint(?:..([^"\n]*))?', text)
    created = re.search(r'createType..([^"\n]*)', text)
    needs_parent = hint is not None or len(parent_ids) != len(re.findall(r"(?i)parentCID=ffffffff\b", text))
    return (
        created[1] if created else "",
        os.fsdecode((hint[1] or "").encode("latin-1")) if hint else None,
        needs_parent,
        tuple(line.strip() for line in re.split(r"[\n\0]", text) if _EXTENT.fullmatch(line)),
    )


def _write_refusal(version: int, compression: int) -> str | None:
    if compression:
        return "a streamOptimized VMDK takes each grain once, and then no write"
    if version == 3:
        return "a VMDK of version 3 is read-only"
    return None
