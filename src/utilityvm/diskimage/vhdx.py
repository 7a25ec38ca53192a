"""VHDX: the disks of Hyper-V.

At fixed places in the first megabyte: the signature, two copies of the header (the valid one with the higher
sequence number counts), and two copies of the region table, of which QEMU reads only the first. The region table
says where the block table (BAT) and the metadata are. All numbers are little-endian, checksums are CRC-32C.

The header names a log. Before QEMU reads anything behind the header it replays that log, which can write anywhere
in the file: over the metadata that we have just read, or as many zeros as the host has room for. So an image with
entries in its log is usable only when writable, and only if the log writes to places that cannot matter here.

Source: Microsoft [MS-VHDX]; QEMU block/vhdx.c (vhdx_parse_header, vhdx_open_region_tables, vhdx_parse_metadata) and
block/vhdx-log.c (vhdx_parse_log).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final
from uuid import UUID

from utilityvm.diskimage.image_header import ImageHeader, Table
from utilityvm.diskimage.source import Source
from utilityvm.scsi.ports import DiskFormat

MAGIC: Final = b"vhdxfile"

_HEADERS_AT: Final = (64 << 10, 128 << 10)
_HEADER_BYTES: Final = 4096
_REGIONS_AT: Final = 192 << 10
_REGIONS_BYTES: Final = 64 << 10
_METADATA_TABLE_BYTES: Final = 64 << 10
_MIB: Final = 1 << 20

# signature, checksum, sequence number, file write, data write and log ids, log version, version, log length and offset
_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGIONS: Final = struct.Struct("<4sIII")  # signature, checksum, entries, reserved
_REGION: Final = struct.Struct("<16sQII")  # id, offset, length, required
_METADATA: Final = struct.Struct("<8sHH20x")  # signature, reserved, entries
_ITEM: Final = struct.Struct("<16sIII4x")  # id, offset in the region, length, flags
_LOCATOR: Final = struct.Struct("<16sHH")  # type, reserved, pairs
_PAIR: Final = struct.Struct("<IIHH")  # offsets and lengths of key and value
_CHECKSUM_AT: Final = 4

_BAT: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA_ID: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE: Final = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_PAGE_83: Final = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
_LOGICAL_SECTOR: Final = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PHYSICAL_SECTOR: Final = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
_PARENT_LOCATOR: Final = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_NEEDED_ITEMS: Final = {
    _FILE_PARAMETERS: 8,
    _VIRTUAL_SIZE: 8,
    _PAGE_83: 16,
    _LOGICAL_SECTOR: 4,
    _PHYSICAL_SECTOR: 4,
}

_REGION_REQUIRED: Final = 1
_ITEM_REQUIRED: Final = 4
_FIXED_FLAG, _PARENT_FLAG = 1, 2
_MAX_REGIONS: Final = 2047
_MAX_ITEMS: Final = 2047
_BLOCK_BYTES: Final = range(_MIB, 256 * _MIB + 1)
_SECTORS_PER_CHUNK: Final = 1 << 23

_LOG_SECTOR: Final = 4096
_DESCRIPTOR: Final = struct.Struct("<4sIQQQ")  # signature, last bytes, length of zeros, offset in the file, sequence
_MAX_LOG_BYTES: Final = 16 * _MIB  # read only when the log may hold something; the usual log has 1 MiB
_MAX_ZERO_BYTES: Final = 256 * _MIB  # QEMU writes them out, in place of what may have been a hole
_MAX_GROWTH_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class _Header:
    sequence: int
    log_id: bytes
    log_version: int
    log_bytes: int
    log_at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Region:
    name: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def read(image: Source) -> ImageHeader:
    """The header of a file that starts with the magic.

    Raises:
        ImageDamaged: cut short, a wrong checksum, impossible numbers, or a sector size that QEMU does not know.
    """
    header = _current_header(image)
    log = _Region("the log", header.log_at, header.log_bytes)
    if header.log_version or log.start < _MIB or log.start % _MIB or log.length % _MIB:
        raise image.damaged(f"its log of version {header.log_version} is {log.length} bytes at {log.start}")
    bat, metadata, unknown = _read_regions(image, log)
    items, unknown_items = _read_items(image, metadata)

    parameters = _item(image, metadata, items, _FILE_PARAMETERS)
    block, flags = struct.unpack("<II", parameters)
    (size,) = struct.unpack("<Q", _item(image, metadata, items, _VIRTUAL_SIZE))
    (sector,) = struct.unpack("<I", _item(image, metadata, items, _LOGICAL_SECTOR))
    if block not in _BLOCK_BYTES or block & (block - 1):
        raise image.damaged(f"its blocks have {block} bytes, not a power of two from 1 MiB to 256 MiB")
    if sector != 512:
        raise image.damaged(
            f"its logical sectors have {sector} bytes, and QEMU reads VHDX with 512 only",
            remedy="convert it on a Windows host: Convert-VHD -LogicalSectorSizeBytes 512",
        )

    blocks = -(-size // block)
    chunk = _SECTORS_PER_CHUNK * sector // block  # blocks to one sector bitmap, whose entry comes after them
    needs_parent = bool(flags & _PARENT_FLAG) or _PARENT_LOCATOR in items
    entries = -(-blocks // chunk) * (chunk + 1) if needs_parent else blocks + max(blocks - 1, 0) // chunk
    if entries * 8 > bat.length:
        raise image.damaged(f"its block table has {bat.length} bytes, too few for {size} bytes of disk")

    dirty = any(header.log_id) and header.log_bytes > 0
    disputes: tuple[str, ...] = ()
    if dirty:
        dirty, disputes = _look_into_log(image, header, metadata)
    return ImageHeader(
        name=image.name,
        format=DiskFormat.VHDX,
        subformat="differencing" if needs_parent else "fixed" if flags & _FIXED_FLAG else "dynamic",
        file_size_bytes=image.size_bytes,
        virtual_size_bytes=size // sector * sector,
        cluster_size_bytes=block,
        backing=_parent_name(image, metadata, items),
        needs_parent=needs_parent,
        dirty=dirty,
        unknown_features=(*unknown, *unknown_items),
        tables=(
            Table("the block table", bat.start, bat.length),
            Table("the metadata region", metadata.start, metadata.length),
            Table("the log", log.start, log.length),
        ),
        disputes=disputes,
    )


def _current_header(image: Source) -> _Header:
    copies: list[_Header] = []
    for offset in _HEADERS_AT:
        data = image.read(offset, _HEADER_BYTES, what="the VHDX header")
        signature, checksum, sequence, _file, _data, log_id, log_version, version, log_bytes, log_at = (
            _HEADER.unpack_from(data)
        )
        if signature == b"head" and version == 1 and checksum == _crc32c(data, without=_CHECKSUM_AT):
            copies.append(_Header(sequence, log_id, log_version, log_bytes, log_at, data[: _HEADER.size]))
    if not copies:
        raise image.damaged("neither copy of its header is valid")
    if len(copies) == 2 and copies[0].sequence == copies[1].sequence and copies[0].data != copies[1].data:
        raise image.damaged("the two copies of its header have one sequence number and differ")
    return max(copies, key=lambda copy: copy.sequence)


def _read_regions(image: Source, log: _Region) -> tuple[_Region, _Region, list[str]]:
    """The block table, the metadata, and what else is required."""
    data = image.read(_REGIONS_AT, _REGIONS_BYTES, what="the region table")
    signature, checksum, entries, _reserved = _REGIONS.unpack_from(data)
    if signature != b"regi" or entries > _MAX_REGIONS or checksum != _crc32c(data, without=_CHECKSUM_AT):
        raise image.damaged("its region table has a wrong signature or checksum")
    found: dict[UUID, _Region] = {}
    regions, unknown = [log], list[str]()
    for number in range(entries):
        raw_id, start, length, required = _REGION.unpack_from(data, _REGIONS.size + number * _REGION.size)
        region_id = UUID(bytes_le=raw_id)
        region = _Region(f"the region {region_id}", start, length)
        regions.append(region)
        if region_id in (_BAT, _METADATA_ID):
            if region_id in found:
                raise image.damaged(f"it has {region.name} twice")
            found[region_id] = region
        elif required & _REGION_REQUIRED:
            unknown.append(region.name)
    if len(found) != 2:
        raise image.damaged("its region table names no block table or no metadata")
    regions.sort(key=lambda region: region.start)
    for before, after in pairwise(regions):
        if after.start < before.end:
            raise image.damaged(f"{before.name} and {after.name} overlap")
    for region in found.values():
        if region.start < _MIB:
            raise image.damaged(f"{region.name} lies over the header")
    return found[_BAT], found[_METADATA_ID], unknown


def _read_items(image: Source, metadata: _Region) -> tuple[dict[UUID, tuple[int, int]], list[str]]:
    """Offset and length of each metadata item, and the required ones that we do not know."""
    if metadata.length < _METADATA_TABLE_BYTES:
        raise image.damaged(f"its metadata region has {metadata.length} bytes")
    data = image.read(metadata.start, _METADATA_TABLE_BYTES, what="the metadata table")
    signature, _reserved, entries = _METADATA.unpack_from(data)
    if signature != b"metadata" or entries > _MAX_ITEMS:
        raise image.damaged("its metadata table has a wrong signature")
    items: dict[UUID, tuple[int, int]] = {}
    unknown: list[str] = []
    for number in range(entries):
        raw_id, offset, length, flags = _ITEM.unpack_from(data, _METADATA.size + number * _ITEM.size)
        item_id = UUID(bytes_le=raw_id)
        if item_id not in _NEEDED_ITEMS and item_id != _PARENT_LOCATOR:
            if flags & _ITEM_REQUIRED:
                unknown.append(f"the metadata item {item_id}")
            continue
        if item_id in items:
            raise image.damaged(f"it has the metadata item {item_id} twice")
        if offset < _METADATA_TABLE_BYTES or offset + length > metadata.length:
            raise image.damaged(f"the metadata item {item_id} lies outside its region")
        items[item_id] = offset, length
    for item_id, length in _NEEDED_ITEMS.items():
        if item_id not in items or items[item_id][1] < length:
            raise image.damaged(f"the metadata item {item_id} is missing or too short")
    return items, unknown


def _item(image: Source, metadata: _Region, items: dict[UUID, tuple[int, int]], item_id: UUID) -> bytes:
    return image.read(metadata.start + items[item_id][0], _NEEDED_ITEMS[item_id], what="a metadata item")


def _parent_name(image: Source, metadata: _Region, items: dict[UUID, tuple[int, int]]) -> str | None:
    """The first of the paths that the parent locator has; only messages use it."""
    if _PARENT_LOCATOR not in items:
        return None
    offset, length = items[_PARENT_LOCATOR]
    data = image.read_up_to(metadata.start + offset, min(length, _METADATA_TABLE_BYTES))
    if len(data) < _LOCATOR.size:
        return None
    _type, _reserved, pairs = _LOCATOR.unpack_from(data)
    for number in range(pairs):
        at = _LOCATOR.size + number * _PAIR.size
        if at + _PAIR.size > len(data):
            break
        key_at, value_at, key_bytes, value_bytes = _PAIR.unpack_from(data, at)
        key = data[key_at : key_at + key_bytes].decode("utf-16-le", errors="replace")
        if key in ("relative_path", "volume_path", "absolute_win32_path"):
            return data[value_at : value_at + value_bytes].decode("utf-16-le", errors="replace")
    return None


def _look_into_log(image: Source, header: _Header, metadata: _Region) -> tuple[bool, tuple[str, ...]]:
    """Is there an entry to replay; and what it would do that we cannot allow.

    Whether QEMU finds an entry valid is not asked: each sector that may start one counts, and each 32 bytes that may
    be a descriptor. That is more than QEMU can replay, and never less.
    """
    if header.log_bytes > _MAX_LOG_BYTES:
        return True, (f"Its log of {header.log_bytes} bytes is too long to look into before QEMU replays it.",)
    log = image.read(header.log_at, header.log_bytes, what="the log")
    entries = [at for at in range(0, len(log), _LOG_SECTOR) if log[at : at + 4] == b"loge"]
    if not any(log[at + 32 : at + 48] == header.log_id for at in entries):
        return False, ()
    end = image.size_bytes + _MAX_GROWTH_BYTES
    if any(struct.unpack_from("<Q", log, at + 56)[0] > end for at in entries):
        return True, ("Its log would make the file grow by more than 1 GiB.",)
    all_zero_bytes = 0
    for at in range(0, len(log), _DESCRIPTOR.size):
        signature, _rest, zero_bytes, start, _sequence = _DESCRIPTOR.unpack_from(log, at)
        if signature == b"zero":
            all_zero_bytes += zero_bytes
            stop = start + zero_bytes
        elif signature == b"desc":
            stop = start + _LOG_SECTOR
        else:
            continue
        if stop > end or all_zero_bytes > _MAX_ZERO_BYTES:
            return True, (f"Its log writes to {start} to {stop}, and the file ends at {image.size_bytes}.",)
        if start < _MIB or (start < metadata.end and stop > metadata.start):
            return True, ("Its log rewrites the header or the metadata, so that QEMU would see others than we do.",)
    return True, ()


def _crc_table() -> tuple[int, ...]:
    table: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def _crc32c(data: bytes, *, without: int) -> int:
    """CRC-32C of `data`, with zeros for the four bytes at `without`, where the checksum itself is."""
    crc, table = 0xFFFFFFFF, _CRC_TABLE
    for byte in data[:without] + bytes(4) + data[without + 4 :]:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
