"""Each rule with images that break it, as an attacker would make them; and what keeps to the rules."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from utilityvm.diskimage.headers import LIMITS, Limits, Rule, check_safe, problems
from utilityvm.diskimage.safety import is_plain_name
from utilityvm.errors import ImageDamaged, ImageError, ImageUnsafe, NotSupported, UtilityVMError
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Bytes, Maker, Reader

Reseal = dict[str, Callable[["Bytes"], "Bytes"]]

# Where things are in the images of the `seeds` fixture.
QCOW2_SIZE, QCOW2_CRYPT, QCOW2_L1_ENTRIES, QCOW2_REFCOUNT_CLUSTERS, QCOW2_SNAPSHOTS = 24, 32, 36, 56, 60
QCOW2_INCOMPATIBLE = 72
VHD_TYPE = 60
VHDX_BAT_LENGTH = 196608 + 16 + 24
VMDK_FLAGS, VMDK_CAPACITY, VMDK_GRAIN, VMDK_DIRECTORY = 8, 12, 20, 56


def incompatible(bit: int) -> Callable[[Bytes], object]:
    return lambda image: image.put(QCOW2_INCOMPATIBLE, ">Q", 1 << bit)


def with_backing(name: bytes) -> Callable[[Bytes], object]:
    """The seed with a backing file has its name at 528; this one gets another there."""

    def change(image: Bytes) -> None:
        (at,) = struct.unpack(">Q", image.get(8, 8))
        image.put(16, ">I", len(name)).write(at, name)

    return change


def in_both_footers(offset: int, layout: str, value: int) -> Callable[[Bytes], object]:
    return lambda image: [image.put(at + offset, layout, value) for at in (0, image.size - 512)]


def vhd_of_virtualbox(image: Bytes) -> None:
    for at in (0, image.size - 512):
        image.put(at + 28, "4s", b"vbox").put(at + 56, ">HBB", 300, 4, 17)


def descriptor(before: bytes, after: bytes) -> Callable[[Bytes], object]:
    def change(image: Bytes) -> None:
        text = image.get(512, 20 * 512)
        assert before in text
        image.write(512, text.replace(before, after)[: 20 * 512])

    return change


def vhdx_parent(image: Bytes) -> None:
    (flags,) = struct.unpack("<I", image.get((3 << 20) + 65536 + 4, 4))
    image.put((3 << 20) + 65536 + 4, "<I", flags | 2)


def vhdx_region(image: Bytes) -> None:
    image.put(196608 + 8, "<I", 3).put(196608 + 16 + 64, "<16sQII", b"x" * 16, 7 << 20, 1 << 20, 1)


def huge_table(image: Bytes) -> None:
    image.put(VHDX_BAT_LENGTH, "<I", 1 << 30).put(VHDX_BAT_LENGTH + 8 + 16, "<Q", 2 << 30)
    image.write(2 << 30, image.get(3 << 20, 1 << 20).rstrip(b"\0"))


ROWS: list[tuple[Rule, str, Callable[[Bytes], object], type[UtilityVMError]]] = [
    (Rule.FOREIGN_NAME, "qcow2-backing", with_backing(b'json:{"driver":"file","filename":"/x"}'), ImageUnsafe),
    (Rule.FOREIGN_NAME, "qcow2-backing", with_backing(b"nbd://host/export"), ImageUnsafe),
    (Rule.FOREIGN_NAME, "qcow2-backing", with_backing(b"host_device:/dev/sda"), ImageUnsafe),
    (Rule.BACKING_FILE, "qcow2-backing", with_backing(b"/etc/passwd"), ImageUnsafe),
    (Rule.DATA_FILE, "qcow2", incompatible(2), ImageUnsafe),
    (Rule.DATA_FILE, "qcow2", lambda image: image.put(88, ">Q", 2), ImageUnsafe),
    (Rule.DATA_FILE, "qcow2", lambda image: image.put(112, ">II4s", 0x44415441, 4, b"/etc"), ImageUnsafe),
    (Rule.PARENT, "vpc-dynamic", in_both_footers(VHD_TYPE, ">I", 4), ImageUnsafe),
    (Rule.PARENT, "vhdx", vhdx_parent, ImageUnsafe),
    (Rule.PARENT, "vmdk", descriptor(b"parentCID=ffffffff", b"parentCID=12345678"), ImageUnsafe),
    (Rule.PARENT, "vmdk", descriptor(b"# The Disk", b'parentFileNameHint="/etc/passwd"\n#'), ImageUnsafe),
    (Rule.PARENT, "vmdk-stream", lambda image: image.write(9000, b'parentFileNameHint="a.vmdk"'), ImageUnsafe),
    (Rule.DISPUTED, "vpc-dynamic", lambda image: image.put(48, ">Q", 1 << 20), ImageUnsafe),
    (Rule.DISPUTED, "vmdk", descriptor(b"monolithicSparse", b"monolithicFlat\0\0"), ImageUnsafe),
    (Rule.DISPUTED, "vmdk", descriptor(b"# The Disk", b'RW 16 FLAT "/etc/passwd" 0\n#'), ImageUnsafe),
    (Rule.DISPUTED, "vmdk", descriptor(b"SPARSE", b"FLAT  "), ImageUnsafe),
    (Rule.TWO_SIZES, "vpc-dynamic", vhd_of_virtualbox, ImageUnsafe),
    *((Rule.UNKNOWN_FEATURE, "qcow2", incompatible(bit), ImageUnsafe) for bit in (5, 31, 63)),
    (Rule.UNKNOWN_FEATURE, "vhdx", vhdx_region, ImageUnsafe),
    (Rule.ENCRYPTED, "qcow2", lambda image: image.put(QCOW2_CRYPT, ">I", 1), NotSupported),
    (Rule.ENCRYPTED, "qcow2", lambda image: image.put(QCOW2_CRYPT, ">I", 2), NotSupported),
    (Rule.ENCRYPTED, "qcow2", lambda image: image.put(QCOW2_CRYPT, ">I", 77), NotSupported),
    (Rule.CORRUPT, "qcow2", incompatible(1), ImageDamaged),
    (Rule.READ_ONLY_FORMAT, "vmdk-stream", lambda image: None, NotSupported),
    (Rule.READ_ONLY_FORMAT, "vmdk", lambda image: image.put(4, "<I", 3), NotSupported),
    (Rule.EMPTY, "qcow2", lambda image: image.put(QCOW2_SIZE, ">Q", 511), ImageDamaged),
    (Rule.VIRTUAL_SIZE, "qcow2", lambda image: image.put(QCOW2_SIZE, ">QII", 128 << 40, 0, 1 << 18), ImageUnsafe),
    (Rule.CLUSTER_SIZE, "vmdk", lambda image: image.put(VMDK_GRAIN, "<Q", 0x200000), ImageUnsafe),
    (Rule.TABLE_SIZE, "qcow2", lambda image: image.put(QCOW2_L1_ENTRIES, ">I", 1 << 30), ImageUnsafe),
    (Rule.TABLE_SIZE, "qcow2", lambda image: image.put(QCOW2_REFCOUNT_CLUSTERS, ">I", 1 << 20), ImageUnsafe),
    (Rule.TABLE_SIZE, "vpc-dynamic", lambda image: image.put(512 + 28, ">I", 1 << 30), ImageUnsafe),
    (Rule.TABLE_SIZE, "vhdx", huge_table, ImageUnsafe),
    (Rule.TABLE_SIZE, "vmdk", lambda image: image.put(VMDK_CAPACITY, "<QQ", 1 << 32, 1).put(44, "<I", 1), ImageUnsafe),
    (Rule.TABLE_OUTSIDE, "qcow2", lambda image: image.put(40, ">Q", 1 << 40), ImageDamaged),
    (Rule.TABLE_OUTSIDE, "qcow2", lambda image: image.put(48, ">Q", 1 << 62), ImageDamaged),
    (Rule.TABLE_OUTSIDE, "vpc-dynamic", lambda image: image.put(512 + 16, ">Q", 1 << 40), ImageDamaged),
    (Rule.TABLE_OUTSIDE, "vmdk", lambda image: image.put(VMDK_DIRECTORY, "<Q", 1 << 30), ImageDamaged),
    (Rule.SNAPSHOTS, "qcow2", lambda image: image.put(QCOW2_SNAPSHOTS, ">IQ", 5000, 65536), ImageUnsafe),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "seed", "change", "error"), ROWS, ids=[f"{number}-{row[0]}-{row[1]}" for number, row in enumerate(ROWS)]
)
def test_rule(
    seeds: dict[str, Bytes],
    reseal: Reseal,
    rule: Rule,
    seed: str,
    change: Callable[[Bytes], object],
    error: type[UtilityVMError],
) -> None:
    image = seeds[seed].copy()
    change(image)
    if rule is Rule.DISPUTED and seed == "vpc-dynamic":
        image.put(64, ">I", ~(sum(image.get(0, 512)) - sum(image.get(64, 4))) & 0xFFFFFFFF)
    else:
        reseal[seed.split("-")[0]](image)
    format = DiskFormat(seed.split("-")[0])
    header = image.read(format)

    assert rule in {problem.rule for problem in problems(header, read_only=False)}
    with pytest.raises((ImageError, NotSupported)) as refused:
        check_safe(header, read_only=False)
    assert refused.value.remedy
    assert next(problem for problem in problems(header, read_only=False) if problem.rule is rule).error is error


def test_rule_backing_file_gives_way_to_a_registered_chain(seeds: dict[str, Bytes]) -> None:
    header = seeds["qcow2-backing"].read()
    assert header.backing_format == "qcow2"
    with pytest.raises(ImageUnsafe, match="backing file"):
        check_safe(header, read_only=True)
    check_safe(header, read_only=True, allow_backing=True)


def test_rule_foreign_name_does_not_give_way_to_a_chain(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2-backing"].copy()
    with_backing(b"json:{}")(image)
    with pytest.raises(ImageUnsafe, match="not the path of a file"):
        check_safe(image.read(), read_only=True, allow_backing=True)


def test_rule_data_file_of_qemu_img(maker: Maker, read: Reader) -> None:
    """CVE-2024-32498."""
    header = read(maker.create("qcow2", "1M", {"data_file": "data.raw", "data_file_raw": "on"}))
    assert header.data_file == "data.raw"
    with pytest.raises(ImageUnsafe, match=r"its data is in another file, 'data\.raw'"):
        check_safe(header, read_only=True)


def test_rule_memory_counts_the_dirty_bitmaps(maker: Maker, read: Reader) -> None:
    small, large = maker.create("qcow2", "1G"), maker.create("qcow2", "1T")
    maker.run("bitmap", "--add", small, "one")
    maker.run("bitmap", "--add", "-g", "512", large, "two")

    header = read(small)
    assert "bitmaps" in header.features
    assert header.memory_bytes >= (1 << 30) // 65536 // 8
    check_safe(header, read_only=False)
    with pytest.raises(ImageUnsafe, match="to open it takes"):
        check_safe(read(large), read_only=False)


def test_rule_memory_counts_the_repair_of_a_dirty_image(seeds: dict[str, Bytes]) -> None:
    """QEMU counts the references to all that the file could hold, and a hole of exabytes costs its maker nothing."""
    image = seeds["qcow2"].copy()
    image.size = 1 << 60
    check_safe(image.read(), read_only=False)
    image.put(QCOW2_INCOMPATIBLE, ">Q", 1)
    with pytest.raises(ImageUnsafe, match="to open it takes"):
        check_safe(image.read(), read_only=False)


def test_rule_log_refuses_only_a_read_only_attachment(seeds: dict[str, Bytes]) -> None:
    header = replace(seeds["vhdx"].read(), dirty=True)
    check_safe(header, read_only=False)
    with pytest.raises(NotSupported, match="log must be replayed"):
        check_safe(header, read_only=True)


def test_rule_read_only_format_refuses_only_a_writable_attachment(seeds: dict[str, Bytes]) -> None:
    check_safe(seeds["vmdk-stream"].read(), read_only=True)


def test_every_rule_has_an_image_that_breaks_it() -> None:
    assert {row[0] for row in ROWS} | {Rule.MEMORY, Rule.LOG} == set(Rule)


@pytest.mark.parametrize("format", ["raw", "qcow2", "vhdx"])
def test_limits_are_the_caller_s(maker: Maker, read: Reader, format: str) -> None:
    header = read(maker.create(format, "8M"))
    check_safe(header, read_only=False, limits=Limits(virtual_size_bytes=8 << 20))
    with pytest.raises(ImageUnsafe, match="claims a disk of 8388608 bytes"):
        check_safe(header, read_only=False, limits=Limits(virtual_size_bytes=(8 << 20) - 1))


def test_a_raw_file_with_a_huge_hole_is_a_bomb_too(memory: type[Bytes]) -> None:
    with pytest.raises(ImageUnsafe, match="claims a disk"):
        check_safe(memory(LIMITS.virtual_size_bytes + 1).read(DiskFormat.RAW), read_only=False)


def test_a_dirty_qcow2_is_allowed_because_qemu_repairs_it(seeds: dict[str, Bytes]) -> None:
    image = seeds["qcow2"].copy()
    image.put(QCOW2_INCOMPATIBLE, ">Q", 1)
    header = image.read()
    assert header.dirty
    check_safe(header, read_only=True)
    check_safe(header, read_only=False)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base.qcow2", True),
        ("/srv/a:b.qcow2", True),
        ("./a:b", True),
        ("", True),
        ("a:b", False),
        ("json:{}", False),
        ("nbd+unix:///x", False),
        ("file:/etc/passwd", False),
        ("fat:rw:/etc", False),
        (":x", False),
    ],
)
def test_a_plain_name_has_no_colon_before_its_first_slash(name: str, plain: bool) -> None:
    assert is_plain_name(name) is plain
