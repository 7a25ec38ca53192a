"""Every call ends in its time, whatever another process holds. No VM is needed: what is held comes before it.

With real VMs, and what stands still in them: tests/real/test_in_time.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from utilityvm import (
    ClonePool,
    GuestImage,
    Leftover,
    LeftoverKind,
    StoreError,
    UtilityVM,
    UtilityVMError,
    examine_vm,
    remove_leftover,
    repair_vm,
)
from utilityvm.machine import paths, patience
from utilityvm.machine.processes import started_at
from utilityvm.store import Store, VMState, database
from utilityvm.store.ownership import Ownership
from utilityvm.tasks import finish

T = 0.2
STUCK_S = 60.0  # what waits for what is held, and not for its caller, takes as long
SOON_S = 15.0  # and what waits for its caller less, also on a machine that is very busy


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for what in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"UTILITYVM_{what}_DIR", str(tmp_path / what.lower()))
    monkeypatch.setattr(database, "BUSY_S", STUCK_S)
    return tmp_path


@pytest.fixture(autouse=True)
def vms(folders: Path) -> Iterator[None]:
    """A VM `runs`, and one that is dead."""
    with subprocess.Popen(["sleep", "1000"]) as process, Store.open() as store:
        runs = store.add("runs", uuid="u-1", config={"memory_mib": 256})
        store.set_process(runs, {"pid": process.pid, "started": started_at(process.pid)})
        store.set_state(runs, VMState.RUNNING)
        store.set_state(store.add("dead", uuid="u-2", config={}), VMState.DEAD)
        yield
        process.kill()


@pytest.fixture
def image(tmp_path: Path) -> GuestImage:
    files = {name: tmp_path / name for name in ("kernel", "initramfs", "root")}
    about = {"key": "none", "arch": "amd64", "suite": "bookworm", "cmdline": ""}
    return GuestImage(**about, **files, packages=1, built_at=0.0, size_bytes=0)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[GuestImage], Awaitable[object]]] = {
    "start": lambda image: UtilityVM.start("new", image=image, timeout_s=T),
    "open": lambda image: UtilityVM.open("runs", timeout_s=T),
    "remove": lambda image: UtilityVM.remove("runs", timeout_s=T),
    "examine_vm": lambda image: examine_vm("runs", timeout_s=T),
    "repair_vm": lambda image: repair_vm("runs", timeout_s=T),
    "remove_leftover": lambda image: remove_leftover(
        Leftover(kind=LeftoverKind.VM, name="dead", path=paths.vm_dir("dead"), size_bytes=0), timeout_s=T
    ),
}


@contextmanager
def soon() -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SOON_S


@contextmanager
def held_by_a_writer() -> Iterator[None]:
    with closing(sqlite3.connect(paths.store_file(), isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_locked_store_is_waited_for_no_longer_than_the_caller_waits(
    call: Callable[[GuestImage], Awaitable[object]], image: GuestImage
) -> None:
    with held_by_a_writer(), soon(), pytest.raises(UtilityVMError):
        await call(image)
    with Store.open() as store:
        assert {vm.name for vm in store.vms()} == {"runs", "dead"}


@pytest.mark.parametrize("call", [CALLS[name] for name in CALLS if name not in ("start", "remove_leftover")])
@pytest.mark.parametrize("has_ticket_only", [True, False])
async def test_a_process_that_stands_still_in_the_queue_is_waited_for_no_longer(
    call: Callable[[GuestImage], Awaitable[object]], has_ticket_only: bool, image: GuestImage
) -> None:
    fellow = await Ownership.acquire(paths.vm_dir("runs"), vm="runs")
    if has_ticket_only:  # it was stopped just before it took the ownership
        taken = fcntl.fcntl(fellow._fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, 1000))
        assert taken
        fcntl.fcntl(fellow._fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, 1))
    try:
        with soon(), pytest.raises(UtilityVMError):  # on a busy machine the time may be up first
            await call(image)
    finally:
        fellow.release()


def _lock(kind: int, byte: int) -> bytes:
    from utilityvm.store.ownership import _FLOCK

    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def test_a_process_that_stands_still_as_it_moves_a_damaged_store_aside_is_not_waited_for() -> None:
    path = paths.store_file()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(b"\xff" * 5000)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with soon(), patience.within(T), pytest.raises(StoreError, match="another process is moving it aside"):
            Store.open()
    finally:
        os.close(fd)


async def test_entering_a_pool_waits_for_no_store() -> None:
    with held_by_a_writer(), soon(), suppress(UtilityVMError):
        async with ClonePool("none", size=1):
            pass


async def test_work_that_goes_on_without_its_caller_is_not_bound_by_its_time() -> None:
    """It would give up at once, for nobody's sake."""
    left: list[float] = []

    async def goes_on() -> None:
        left.append(patience.left_s(50))

    with patience.within(10):
        assert patience.left_s(50) <= 10
        with patience.within(20):
            assert patience.left_s(50) <= 10, "a part of a call takes no longer than the call"
        work = asyncio.create_task(finish(goes_on()))
    await work
    assert left == [50]


def test_one_who_is_out_of_time_waits_for_what_is_held_in_the_ordinary_course() -> None:
    with patience.within(0):
        assert patience.left_s(50) == patience.SHORTEST_S
    assert partial(patience.left_s, 50)() == 50
