"""Rounds of adding and removing, over twelve images of five formats, in one VM.

Forty of them; `./dev long` goes two hundred.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from points import rounds
from utilityvm import SCSIMount, UtilityVM
from utilityvm.scsi.ports import DiskFormat
from utilityvm.testing.images import ext4_image, read_file, suffix

pytestmark = pytest.mark.real

ROUNDS = rounds(40, long=200)
FORMATS = list(DiskFormat)


@dataclass
class Disk:
    """An image and what it must hold; a writable one grows by a line a round."""

    path: Path
    image_format: DiskFormat
    read_only: bool
    guest_path: str
    lines: list[str]
    mounts: list[SCSIMount] = field(default_factory=list)


def make_disks(folder: Path) -> list[Disk]:
    disks = []
    for number in range(12):
        image_format = FORMATS[number % len(FORMATS)]
        path = folder / f"disk{number}.{suffix(image_format)}"
        line = f"I am disk {number}\n"
        ext4_image(path, {"log": line}, image_format=image_format)
        disks.append(Disk(path, image_format, number % 3 == 0, f"/mnt/disk{number}", [line]))
    return disks


async def guest(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def test_random_rounds_keep_every_disk_right(vm_booted: UtilityVM, tmp_path: Path) -> None:
    dice = random.Random(20210419)
    disks = make_disks(tmp_path)
    free_before = len(vm_booted.scsi_slots())
    for number in range(ROUNDS):
        disk = dice.choice(disks)
        if disk.mounts and (len(disk.mounts) == 3 or dice.random() < 0.55):
            await disk.mounts.pop(dice.randrange(len(disk.mounts))).release()
            continue
        mount = await vm_booted.add_scsi(disk.path, disk.guest_path, read_only=disk.read_only)
        disk.mounts.append(mount)
        assert mount.ref_count == len(disk.mounts)
        assert await guest(vm_booted, f"cat {disk.guest_path}/log") == "".join(disk.lines)
        if not disk.read_only:
            disk.lines.append(f"round {number}\n")
            await guest(vm_booted, f"echo round {number} >> {disk.guest_path}/log")
    for disk in disks:
        while disk.mounts:
            await disk.mounts.pop().release()
    assert len(vm_booted.scsi_slots()) == free_before
    assert not vm_booted.scsi_mounts()
    for disk in disks:
        assert read_file(disk.path, "/log", image_format=disk.image_format) == "".join(disk.lines), disk.path.name
