"""What a device holds is told by what its makers made; of several things none is guessed, and all are named."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from filesystem_images import MIB, blank, filesystem_image, gpt_disk, mbr_disk
from utilityvm.agent import blkid, content
from utilityvm.agent.blkid import Look, Partition, Superblock, Table
from utilityvm.agent.content import Content


def soon() -> float:
    return time.monotonic() + 60


def of(path: Path) -> Content:
    return content.of(str(path), soon())


def write(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def tool(command: str, *, text: str = "") -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(command.split(), check=True, input=text.encode(), capture_output=True)


def made(path: Path, command: str, mib: int = 32, *, text: str = "") -> Path:
    tool(f"{command} {blank(path, mib)}", text=text)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk.raw"


# One file system.


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("mkfs.ext4 -q -F", "ext4"),
        ("mkfs.ext4 -q -F -O ^has_journal,^extent,^64bit,^metadata_csum", "ext4"),
        ("mkfs.vfat -F 12", "vfat"),
        ("mkfs.vfat -F 16", "vfat"),
        ("mkfs.exfat", "exfat"),
        ("mkfs.btrfs -q -M", "btrfs"),
        ("mkudffs", "udf"),
        ("mkfs.ntfs -q -F", "ntfs3"),
        ("mkfs.f2fs -q", "f2fs"),
        ("mkfs.jfs -q", "jfs"),
    ],
)
def test_a_file_system_is_found(disk: Path, command: str, kind: str) -> None:
    found = of(made(disk, command, 128))
    assert found.filesystem == kind
    assert len(found.names) == 1
    assert found.remedy is None


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "erofs", "squashfs", "vfat"])
def test_a_file_system_with_files_is_found(disk: Path, kind: str) -> None:
    assert of(filesystem_image(kind, disk, {"a": "a"})).filesystem == kind


def test_a_fat_whose_boot_sector_does_not_name_it_is_found(disk: Path) -> None:
    made(disk, "mkfs.vfat -F 32", 64)
    write(disk, 82, b"        ")
    write(disk, 3, b"NONAME  ")
    assert of(disk).filesystem == "vfat"


def test_of_a_udf_bridge_disc_udf_counts() -> None:
    look = Look((Superblock("udf", "filesystem"), Superblock("iso9660", "filesystem")))
    assert content.judge(look, iso9660).filesystem == "udf"
    turned = Look(look.superblocks[::-1])
    assert content.judge(turned, iso9660).filesystem == "udf"


def iso9660(offset: int, length: int) -> bytes:
    """Reads a disc image with a primary volume descriptor."""
    descriptor = bytearray(2048)
    descriptor[:7] = b"\1CD001\1"
    struct.pack_into("<I", descriptor, 80, 1000)
    struct.pack_into(">I", descriptor, 84, 1000)
    struct.pack_into("<H", descriptor, 128, 2048)
    struct.pack_into(">H", descriptor, 130, 2048)
    descriptor[156] = 34
    return bytes(descriptor[offset - 32768 :][:length]) if 32768 <= offset < 34816 else bytes(length)


# Signatures that are chance, or planted.


PLANTED = {
    "ISO 9660": (32769, b"CD001"),
    "ISO 9660 descriptor": (32768, b"\1CD001\1"),
    "ext2": (1080, b"\x53\xef"),
    "btrfs": (65600, b"_BHRfS_M"),
    "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
    "f2fs": (1024, b"\x10\x20\xf5\xf2"),
    "hfsplus": (1024, b"H+"),
    "minix": (1040, b"\x7f\x13"),
    "reiserfs": (65588, b"ReIsErFs"),
    "nilfs2": (1030, b"\x34\x34"),
    "zfs": (131072, b"\x0c\xb1\xba\0\0\0\0\0"),
    "swap": (4086, b"SWAPSPACE2"),
    "LVM": (512, b"LABELONE"),
    "RAID": (4096, b"\xfc\x4e\x2b\xa9"),
    "JFS": (32768, b"JFS1"),
    "GPT": (512, b"EFI PART"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_signature_in_the_data_makes_no_other_file_system(disk: Path, what: str) -> None:
    made(disk, "mkfs.vfat -F 16 -R 1 -s 1", 8)
    assert of(write(disk, *PLANTED[what])).filesystem == "vfat"


@pytest.mark.parametrize("what", PLANTED)
def test_a_signature_alone_is_no_file_system(disk: Path, what: str) -> None:
    assert of(write(blank(disk, 8), *PLANTED[what])).filesystem is None


@pytest.mark.parametrize("what", ["ext2", "btrfs", "erofs", "f2fs"])
def test_a_signature_alone_is_named_as_what_it_is(disk: Path, what: str) -> None:
    found = of(write(blank(disk, 8), *PLANTED[what]))
    assert "the signature of" in str(found)
    assert what in str(found)
    assert found.remedy


# Several things.


def test_of_a_new_file_system_over_an_old_one_neither_is_taken(disk: Path) -> None:
    made(disk, "mkfs.ext4 -q -F", 64)
    superblock = disk.read_bytes()[1024:3072]
    tool(f"mkfs.vfat -F 32 {disk}")
    write(disk, 1024, superblock)
    found = of(disk)
    assert found.filesystem is None
    assert found.names == ("a vfat file system", "an ext4 file system")
    assert "filesystem=vfat or filesystem=ext4" in str(found.remedy)
    fault = content.refusal(found, "the disk at 0:1", str(disk), has_key=False)
    assert fault.message == (
        "it cannot be told which file system is on the disk at 0:1: it holds a vfat file system and an ext4 file system"
    )


def test_also_of_a_small_one(disk: Path) -> None:
    made(disk, "mkfs.ext4 -q -F", 1)
    superblock = disk.read_bytes()[1024:3072]
    tool(f"mkfs.vfat -F 12 -R 8 {disk}")
    assert of(write(disk, 1024, superblock)).filesystem is None


def test_a_disk_that_was_partitioned_after_it_was_formatted_is_not_mounted_as_a_whole(disk: Path) -> None:
    made(disk, "mkfs.ext4 -q -F", 64)
    tool(f"sfdisk -q --wipe never {disk}", text="label: dos\n,16M\n")
    found = of(disk)
    assert found.filesystem is None
    assert found.names == ("an ext4 file system", "a partition table (MBR) with partition 1")
    assert "filesystem=ext4 or partition=1" in str(found.remedy)


def test_a_hybrid_disc_is_a_disc() -> None:
    table = Table("dos", 512, (Partition(1, 0, MIB),))
    look = Look((Superblock("iso9660", "filesystem"),), table)
    assert content.judge(look, iso9660).filesystem == "iso9660"


@pytest.mark.parametrize("kind", ["exfat", "ntfs"])
def test_boot_code_is_no_partition_table(kind: str) -> None:
    table = Table("dos", 512, (Partition(1, 0, MIB),))
    assert content.judge(Look((Superblock(kind, "filesystem"),), table), iso9660).filesystem


def test_what_a_file_system_lies_on_top_of_goes_before_it() -> None:
    look = Look((Superblock("linux_raid_member", "raid"), Superblock("xfs", "filesystem")))
    found = content.judge(look, iso9660)
    assert found.filesystem is None
    assert found.names == ("a member of a Linux RAID (md)", "an xfs file system")
    assert "mdadm" in str(found.remedy)


def test_a_superblock_with_a_wrong_checksum_is_no_rival_and_alone_is_damaged() -> None:
    damaged = Superblock("xfs", "filesystem", is_damaged=True)
    assert content.judge(Look((damaged, Superblock("vfat", "filesystem"))), iso9660).filesystem == "vfat"
    found = content.judge(Look((damaged,)), iso9660)
    assert found.filesystem is None
    assert str(found) == "an xfs file system whose checksum is wrong"
    assert "repair" in str(found.remedy)


# What is no file system.


@pytest.mark.parametrize(
    ("command", "name", "remedy"),
    [
        ("mkswap", "swap space", "swapon"),
        ("cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000", "a LUKS volume", "cryptsetup"),
        ("pvcreate -q", "a physical volume of LVM", "vgchange"),
    ],
)
def test_what_is_no_file_system_is_named_with_what_to_do(disk: Path, command: str, name: str, remedy: str) -> None:
    found = of(made(disk, command, text="secret\n"))
    assert (found.filesystem, str(found)) == (None, name)
    assert remedy in str(found.remedy)
    fault = content.refusal(found, "the disk at 0:1", str(disk), has_key=False)
    assert fault.kind == "refused"
    assert "ensure_filesystem" not in str(fault.remedy)


@pytest.mark.parametrize(("make_disk", "kind"), [(gpt_disk, "GPT"), (mbr_disk, "MBR")])
def test_a_partitioned_disk_is_told_with_its_partitions(
    tmp_path: Path, disk: Path, make_disk: Callable[[Path, list[Path]], Path], kind: str
) -> None:
    part = filesystem_image("ext4", tmp_path / "part.raw", {})
    found = of(make_disk(disk, [part, part, part]))
    assert (found.filesystem, str(found)) == (None, f"a partition table ({kind}) with partitions 1, 2 and 3")
    assert "one of its partitions: partition=1 (--partition 1)" in str(found.remedy)


def test_only_a_disk_that_looks_blank_is_offered_a_file_system(disk: Path) -> None:
    blank(disk, 8)
    assert content.refusal(of(disk), "the disk", str(disk), has_key=False).kind == "no_filesystem"
    for offset in (12345, 8 * MIB - 1):
        write(blank(disk, 8), offset, b"\1")
        fault = content.refusal(of(disk), "the disk", str(disk), has_key=False)
        assert fault.kind == "refused"
        assert "not blank" in fault.message
        assert "--key-file" in str(fault.remedy)


# Partition tables that the kernel does not take, or that are not whole.


@pytest.fixture
def partitioned(tmp_path: Path, disk: Path) -> Path:
    part = filesystem_image("ext4", tmp_path / "part.raw", {})
    return gpt_disk(disk, [part, part])


def test_a_gpt_with_its_first_copy_damaged_is_told_with_its_backup(partitioned: Path) -> None:
    write(partitioned, 512, bytes(512))
    what, remedy = content.instead_of_partitions(str(partitioned), soon()) or ("", "")
    assert what.startswith(
        "the first copy of a partition table (GPT) with partitions 1 and 2 is damaged, and the backup"
    )
    assert "fdisk" in remedy
    tool(f"fdisk {partitioned}", text="w\n")
    assert content.is_gpt_at(lambda offset, length: partitioned.read_bytes()[offset : offset + length], 512)


def test_a_gpt_of_other_sectors_is_told_with_their_size(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("gpt", 4096, (Partition(1, MIB, MIB),))
    monkeypatch.setattr(blkid, "look", lambda node, deadline: Look(hidden=table))
    what, remedy = content.instead_of_partitions(str(blank(disk, 1)), soon()) or ("", "")
    assert "counts in sectors of 4096 bytes, and the disk has sectors of 512" in what
    assert "--sector-size 4096" in remedy


def test_what_is_there_instead_of_partitions_is_told(disk: Path) -> None:
    what, remedy = content.instead_of_partitions(str(made(disk, "mkfs.ext4 -q -F")), soon()) or ("", "")
    assert what.endswith("and holds an ext4 file system")
    assert "leave the partition out" in remedy
    assert content.instead_of_partitions(str(blank(disk, 8)), soon()) is None
    assert content.instead_of_partitions(str(disk.with_name("none")), soon()) is None


def test_a_grown_disk_is_told_where_its_gpts_backup_is(partitioned: Path) -> None:
    assert not content.notes_of_table(str(partitioned))
    last = partitioned.stat().st_size // 512 - 1
    with partitioned.open("r+b") as file:
        file.truncate(partitioned.stat().st_size + 8 * MIB)
    (note,) = content.notes_of_table(str(partitioned))
    assert f"is in sector {last}, and the disk now ends with {last + 16384}" in note
    assert "fdisk" in note
    tool(f"fdisk {partitioned}", text="w\n")
    assert not content.notes_of_table(str(partitioned))


def test_a_gpt_without_its_backup_is_told(partitioned: Path) -> None:
    write(partitioned, partitioned.stat().st_size - 512, bytes(512))
    (note,) = content.notes_of_table(str(partitioned))
    assert "no backup at the end" in note


def test_of_a_disk_with_an_mbr_there_is_nothing_to_say(tmp_path: Path, disk: Path) -> None:
    assert not content.notes_of_table(str(mbr_disk(disk, [filesystem_image("ext4", tmp_path / "part.raw", {})])))


def test_high_sierra_which_came_before_iso9660_is_known_at_its_one_place() -> None:
    def disc(sector: int) -> bool:
        descriptor = bytearray(2048)
        descriptor[9:14] = b"CDROM"
        image = bytes(sector * 2048) + bytes(descriptor) + bytes(1 << 16)
        if sector > 16:
            boot = bytearray(2048)
            boot[1:6] = b"CD001"
            image = image[: 16 * 2048] + bytes(boot) + image[17 * 2048 :]
        return content.fits("iso9660", lambda offset, length: image[offset : offset + length])

    assert disc(16)
    assert not disc(17)
