"""The header of a qcow2 image, versions 2 and 3, read as QEMU reads it.

All numbers are big-endian. Behind the header (72 bytes in version 2, `header_length` in version 3) come
extensions, up to the backing file's name or the end of the first cluster. What makes QEMU open another file is the
backing file's name in the header, and the data file: incompatible feature bit 2, with its name in an extension.

Source: QEMU docs/interop/qcow2.txt; block/qcow2.c, qcow2_do_open and qcow2_read_extensions.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from utilityvm.diskimage.image_header import ImageHeader, Table
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.scsi.ports import DiskFormat

MAGIC: Final = b"QFI\xfb"

# magic, version, backing file offset and size, cluster bits, size, encryption, L1 size and offset,
# refcount table offset and clusters, snapshots and their offset
_HEADER_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
# incompatible, compatible and autoclear features, refcount order, header length
_HEADER_V3: Final = struct.Struct(">QQQII")
_V3_LENGTH: Final = _HEADER_V2.size + _HEADER_V3.size
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")  # number, reserved, size and offset of the directory
_BITMAP: Final = struct.Struct(">QIIBBHI")  # table offset, its entries, flags, type, granularity bits, name, extra

_CLUSTER_BITS: Final = range(9, 22)  # 512 bytes to 2 MiB
_MAX_NAME_BYTES: Final = 1023
_MAX_FORMAT_BYTES: Final = 15
_MAX_DATA_FILE_BYTES: Final = 4096
_MAX_BITMAP_DIRECTORY_BYTES: Final = 1 << 20
_SNAPSHOT_BYTES: Final = 40  # at least; each has its name behind it

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = range(5)
_INCOMPATIBLE: Final = {
    _DIRTY: "dirty",
    _CORRUPT: "corrupt",
    _DATA_FILE: "data file",
    _COMPRESSION: "zstd",
    _EXTENDED_L2: "extended L2",
}
_COMPATIBLE: Final = {0: "lazy refcounts"}
_AUTOCLEAR: Final = {0: "bitmaps", 1: "raw data file"}
_ENCRYPTION: Final = {1: "AES", 2: "LUKS"}

_EXTENSION_END: Final = 0
_EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
_EXTENSION_BITMAPS: Final = 0x23852875
_EXTENSION_DATA_FILE: Final = 0x44415441


def read(image: Source) -> ImageHeader:
    """The header of a file that starts with the magic.

    Raises:
        ImageDamaged: cut short, impossible, or of a version that we do not read.
    """
    (
        _magic, version, backing_at, backing_bytes, cluster_bits, size, encryption,
        l1_entries, l1_at, refcount_at, refcount_clusters, snapshots, snapshots_at,
    ) = _HEADER_V2.unpack(image.read(0, _HEADER_V2.size, what="the qcow2 header"))  # fmt: skip
    if version not in (2, 3):
        raise image.damaged(
            f"it is qcow version {version}, and versions 2 and 3 are read",
            remedy="convert it: qemu-img convert -f qcow -O qcow2" if version == 1 else "restore it from a good copy",
        )
    if cluster_bits not in _CLUSTER_BITS:
        raise image.damaged(f"its clusters have 2^{cluster_bits} bytes, not 2^9 to 2^21")
    cluster = 1 << cluster_bits

    incompatible = compatible = autoclear = 0
    header_bytes, refcount_order, compression = _HEADER_V2.size, 4, 0
    if version == 3:
        incompatible, compatible, autoclear, refcount_order, header_bytes = _HEADER_V3.unpack(
            image.read(_HEADER_V2.size, _HEADER_V3.size, what="the qcow2 header")
        )
        if not _V3_LENGTH <= header_bytes <= cluster:
            raise image.damaged(f"its header has {header_bytes} bytes, not {_V3_LENGTH} to {cluster}")
        if header_bytes > _V3_LENGTH:
            compression = image.read(_V3_LENGTH, 1, what="the compression type")[0]
    if refcount_order > 6:
        raise image.damaged(f"its reference counts have 2^{refcount_order} bits, not 1 to 64")
    if compression > 1 or (compression == 1) != bool(incompatible >> _COMPRESSION & 1):
        raise image.damaged(f"its compression type {compression} does not fit its feature bits")
    extended_l2 = bool(incompatible >> _EXTENDED_L2 & 1)
    if extended_l2 and cluster_bits < 14:
        raise image.damaged(f"extended L2 entries need clusters of 16 KiB or more, and it has {cluster} bytes")

    if backing_at > cluster:
        raise image.damaged("its backing file's name is outside the first cluster")
    extensions = _read_extensions(image, header_bytes, backing_at or cluster)
    backing = _read_backing_name(image, backing_at, backing_bytes, cluster) if backing_at else None

    tables = [
        Table("the L1 table", l1_at, l1_entries * 8),
        Table("the refcount table", refcount_at, refcount_clusters * cluster),
        Table("the snapshot table", snapshots_at, snapshots * _SNAPSHOT_BYTES),
    ]
    if not refcount_clusters:
        raise image.damaged("it has no refcount table")
    l2_covers = cluster * (cluster // (16 if extended_l2 else 8))
    if l1_entries < -(-size // l2_covers):
        raise image.damaged(f"its L1 table has {l1_entries} entries, too few for {size} bytes")

    memory_bytes = 0
    if incompatible >> _DIRTY & 1:  # QEMU counts the references to each cluster of the file, in an array
        memory_bytes = (image.size_bytes // cluster << refcount_order) // 8
    if autoclear & 1 and _EXTENSION_BITMAPS in extensions:
        directory, bitmap_bytes = _read_bitmaps(image, extensions[_EXTENSION_BITMAPS], size)
        tables.append(directory)
        memory_bytes += bitmap_bytes
    tables = [table for table in tables if table.size_bytes]
    for table in tables:
        if table.offset % cluster or not table.offset:
            raise image.damaged(f"{table.name} is at {table.offset}, not on a cluster behind the header")

    data_file = None
    if _EXTENSION_DATA_FILE in extensions:
        data_file = _name(image, extensions[_EXTENSION_DATA_FILE], "data file")
    elif incompatible >> _DATA_FILE & 1 or autoclear >> 1 & 1:
        data_file = ""
    backing_format = extensions.get(_EXTENSION_BACKING_FORMAT)
    return ImageHeader(
        name=image.name,
        format=DiskFormat.QCOW2,
        subformat=f"v{version}",
        file_size_bytes=image.size_bytes,
        virtual_size_bytes=size // SECTOR * SECTOR,
        cluster_size_bytes=cluster,
        backing=backing,
        backing_format=_name(image, backing_format, "backing format") if backing_format else None,
        data_file=data_file,
        dirty=bool(incompatible >> _DIRTY & 1),
        corrupt=bool(incompatible >> _CORRUPT & 1),
        encryption=_ENCRYPTION.get(encryption, f"method {encryption}") if encryption else None,
        features=_names(incompatible, _INCOMPATIBLE) | _names(compatible, _COMPATIBLE) | _names(autoclear, _AUTOCLEAR),
        unknown_features=tuple(
            f"incompatible feature bit {bit}"
            for bit in range(64)
            if incompatible >> bit & 1 and bit not in _INCOMPATIBLE
        ),
        tables=tuple(tables),
        snapshots=snapshots,
        memory_bytes=memory_bytes,
    )


def _names(bits: int, known: dict[int, str]) -> frozenset[str]:
    return frozenset(name for bit, name in known.items() if bits >> bit & 1)


def _read_extensions(image: Source, offset: int, end: int) -> dict[int, bytes]:
    """Those that we use, by magic. QEMU lets a later one of the same magic replace an earlier one, and so do we."""
    limits = {
        _EXTENSION_BACKING_FORMAT: _MAX_FORMAT_BYTES,
        _EXTENSION_DATA_FILE: _MAX_DATA_FILE_BYTES,
        _EXTENSION_BITMAPS: _BITMAPS.size,
    }
    area = image.read_up_to(offset, end - offset)  # a cluster at most; behind the end of the file QEMU reads zeros
    found: dict[int, bytes] = {}
    at = 0
    while at < end - offset:
        magic, length = _EXTENSION.unpack(area[at : at + _EXTENSION.size].ljust(_EXTENSION.size, b"\0"))
        at += _EXTENSION.size
        if length > end - offset - at:
            raise image.damaged(f"the header extension {magic:#x} of {length} bytes does not fit the header")
        if magic == _EXTENSION_END:
            break
        if magic in limits:
            data = area[at : at + length]
            if length > limits[magic] or len(data) < length:
                raise image.damaged(f"the header extension {magic:#x} has {length} bytes")
            found[magic] = data
        at += -(-length // 8) * 8
    return found


def _read_backing_name(image: Source, offset: int, length: int, cluster: int) -> str | None:
    if length > min(_MAX_NAME_BYTES, cluster - offset):
        raise image.damaged(f"its backing file's name has {length} bytes")
    return _name(image, image.read(offset, length, what="the backing file's name"), "backing file") or None


def _name(image: Source, data: bytes, what: str) -> str:
    if b"\0" in data:  # QEMU would take what is before it, others the whole
        raise image.unsafe(f"the name of its {what} holds a NUL byte", remedy="use an image that qemu-img made")
    return os.fsdecode(data)


def _read_bitmaps(image: Source, extension: bytes, size: int) -> tuple[Table, int]:
    """Where the directory of the dirty bitmaps is, and how much memory QEMU needs for all of them."""
    if len(extension) != _BITMAPS.size:
        raise image.damaged(f"its bitmaps extension has {len(extension)} bytes, not {_BITMAPS.size}")
    number, _reserved, directory_bytes, directory_at = _BITMAPS.unpack(extension)
    if not number or directory_bytes > _MAX_BITMAP_DIRECTORY_BYTES:
        raise image.damaged(
            f"its directory of {number} dirty bitmaps has {directory_bytes} bytes",
            remedy="remove them: qemu-img bitmap --remove",
        )
    directory = image.read(directory_at, directory_bytes, what="the directory of dirty bitmaps")
    memory_bytes = at = 0
    while at < len(directory):
        if len(directory) - at < _BITMAP.size:
            raise image.damaged("its directory of dirty bitmaps ends in the middle of an entry")
        _at, entries, _flags, _type, granularity, name_bytes, extra_bytes = _BITMAP.unpack_from(directory, at)
        if not 9 <= granularity <= 31:
            raise image.damaged(f"a dirty bitmap of it has a granularity of 2^{granularity} bytes, not 2^9 to 2^31")
        memory_bytes += (size >> granularity >> 3) + entries * 8
        at += -(-(_BITMAP.size + name_bytes + extra_bytes) // 8) * 8
    return Table("the directory of dirty bitmaps", directory_at, directory_bytes), memory_bytes
