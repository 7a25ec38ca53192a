"""What a disk holds is found by libblkid in the guest; what is not mounted is named, with what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from filesystem_images import MIB, blank, digest, filesystem_image, gpt_disk
from in_guest import mount_at, output
from utilityvm import GuestBusy, GuestRefused, UtilityVM
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real


def tool(command: str, *, text: str = "") -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(command.split(), check=True, input=text.encode(), capture_output=True)


async def refusal(vm: UtilityVM, disk: Path, partition: int = 0) -> tuple[str, str]:
    """The error and its remedy of a mount that is refused, and changes nothing."""
    before = digest(disk)
    with pytest.raises(GuestRefused) as caught:
        await vm.add_scsi(disk, "/data", partition=partition)
    assert not vm.scsi_slots()
    assert digest(disk) == before
    return str(caught.value), str(caught.value.remedy)


async def test_what_is_no_file_system_of_the_guests_is_named(vm: UtilityVM, tmp_path: Path) -> None:
    for command, name, remedy in (
        ("mkswap", "swap space", "swapon"),
        ("cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000", "a LUKS volume", "cryptsetup"),
        ("mkfs.ntfs -q -F", "as ntfs3: the guest's kernel knows no such file system", "--kernel"),
    ):
        disk = blank(tmp_path / "disk.raw", 32)
        tool(f"{command} {disk}", text="secret\n")
        said, advice = await refusal(vm, disk)
        assert name in said
        assert remedy in advice
        assert "ensure_filesystem" not in advice


async def test_of_two_file_systems_neither_is_mounted_unless_it_is_named(vm: UtilityVM, tmp_path: Path) -> None:
    disk = ext4_image(tmp_path / "disk.raw", {}, size_mib=64)
    superblock = disk.read_bytes()[1024:3072]
    tool(f"mkfs.vfat -F 32 {disk}")
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write(superblock)
    said, advice = await refusal(vm, disk)
    assert "a vfat file system and an ext4 file system" in said
    assert "filesystem=vfat" in advice
    async with await vm.add_scsi(disk, "/data", filesystem="vfat", read_only=True):
        assert (await mount_at(vm, "/data")).filesystem == "vfat"


@pytest.mark.parametrize("kind", ["iso9660", "squashfs"])
async def test_what_cannot_be_written_to_is_mounted_read_only_and_that_is_told(
    vm: UtilityVM, tmp_path: Path, kind: str
) -> None:
    disk, tree = tmp_path / "disk.raw", tmp_path / "tree"
    tree.mkdir()
    (tree / "greeting").write_text("hello\n")
    match kind:
        case "iso9660":
            tool(f"xorriso -as mkisofs -quiet -R -o {disk} {tree}")
        case _:
            filesystem_image(kind, disk, {"greeting": "hello\n"})
    before = digest(disk)
    async with vm.add_scsi(disk, "/data") as mount:
        found = await mount_at(vm, "/data")
        assert (found.filesystem, "ro" in found.options) == (kind, True)
        assert await output(vm, "cat /data/greeting") == "hello\n"
    assert "/data is mounted read-only" in mount.notes[0]
    assert digest(disk) == before


async def test_a_journal_that_was_replayed_is_told_and_a_clean_mount_says_nothing(
    vm: UtilityVM, tmp_path: Path
) -> None:
    disk = ext4_image(tmp_path / "disk.raw", {})
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", disk], check=True, capture_output=True)
    async with vm.add_scsi(disk, "/data") as mount:
        (note,) = mount.notes
    assert re.fullmatch(r"the kernel says of the file system at /data: EXT4-fs \(sd\w+\): recovery complete", note)
    async with vm.add_scsi(disk, "/data") as mount:
        assert mount.notes == ()


async def test_udf_is_found(vm: UtilityVM, tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk.raw", 16)
    tool(f"mkudffs {disk}")
    async with await vm.add_scsi(disk, "/data"):
        assert (await mount_at(vm, "/data")).filesystem == "udf"
        await output(vm, "echo hello > /data/greeting")
    async with await vm.add_scsi(disk, "/data", read_only=True):
        assert await output(vm, "cat /data/greeting") == "hello\n"


async def test_a_damaged_gpt_is_told_with_its_backup_and_a_grown_one_works_and_is_told(
    vm: UtilityVM, tmp_path: Path
) -> None:
    disk = gpt_disk(tmp_path / "disk.raw", [ext4_image(tmp_path / "part.raw", {"greeting": "hello\n"})])
    os.truncate(disk, disk.stat().st_size + 8 * MIB)
    async with vm.add_scsi(disk, "/data", partition=1, read_only=True) as mount:
        assert await output(vm, "cat /data/greeting") == "hello\n"
    (note,) = mount.notes
    assert "the backup of the partition table (GPT) is in sector" in note
    os.truncate(disk, disk.stat().st_size - 8 * MIB)
    with disk.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    said, advice = await refusal(vm, disk, partition=1)
    assert "the backup at the end of the disk is whole" in said
    assert "fdisk" in advice


async def test_a_btrfs_over_disks_is_mounted_when_all_are_there_and_says_which_is_not(
    vm: UtilityVM, tmp_path: Path
) -> None:
    disks = [blank(tmp_path / f"{number}.raw", 128) for number in (1, 2, 3)]
    tool(f"mkfs.btrfs -q -f -d raid1 -m raid1 {' '.join(map(str, disks))}")
    async with await vm.add_scsi(disks[0]):
        with pytest.raises(GuestRefused, match=r"3 disks: 2 here \(devid 1, 3\), 1 missing \(devid 2\)") as caught:
            await vm.add_scsi(disks[2], "/data")
        assert "attach the missing disks" in str(caught.value.remedy)
        async with await vm.add_scsi(disks[1]) as second, await vm.add_scsi(disks[2], "/data"):
            await output(vm, "echo hello > /data/greeting")
            with pytest.raises(GuestBusy, match="mounted at /data"):
                await second.release()
            assert await output(vm, "cat /data/greeting") == "hello\n"
