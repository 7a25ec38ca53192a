"""Raw disk images for tests: file systems of every kind with files in them, partition tables, hash trees."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import UUID, uuid5

from utilityvm.machine.programs import find_program, run
from utilityvm.testing.images import ext4_image

MIB = 1 << 20
_SECTOR = 512
_LINUX_DATA = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")  # GPT's type of a Linux file system
_ENTRIES, _ENTRY_BYTES = 128, 128


def filesystem_image(kind: str, path: Path, files: Mapping[str, str]) -> Path:
    """Make a file system of `kind` at `path` with `files` (path to text). A vfat comes empty."""
    if kind == "ext4":
        return ext4_image(path, files)
    tree = path.with_name(path.name + ".tree")
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    try:
        match kind:
            case "xfs":
                proto = path.with_name(path.name + ".proto")
                proto.write_text(f"/\n0 0\nd--755 0 0\n{_xfs_lines(tree)}$\n")
                blank(path, 300)
                run([find_program("mkfs.xfs", package="xfsprogs"), "-q", "-p", proto, path])
            case "btrfs":
                blank(path, 128)
                run([find_program("mkfs.btrfs", package="btrfs-progs"), "-q", "--rootdir", tree, path])
            case "erofs":
                run([find_program("mkfs.erofs", package="erofs-utils"), path, tree])
            case "squashfs":
                run([find_program("mksquashfs", package="squashfs-tools"), tree, path, "-quiet", "-no-progress"])
            case "vfat":
                run([find_program("mkfs.vfat", package="dosfstools"), blank(path, 4)])
            case _:
                raise ValueError(kind)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return path


def _xfs_lines(folder: Path) -> str:
    lines = ""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            lines += f"{entry.name} d--755 0 0\n{_xfs_lines(entry)}$\n"
        else:
            lines += f"{entry.name} ---644 0 0 {entry}\n"
    return lines


def blank(path: Path, size_mib: int) -> Path:
    """Make an image of zeros."""
    with path.open("wb") as image:
        image.truncate(size_mib * MIB)
    return path


def mbr_disk(path: Path, parts: Sequence[Path]) -> Path:
    """Put `parts` (at most four) on a disk with an MBR."""
    starts, _ = _lay_out(path, parts)
    entries = b"".join(
        struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start, part.stat().st_size // _SECTOR)
        for start, part in zip(starts, parts, strict=True)
    )
    _write(path, 0, b"\0" * 440 + struct.pack("<IH", 0x7574696C, 0) + entries.ljust(64, b"\0") + b"\x55\xaa")
    return path


def gpt_disk(path: Path, parts: Sequence[Path]) -> Path:
    """Put `parts` on a disk with a GPT, its protective MBR and its copy at the end."""
    starts, size = _lay_out(path, parts)
    last = size // _SECTOR - 1
    table = b"".join(
        struct.pack(
            "<16s16sQQQ72s",
            _LINUX_DATA.bytes_le,
            uuid5(_LINUX_DATA, str(part)).bytes_le,
            start,
            start + part.stat().st_size // _SECTOR - 1,
            0,
            part.stem[:36].encode("utf-16-le"),
        )
        for start, part in zip(starts, parts, strict=True)
    ).ljust(_ENTRIES * _ENTRY_BYTES, b"\0")
    table_sectors = len(table) // _SECTOR
    _write(path, 446, struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF)))
    _write(path, 510, b"\x55\xaa")
    for here, other, entries in ((1, last, 2), (last, 1, last - table_sectors)):

        def header(checksum: int, here: int = here, other: int = other, entries: int = entries) -> bytes:
            first, end = 2 + table_sectors, last - table_sectors - 1
            return struct.pack(
                "<8sIIIIQQQQ16sQIII",
                b"EFI PART",
                0x10000,
                92,
                checksum,
                0,
                here,
                other,
                first,
                end,
                uuid5(_LINUX_DATA, str(path)).bytes_le,
                entries,
                _ENTRIES,
                _ENTRY_BYTES,
                zlib.crc32(table),
            )

        _write(path, entries * _SECTOR, table)
        _write(path, here * _SECTOR, header(zlib.crc32(header(0))))
    return path


def _lay_out(path: Path, parts: Sequence[Path]) -> tuple[list[int], int]:
    """Copy the parts to whole MiBs of a new disk; where each starts, in sectors, and the disk's size in bytes."""
    starts, offset = [], MIB
    for part in parts:
        starts.append(offset // _SECTOR)
        offset += -(-part.stat().st_size // MIB) * MIB
    blank(path, offset // MIB + 1)
    with path.open("r+b") as disk:
        for start, part in zip(starts, parts, strict=True):
            disk.seek(start * _SECTOR)
            disk.write(part.read_bytes())
    return starts, offset + MIB


def add_hash_tree(image: Path, *options: str) -> tuple[bytes, int]:
    """Append a dm-verity tree to the image; gives the root hash and where the tree begins."""
    size = image.stat().st_size
    veritysetup = find_program("veritysetup", package="cryptsetup-bin")
    said = run([veritysetup, "format", image, image, "--hash-offset", str(size), *options]).decode()
    found = re.search(r"Root hash:\s*([0-9a-f]+)", said)
    assert found, said
    return bytes.fromhex(found[1]), size


def _write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(data)


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte."""
    with path.open("r+b") as image:
        image.seek(offset)
        (byte,) = image.read(1)
        image.seek(offset)
        image.write(bytes([byte ^ 0xFF]))


def digest(path: Path) -> str:
    """The hash of all that the image holds; changes with any byte."""
    with path.open("rb") as image:
        return hashlib.file_digest(image, "sha256").hexdigest()


def copy_sparse(source: Path, target: Path) -> Path:
    """Copy an image with its holes, also one that a VM just writes to."""
    with source.open("rb") as image, target.open("wb") as copy:
        size = image.seek(0, os.SEEK_END)
        end = 0
        while end < size:
            try:
                begin = os.lseek(image.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            end = os.lseek(image.fileno(), begin, os.SEEK_HOLE)
            image.seek(begin)
            copy.seek(begin)
            copy.write(image.read(end - begin))
        copy.truncate(size)
    return target
