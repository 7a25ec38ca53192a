"""VHD ("vpc" in QEMU): fixed and dynamic disks of Virtual PC and of Hyper-V's first generation.

A fixed VHD is the disk's bytes and then a footer of 512 bytes. A dynamic one has a copy of the footer at its start,
then a header and a table of blocks. All numbers are big-endian.

QEMU decides between the two by the first eight bytes alone, and believes the copy. So whoever can write the first
sector of a fixed VHD's disk (its guest!) can make the next reader take it for a dynamic one. The specification says
that the footer at the end counts, and so it does here: QEMU is given a fixed VHD as raw bytes of a stated size.

The size: the footer has a size in bytes (Current Size) and a geometry, and the two differ. The specification says that
the size counts. QEMU takes the geometry unless that is full or the creator is one that means the size; from version 10
on it takes the size unless the creator is one that means the geometry. It has no option for this. A dynamic VHD that
one of the two would show with another size is disputed, and `check_safe` refuses it with both sizes.

Source: Microsoft, Virtual Hard Disk Image Format Specification 1.0; QEMU block/vpc.c, vpc_open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

from utilityvm.diskimage.image_header import ImageHeader, Table
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.scsi.ports import DiskFormat

COOKIE: Final = b"conectix"

# cookie, features, version, data offset, time, creator, its version and system, original and current size,
# cylinders, heads, sectors, type, checksum, unique id, saved state
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
# cookie, data offset, table offset, version, entries, block size, checksum, parent id, its time, reserved, its name
_DYNAMIC: Final = struct.Struct(">8sQQIIII16sII512s448x")
_CHECKSUM_AT: Final = 64
_DYNAMIC_CHECKSUM_AT: Final = 36

_FIXED, _DYNAMIC_TYPE, _DIFFERENCING = 2, 3, 4
FIXED: Final = "fixed"
_SUBFORMATS: Final = {_FIXED: FIXED, _DYNAMIC_TYPE: "dynamic", _DIFFERENCING: "differencing"}
_MAX_GEOMETRY_SECTORS: Final = 65535 * 16 * 255
_MAX_SECTORS: Final = 0xFF000000  # 2040 GiB
_MEANS_SIZE: Final = frozenset({b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0"})
_SEARCHED_BYTES: Final = (64 << 10) + SECTOR  # how far before the end a misplaced footer is looked for


@dataclass(frozen=True, slots=True)
class _Footer:
    data_offset: int
    creator: bytes
    size_bytes: int
    cylinders: int
    heads: int
    sectors: int
    type: int
    unique_id: bytes

    @property
    def whole_bytes(self) -> int:
        """The disk's size; a last part of a sector is none."""
        return self.size_bytes // SECTOR * SECTOR


def starts_dynamic(image: Source) -> bool:
    return image.read_up_to(0, len(COOKIE)) == COOKIE


def ends_fixed(image: Source) -> bool:
    """Does the file end in a whole footer of a fixed disk? A raw disk may end so too: unlikely by accident, as there is
    a checksum, and possible on purpose."""
    data = _last_sector(image)
    return _is_whole(data) and _parse(data).type == _FIXED


def has_footer(image: Source) -> bool:
    return _last_sector(image).startswith(COOKIE)


def misplaced_footer(image: Source) -> int | None:
    """How many bytes before the end of the file a whole footer ends, if it does not end there as it should."""
    begin = max(0, image.size_bytes - _SEARCHED_BYTES)
    data = image.read_up_to(begin, _SEARCHED_BYTES)
    at = data.rfind(COOKIE)
    while at >= 0:
        behind = len(data) - at - SECTOR
        if behind > 0 and _is_whole(data[at : at + SECTOR]):
            return behind
        at = data.rfind(COOKIE, 0, at)
    return None


def read(image: Source) -> ImageHeader:
    """The header of a file that starts or ends with the cookie. If it ends in a footer of a fixed disk, it is one.

    Raises:
        ImageDamaged: cut short, a wrong checksum, or a size that the file does not hold.
    """
    if not starts_dynamic(image) or ends_fixed(image):
        return _read_fixed(image, _checked(image, _last_sector(image), "the footer"))
    first = _checked(image, image.read(0, SECTOR, what="the footer's copy"), "the footer's copy")
    footer = _checked(image, _last_sector(image), "the footer")
    header = _read_dynamic(image, first)
    if first == footer:
        return header
    return replace(
        header,
        disputes=(
            f"Its first sector says {_describe(first)} and its footer {_describe(footer)}:"
            " QEMU would believe the first, others the footer.",
        ),
    )


def _read_fixed(image: Source, footer: _Footer) -> ImageHeader:
    if footer.type != _FIXED:
        raise image.damaged(f"its footer says {_describe(footer)}, and its first sector holds no copy of the footer")
    if footer.size_bytes > image.sectors_end - SECTOR:
        raise image.damaged(
            f"it is cut short: a fixed disk of {footer.size_bytes} bytes, and the file has {image.size_bytes}"
        )
    return ImageHeader(
        name=image.name,
        format=DiskFormat.VHD,
        subformat=FIXED,
        file_size_bytes=image.size_bytes,
        virtual_size_bytes=footer.whole_bytes,
    )


def _read_dynamic(image: Source, footer: _Footer) -> ImageHeader:
    if footer.type not in (_DYNAMIC_TYPE, _DIFFERENCING):
        raise image.damaged(f"its first sector says {_describe(footer)}, and only dynamic disks have such a sector")
    data = image.read(footer.data_offset, _DYNAMIC.size, what="the dynamic disk header")
    cookie, _next, table_at, _version, entries, block, checksum, _id, _time, _zero, parent = _DYNAMIC.unpack(data)
    if cookie != b"cxsparse" or checksum != _checksum(data, _DYNAMIC_CHECKSUM_AT):
        raise image.damaged("its dynamic disk header has a wrong cookie or checksum")
    if block < SECTOR or block & (block - 1):
        raise image.damaged(f"its blocks have {block} bytes, not a power of two")
    size = footer.whole_bytes
    if entries * block < size:
        raise image.damaged(f"its block table has {entries} entries, too few for {size} bytes")
    differencing = footer.type == _DIFFERENCING
    return ImageHeader(
        name=image.name,
        format=DiskFormat.VHD,
        subformat=_SUBFORMATS[footer.type],
        file_size_bytes=image.size_bytes,
        virtual_size_bytes=size,
        other_size_bytes=_other_size(footer),
        cluster_size_bytes=block,
        backing=(parent.decode("utf-16-be", errors="replace").split("\0")[0] or None) if differencing else None,
        needs_parent=differencing,
        tables=(Table("the block table", table_at, entries * 4),),
    )


def _other_size(footer: _Footer) -> int | None:
    """What some QEMU takes for the disk's size, if that is another than the footer says."""
    geometry = footer.cylinders * footer.heads * footer.sectors
    if geometry == _MAX_GEOMETRY_SECTORS or footer.creator in _MEANS_SIZE:
        return None
    return None if geometry * SECTOR == footer.whole_bytes else geometry * SECTOR


def _last_sector(image: Source) -> bytes:
    # Virtual PC wrote footers of 511 bytes once; QEMU counts whole sectors and so reads a zero behind them.
    return image.read_up_to(image.sectors_end - SECTOR, SECTOR).ljust(SECTOR, b"\0")


def _checked(image: Source, data: bytes, what: str) -> _Footer:
    if not data.startswith(COOKIE):
        raise image.damaged(f"it does not end in a VHD footer; it may be cut short (it has {image.size_bytes} bytes)")
    if not _is_whole(data):
        raise image.damaged(
            f"{what} has a wrong checksum",
            remedy="restore it from a good copy, or give the format raw if all its bytes are the disk",
        )
    footer = _parse(data)
    if footer.size_bytes // SECTOR > _MAX_SECTORS:
        raise image.damaged(f"{what} says {footer.size_bytes} bytes, and a VHD holds at most {_MAX_SECTORS * SECTOR}")
    return footer


def _is_whole(data: bytes) -> bool:
    (checksum,) = struct.unpack_from(">I", data, _CHECKSUM_AT)
    return data.startswith(COOKIE) and checksum == _checksum(data, _CHECKSUM_AT)


def _checksum(data: bytes, at: int) -> int:
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _parse(data: bytes) -> _Footer:
    (
        _cookie, _features, _version, data_offset, _time, creator, _creator_version, _system, _original, size_bytes,
        cylinders, heads, sectors, kind, _checksum_field, unique_id, _saved,
    ) = _FOOTER.unpack(data)  # fmt: skip
    return _Footer(data_offset, creator, size_bytes, cylinders, heads, sectors, kind, unique_id)


def _describe(footer: _Footer) -> str:
    return f"a {_SUBFORMATS.get(footer.type, f'type {footer.type}')} disk of {footer.whole_bytes} bytes"
