"""VHDX: which header counts, what a log can do, and what the metadata must say."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utilityvm.diskimage.headers import check_safe, problems
from utilityvm.errors import ImageDamaged, ImageUnsafe, NotSupported
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.diskimage.conftest import Bytes, Maker, Reader

    Reseal = dict[str, Callable[[Bytes], Bytes]]

HEADERS = (64 << 10, 128 << 10)
REGIONS, LOG, BAT, METADATA = 192 << 10, 1 << 20, 2 << 20, 3 << 20  # where qemu-img puts them
BLOCK_SIZE, VIRTUAL_SIZE, LOGICAL_SECTOR = METADATA + 65536, METADATA + 65544, METADATA + 65568
LOG_ID = b"the log's own id"
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")


def put_log(
    image: Bytes,
    crc: Callable[[bytes], int],
    *,
    offset: int,
    data: bytes = bytes(4096),
    zeros: int = 0,
    last: int = 0,
    log_id: bytes = LOG_ID,
) -> Bytes:
    """A log with one entry that QEMU takes for valid: a sector of `data`, or `zeros` bytes of zeros, at `offset`."""
    for header in HEADERS:
        image.put(header + 48, "16s", LOG_ID)
    length = 4096 if zeros else 8192
    head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, length, 0, 1, 1, 0, log_id, image.size, last or image.size)
    if zeros:
        descriptor = struct.pack("<4sIQQQ", b"zero", 0, zeros, offset, 1)
        entry = (head + descriptor).ljust(4096, b"\0")
    else:
        descriptor = struct.pack("<4s4s8sQQ", b"desc", data[-4:], data[:8], offset, 1)
        sector = struct.pack("<4sI4084sI", b"data", 0, data[8:-4], 1)
        entry = (head + descriptor).ljust(4096, b"\0") + sector
    image.write(LOG, entry[:4] + struct.pack("<I", crc(entry)) + entry[8:])
    return image


@pytest.mark.parametrize("newer", [0, 1])
def test_the_header_with_the_higher_sequence_number_counts(
    seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int], newer: int
) -> None:
    image = put_log(seeds["vhdx"].copy(), crc, offset=BAT)
    image.put(HEADERS[newer] + 48, "16x").put(HEADERS[newer] + 8, "<Q", 1 << 40)
    image.put(HEADERS[1 - newer] + 8, "<Q", 5)
    assert not reseal["vhdx"](image).read().dirty
    image.put(HEADERS[1 - newer] + 8, "<Q", 1 << 41)
    assert reseal["vhdx"](image).read().dirty


@pytest.mark.parametrize("broken", [0, 1])
def test_one_valid_header_is_enough(seeds: dict[str, Bytes], broken: int) -> None:
    image = seeds["vhdx"].copy()
    image.put(HEADERS[broken] + 100, "B", 1)
    assert image.read().virtual_size_bytes == 16 << 20


def test_two_headers_of_one_number_must_be_the_same(seeds: dict[str, Bytes], reseal: Reseal) -> None:
    image = seeds["vhdx"].copy()
    image.write(HEADERS[1], image.get(HEADERS[0], 4096))
    assert reseal["vhdx"](image).read().format is DiskFormat.VHDX
    image.put(HEADERS[1] + 16, "B", 1)
    with pytest.raises(ImageDamaged, match="one sequence number and differ"):
        reseal["vhdx"](image).read()


def test_a_log_to_replay_refuses_read_only_as_qemu_does(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int]
) -> None:
    path = reseal["vhdx"](put_log(seeds["vhdx"].copy(), crc, offset=BAT)).save(maker.path("vhdx"))
    assert maker.try_info(path, "vhdx") is None

    header = read(path)
    check_safe(header, read_only=False)
    with pytest.raises(NotSupported, match="log must be replayed") as refused:
        check_safe(header, read_only=True)
    assert "qemu-img check -r all -f vhdx" in str(refused.value.remedy)

    maker.run("check", "-q", "-r", "all", "-f", "vhdx", path)  # the remedy
    check_safe(read(path), read_only=True)


def test_a_log_with_nothing_of_this_file_in_it_is_no_log(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int]
) -> None:
    image = put_log(seeds["vhdx"].copy(), crc, offset=BAT, log_id=b"the id of before")
    path = reseal["vhdx"](image).save(maker.path("vhdx"))
    assert maker.try_info(path, "vhdx") is not None
    assert not read(path).dirty


def test_a_log_can_make_another_disk_of_it_and_is_refused(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int]
) -> None:
    """What we read of the metadata is not what QEMU reads after the replay."""
    image = seeds["vhdx"].copy()
    sector = bytearray(image.get(METADATA + 65536, 4096))
    struct.pack_into("<Q", sector, 8, 8 << 20)
    path = reseal["vhdx"](put_log(image, crc, offset=METADATA + 65536, data=bytes(sector))).save(maker.path("vhdx"))

    header = read(path)
    assert header.virtual_size_bytes == 16 << 20
    with pytest.raises(ImageUnsafe, match="QEMU would see others than we do"):
        check_safe(header, read_only=False)

    maker.run("check", "-q", "-r", "all", "-f", "vhdx", path)
    assert maker.info(path, "vhdx")["virtual-size"] == 8 << 20


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"offset": 0}, "rewrites the header"),
        ({"offset": REGIONS}, "rewrites the header"),
        ({"offset": METADATA, "zeros": 4096}, "rewrites the header"),
        ({"offset": BAT, "zeros": (1 << 20) + 4096}, "rewrites the header"),
        ({"offset": 1 << 40}, "the file ends at"),
        ({"offset": 4 << 20, "zeros": 1 << 40}, "the file ends at"),
        ({"offset": 4 << 20, "zeros": 300 << 20}, "the file ends at"),
        ({"offset": BAT, "last": 1 << 50}, "make the file grow"),
    ],
)
def test_a_log_that_writes_elsewhere_is_refused(
    seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int], entry: dict[str, int], message: str
) -> None:
    header = reseal["vhdx"](put_log(seeds["vhdx"].copy(), crc, **entry)).read()  # type: ignore[arg-type]
    with pytest.raises(ImageUnsafe, match=message):
        check_safe(header, read_only=False)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    page=st.integers(0, 2304),
    pages_of_zeros=st.integers(0, 600),
    size=st.sampled_from([0, 1 << 20, 16 << 20, 1 << 50]),
    fill=st.binary(min_size=1, max_size=40),
)
def test_a_log_that_is_let_pass_changes_nothing_that_was_read(
    maker: Maker,
    read: Reader,
    seeds: dict[str, Bytes],
    reseal: Reseal,
    crc: Callable[[bytes], int],
    page: int,
    pages_of_zeros: int,
    size: int,
    fill: bytes,
) -> None:
    data = struct.pack("<IIQ", 8 << 20, 0, size) + (fill * 4096)[:4080]
    image = put_log(seeds["vhdx"].copy(), crc, offset=page * 4096, data=data, zeros=pages_of_zeros * 4096)
    path = reseal["vhdx"](image).save(maker.folder / "replayed.vhdx")
    header = read(path)
    if any(problems(header, read_only=False)):
        return

    maker.run("check", "-q", "-r", "all", "-f", "vhdx", path)

    assert maker.info(path, "vhdx")["virtual-size"] == header.virtual_size_bytes
    assert path.stat().st_size <= (8 << 20) + (1 << 30)
    assert replace(read(path), file_size_bytes=header.file_size_bytes, dirty=True) == header


def test_a_log_too_long_to_look_into_is_refused(
    seeds: dict[str, Bytes], reseal: Reseal, crc: Callable[[bytes], int]
) -> None:
    image = put_log(seeds["vhdx"].copy(), crc, offset=BAT)
    for header in HEADERS:
        image.put(header + 68, "<IQ", 17 << 20, 1 << 30)
    image.size = 2 << 30
    with pytest.raises(ImageUnsafe, match="too long to look into"):
        check_safe(reseal["vhdx"](image).read(), read_only=False)


def item(number: int) -> int:
    return METADATA + 32 + 32 * number


def add_item(image: Bytes, item_id: UUID, *, offset: int = 70000, length: int = 64, flags: int = 0) -> Bytes:
    (count,) = struct.unpack("<H", image.get(METADATA + 10, 2))
    image.put(METADATA + 10, "<H", count + 1)
    return image.put(item(count), "<16sIII", item_id.bytes_le, offset, length, flags)


DAMAGES: dict[str, Callable[[Bytes], object]] = {
    "neither copy": lambda image: [image.write(at, b"hea_") for at in HEADERS],
    "log of version 1": lambda image: [image.put(at + 64, "<H", 1) for at in HEADERS],
    "bytes at 1052672": lambda image: [image.put(at + 72, "<Q", (1 << 20) + 4096) for at in HEADERS],
    "region table has a wrong": lambda image: image.write(REGIONS, b"reg_"),
    "names no block table": lambda image: image.put(REGIONS + 8, "<I", 1),
    "overlap": lambda image: image.put(REGIONS + 16 + 16, "<Q", METADATA),
    "lies over the header": lambda image: image.put(REGIONS + 16 + 16, "<QI", 4096, 4096),
    "twice": lambda image: image.write(REGIONS + 16 + 32, image.get(REGIONS + 16, 16)),
    "metadata region has 4096 bytes": lambda image: image.put(REGIONS + 16 + 32 + 24, "<I", 4096),
    "metadata table has a wrong": lambda image: image.write(METADATA, b"_"),
    "is missing or too short": lambda image: image.put(item(1), "16x"),
    "the metadata item 2fa54224-cd1b-4876-b211-5dbed83bf4b8 twice": lambda image: image.write(
        item(2), image.get(item(1), 32)
    ),
    "lies outside its region": lambda image: image.put(item(0) + 16, "<I", 1 << 20),
    "blocks have 3145728 bytes": lambda image: image.put(BLOCK_SIZE, "<I", 3 << 20),
    "blocks have 524288 bytes": lambda image: image.put(BLOCK_SIZE, "<I", 1 << 19),
    "blocks have 536870912 bytes": lambda image: image.put(BLOCK_SIZE, "<I", 1 << 29),
    "logical sectors have 4096 bytes": lambda image: image.put(LOGICAL_SECTOR, "<I", 4096),
    "block table has 1048576 bytes": lambda image: image.put(VIRTUAL_SIZE, "<Q", 64 << 40),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_impossible_header_is_damaged(seeds: dict[str, Bytes], reseal: Reseal, message: str) -> None:
    image = seeds["vhdx"].copy()
    DAMAGES[message](image)
    with pytest.raises(ImageDamaged) as refused:
        reseal["vhdx"](image).read()
    assert message in str(refused.value)


@pytest.mark.parametrize("at", [*HEADERS, REGIONS])
def test_a_wrong_checksum_does_not_count(seeds: dict[str, Bytes], at: int) -> None:
    image = seeds["vhdx"].copy()
    image.put(at + 200, "B", 1)
    if at == REGIONS:
        with pytest.raises(ImageDamaged, match="region table has a wrong signature or checksum"):
            image.read()
    else:
        assert image.read().format is DiskFormat.VHDX


def test_an_unknown_item_counts_only_when_required(seeds: dict[str, Bytes]) -> None:
    image = add_item(seeds["vhdx"].copy(), UUID(int=7))
    check_safe(image.read(), read_only=False)
    image = add_item(seeds["vhdx"].copy(), UUID(int=7), flags=4)
    with pytest.raises(ImageUnsafe, match="the metadata item 00000000-0000-0000-0000-000000000007"):
        check_safe(image.read(), read_only=False)


@pytest.mark.parametrize("size", [10, 20, 200, 1 << 19])
def test_a_parent_locator_makes_it_a_differencing_disk_and_names_the_parent(seeds: dict[str, Bytes], size: int) -> None:
    image = add_item(seeds["vhdx"].copy(), PARENT_LOCATOR, length=size)
    key, value = "relative_path".encode("utf-16-le"), "..\\base.vhdx".encode("utf-16-le")
    image.put(METADATA + 70000, "<16sHH", b"", 0, 1)
    image.put(METADATA + 70020, "<IIHH", 32, 32 + len(key), len(key), len(value))
    image.write(METADATA + 70032, key + value)

    header = image.read()

    assert (header.subformat, header.backing) == ("differencing", None if size <= 20 else "..\\base.vhdx")
    with pytest.raises(ImageUnsafe, match="differs from a parent"):
        check_safe(header, read_only=True)
