"""What people have in place of a disk is told by its name, and taken for a raw disk only by who says so."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage import headers
from utilityvm.diskimage.source import Source
from utilityvm.errors import ImageDamaged, ImageError
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Bytes, Maker, Reader

DISK = b"\xeb\x58\x90mkfs.fat" + bytes(1 << 20)


def read_bytes(data: bytes, expected: DiskFormat | None = None, *, name: str = "image") -> headers.ImageHeader:
    source = Source(lambda length, offset: data[offset : offset + length], size_bytes=len(data), name=name)
    return headers.read_source(source, expected=expected)


def tar(format: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=format) as archive:
        member = tarfile.TarInfo("disk.vmdk")
        member.size = len(DISK)
        archive.addfile(member, io.BytesIO(DISK))
    return made.getvalue()


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("disk.img", DISK)
    return made.getvalue()


def by_tool(*command: str) -> Callable[[], bytes]:
    def make() -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is missing")
        return subprocess.run(command, input=DISK, stdout=subprocess.PIPE, check=True).stdout

    return make


MADE: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip": (lambda: gzip.compress(DISK), "compressed (gzip)"),
    "bzip2": (lambda: bz2.compress(DISK), "compressed (bzip2)"),
    "bzip2 of nothing": (lambda: bz2.compress(b""), "compressed (bzip2)"),
    "xz": (lambda: lzma.compress(DISK), "compressed (xz)"),
    "lzma": (lambda: lzma.compress(DISK, lzma.FORMAT_ALONE), "compressed (lzma)"),
    "zstd": (by_tool("zstd", "-qc"), "compressed (zstd)"),
    "lz4": (by_tool("lz4", "-qc"), "compressed (lz4)"),
    "tar": (lambda: tar(tarfile.USTAR_FORMAT), "a tar archive"),
    "tar of GNU": (lambda: tar(tarfile.GNU_FORMAT), "a tar archive"),
    "tar of POSIX": (lambda: tar(tarfile.PAX_FORMAT), "a tar archive"),
    "zip": (zipped, "a zip archive"),
    "cpio": (lambda: b"\xc7\x71" + DISK, "a cpio archive"),
    "cabinet": (lambda: b"MSCF\0\0\0\0" + DISK, "a cabinet"),
    "snappy": (lambda: b"\xff\x06\0\0sNaPpY" + DISK, "compressed (snappy)"),
    "E01": (lambda: b"EVF\x09\x0d\x0a\xff\x00" + DISK, "an Expert Witness image (E01)"),
    "dmg": (lambda: DISK + struct.pack(">4sII", b"koly", 4, 512).ljust(512, b"\0"), "an Apple disk image (dmg)"),
    "cloop": (lambda: b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop" + DISK, "a cloop image"),
    "seSparse": (lambda: struct.pack("<QQ", 0xCAFEBABE, 0x200000001) + DISK, "an ESX sparse extent"),
    "QED": (lambda: b"QED\0" + DISK, "a QED image"),
    "VDI": (lambda: b"<<< Oracle VM VirtualBox Disk Image >>>".ljust(64) + b"\x7f\x10\xda\xbe" + DISK, "VDI"),
    "Parallels": (lambda: b"WithoutFreeSpace" + DISK, "a Parallels image"),
    "Bochs": (lambda: b"Bochs Virtual HD Image" + DISK, "a Bochs image"),
    "WIM": (lambda: b"MSWIM\0\0\0" + DISK, "a Windows image"),
    "HTML": (lambda: b"\n <!DOCTYPE html><title>404</title>" + DISK, "a web page"),
    "XML": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?>" + DISK, "a web page or an XML document"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_no_disk_is_refused_by_what_it_is_unless_raw_is_stated(kind: str) -> None:
    make, title = MADE[kind]
    data = make()
    for name in ("image", "disk.img", "disk.raw"):
        with pytest.raises(ImageDamaged) as refused:
            read_bytes(data, name=name)
        assert title in str(refused.value)
        assert refused.value.remedy
    assert read_bytes(data, DiskFormat.RAW).format is DiskFormat.RAW


@pytest.mark.parametrize(
    "start",
    [b"", b"\0", b"BZh9 is not bzip2", b"\x5d\x00\x00", b"\x50\x2a\x4d\x18", b"BZh", b"#!/bin/sh\n"],
)
def test_what_only_begins_alike_is_a_raw_disk(memory: type[Bytes], start: bytes) -> None:
    assert memory.of(start, size=1 << 20).read().format is DiskFormat.RAW


def test_a_boot_sector_with_text_where_tar_has_its_checksum_is_a_raw_disk() -> None:
    data = bytearray(DISK)
    data[148:156] = b"0012345\0"
    assert read_bytes(bytes(data)).format is DiskFormat.RAW


PROMISES = [
    ("disk.qcow2", "a qcow2 image"),
    ("disk.QCOW2", "a qcow2 image"),
    ("disk.vhd", "a vpc image"),
    ("disk.vhdx", "a vhdx image"),
    ("disk.vmdk", "a vmdk image"),
    ("disk.vdi", "a VirtualBox VDI image"),
    ("disk.qed", "a QED image"),
    ("/srv/a.b/disk.raw.gz", "compressed"),
    ("disk.ova", "a tar archive"),
    ("disk.E01", "an Expert Witness image"),
    ("disk.dmg", "an Apple disk image"),
    ("disk.zip", "a zip archive"),
]


@pytest.mark.parametrize(("name", "said"), PROMISES)
def test_a_name_that_promises_an_image_is_no_raw_disk_unless_raw_is_stated(name: str, said: str) -> None:
    with pytest.raises(ImageDamaged, match=f"its name says that it is {said}.*, and its bytes say no format"):
        read_bytes(DISK, name=name)
    assert read_bytes(DISK, DiskFormat.RAW, name=name).format is DiskFormat.RAW


@pytest.mark.parametrize("name", ["disk", "disk.img", "disk.bin", "disk.raw", "disk.iso", "disk.001", "disk-flat.vmdk"])
def test_other_names_are_raw_disks(name: str) -> None:
    assert read_bytes(DISK, name=name).format is DiskFormat.RAW


@pytest.mark.parametrize("format", [format for format in DiskFormat if format is not DiskFormat.RAW])
@pytest.mark.parametrize("suffix", ["raw", "iso", "qcow2", "vhd", "vhdx", "vmdk", "vdi", "img"])
def test_a_name_and_bytes_that_say_different_formats_are_refused(
    maker: Maker, read: Reader, format: DiskFormat, suffix: str
) -> None:
    path = maker.create(format.value).rename(maker.path(suffix))
    if suffix in ("img", "vhd" if format is DiskFormat.VHD else format.value):
        assert read(path).format is format
        return
    with pytest.raises(ImageDamaged, match=f"its name says .*, and its bytes say a {format} image"):
        read(path)
    assert read(path, format).format is format


@pytest.mark.parametrize("length", [-100_000, -4096, -513, -512, 513, 4096, 65536, 100_000])
def test_a_fixed_vhd_that_was_cut_or_padded_is_no_raw_disk(
    seeds: dict[str, Bytes], length: int, tmp_path: Path
) -> None:
    whole = seeds["vpc-fixed"].save(tmp_path / "whole").read_bytes()
    data = whole[:length] if length < 0 else whole + bytes(length)
    with pytest.raises(ImageError) as refused:
        read_bytes(data, name="disk.vhd")
    if 512 < length <= 65536:
        assert f"{length} bytes are behind that" in str(refused.value)


@pytest.mark.parametrize("length", [1, 512, 4096])
def test_a_padded_vhd_is_no_raw_disk_whatever_it_is_called_unless_raw_is_stated(
    seeds: dict[str, Bytes], length: int, tmp_path: Path
) -> None:
    data = seeds["vpc-fixed"].save(tmp_path / "whole").read_bytes() + bytes(length)
    with pytest.raises(ImageDamaged, match=f"{length} bytes are behind the one in it") as refused:
        read_bytes(data, name="disk.img")
    assert refused.value.remedy
    for name, stated in (("disk.img", DiskFormat.RAW), ("disk.raw", None)):
        assert read_bytes(data, stated, name=name).format is DiskFormat.RAW
