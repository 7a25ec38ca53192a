"""VHD: which of its sizes counts, and which of its two footers."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage.headers import check_safe, driver_options
from utilityvm.errors import ImageDamaged, ImageUnsafe
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.diskimage.conftest import Bytes, Maker, Reader

    Reseal = dict[str, Callable[[Bytes], Bytes]]

CREATORS = [
    b"vpc ",
    b"qemu",
    b"qem2",
    b"win ",
    b"d2v ",
    b"d2vx",
    b"CTXS",
    b"tap\0",
    b"tapx",
    b"wa\0\0",
    b"abcd",
    b"\0" * 4,
]


def footers(image: Bytes) -> list[int]:
    return [at for at in (0, image.size - 512) if image.get(at, 8) == b"conectix"]


def change_footers(image: Bytes, offset: int, layout: str, *values: object) -> Bytes:
    for at in footers(image):
        image.put(at + offset, layout, *values)
    return image


GEOMETRIES = [(300, 4, 17), (65535, 16, 255), (0, 0, 0)]


@pytest.mark.parametrize("creator", CREATORS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_dynamic_disk_has_the_size_of_its_footer_and_is_refused_where_qemu_shows_another(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], reseal: Reseal, creator: bytes, geometry: tuple[int, int, int]
) -> None:
    image = seeds["vpc-dynamic"].copy()
    change_footers(change_footers(image, 28, "4s", creator), 56, ">HBB", *geometry)
    path = reseal["vpc"](image).save(maker.path("vhd"))

    header = read(path, DiskFormat.VHD)

    told = maker.info(path, "vpc")["virtual-size"]
    assert header.virtual_size_bytes == 16 << 20
    if told == header.virtual_size_bytes and header.other_size_bytes is None:
        check_safe(header, read_only=True)
        return
    cylinders, heads, sectors = geometry
    assert header.other_size_bytes == cylinders * heads * sectors * 512
    assert told in (header.other_size_bytes, header.virtual_size_bytes)  # a later QEMU knows better, and we do not ask
    with pytest.raises(
        ImageUnsafe, match=f"its footer says 16777216 bytes, and QEMU may show {header.other_size_bytes}"
    ):
        check_safe(header, read_only=True)


@pytest.mark.parametrize("creator", CREATORS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_fixed_disk_has_the_size_of_its_footer_whatever_its_creator_and_geometry(
    seeds: dict[str, Bytes], reseal: Reseal, creator: bytes, geometry: tuple[int, int, int]
) -> None:
    image = seeds["vpc-fixed"].copy()
    change_footers(change_footers(image, 28, "4s", creator), 56, ">HBB", *geometry)

    header = reseal["vpc"](image).read()

    check_safe(header, read_only=False)
    assert header.virtual_size_bytes == 1 << 20
    assert driver_options(header) == {"driver": "raw", "size": 1 << 20}


def test_a_disk_whose_sizes_differ_can_be_converted_by_its_footer(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], reseal: Reseal
) -> None:
    """The remedy, as it is printed."""
    image = seeds["vpc-dynamic"].copy()
    change_footers(change_footers(image, 28, "4s", b"vbox"), 56, ">HBB", 300, 4, 17)
    path, target = reseal["vpc"](image).save(maker.folder / "my disk, of old.vhd"), maker.path("qcow2")
    with pytest.raises(ImageUnsafe) as refused:
        check_safe(read(path), read_only=True)

    assert refused.value.remedy is not None
    maker.run(*shlex.split(refused.value.remedy.partition("qemu-img ")[2]), target)

    assert read(target).virtual_size_bytes == 16 << 20


@pytest.mark.parametrize("seed", ["vpc-dynamic", "vpc-fixed"])
def test_a_wrong_checksum_is_damaged(seeds: dict[str, Bytes], seed: str) -> None:
    image = seeds[seed].copy()
    image.put(image.size - 512 + 100, "B", 1)
    with pytest.raises(ImageDamaged, match="the footer has a wrong checksum"):
        image.read(DiskFormat.VHD)


def test_a_dynamic_disk_without_the_copy_is_damaged(seeds: dict[str, Bytes]) -> None:
    image = seeds["vpc-dynamic"].copy().write(0, bytes(512))
    with pytest.raises(ImageDamaged, match="its first sector holds no copy of the footer"):
        image.read(DiskFormat.VHD)


def test_a_wrong_checksum_of_the_copy_is_damaged(seeds: dict[str, Bytes]) -> None:
    image = seeds["vpc-dynamic"].copy()
    image.put(100, "B", 1)
    with pytest.raises(ImageDamaged, match="the footer's copy has a wrong checksum"):
        image.read()


def test_a_guest_cannot_turn_its_fixed_disk_into_a_dynamic_one(seeds: dict[str, Bytes]) -> None:
    """QEMU believes the first sector, which the guest writes; the dynamic header behind it would be the guest's too."""
    image = seeds["vpc-fixed"].copy()
    image.write(0, seeds["vpc-dynamic"].get(0, 2048))
    with pytest.raises(ImageUnsafe, match="it starts as a dynamic vpc and ends as a fixed vpc"):
        image.read()
    header = image.read(DiskFormat.VHD)
    assert (header.subformat, driver_options(header)) == ("fixed", {"driver": "raw", "size": 1 << 20})


def test_a_dynamic_disk_whose_footers_differ_is_disputed(seeds: dict[str, Bytes], reseal: Reseal) -> None:
    image = seeds["vpc-dynamic"].copy()
    image.put(48, ">Q", 8 << 20)
    header = reseal["vpc"](image).read()
    with pytest.raises(ImageUnsafe, match="a dynamic disk of 8388608 bytes and its footer a dynamic disk of 16777216"):
        check_safe(header, read_only=True)


@pytest.mark.parametrize("fields", [(84, "B", 1), (24, ">I", 1234)])
def test_footers_may_differ_in_time_and_saved_state(
    seeds: dict[str, Bytes], reseal: Reseal, fields: tuple[int, str, int]
) -> None:
    image = seeds["vpc-dynamic"].copy()
    image.put(*fields)
    check_safe(reseal["vpc"](image).read(), read_only=True)


def test_the_name_of_a_parent_is_told(seeds: dict[str, Bytes], reseal: Reseal) -> None:
    image = seeds["vpc-dynamic"].copy()
    change_footers(image, 60, ">I", 4).write(512 + 64, "C:\\base.vhd".encode("utf-16-be"))
    header = reseal["vpc"](image).read()
    assert (header.subformat, header.backing) == ("differencing", "C:\\base.vhd")
    with pytest.raises(ImageUnsafe, match=r"differs from a parent, 'C:\\\\base\.vhd'"):
        check_safe(header, read_only=True)


DAMAGES: dict[str, Callable[[Bytes], object]] = {
    "type 5": lambda image: change_footers(image, 60, ">I", 5),
    "wrong cookie or checksum": lambda image: image.write(512, b"cxspars_"),
    "blocks have 0 bytes": lambda image: image.put(512 + 32, ">I", 0),
    "blocks have 256 bytes": lambda image: image.put(512 + 32, ">I", 256),
    "blocks have 1536 bytes": lambda image: image.put(512 + 32, ">I", 1536),
    "block table has 7 entries": lambda image: image.put(512 + 28, ">I", 7),
    "dynamic disk header is at 2048": lambda image: change_footers(image, 16, ">Q", 2048),
    "a VHD holds at most": lambda image: change_footers(image, 48, ">Q", 1 << 50),
    "does not end in a VHD footer": lambda image: image.write(image.size - 512, bytes(8)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_impossible_header_is_damaged(seeds: dict[str, Bytes], reseal: Reseal, message: str) -> None:
    image = seeds["vpc-dynamic"].copy()
    DAMAGES[message](image)
    with pytest.raises(ImageDamaged) as refused:
        reseal["vpc"](image).read()
    assert message in str(refused.value)


def test_a_fixed_disk_larger_than_its_file_is_damaged(seeds: dict[str, Bytes], reseal: Reseal) -> None:
    """Its last sector would be the footer, for the guest to write."""
    image = change_footers(seeds["vpc-fixed"].copy(), 48, ">Q", (1 << 20) + 512)
    with pytest.raises(ImageDamaged, match="cut short: a fixed disk of 1049088 bytes"):
        reseal["vpc"](image).read()


def test_a_footer_of_511_bytes_is_read_as_qemu_does(maker: Maker, read: Reader, seeds: dict[str, Bytes]) -> None:
    image = seeds["vpc-fixed"].copy()
    image.size -= 1
    path = image.save(maker.path("vhd"))
    assert read(path, DiskFormat.VHD).virtual_size_bytes == maker.info(path, "vpc")["virtual-size"] == 1 << 20
