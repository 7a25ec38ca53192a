"""Every public call ends within its time and half a second, whatever stands still: QEMU, the agent, or the store.

What waits for other processes before there is a VM: tests/vm/test_in_time.py.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from real_vms import Start
from utilityvm import ClonePool, DiskSpec, UtilityVM, VMConfig
from utilityvm.errors import UtilityVMError
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths
from utilityvm.store import Store, database
from utilityvm.testing.images import ext4_image
from utilityvm.vm.acquiring import is_acquiring

T = 0.6
BEYOND_S = 0.5
TICK_S = 0.02
SOON_S = 30.0

Call = Callable[[UtilityVM, Path, Path], Awaitable[object]]


def nothing(_: bytes) -> None:
    return


# The call on a VM, the disk that it has at /data, and another one.
CALLS: dict[str, Call] = {
    "ping": lambda vm, disk, other: vm.ping(timeout_s=T),
    "run": lambda vm, disk, other: vm.run(["true"], timeout_s=T),
    "run_streaming": lambda vm, disk, other: vm.run_streaming(["true"], stdout=nothing, stderr=nothing, timeout_s=T),
    "put": lambda vm, disk, other: vm.put(other, "/other", timeout_s=T),
    "get": lambda vm, disk, other: vm.get("/etc/hostname", other.with_name("got"), timeout_s=T),
    "read_bytes": lambda vm, disk, other: vm.read_bytes("/etc/hostname", timeout_s=T),
    "write_bytes": lambda vm, disk, other: vm.write_bytes("/written", b"", timeout_s=T),
    "start_program": lambda vm, disk, other: vm.start_program(["true"], timeout_s=T),
    "programs": lambda vm, disk, other: vm.programs(timeout_s=T),
    "program": lambda vm, disk, other: vm.program(1, timeout_s=T),
    "follow_program": lambda vm, disk, other: vm.follow_program(1, timeout_s=T),
    "add_scsi": lambda vm, disk, other: vm.add_scsi(other, "/other", timeout_s=T),
    "add_scsi_physical_disk": lambda vm, disk, other: vm.add_scsi_physical_disk(other, "/other", timeout_s=T),
    "add_scratch": lambda vm, disk, other: vm.add_scratch(16 << 20, "/other", timeout_s=T),
    "find_scsi": lambda vm, disk, other: vm.find_scsi(disk, timeout_s=T),
    "add": lambda vm, disk, other: vm.add(DiskSpec(host_path=disk, guest_path="/again"), timeout_s=T),
    "add_scsi_many": lambda vm, disk, other: vm.add_scsi_many(
        [DiskSpec(host_path=disk, guest_path="/1"), DiskSpec(host_path=other, guest_path="/2")], timeout_s=T
    ),
    "resize_scsi": lambda vm, disk, other: vm.resize_scsi(disk, 1 << 30, timeout_s=T),
    "export_scsi_state": lambda vm, disk, other: vm.export_scsi_state(timeout_s=T),
    "resume_scsi": lambda vm, disk, other: vm.resume_scsi(timeout_s=T),
    "save_as_template": lambda vm, disk, other: vm.save_as_template("in-time", timeout_s=T),
    "remove_scsi": lambda vm, disk, other: vm.remove_scsi(disk, timeout_s=T),
    "release": lambda vm, disk, other: vm.release(vm.scsi_reservations()[0].id, timeout_s=T),
    "remove_scsi_many": lambda vm, disk, other: vm.remove_scsi_many(vm.scsi_reservations()[:1], timeout_s=T),
    "wait": lambda vm, disk, other: vm.wait(timeout_s=T),
}
ENDS = {"stop", "close", "start", "clone", "open", "remove"}  # each has a test of its own


@asynccontextmanager
async def in_time(what: str, seconds: float = T) -> AsyncIterator[None]:
    """The block takes no longer than `seconds` and what a call may take beyond, not counting what others' load cost."""
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            late += time.monotonic() - before - TICK_S

    ticking = asyncio.create_task(tick())
    begun = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - begun
        ticking.cancel()
        assert took - late <= seconds + BEYOND_S, f"{what} took {took:.2f} s, {late:.2f} of it for others"


async def stop_qemu(vm: UtilityVM) -> None:
    os.kill(vm.process.pid, signal.SIGSTOP)


async def stop_agent(vm: UtilityVM) -> None:
    with suppress(UtilityVMError):
        await vm.run(["sh", "-c", "kill -STOP $PPID"], timeout_s=1.0)


def test_every_public_call_that_waits_is_tried() -> None:
    waits = {
        name
        for name, member in inspect.getmembers(UtilityVM, inspect.isroutine)
        if name[0] != "_" and (inspect.iscoroutinefunction(member) or is_acquiring(member))
    }
    assert waits == CALLS.keys() | ENDS


# Others are refused at once while one of these is under way.
ALONE = ("export_scsi_state", "save_as_template")


@pytest.mark.parametrize("stand_still", [stop_qemu, stop_agent])
async def test_every_call_ends_in_time(
    start: Start, disk: Path, tmp_path: Path, stand_still: Callable[[UtilityVM], Awaitable[None]]
) -> None:
    vm = await start("in-time")
    other = ext4_image(tmp_path / "other.raw", {})
    await vm.add_scsi(disk, "/data")
    await stand_still(vm)

    async def ends(name: str) -> None:
        async with in_time(name):
            with suppress(UtilityVMError, IndexError):
                await CALLS[name](vm, disk, other)

    await asyncio.gather(*(ends(name) for name in CALLS if name not in ALONE))
    for name in ALONE:
        await ends(name)
    async with in_time("stop"):
        told = await vm.stop(timeout_s=T)
    assert not vm.process.is_running()
    assert [line for line in told if "in-time was killed" in line], "stop says that the guest could not be asked"


@pytest.mark.parametrize("stand_still", [stop_qemu, stop_agent])
async def test_closing_opening_and_removing_end_in_time(
    start: Start, disk: Path, stand_still: Callable[[UtilityVM], Awaitable[None]]
) -> None:
    vm = await start("in-time", keep=True)
    mount = await vm.add_scsi(disk, "/data")
    await stand_still(vm)
    with suppress(UtilityVMError):
        await mount.release(timeout_s=0.1)
    async with in_time("close"):
        await vm.close(timeout_s=T)
    async with in_time("open"):
        with pytest.raises(UtilityVMError):
            await UtilityVM.open("in-time", timeout_s=T)
    async with in_time("remove"):
        assert await UtilityVM.remove("in-time", timeout_s=T)
    assert not vm.process.is_running()


async def test_starting_ends_in_time(booted: str, guest_image: GuestImage) -> None:
    name = "starting-in-time"  # on a busy machine what is left of one is removed after its time, and in the background
    for seconds in (0.0, 0.05, 0.2):
        async with in_time("start", seconds):
            with suppress(UtilityVMError):
                await (await UtilityVM.start(VMConfig(name=name), image=guest_image, timeout_s=seconds)).stop()
        async with in_time("clone", seconds):
            with suppress(UtilityVMError):
                await (await UtilityVM.clone(booted, name, timeout_s=seconds)).stop()


async def test_a_vm_goes_on_after_a_save_that_stood_still(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await start("in-time")
    save = vm._host.save

    async def stop_and_save(state: int, *, timeout_s: float) -> None:
        os.kill(vm.process.pid, signal.SIGSTOP)
        await save(state, timeout_s=timeout_s)

    monkeypatch.setattr(vm._host, "save", stop_and_save)
    try:
        async with in_time("save", 2.0):
            with pytest.raises(UtilityVMError):
                await vm.save_as_template("in-time", timeout_s=2.0)
        async with in_time("run"):
            with pytest.raises(UtilityVMError):
                await vm.run(["true"], timeout_s=T)
    finally:
        os.kill(vm.process.pid, signal.SIGCONT)
    assert (await vm.run(["true"], timeout_s=60)).exit_code == 0
    assert await vm._host.status() == "running"


async def test_no_call_waits_for_a_locked_store_longer_than_its_time(
    start: Start, booted: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for the store and not for its caller waits a minute here: it is told apart on a busy machine too."""
    monkeypatch.setattr(database, "BUSY_S", 60.0)
    vm = await start("in-time")
    kept = await start("in-time-kept", keep=True)
    other = ext4_image(tmp_path / "other.raw", {})
    await vm.add_scsi(disk, "/data")

    async def soon(name: str, call: Awaitable[object]) -> None:
        begun = time.monotonic()
        with suppress(UtilityVMError, IndexError):
            await call
        assert time.monotonic() - begun < SOON_S, name

    async with ClonePool(booted, size=1) as pool:
        await (await pool.acquire()).stop(timeout_s=0)
        with closing(sqlite3.connect(paths.store_file(), isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            waits = [soon(name, CALLS[name](vm, disk, other)) for name in CALLS if name not in ALONE]
            waits += [soon("clone", UtilityVM.clone(booted, "in-time-too", timeout_s=T))]
            waits += [soon("acquire", pool.acquire(timeout_s=T)), soon("close of a pool", pool.close(timeout_s=T))]
            await asyncio.gather(*waits)
            for name in ALONE:
                await soon(name, CALLS[name](vm, disk, other))
            await asyncio.gather(soon("stop", vm.stop(timeout_s=T)), soon("close", kept.close(timeout_s=T)))
    await vm.stop()
    await UtilityVM.remove("in-time-kept")
    with Store.open() as store:
        assert not {found.name for found in store.vms()} & {"in-time", "in-time-kept", "in-time-too"}
    assert not vm.process.is_running()
