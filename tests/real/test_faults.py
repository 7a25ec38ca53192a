"""Whatever fails once, in whatever step: all is as it was before, or the same call once more finishes it.

Every command to QEMU, request to the agent, write to the store, open and lock of an image is made to fail once, in
adding a disk, giving it back, and growing it. On a real VM. The default takes every sixth of these faults, and
`./dev long` takes all: see `points`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from agreement import check_agreement, is_locked, read_in_guest, sizes_in_guest
from fault_points import DEATHS, Faults
from points import Tell, chosen
from utilityvm import OutcomeUnknown, SCSIMount, UtilityVM, UtilityVMError
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import launch
from utilityvm.hosts.qemu.qmp import Qmp
from utilityvm.machine import paths as places
from utilityvm.store import Store
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

EVERY = 6
MIB = 1 << 20
Start = Callable[..., Awaitable[UtilityVM]]
Act: TypeAlias = Callable[[], Awaitable[object]]


class Bench:
    """One image and a VM, and what is done with them."""

    def __init__(self, vm: UtilityVM, image: Path) -> None:
        self.vm = vm
        self.image = image
        self.held: SCSIMount | None = None

    async def add(self) -> None:
        self.held = await self.vm.add_scsi(self.image, "/data")

    async def release(self) -> None:
        assert self.held
        await self.held.release()
        self.held = None

    async def resize(self) -> None:
        await self.vm.resize_scsi(self.image, self.size_bytes + MIB)

    async def prepare(self, operation: str) -> Act:
        """Have all at hand for the operation, and give it."""
        self.size_bytes = self.image.stat().st_size
        if operation == "add":
            return self.add
        await self.add()
        return {"release": self.release, "resize": self.resize}[operation]

    def state(self) -> object:
        slots = [(view.slot, view.host_path, view.state, view.references) for view in self.vm.scsi_slots()]
        mounts = [(view.guest_path, view.state, view.references) for view in self.vm.scsi_mounts()]
        return slots, mounts, [held.id for held in self.vm.scsi_reservations()]

    async def leave(self) -> None:
        """Give back what is held; then there is nothing of it anywhere."""
        if self.held:
            await self.release()
        assert not self.vm.scsi_slots()
        await self.check()

    async def check(self) -> None:
        await check_agreement(self.vm, [self.image])
        if self.held:
            assert await read_in_guest(self.vm, "/data/greeting") == "hello\n"
            assert await sizes_in_guest(self.vm) == [self.image.stat().st_size]


@pytest.fixture
def bench(vm_booted: UtilityVM, tmp_path: Path) -> Bench:
    return Bench(vm_booted, ext4_image(tmp_path / "disk.raw", {"greeting": "hello\n"}))


@pytest.mark.parametrize("operation", ["add", "release", "resize"])
async def test_after_one_fault_all_is_as_before_or_a_second_call_finishes_it(
    operation: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    faults = Faults(bench.vm, monkeypatch)
    act = await bench.prepare(operation)
    with faults.counted() as counted:
        await act()
    await bench.leave()
    kinds = [fault for fault in counted if fault not in DEATHS]
    points = [(fault, at) for fault in kinds for at in range(1, counted[fault] + 1)]
    tried = chosen(len(points), every=EVERY)
    for number in tried:
        fault, at = points[number - 1]
        act = await bench.prepare(operation)
        before = bench.state()
        error: UtilityVMError | None = None
        with faults.one(fault, at):
            try:
                await act()
            except UtilityVMError as caught:
                error = caught
        try:
            await bench.vm._scsi.repair()
            if error is not None:
                if operation == "add":
                    assert bench.state() == before
                await act()
            await bench.check()
            await bench.leave()
        except BaseException as broken:
            broken.add_note(f"{fault}, number {at}, in {operation}; it raised {error!r}")
            raise
    tell(f"{operation}: {len(tried)} faults of {len(points)}, and all came right")


# The end of a VM.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Store, "set_state"),
        (BridgeGuest, "shutdown"),
        (Qmp, "execute"),
        (launch, "destroy"),
        (Store, "remove"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_stop_that_fails_once_is_finished_by_the_next(
    owner: object, name: str, start: Start, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await start("stopped")
    await vm.add_scsi(disk)
    plain, failed = getattr(owner, name), list[str]()

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(name)
            raise OutcomeUnknown("the test broke it")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_once)
    with suppress(OutcomeUnknown):
        await vm.stop(timeout_s=0)
    await vm.stop(timeout_s=0)
    assert failed
    assert not places.vm_dir(vm.name).exists()
    with Store.open() as store:
        assert store.find(vm.name) is None
    assert not vm.process.is_running()
    assert not is_locked(disk)


async def test_a_close_that_is_cancelled_lets_go_of_the_vm_all_the_same(
    start: Start, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await start("closed", keep=True)
    await vm.add_scsi(disk, "/data", holder="named")
    plain, waits = vm._scsi.settle, asyncio.Event()

    async def settle() -> None:
        if not waits.is_set():
            waits.set()
            await asyncio.Event().wait()
        await plain()

    monkeypatch.setattr(vm._scsi, "settle", settle)
    closing = asyncio.create_task(vm.close())
    await waits.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await vm.close()
    again = await UtilityVM.open("closed")
    assert [held.holder for held in again.scsi_reservations()] == ["named"]
    await again.stop()
