"""What starting, opening and ending a VM have in common: who may, whether it runs, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from utilityvm.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ProtocolError,
    SetupError,
    StartFailed,
    StoreError,
    UtilityVMError,
    VMExists,
    VMGone,
    VMNotFound,
    VMNotRunning,
    VMOwned,
)
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost, QemuProcess, launch
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.log import logger
from utilityvm.machine import paths
from utilityvm.machine.processes import process_with
from utilityvm.scsi.ports import DiskRecord
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, StoredVM, VMState
from utilityvm.store.ownership import Ownership, owner_of
from utilityvm.tasks import Deadline, Undo
from utilityvm.templates import catalog

BOOT_S: Final = 120.0  # KVM needs one second, an emulated processor on a busy machine a good part of a minute
SHUTDOWN_S: Final = 15.0
CONNECT_S: Final = 10.0
_LATER_S: Final = 0.1  # than the steps of a start, which say better why they are out of time
_CONSOLE_LINES: Final = 20
_SEED_BYTES: Final = 64
_TELLING: Final = ("utilityvm:", "Kernel panic", "error", "Error")  # what a line has in it that says why

_log = logger(__name__)


async def claim_name(
    undo: Undo, store: Store, name: str, vm_uuid: str, document: Mapping[str, object]
) -> tuple[StoredVM, Ownership, Path]:
    """Become the owner of a new VM of that name; a dead one of the name is replaced. `undo` gives back the ownership.

    Raises:
        VMExists: a VM of that name runs.
        VMOwned: another process is just starting or ending one.
    """
    folder = paths.vm_dir(name)
    refuse_running(store, name)
    ownership = await Ownership.acquire(folder, vm=name)
    undo.add(_give_back, ownership, folder)
    refuse_running(store, name)
    launch.check_unused(folder, vm=name)  # another store's VM may run there: nothing in the folder is ours then
    if (dead := store.find(name)) is not None:
        await clear(dead, store)
    return store.add(name, uuid=vm_uuid, config=document), ownership, folder


def _give_back(ownership: Ownership, folder: Path) -> None:
    """Let go of the name. The lock goes too, unless another VM's things are in the folder."""
    try:
        is_ours = [entry.name for entry in folder.iterdir()] == [paths.LOCK_FILE]
    except OSError:
        is_ours = False
    ownership.release(remove=is_ours)


@asynccontextmanager
async def coming_up(name: str, deadline: Deadline) -> AsyncIterator[None]:
    """A start that is out of time is one that failed: nothing is left of it, so nothing is unknown.

    Raises:
        StartFailed: says what was not done.
    """
    try:
        async with deadline.limit("the start was not finished", vm=name, later_s=_LATER_S):
            yield
    except DeadlineExceeded as error:
        raise StartFailed(
            f"VM {name} did not come up within {deadline.timeout_s:g} s ({error})", vm=name, remedy="give it more time"
        ) from error


async def boot(host: QemuHost, name: str, *, timeout_s: float) -> BridgeGuest:
    """Wait until the guest's agent answers.

    Raises:
        StartFailed: it did not, or QEMU ended; says what the console says.
    """
    return await _answered(host, name, BridgeGuest.connect(host.process.agent_socket, timeout_s=timeout_s, vm=name))


async def _answered(host: QemuHost, name: str, connecting: Awaitable[BridgeGuest]) -> BridgeGuest:
    begun = time.monotonic()
    try:
        return await connecting
    except (DeadlineExceeded, ProtocolError, VMGone) as error:
        lines = [line.strip() for line in host.console().decode(errors="replace").splitlines() if line.strip()]
        told = [line for mark in _TELLING for line in reversed(lines) if mark in line]
        said = f'its console says "{(told or lines[-1:])[0]}"' if lines else "its console is empty"
        raise StartFailed(
            f"VM {name} did not come up within {time.monotonic() - begun:.0f} s ({error}); {said}",
            console=lines[-_CONSOLE_LINES:],
            vm=name,
            remedy="give it more memory or time; `uvm doctor` tells whether this machine can run VMs",
        ) from error


def new_identity(name: str) -> dict[str, Any]:
    """What a clone is given to be itself: arguments of `BridgeGuest.awaken` and `make_unique`."""
    return {"seed": os.urandom(_SEED_BYTES), "hostname": name, "machine_id": uuid.uuid4().hex}


async def wake(host: QemuHost, name: str, *, timeout_s: float) -> BridgeGuest:
    """Let a clone run, and be itself. What we say is there before it runs, so it is heard at once.

    Raises:
        StartFailed: the agent did not answer, or QEMU ended.
        GuestRefused: it could not be made unique; it must not be used.
    """
    awakening = BridgeGuest.awaken(host.process.agent_socket, **new_identity(name), timeout_s=timeout_s, vm=name)
    connecting = asyncio.ensure_future(_answered(host, name, awakening))
    try:
        await host.resume(timeout_s=timeout_s)
        return await connecting
    except BaseException:
        connecting.cancel()
        await asyncio.wait([connecting])
        if not connecting.cancelled() and connecting.exception() is None:
            await connecting.result().close()
        raise


async def own(store: Store, name: str, *, wait_s: float, must_run: bool = False) -> tuple[StoredVM, Ownership]:
    """Become the owner of a VM that there is; with `must_run`, of one that runs. On failure nothing is left of it.

    Raises:
        VMNotFound, VMNotRunning: also when it ended while we waited.
        VMOwned: another process has it, also after `wait_s` seconds.
        SetupError: it lives in another runtime folder than ours.
    """
    folder = paths.vm_dir(name)
    record = store.get(name)
    _check_folder(record, folder)
    if must_run and owner_of(folder) is None:
        check_running(record, store)  # before a lock is made for it
    ownership = await Ownership.acquire(folder, vm=name, wait_s=wait_s)
    try:
        record = store.get(name)
        if must_run:
            check_running(record, store)
    except VMNotFound:
        ownership.release(remove=True)
        raise
    except BaseException:
        ownership.release()
        raise
    return record, ownership


async def sweep(store: Store, name: str) -> None:
    """Remove the runtime folder of a VM without a record: an owner died just before it wrote one, or had removed it.

    One that a process owns stays, and so does one in which QEMU runs: its store was lost.
    """
    folder = paths.vm_dir(name)
    with suppress(InvalidRequest, VMOwned, VMExists):
        launch.QemuConfig(name=name).check()
        if not folder.is_dir():
            return
        ownership = await Ownership.acquire(folder, vm=name)
        try:
            launch.check_unused(folder, vm=name)
            if store.find(name) is None:
                launch.clean(folder)
                remove_copy(folder)
                ownership.release(remove=True)
        finally:
            ownership.release()


def refuse_running(store: Store, name: str) -> None:
    """Raises:
    VMExists: a VM of that name runs.
    """
    record = store.find(name)
    if record is not None and record.is_alive():
        raise VMExists(
            f"a VM named {name!r} runs already",
            vm=name,
            remedy=f"choose another name, open that VM, or end it: uvm stop {name}",
        )


def check_running(record: StoredVM, store: Store) -> None:
    """Raises:
    VMNotRunning: its QEMU has ended, and the store says so now.
    """
    if record.is_alive():
        return
    if record.state is not VMState.STARTING:
        store.set_dead(record)
    raise not_running(record)


def refuse_unfinished(record: StoredVM) -> None:
    """Raises:
    VMNotRunning: it is a clone that was not made unique, or a template was made of it: it must not go on.
    """
    if record.state is VMState.STARTING and catalog.clone_of(record.config):
        what = "is a clone whose start was cut short"
    elif record.state is VMState.SAVING and (template := catalog.made_of(record.uuid)) is not None:
        what = f"was saved as template {template}"
    else:
        return
    raise VMNotRunning(f"VM {record.name} {what}", vm=record.name, remedy=f"clear it away: uvm stop {record.name}")


def not_running(record: StoredVM) -> VMNotRunning:
    what = "has not come up" if record.state is VMState.STARTING else "is dead"
    return VMNotRunning(
        f"VM {record.name} {what}: its QEMU does not run",
        vm=record.name,
        remedy=f"see why: uvm log {record.name}; clear it away: uvm stop {record.name}",
    )


def process_of(record: StoredVM) -> QemuProcess:
    """Raises:
    StoreError: the record is not one that we wrote.
    """
    try:
        process = QemuProcess.from_json(record.process or {})
        if (process.name, process.uuid) != (record.name, record.uuid):
            raise ValueError(f"it is of VM {process.name}, {process.uuid}")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"the store's record of VM {record.name} is not one that utilityvm wrote: {error!r}",
            vm=record.name,
            remedy=f"end that VM, which does not need the record: uvm stop {record.name}",
        ) from error
    return process


async def strays(host: QemuHost, journal: SqliteJournal) -> dict[Slot, str]:
    """What QEMU has and the journal has not, as after the store was lost. It may be in use: its slots are kept off."""
    known = {record.attachment for record in journal.read() if isinstance(record, DiskRecord)}
    return {one.slot: "a disk that is in no journal" for one in await host.attachments() if one.attachment not in known}


async def shut_down(record: StoredVM, *, timeout_s: float) -> None:
    """Have the guest power off within `timeout_s` seconds; one that does not, or does not answer, is to be killed."""
    with suppress(UtilityVMError, TimeoutError):
        process = process_of(record)
        async with asyncio.timeout(timeout_s), AsyncExitStack() as closing:
            host = await QemuHost.connect(process, timeout_s=CONNECT_S)
            closing.push_async_callback(host.close)
            guest = await BridgeGuest.connect(process.agent_socket, timeout_s=CONNECT_S, vm=record.name)
            closing.push_async_callback(guest.close)
            await guest.shutdown(timeout_s=SHUTDOWN_S)
            await asyncio.wait([host.gone], timeout=SHUTDOWN_S)


async def clear(record: StoredVM, store: Store) -> None:
    """Remove what is left of a VM: its process if there is one, its runtime folder's files, its record.

    Raises:
        OutcomeUnknown: the kernel does not let its QEMU go; call again.
    """
    if record.process is not None:
        try:
            await launch.destroy(process_of(record))
        except StoreError as error:
            _log.warning("%s", error)
    if (found := process_with("-uuid", record.uuid)) is not None:
        # Its starter died before it could write down the process, or the record lies. No other QEMU has this UUID.
        await _kill(*found)
    folder = paths.vm_dir(record.name)
    launch.clean(folder)
    remove_overlays(record)
    remove_copy(folder)
    store.remove(record)


def remove_overlays(record: StoredVM) -> None:
    """Remove what a clone wrote to its disks. Its QEMU must have ended. Removed before is done."""
    shutil.rmtree(paths.overlays_dir(record.uuid), ignore_errors=True)


def write_copy(folder: Path, record: StoredVM, process: Mapping[str, object]) -> None:
    """Put a copy of the VM's record beside its sockets, from which a lost store is made again."""
    document = {"name": record.name, "uuid": record.uuid, "created": record.created, "config": record.config}
    document["store"] = str(paths.store_file())
    path = folder / paths.RECORD_FILE
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps({**document, "process": process}))
        temporary.replace(path)
    except OSError as error:
        _log.warning("no copy of the record of VM %s: %s", record.name, error)
        temporary.unlink(missing_ok=True)


def remove_copy(folder: Path) -> None:
    """Removed before is done."""
    (folder / paths.RECORD_FILE).unlink(missing_ok=True)


def _check_folder(record: StoredVM, folder: Path) -> None:
    """The lock lies in the runtime folder: processes that differ in it would both think that they own the VM."""
    theirs = (record.process or {}).get("folder", str(folder))
    if theirs != str(folder):
        raise SetupError(
            f"VM {record.name} lives in {theirs}, and the runtime folder here is {folder.parent.parent}",
            vm=record.name,
            remedy=f"set UTILITYVM_RUNTIME_DIR to {Path(theirs).parent.parent}",
        )


async def _kill(pid: int, started: str) -> None:
    try:
        watch = Watch(pid, started)
    except VMGone:
        return
    watch.kill()
    await watch.wait(timeout_s=CONNECT_S)
    watch.close()
