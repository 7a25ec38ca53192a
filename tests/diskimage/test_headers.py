"""Format and size, for all that qemu-img makes, against what qemu-img says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage import headers
from utilityvm.errors import ConfigDiffers, ImageDamaged, ImageUnsafe, InvalidRequest
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Bytes, Maker, Reader

MADE = [
    ("raw", "10M", {}),
    ("raw", "1000", {}),
    ("qcow2", "64M", {}),
    ("qcow2", "1G", {"compat": "0.10"}),
    ("qcow2", "1G", {"compat": "1.1", "lazy_refcounts": "on"}),
    ("qcow2", "20M", {"cluster_size": "512"}),
    ("qcow2", "8T", {"cluster_size": "2M"}),
    ("qcow2", "64M", {"extended_l2": "on"}),
    ("qcow2", "64M", {"extended_l2": "on", "cluster_size": "16k"}),
    ("qcow2", "64M", {"compression_type": "zstd"}),
    ("qcow2", "64M", {"refcount_bits": "1"}),
    ("qcow2", "64M", {"refcount_bits": "64"}),
    ("qcow2", "64M", {"preallocation": "metadata"}),
    ("qcow2", "1000", {}),
    ("vpc", "64M", {}),
    ("vpc", "64M", {"force_size": "on"}),
    ("vpc", "12345678", {"subformat": "dynamic"}),
    ("vpc", "12345856", {"subformat": "fixed", "force_size": "on"}),
    ("vpc", "12345678", {"subformat": "fixed"}),
    ("vpc", "2040G", {"force_size": "on"}),
    ("vhdx", "64M", {}),
    ("vhdx", "3M", {"subformat": "fixed"}),
    ("vhdx", "100G", {"block_size": "1M"}),
    ("vhdx", "64T", {"block_size": "256M"}),
    ("vhdx", "1G", {"log_size": "4M"}),
    ("vmdk", "64M", {}),
    ("vmdk", "64M", {"subformat": "streamOptimized"}),
    ("vmdk", "2T", {"subformat": "monolithicSparse", "zeroed_grain": "on"}),
]


@pytest.mark.parametrize(("format", "size", "options"), MADE)
def test_format_and_sizes_are_what_qemu_says(
    maker: Maker, read: Reader, format: str, size: str, options: dict[str, str]
) -> None:
    path = maker.create(format, size, options)
    told = maker.info(path, format)

    header = read(path)

    assert header.format == told["format"]
    assert header.virtual_size_bytes == told["virtual-size"]
    assert header.cluster_size_bytes == told.get("cluster-size")
    assert header.backing is None
    assert not header.dirty
    headers.check_safe(header, read_only=True)


@pytest.mark.parametrize("format", [format for format in DiskFormat if format is not DiskFormat.RAW])
def test_the_expected_format_is_accepted(maker: Maker, read: Reader, format: DiskFormat) -> None:
    assert read(maker.create(format.value), format).format is format


@pytest.mark.parametrize("expected", list(DiskFormat))
@pytest.mark.parametrize("format", list(DiskFormat))
def test_another_expected_format_is_refused_except_raw(
    maker: Maker, read: Reader, format: DiskFormat, expected: DiskFormat | None
) -> None:
    path = maker.create(format.value)
    if expected in (format, DiskFormat.RAW):
        assert read(path, expected).format is expected
    else:
        with pytest.raises(ConfigDiffers, match=f"asked for as {expected}, and its header says {format}"):
            read(path, expected)


def test_a_raw_disk_stays_raw_whatever_its_guest_wrote_into_it(maker: Maker, read: Reader) -> None:
    """CVE-2008-2004."""
    secret = maker.create("qcow2")
    path = maker.path("raw")
    path.write_bytes(maker.create("qcow2", backing=secret).read_bytes())

    header = read(path, DiskFormat.RAW)

    assert (header.format, header.backing) == (DiskFormat.RAW, None)
    assert header.virtual_size_bytes == maker.info(path, "raw")["virtual-size"]
    headers.check_safe(header, read_only=False)


def test_a_fixed_vhd_stays_one_whatever_its_guest_wrote_into_it(maker: Maker, read: Reader) -> None:
    path = maker.create("vpc", "1M", {"subformat": "fixed", "force_size": "on"})
    with path.open("r+b") as file:
        file.write(maker.create("qcow2").read_bytes()[:512])

    with pytest.raises(ImageUnsafe, match="starts as qcow2 and ends as a fixed vpc"):
        read(path)
    header = read(path, DiskFormat.VHD)

    assert (header.format, header.virtual_size_bytes) == (DiskFormat.VHD, 1 << 20)


def test_what_ends_in_a_wrong_vhd_footer_is_damaged_unless_it_is_said_to_be_raw(memory: type[Bytes]) -> None:
    image = memory.of(b"conectix".ljust(512, b"\0"), at=1 << 20)
    with pytest.raises(ImageDamaged, match="the footer has a wrong checksum") as refused:
        image.read()
    assert "give the format raw" in (refused.value.remedy or "")
    assert image.read(DiskFormat.RAW).format is DiskFormat.RAW


@pytest.mark.parametrize("expected", [None, DiskFormat.RAW, DiskFormat.QCOW2])
def test_an_empty_file_is_damaged(memory: type[Bytes], expected: DiskFormat | None) -> None:
    with pytest.raises(ImageDamaged, match="empty"):
        memory(0).read(expected)


@pytest.mark.parametrize("kind", ["qcow2", "qcow2-v2", "vpc-dynamic", "vpc-fixed", "vhdx", "vmdk", "vmdk-stream"])
@pytest.mark.parametrize("keep", [1, 3, 4, 8, 71, 72, 100, 511, 512, 513, 1024, 70000])
def test_an_image_cut_short_is_damaged_or_raw(seeds: dict[str, Bytes], kind: str, keep: int) -> None:
    """Cut before the magic is whole, or with the footer of a fixed VHD lost, nothing tells it from a raw disk."""
    image = seeds[kind].copy()
    image.size = min(keep, image.size - 512)
    format = DiskFormat(kind.split("-")[0])
    try:
        header = image.read()
        headers.check_safe(header, read_only=False)
    except (ImageDamaged, ImageUnsafe):
        return
    assert header.format is DiskFormat.RAW
    assert keep < 8 or kind == "vpc-fixed"
    with pytest.raises((ImageDamaged, ConfigDiffers)):
        image.read(format)


def test_the_file_position_is_left_alone(maker: Maker) -> None:
    path = maker.create("qcow2")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.lseek(fd, 17, os.SEEK_SET)
        headers.read(fd, name=str(path))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 17
    finally:
        os.close(fd)


def test_neither_file_nor_block_device_is_refused(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for fd in (read_end, folder):
            with pytest.raises(InvalidRequest, match="neither a file nor a block device"):
                headers.read(fd, name="it")
    finally:
        for fd in (read_end, write_end, folder):
            os.close(fd)


def test_storage_that_fails_is_an_image_error(maker: Maker) -> None:
    fd = os.open(maker.create("qcow2"), os.O_WRONLY)
    try:
        with pytest.raises(ImageDamaged, match="cannot be read: Bad file descriptor"):
            headers.read(fd, name="it")
    finally:
        os.close(fd)


def test_every_refusal_names_the_image_and_a_remedy(memory: type[Bytes]) -> None:
    with pytest.raises(ImageDamaged) as refused:
        memory.of(b"QFI\xfb\0\0\0\1", size=4096).read()
    assert str(refused.value).startswith("image: ")
    assert refused.value.host_path == Path("image")
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("format", "options"),
    [
        (DiskFormat.QCOW2, {"driver": "qcow2", "backing": None}),
        (DiskFormat.VMDK, {"driver": "vmdk", "backing": None}),
        (DiskFormat.VHDX, {"driver": "vhdx"}),
        (DiskFormat.VHD, {"driver": "vpc"}),
        (DiskFormat.RAW, {"driver": "raw"}),
    ],
)
def test_qemu_is_told_the_driver_and_to_follow_no_backing_name(
    maker: Maker, read: Reader, format: DiskFormat, options: dict[str, object]
) -> None:
    assert headers.driver_options(read(maker.create(format.value))) == options
