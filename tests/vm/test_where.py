"""Where an error happened is filled in by the calls that know it: whatever raised it, and however far down."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import ClassVar

import pytest

import utilityvm
from utilityvm.errors import GuestRefused, NoFreeSlot, UtilityVMError, VMGone, bound
from utilityvm.machine.oserrors import is_typed, typed_errors
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig
from utilityvm.scsi.slot import Slot
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld, MemoryJournal
from utilityvm.testing.fakes import Break


def test_what_is_not_said_is_filled_in_and_what_is_said_stays() -> None:
    with pytest.raises(GuestRefused) as raised, bound(vm="outer", slot=Slot(0, 2), host_path="/b"), bound(vm="v"):
        raise GuestRefused("no", host_path="/a")
    error = raised.value
    assert (error.vm, error.slot, error.host_path) == ("v", Slot(0, 2), Path("/a"))


def test_the_end_of_a_vm_is_of_no_disk() -> None:
    """One such error is told to all who wait for something of the VM."""
    with pytest.raises(VMGone) as raised, bound(vm="v", slot=Slot(0, 2), host_path="/b"):
        raise VMGone("QEMU was killed")
    error = raised.value
    assert (error.vm, error.slot, error.host_path) == ("v", None, None)


@typed_errors
class Thing:
    """Its calls fail, each in its way."""

    _where: ClassVar = {"vm": "v", "host_path": "/a"}

    def ours(self) -> None:
        raise NoFreeSlot("no free slot")

    def the_systems(self) -> None:
        raise OSError(28, "No space left on device")

    async def later(self) -> None:
        raise NoFreeSlot("no free slot")


async def test_the_errors_of_an_objects_calls_say_where_it_is() -> None:
    thing = Thing()
    for call in (thing.ours, thing.the_systems):
        with pytest.raises(UtilityVMError) as raised:
            call()
        assert (raised.value.vm, raised.value.host_path) == ("v", Path("/a"))
    with pytest.raises(NoFreeSlot) as late:
        await thing.later()
    assert late.value.vm == "v"


@pytest.mark.parametrize("kind", [utilityvm.UtilityVM, utilityvm.SCSIMount, utilityvm.Program, utilityvm.ProgramPieces])
def test_what_belongs_to_a_vm_knows_where_it_is(kind: type) -> None:
    assert hasattr(kind, "_where")
    for name, member in inspect.getmembers(kind, inspect.iscoroutinefunction):
        assert name.startswith("_") or is_typed(member), name


@pytest.mark.parametrize("step", ["attach", "mount", "unmount", "eject", "detach"])
@pytest.mark.parametrize("how", [Break.REFUSE, Break.LOSE_REQUEST])
async def test_a_step_that_fails_names_vm_slot_and_disk(step: str, how: Break) -> None:
    world = FakeWorld()
    manager = ScsiManager(FakeHost(world), FakeGuest(world), MemoryJournal(), controllers=1, vm="v")
    world.fail_next(step, how)
    disk = DiskRequest(host_path="/a", read_only=True)
    with pytest.raises(UtilityVMError) as raised:
        await manager.release(await manager.add(disk, mount=MountConfig(), holder=Holder(name="test")))
    error = raised.value
    assert (error.vm, error.slot, error.host_path) == ("v", Slot(0, 0), Path("/a"))
