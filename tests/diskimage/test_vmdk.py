"""VMDK: the one file that it may be, and all the others that it may name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage.headers import check_safe
from utilityvm.errors import ImageDamaged, ImageUnsafe, NotSupported
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.diskimage.conftest import Bytes, Maker, Reader

CAPACITY, GRAIN, TEXT, ENTRIES, DIRECTORY, OVERHEAD, COMPRESSION = 12, 20, 28, 44, 56, 64, 77
AT_END = 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("expected", [None, DiskFormat.VMDK])
def test_a_descriptor_file_is_refused(maker: Maker, read: Reader, subformat: str, expected: DiskFormat | None) -> None:
    path = maker.create("vmdk", "3G" if subformat.startswith("two") else "8M", {"subformat": subformat})
    with pytest.raises(ImageUnsafe, match="whose disk is in other files"):
        read(path, expected)


@pytest.mark.parametrize(
    "text",
    [
        b"version=1\n",
        b"# my disk\nversion=2\n",
        b"# a\n  \n   \r\nversion=3\r\n",
        b"# Disk DescriptorFile\nversion = 9\n",
        b"COWD\1\0\0\0",
    ],
)
def test_all_that_qemu_takes_for_a_descriptor_is_refused(memory: type[Bytes], text: bytes) -> None:
    with pytest.raises(ImageUnsafe, match="whose disk is in other files"):
        memory.of(text, size=65536).read()


@pytest.mark.parametrize("text", [b"", b"version=4\n", b"x\nversion=1\n", b"# version=1\n", b"#" * 600])
def test_other_text_is_a_raw_disk(memory: type[Bytes], text: bytes) -> None:
    assert memory.of(text, size=65536).read().format is DiskFormat.RAW


def test_a_capacity_of_0_makes_qemu_open_any_file_and_is_refused(
    maker: Maker, read: Reader, seeds: dict[str, Bytes]
) -> None:
    """CVE-2022-47951, in a file that starts as a sparse VMDK."""
    secret = maker.path("secret")
    secret.write_bytes(b"secret".ljust(8192))
    image = seeds["vmdk"].copy()
    text = f'createType="monolithicFlat"\nCID=1\nparentCID=ffffffff\nRW 16 FLAT "{secret}" 0\n'.encode()
    image.put(CAPACITY, "<Q", 0).write(512, text.ljust(10240, b"\0"))
    path = image.save(maker.path("vmdk"))
    assert maker.info(path, "vmdk")["format-specific"]["data"]["extents"][0]["filename"] == os.fspath(secret)

    for expected in (None, DiskFormat.VMDK):
        with pytest.raises(ImageUnsafe, match="capacity of 0"):
            read(path, expected)


def test_a_parent_behind_the_end_of_the_text_is_seen(seeds: dict[str, Bytes]) -> None:
    image = seeds["vmdk"].copy()
    image.write(5000, b'PARENTFILENAMEHINT="/etc/passwd"')
    header = image.read()
    assert header.backing == "/etc/passwd"
    with pytest.raises(ImageUnsafe, match="differs from a parent, '/etc/passwd'"):
        check_safe(header, read_only=True)


def test_the_parent_is_the_one_that_qemu_would_open(maker: Maker, read: Reader) -> None:
    base = maker.create("vmdk", "8M")
    child = maker.path("vmdk")
    maker.run("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", child)
    assert read(child).backing == maker.info(child, "vmdk")["backing-filename"]
    with pytest.raises(ImageUnsafe, match="differs from a parent"):
        check_safe(read(child), read_only=True, allow_backing=True)


def stream(seeds: dict[str, Bytes], *, capacity: int | None = None) -> Bytes:
    """A stream as VMware writes it: the grain directory's place is in a footer, behind the grains."""
    image = seeds["vmdk-stream"].copy()
    footer = bytearray(image.get(0, 512))
    if capacity is not None:
        footer[CAPACITY : CAPACITY + 8] = capacity.to_bytes(8, "little")
    end = image.size
    image.put(DIRECTORY, "<Q", AT_END)
    image.put(end, "<QII", 1, 0, 3).write(end + 512, bytes(footer))
    image.write(end + 1024, bytes(512))
    return image


def test_the_footer_of_a_stream_counts(maker: Maker, read: Reader, seeds: dict[str, Bytes]) -> None:
    path = stream(seeds).save(maker.path("vmdk"))
    header = read(path)
    assert header.virtual_size_bytes == maker.info(path, "vmdk")["virtual-size"] == 16 << 20
    check_safe(header, read_only=True)
    with pytest.raises(NotSupported, match="streamOptimized"):
        check_safe(header, read_only=False)


def test_a_footer_with_another_size_is_disputed(maker: Maker, read: Reader, seeds: dict[str, Bytes]) -> None:
    path = stream(seeds, capacity=2048).save(maker.path("vmdk"))
    header = read(path)
    assert header.virtual_size_bytes == maker.info(path, "vmdk")["virtual-size"] == 1 << 20
    with pytest.raises(ImageUnsafe, match="disagree about its capacity"):
        check_safe(header, read_only=True)


@pytest.mark.parametrize("at", [8, 12, 512, 1024])
def test_a_stream_without_a_whole_footer_is_damaged(seeds: dict[str, Bytes], at: int) -> None:
    image = stream(seeds)
    image.put(image.size - 1536 + at, "<I", 9)
    with pytest.raises(ImageDamaged, match="does not end in a footer"):
        image.read()


DAMAGES: dict[str, Callable[[Bytes], object]] = {
    "version 4": lambda image: image.put(4, "<I", 4),
    "capacity is 4294967297": lambda image: image.put(CAPACITY, "<Q", (1 << 32) + 1),
    "grains of 0 sectors": lambda image: image.put(GRAIN, "<Q", 0),
    "grains of 96 sectors": lambda image: image.put(GRAIN, "<Q", 96),
    "grains of 4194304 sectors": lambda image: image.put(GRAIN, "<Q", 1 << 22),
    "and 0 to a table": lambda image: image.put(ENTRIES, "<I", 0),
    "and 513 to a table": lambda image: image.put(ENTRIES, "<I", 513),
    "compression 2": lambda image: image.put(COMPRESSION, "<H", 2),
    "first grain is at": lambda image: image.put(OVERHEAD, "<Q", 1 << 20),
    "20 sectors at 2": lambda image: image.put(TEXT, "<Q", 2),
    "21 sectors at 1": lambda image: image.put(TEXT + 8, "<Q", 21),
    "no content ids": lambda image: image.write(512, bytes(10240)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_impossible_header_is_damaged(seeds: dict[str, Bytes], message: str) -> None:
    image = seeds["vmdk"].copy()
    DAMAGES[message](image)
    with pytest.raises(ImageDamaged) as refused:
        image.read()
    assert message in str(refused.value)


def test_both_copies_of_the_grain_directory_are_loaded(seeds: dict[str, Bytes]) -> None:
    image = seeds["vmdk"].copy()
    assert [table.offset for table in image.read().tables] == [26 * 512, 21 * 512]
    image.put(48, "<Q", 1 << 30)
    with pytest.raises(ImageDamaged, match="the grain directory's copy ends at"):
        check_safe(image.read(), read_only=True)
    image.put(8, "<I", 1)  # says that there is no copy
    check_safe(image.read(), read_only=True)


def test_a_crlf_descriptor_is_read(seeds: dict[str, Bytes]) -> None:
    image = seeds["vmdk"].copy()
    image.write(512, image.get(512, 1024).rstrip(b"\0").replace(b"\n", b"\r\n"))
    check_safe(image.read(), read_only=False)
