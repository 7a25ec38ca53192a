"""QEMU, the guest's kernel or its agent dies in the middle of work, and whoever waits hears of it at once.

Nobody here waits for a deadline: a step has 30 seconds or more, a caller 60, and each test allows itself 20.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agreement import check_agreement, is_locked, read_in_guest
from fault_points import DEATHS, Faults
from points import chosen
from utilityvm import GuestBusy, OutcomeUnknown, SCSIMount, UtilityVM, UtilityVMError, VMGone
from utilityvm.machine import paths as places
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import SqliteJournal, Store, VMState
from utilityvm.testing.images import ext4_image, read_file

pytestmark = pytest.mark.real

Start = Callable[..., Awaitable[UtilityVM]]

EVERY = 4
PATIENCE_S = 20.0
MIB = 1 << 20


class Doomed:
    """A VM with a disk at /first, and what is done with it while it dies."""

    def __init__(self, vm: UtilityVM, images: list[Path]) -> None:
        self.vm = vm
        self.images = images
        self._held: list[SCSIMount] = []

    async def add(self) -> None:
        self._held.append(await self.vm.add_scsi(self.images[1], "/data"))

    async def release(self) -> None:
        await self._held.pop().release()

    async def resize(self) -> None:
        await self.vm.resize_scsi(self.images[0], self.images[0].stat().st_size + MIB)

    async def prepare(self, operation: str) -> Callable[[], Awaitable[None]]:
        await self.vm.add_scsi(self.images[0], "/first")
        if operation == "release":
            await self.add()
        return {"add": self.add, "release": self.release, "resize": self.resize}[operation]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [ext4_image(tmp_path / f"{name}.raw", {"greeting": "hello\n"}) for name in ("one", "two")]


async def copied(data: bytes) -> None:
    raise AssertionError(f"nobody writes: {data!r}")


@pytest.mark.parametrize("operation", ["add", "release", "resize"])
async def test_wherever_qemu_dies_everybody_hears_it_at_once(
    operation: str, start: Start, vm_booted: UtilityVM, images: list[Path]
) -> None:
    spared = Doomed(await start("spared"), images)
    act = await spared.prepare(operation)
    with pytest.MonkeyPatch.context() as patch, Faults(spared.vm, patch).counted() as counted:
        await act()
    await spared.vm.stop()
    points = [(fault, at) for fault in DEATHS for at in range(1, counted[fault] + 1)]
    assert len(points) >= 3
    for number in chosen(len(points), every=EVERY):
        fault, at = points[number - 1]
        vm = await start(f"doomed{number}")
        act = await Doomed(vm, images).prepare(operation)
        async with asyncio.timeout(PATIENCE_S):
            others = [
                asyncio.create_task(one)
                for one in (
                    vm.run(["sleep", "1000"]),
                    vm.run_streaming(["sleep", "1000"], stdout=copied, stderr=copied),
                )
            ]
            dead = asyncio.create_task(vm.wait())
            await vm.ping()  # they have begun
            with pytest.MonkeyPatch.context() as patch:
                faults = Faults(vm, patch)
                sharing = asyncio.create_task(vm.add_scsi(images[1], "/data") if operation == "add" else vm.wait())
                with faults.one(fault, at):
                    error = await error_of(act())
                    await dead
            assert isinstance(error, VMGone) or (error is None and operation == "release"), f"{fault} {at}: {error!r}"
            assert [type(await error_of(other)) for other in others] == [VMGone, VMGone]
            assert operation != "add" or isinstance(await error_of(sharing), VMGone)
            assert isinstance(await error_of(vm.add_scsi(images[1])), VMGone)
        await check_dead(vm)
        await vm.stop()
        assert not places.vm_dir(vm.name).exists()
        assert not any(map(is_locked, images))
    for image in images:  # whole, and free for others
        async with vm_booted.add_scsi(image, "/again"):
            assert await read_in_guest(vm_booted, "/again/greeting") == "hello\n"
        run([find_program("e2fsck", package="e2fsprogs"), "-fn", image])


async def error_of(call: Awaitable[object]) -> UtilityVMError | None:
    try:
        await call
    except UtilityVMError as error:
        return error
    return None


async def check_dead(vm: UtilityVM) -> None:
    assert not vm.is_running
    assert not vm.scsi_slots()
    assert not vm.scsi_reservations()
    with Store.open() as store:
        async with asyncio.timeout(20):
            while (record := store.get(vm.name)).state is not VMState.DEAD:  # written in the background
                await asyncio.sleep(0)
        assert not SqliteJournal(store, record).read()


async def test_a_kernel_that_panics_ends_its_vm_and_the_console_says_why(start: Start, images: list[Path]) -> None:
    vm = await start("panics")
    async with asyncio.timeout(PATIENCE_S):
        waiting = asyncio.create_task(vm.run(["sleep", "1000"]))
        await vm.add_scsi(images[0], "/data")
        assert isinstance(await error_of(vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000"])), VMGone)
        assert isinstance(said := await error_of(waiting), VMGone)
        assert str(said) == str(await vm.wait()), "the call tells of the VM's end, and not of the connection's"
    await check_dead(vm)
    assert "Kernel panic" in vm.console()
    await vm.stop()
    assert read_file(images[0], "/greeting", image_format=DiskFormat.RAW) == "hello\n"


async def test_an_agent_that_dies_in_a_mount_leaves_what_a_second_call_finishes(
    vm_booted: UtilityVM, tmp_path: Path
) -> None:
    image = tmp_path / "blank.raw"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    vm = vm_booted
    async with asyncio.timeout(PATIENCE_S):
        events = vm.scsi_events()
        adding = asyncio.create_task(vm.add_scsi(image, "/data", ensure_filesystem=True))
        async for event in events:
            if event.what == "mounting":
                break
        assert isinstance(await error_of(vm.run(["sh", "-c", "kill -9 $PPID; exec sleep 1000"])), OutcomeUnknown)
        held = None
        try:
            held = await adding
        except (OutcomeUnknown, GuestBusy):
            while vm.scsi_slots():
                await vm._scsi.repair()  # what makes the file system goes on, and has the disk until its end
        held = held or await vm.add_scsi(image, "/data", ensure_filesystem=True)
        await check_agreement(vm, [image])
        await held.release()
        await check_agreement(vm, [image])
    run([find_program("e2fsck", package="e2fsprogs"), "-fn", image])
