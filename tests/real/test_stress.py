"""Many tasks on many disks of one VM, and every slot that a VM has.

`./dev long` runs twenty rounds of each task, and mounts the disk at every slot; UTILITYVM_STRESS=1000 runs as many
rounds as hcsshim's ParallelScsiOps.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from points import rounds
from utilityvm import DiskSpec, NoFreeSlot, SCSIMount, UtilityVM
from utilityvm.scsi.ports import DiskFormat
from utilityvm.scsi.slot import Slot
from utilityvm.testing.images import convert, ext4_image, read_file, suffix

pytestmark = pytest.mark.real

TASKS, DISKS = 16, 40
ROUNDS = int(os.environ.get("UTILITYVM_STRESS", rounds(1, long=20)))
MOUNT_EACH = rounds(48, long=1)  # of the 255 disks
FORMATS = list(DiskFormat)
MARK = "disk 000\n"


class Images:
    """Images whose file `mark` says which one it is: copies of one file system with other bytes in that place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template = ext4_image(folder / "template", {"mark": MARK}, size_mib=4).read_bytes()
        assert self._template.count(MARK.encode()) == 1

    def make(self, number: int, image_format: DiskFormat = DiskFormat.RAW) -> Path:
        path = self._folder / f"{number}.{suffix(image_format)}"
        raw = path.with_suffix(".made") if image_format is not DiskFormat.RAW else path
        raw.write_bytes(self._template.replace(MARK.encode(), mark(number).encode()))
        if raw != path:
            convert(raw, path, source_format=DiskFormat.RAW, image_format=image_format)
            raw.unlink()
        return path


def mark(number: int) -> str:
    return f"disk {number:03}\n"


@dataclass
class Disk:
    """An image that tasks share. Those that write to it each write a file of their own."""

    number: int
    path: Path
    image_format: DiskFormat
    read_only: bool
    written: Counter[int] = field(default_factory=Counter)  # by task: the lines in its file

    @property
    def guest_path(self) -> str:
        return f"/mnt/{self.number}"


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, f"{script}: {result.stderr.decode()}"
    return result.stdout.decode()


async def one_round(vm: UtilityVM, disk: Disk, task: int, dice: random.Random) -> None:
    """Attach it, mount it, look at it, write to it, and give both back in some order; at times, give up."""
    attached = await vm.add_scsi(disk.path, read_only=disk.read_only)
    adding = asyncio.create_task(vm.add_scsi(disk.path, disk.guest_path, read_only=disk.read_only))
    if dice.random() < 0.1:
        for _ in range(dice.randrange(30)):
            await asyncio.sleep(0)
        adding.cancel()
        (mounted,) = await asyncio.gather(adding, return_exceptions=True)
        if isinstance(mounted, SCSIMount):
            await mounted.release()
        await attached.release()
        return
    mounted = await adding
    assert mounted.slot == attached.slot
    held = [attached, mounted]
    if dice.random() < 0.5:
        await held.pop(0).release()
    script = f"cat {disk.guest_path}/mark"
    if not disk.read_only:
        script += f"; echo {task} >> {disk.guest_path}/{task}"
        disk.written[task] += 1
    assert await output(vm, script) == mark(disk.number)
    dice.shuffle(held)
    for mount in held:
        await mount.release()


async def test_tasks_that_share_disks_at_random_get_the_right_ones_and_lose_nothing(
    vm_booted: UtilityVM, tmp_path: Path
) -> None:
    images = Images(tmp_path)
    disks = []
    for number in range(DISKS):
        image_format = FORMATS[number % len(FORMATS)]
        disks.append(Disk(number, images.make(number, image_format), image_format, read_only=number % 3 == 0))

    async def work(task: int) -> None:
        dice = random.Random(task)
        for _ in range(ROUNDS):
            await one_round(vm_booted, dice.choice(disks), task, dice)

    async with asyncio.TaskGroup() as group:
        for task in range(TASKS):
            group.create_task(work(task))
    await vm_booted._scsi.settle()
    assert not vm_booted.scsi_slots()
    assert not vm_booted.scsi_mounts()
    assert not await vm_booted._guest.mounts()
    assert not await vm_booted._host.attachments()
    for disk in disks:
        for task, lines in disk.written.items():
            assert read_file(disk.path, f"/{task}", image_format=disk.image_format) == f"{task}\n" * lines


async def test_every_slot_is_filled_used_and_given_back(vm_booted: UtilityVM, tmp_path: Path) -> None:
    vm = vm_booted
    images = Images(tmp_path)
    slots = [Slot(controller, lun) for controller in range(4) for lun in range(64)][1:]
    paths = {slot: images.make(slot.number) for slot in slots}
    attached = await vm.add_scsi_many([DiskSpec(host_path=path) for path in paths.values()], holder="the test")
    held = {mount.slot: mount for mount in attached if isinstance(mount, SCSIMount)}
    assert sorted(held) == slots
    paths = {slot: mount.host_path for slot, mount in held.items()}  # who came first got the lowest
    seen = slots[::-MOUNT_EACH][::-1]
    specs = [DiskSpec(host_path=paths[slot], guest_path=f"/all/of/them/{slot.number:03}") for slot in seen]
    mounts = await vm.add_scsi_many(specs, timeout_s=300)
    assert await output(vm, "cat /all/of/them/*/mark") == "".join(mark(int(paths[slot].stem)) for slot in seen)

    one_more = images.make(0)
    with pytest.raises(NoFreeSlot, match="256 of 256") as caught:
        await vm.add_scsi(one_more, "/mnt/more")
    told = caught.value.holders
    assert len(told) == 256
    assert told[0] == "0:0: the VM's root disk (reserved)"
    assert told[1].startswith(f"0:1: {paths[Slot(0, 1)]} (attached, held by the test")
    shared = await vm.add_scsi(paths[Slot(0, 1)])  # what is attached can still be shared
    await shared.release()

    assert await vm.remove_scsi_many([one for one in mounts if isinstance(one, SCSIMount)]) == [None] * len(seen)
    free = Slot(1, 40)
    await held.pop(free).release()
    async with vm.add_scsi(one_more, "/mnt/more") as more:
        assert more.slot == free
        assert await output(vm, "cat /mnt/more/mark") == mark(0)
    assert await vm.remove_scsi_many(held.values(), timeout_s=300) == [None] * 254
    assert not vm.scsi_slots()
    assert await output(vm, "ls / | grep -c all || true") == "0\n", "what they shared is gone with the last of them"
    assert not await vm._guest.mounts()
    assert not await vm._host.attachments()
