"""qcow2 headers field by field, and the places where readers were led astray before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage.headers import check_safe
from utilityvm.errors import ImageDamaged, ImageUnsafe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.diskimage.conftest import Bytes, Maker, Reader

DAMAGES: dict[str, Callable[[Bytes], object]] = {
    "version 1": lambda image: image.put(4, ">I", 1),
    "version 4": lambda image: image.put(4, ">I", 4),
    "2^8 bytes": lambda image: image.put(20, ">I", 8),
    "2^22 bytes": lambda image: image.put(20, ">I", 22),
    "header has 103 bytes": lambda image: image.put(100, ">I", 103),
    "header has 65537 bytes": lambda image: image.put(100, ">I", 65537),
    "2^7 bits": lambda image: image.put(96, ">I", 7),
    "compression type 2": lambda image: image.put(104, ">B", 2).put(72, ">Q", 8),
    "compression type 1": lambda image: image.put(104, ">B", 1),
    "compression type 0": lambda image: image.put(72, ">Q", 8),
    "extended L2 entries need": lambda image: image.put(72, ">Q", 16).put(20, ">I", 13),
    "outside the first cluster": lambda image: image.put(8, ">Q", 65537),
    "name has 1024 bytes": lambda image: image.put(8, ">QI", 1000, 1024),
    "name has 37 bytes": lambda image: image.put(8, ">QI", 65500, 37),
    "does not fit the header": lambda image: image.put(112, ">II", 0x1234, 65536),
    "has 16 bytes": lambda image: image.put(112, ">II", 0xE2792ACA, 16),
    "no refcount table": lambda image: image.put(56, ">I", 0),
    "the L1 table is at 0": lambda image: image.put(40, ">Q", 0),
    "the L1 table is at 196609": lambda image: image.put(40, ">Q", 196609),
    "the refcount table is at 512": lambda image: image.put(48, ">Q", 512),
    "L1 table has 1 entries": lambda image: image.put(24, ">Q", (512 << 20) + 1),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_impossible_header_is_damaged(seeds: dict[str, Bytes], message: str) -> None:
    image = seeds["qcow2"].copy()
    DAMAGES[message](image)
    with pytest.raises(ImageDamaged) as refused:
        image.read()
    assert message in str(refused.value)


def test_a_header_that_is_just_possible_is_read(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(24, ">Q", 512 << 20)
    assert image.read().virtual_size_bytes == 512 << 20


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({"compat": "0.10"}, set[str]()),
        ({"lazy_refcounts": "on"}, {"lazy refcounts"}),
        ({"extended_l2": "on"}, {"extended L2"}),
        ({"compression_type": "zstd"}, {"zstd"}),
    ],
)
def test_features_are_named(maker: Maker, read: Reader, options: dict[str, str], features: set[str]) -> None:
    assert read(maker.create("qcow2", "1M", options)).features == features


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_backing_file_is_the_one_that_qemu_would_open(maker: Maker, read: Reader, compat: str) -> None:
    path = maker.create("qcow2", "1M", {"compat": compat}, backing=maker.create("qcow2", "1M"))
    header = read(path)
    told = maker.info(path, "qcow2")
    assert header.backing == told["backing-filename"]
    assert header.backing_format == told["backing-filename-format"] == "qcow2"


def test_an_offset_without_a_name_is_no_backing_file(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(8, ">QI", 600, 0)
    assert image.read().backing is None


def test_a_name_without_an_offset_is_no_backing_file(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(8, ">QI", 0, 10)
    assert image.read().backing is None


@pytest.mark.parametrize("name", [b"good.qcow2\0/etc/passwd", b"\0/etc/passwd"])
def test_a_nul_byte_in_a_name_is_refused(seeds: dict[str, Bytes], name: bytes) -> None:
    image = seeds["qcow2"].copy()
    image.put(8, ">QI", 1024, len(name)).write(1024, name)
    with pytest.raises(ImageUnsafe, match="NUL"):
        image.read()


def test_the_last_of_two_data_file_names_counts(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(112, ">II8sII8sII", 0x44415441, 5, b"first", 0x44415441, 6, b"second", 0, 0)
    assert image.read().data_file == "second"


def test_extensions_behind_the_end_mark_do_not_count(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(112, ">IIII8s", 0, 0, 0x44415441, 5, b"first")
    assert image.read().data_file is None


def test_a_longer_header_moves_the_extensions(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(100, ">I", 120).put(112, ">QII8s", 0, 0x44415441, 5, b"moved")
    assert image.read().data_file == "moved"


def test_extensions_may_be_cut_off_where_the_name_starts(seeds: dict[str, Bytes]) -> None:
    """QEMU reads none at all when the backing file's name lies inside the header."""
    image = seeds["qcow2"].copy()
    image.put(8, ">QI", 106, 4).write(106, b"base").put(112, ">II8s", 0x44415441, 5, b"never")
    header = image.read()
    assert header.data_file is None
    assert header.backing == "base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.put(112, ">IIIIQQ", 0x23852875, 24, 0, 0, 24, 131072), "0 dirty bitmaps"),
        (lambda image: image.put(112, ">IIIIQQ", 0x23852875, 24, 1, 0, 1 << 30, 131072), "has 1073741824 bytes"),
        (lambda image: image.put(112, ">IIIIQQ", 0x23852875, 24, 1, 0, 20, 131072), "middle of an entry"),
        (lambda image: image.put(112, ">IIIIQQ", 0x23852875, 24, 1, 0, 24, 1 << 40), "cut short"),
        (lambda image: image.put(112, ">IIQQ", 0x23852875, 16, 0, 0), "16 bytes, not 24"),
        (lambda image: image.put(112, ">IIIIQQ", 0x23852875, 24, 1, 0, 24, 131072), "granularity of 2^0"),
    ],
)
def test_an_impossible_list_of_dirty_bitmaps_is_damaged(
    seeds: dict[str, Bytes], change: Callable[[Bytes], object], message: str
) -> None:
    image = seeds["qcow2"].copy()
    image.put(88, ">Q", 1).put(131072, ">32x")
    change(image)
    with pytest.raises(ImageDamaged) as refused:
        image.read()
    assert message in str(refused.value)


def test_snapshots_are_counted(maker: Maker, read: Reader) -> None:
    path = maker.create("qcow2", "1M")
    maker.run("snapshot", "-c", "one", path)
    header = read(path)
    assert header.snapshots == 1
    check_safe(header, read_only=False)
