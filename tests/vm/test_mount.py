"""What leaving `async with` of a mount does. The VM is a manager on fakes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

from scsi_bench import Bench
from utilityvm.errors import GuestBusy, NotAttached, UtilityVMError, VMGone
from utilityvm.scsi.ports import MountRecord
from utilityvm.vm.mount import OnBusy, SCSIMount


class VM:
    """As much of a `UtilityVM` as a mount asks for."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.scsi = self._scsi = self.bench.manager

    async def release(self, reservation: Any, *, force: bool, timeout_s: float) -> None:
        await self.scsi.release(reservation, force=force, timeout_s=timeout_s)

    async def mount(self, on_busy: OnBusy = "raise") -> SCSIMount:
        return SCSIMount(self, await self.bench.add("a", "/1"), on_busy=on_busy)  # type: ignore[arg-type]

    def use(self) -> None:
        """A program in the guest works in the mount."""
        self.bench.world.busy[PurePosixPath("/1")] = "sh"


@pytest.fixture
def vm() -> VM:
    return VM()


async def test_leaving_the_block_gives_it_back(vm: VM) -> None:
    async with await vm.mount() as mount:
        assert mount.ref_count == 1
    assert mount.ref_count == 0
    vm.bench.check_empty()


async def test_leaving_is_done_by_whatever_call_it_was_given_back_inside(vm: VM) -> None:
    async with await vm.mount() as mount:
        await mount.release()
    async with await vm.mount() as mount:
        await vm.scsi.release(mount.id)
    async with await vm.mount():
        await vm.scsi.remove("a")
    async with await vm.mount() as mount:
        await SCSIMount(vm, mount._reservation).release()  # type: ignore[arg-type]
    async with await vm.mount() as mount:
        assert await vm.scsi.remove_many([mount.id]) == [None]
    async with await vm.mount() as mount:
        await mount.release()
        vm.scsi._workers.released.clear()  # so long ago that nobody remembers
        with pytest.raises(NotAttached):
            await mount.release()
    vm.bench.check_empty()


async def test_a_disk_that_is_in_use_is_an_error_on_the_way_out(vm: VM) -> None:
    with pytest.raises(GuestBusy):
        async with await vm.mount():
            vm.use()
    assert len(vm.scsi.reservations()) == 1


async def test_the_error_of_the_block_says_what_was_not_released(vm: VM) -> None:
    with pytest.raises(ValueError, match="the job's own") as raised:  # noqa: PT012
        async with await vm.mount():
            vm.use()
            raise ValueError("the job's own error")
    (note,) = raised.value.__notes__
    assert "a at 0:0 was not released" in note
    assert "in use" in note


async def test_a_mount_can_be_told_to_force_its_way_out(vm: VM) -> None:
    async with await vm.mount("force"):
        vm.use()
    vm.bench.check_empty()
    with pytest.raises(ValueError, match="own") as raised:
        async with await vm.mount("force"):
            raise ValueError("the job's own error")
    assert not hasattr(raised.value, "__notes__")
    vm.bench.check_empty()


async def test_force_is_for_a_disk_that_is_in_use_and_for_nothing_else(vm: VM) -> None:
    vm.bench.world.dead.add("file:a")
    with pytest.raises(UtilityVMError, match="does not reach"):
        async with await vm.mount("force"):
            pass
    assert len(vm.scsi.reservations()) == 1


async def test_the_disk_of_a_vm_that_died_is_free(vm: VM) -> None:
    async with await vm.mount():
        vm.scsi.mark_gone(VMGone("QEMU was killed"))


async def test_a_mount_has_the_notes_of_when_it_was_made_also_for_who_shares_it(vm: VM) -> None:
    assert (await vm.mount()).notes == ()
    await vm.scsi.remove("a")
    vm.bench.world.notes[PurePosixPath("/1")] = ["it is read-only"]
    made = await vm.mount()
    vm.bench.world.notes.clear()
    shared = await vm.mount()
    assert made.notes == shared.notes == ("it is read-only",)
    records = [record for record in vm.bench.journal.read() if isinstance(record, MountRecord)]
    assert [record.notes for record in records] == [("it is read-only",)], "a later owner has them from the journal"
