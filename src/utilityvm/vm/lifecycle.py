"""What starting, opening and ending a VM have in common: who may, whether it runs, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final

from utilityvm.errors import (
    InvalidRequest,
    SetupError,
    StoreError,
    UtilityVMError,
    VMExists,
    VMGone,
    VMNotFound,
    VMNotRunning,
    VMOwned,
)
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost, QemuProcess, launch, userids
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.log import logger
from utilityvm.machine import paths, runtime
from utilityvm.machine.processes import Life, process_with
from utilityvm.machine.threads import in_thread
from utilityvm.scsi.ports import DiskRecord
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, StoredVM, VMState, database, recover
from utilityvm.store.catalog import is_plain
from utilityvm.store.ownership import Ownership, owned_by, owner_of, read_owner
from utilityvm.tasks import Undo
from utilityvm.templates import catalog

BOOT_S: Final = 120.0  # KVM needs one second, an emulated processor on a busy machine a good part of a minute
SHUTDOWN_S: Final = 15.0
CONNECT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.02
_SEIZE_S: Final = 1.0  # for the owner of a VM that was killed to clear it away

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
    await store.lane.run(refuse_running, store, name)
    dead, ownership = await _acquire(store, name, wait_s=0.0)
    undo.add(in_thread, _give_back, ownership, folder, always=True)
    await store.lane.run(refuse_running, store, name)
    if dead is not None:
        await _end_process(dead, store)  # it may run: its starter died before it could write down the process
    await in_thread(launch.check_unused, folder, name)  # another store's VM may run there: nothing is ours then
    if dead is not None:
        await clear(dead, store)
    adding = partial(store.add, name, uuid=vm_uuid, config=document, owner=ownership.owner.to_json())
    record = await store.lane.run(adding, late=store.remove)
    ownership.on_release = partial(_drop_owner, store, record, ownership)
    return record, ownership, folder


async def _acquire(store: Store, name: str, *, wait_s: float) -> tuple[StoredVM | None, Ownership]:
    """Own the name; gives the record of the VM that has it. See `ownership` for why the lock alone does not decide.

    Raises:
        VMOwned: another process owns the VM, also after `wait_s` seconds.
        SetupError: its runtime folder cannot be used.
    """
    until = time.monotonic() + wait_s
    folder = paths.vm_dir(name)
    while True:
        ownership = await Ownership.acquire(folder, vm=name, wait_s=max(until - time.monotonic(), 0.0))
        try:
            record = await store.lane.run(store.find, name)
            owner = read_owner(record.owner) if record else None
            if not ownership.belongs_to_other(owner):
                return record, ownership
            if time.monotonic() >= until:
                raise owned_by(owner, ownership.path, name, wait_s=wait_s)
        except BaseException:
            await in_thread(partial(ownership.release, remove=ownership.is_new), always=True)
            raise
        await in_thread(partial(ownership.release, remove=ownership.is_new), always=True)
        await asyncio.sleep(_LOOK_AGAIN_S)


def _give_back(ownership: Ownership, folder: Path) -> None:
    """Let go of the name. The lock goes too, unless another VM's things are in the folder."""
    try:
        is_ours = [entry.name for entry in folder.iterdir()] == [paths.LOCK_FILE]
    except OSError:
        is_ours = False
    ownership.release(remove=is_ours)


async def own(store: Store, name: str, *, wait_s: float, must_run: bool = False) -> tuple[StoredVM, Ownership]:
    """Become the owner of a VM that there is; with `must_run`, of one that runs. On failure nothing is left of it.

    Raises:
        VMNotFound, VMNotRunning: also when it ended while we waited.
        VMOwned: another process has it, also after `wait_s` seconds.
        SetupError: it lives in another runtime folder than ours.
    """
    folder = paths.vm_dir(name)
    found = await store.lane.run(store.get, name)
    _check_folder(found, folder)
    if must_run and await in_thread(owner_of, folder, found.owner) is None:
        await store.lane.run(check_running, found, store)  # before a lock is made for it
    record, ownership = await _acquire(store, name, wait_s=wait_s)
    try:
        if record is None:
            await store.lane.run(store.get, name)  # says which there are
            raise VMNotFound(f"VM {name} ended meanwhile", vm=name)
        if must_run:
            await store.lane.run(check_running, record, store)
        try:
            await store.lane.run(store.set_owner, record, ownership.owner.to_json())
        except database.StoreBusy:
            raise
        except StoreError as error:  # a full disk must not keep a VM running
            _log.warning("not written down: %s", error)
        ownership.on_release = partial(_drop_owner, store, record, ownership)
    except VMNotFound:
        await in_thread(partial(ownership.release, remove=True), always=True)
        raise
    except BaseException:
        await in_thread(ownership.release, always=True)
        raise
    return record, ownership


def _drop_owner(store: Store, record: StoredVM, ownership: Ownership) -> None:
    try:
        store.drop_owner(record, ownership.owner.to_json())
    except StoreError as error:
        _log.warning("not written down: %s", error)


async def seize(store: Store, name: str, *, wait_s: float) -> tuple[StoredVM, Ownership] | None:
    """Kill the VM's QEMU and own what is left of it, whoever had it. None: its owner has cleared it away meanwhile.

    The owner is waited for, for a moment: it hears that its VM is gone, and clears it away itself. One that stands
    still does not; it touches nothing of what comes later under that name.

    Raises:
        VMNotFound: there is no VM of that name.
        OutcomeUnknown: the kernel does not let its QEMU go; call again.
    """
    record = await store.lane.run(store.get, name)
    _check_folder(record, paths.vm_dir(name))
    await _end_process(record, store)
    try:
        return await own(store, name, wait_s=min(wait_s, _SEIZE_S))
    except VMNotFound:
        return None
    except VMOwned as error:
        if (now := await store.lane.run(store.find, name)) is None or now.id != record.id:
            return None
        _log.warning("%s; its lock was broken", error)
        return record, await Ownership.seize(paths.vm_dir(name), vm=name)


async def sweep(store: Store, name: str) -> None:
    """Remove the runtime folder of a VM without a record: an owner died just before it wrote one, or had removed it.

    One that a process owns stays, and so does one in which QEMU runs: its store was lost.
    """
    folder = paths.vm_dir(name)
    with suppress(InvalidRequest, VMOwned, VMExists):
        launch.QemuConfig(name=name).check()
        if not await in_thread(folder.is_dir):
            return
        record, ownership = await _acquire(store, name, wait_s=0.0)
        await in_thread(_sweep, store, folder, record, ownership, always=True)


def _sweep(store: Store, folder: Path, record: StoredVM | None, ownership: Ownership) -> None:
    try:
        launch.check_unused(folder, vm=folder.name)
        copy = recover.copy_of(folder, store.path)
        if record is None and (copy is None or not recover.is_running_copy(copy)):
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
    StoreError: its record is damaged, and no copy of it is left.
    """
    if record.damage:
        raise damaged(record)
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


def damaged(record: StoredVM, why: object = None) -> StoreError:
    return StoreError(
        f"the store's record of VM {record.name} is not one that utilityvm wrote: {record.damage or why}",
        vm=record.name,
        remedy=f"end that VM, which does not need the record: uvm stop {record.name}",
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
        raise damaged(record, repr(error)) from error
    return process


async def strays(host: QemuHost, journal: SqliteJournal) -> dict[Slot, str]:
    """What QEMU has and the journal has not, as after the store was lost. It may be in use: its slots are kept off."""
    records = await in_thread(journal.read)
    known = {record.attachment for record in records if isinstance(record, DiskRecord)}
    return {one.slot: "a disk that is in no journal" for one in await host.attachments() if one.attachment not in known}


async def shut_down(record: StoredVM, *, timeout_s: float) -> list[str]:
    """Have the guest write out and power off within `timeout_s` seconds. Says what is not so, a line each.

    The VM may run on then, and is to be killed.
    """
    told = []
    why = f"it did not power off within {timeout_s:.3g} s"
    try:
        process = process_of(record)
        async with asyncio.timeout(timeout_s), AsyncExitStack() as closing:
            host = await QemuHost.connect(process, timeout_s=CONNECT_S)
            closing.push_async_callback(host.close)
            if await in_thread(launch.was_restored, process):
                told.append(f"the runtime folder {process.folder} was removed while the VM ran, and was made again")
            guest = await BridgeGuest.connect(process.agent, timeout_s=CONNECT_S, vm=record.name)
            closing.push_async_callback(guest.close)
            told += await guest.shutdown(timeout_s=SHUTDOWN_S)
            await asyncio.wait([host.gone], timeout=SHUTDOWN_S)
            if host.gone.done():
                return told
    except TimeoutError:
        pass
    except UtilityVMError as error:
        why = str(error)
    return [*told, killed(record.name, why)]


def killed(name: str, why: object) -> str:
    """What to tell of a VM whose guest could not be asked to power off, or did not."""
    return f"VM {name} was killed, and what its guest had not written out is lost: {why}"


async def clear(record: StoredVM, store: Store) -> None:
    """Remove what is left of a VM: its process if there is one, its runtime folder's files, its record.

    Raises:
        OutcomeUnknown: the kernel does not let its QEMU go; call again.
    """
    await _end_process(record, store)
    await in_thread(_remove_files, record)
    await store.lane.run(store.remove, record)


def clear_at_once(record: StoredVM, store: Store) -> bool:
    """As `clear`, for threads, of a dead VM that nobody owns. False: it has an owner by now, or may run.

    Of one whose process was never written down it cannot be told here.
    """
    ownership = Ownership.acquire_at_once(paths.vm_dir(record.name), vm=record.name)
    if ownership is None:
        return False
    try:
        now = store.find(record.name)
        if now is None or now.id != record.id or ownership.belongs_to_other(read_owner(now.owner)):
            return False
        try:
            process = process_of(now)
        except StoreError:
            return False
        if now.life is not Life.ENDED:
            return False
        store.set_owner(now, ownership.owner.to_json())
        userids.rest(process.uid)
        _remove_files(now)
        store.remove(now)
        ownership.release(remove=True)
    finally:
        ownership.release()
    return True


def _remove_files(record: StoredVM) -> None:
    if is_plain(record.name):
        folder = paths.vm_dir(record.name)
        launch.clean(folder)
        remove_copy(folder, record.uuid)
    remove_overlays(record)


async def _end_process(record: StoredVM, store: Store) -> None:
    """Kill the VM's QEMU, by whatever of the record can be read. Calling it again is no error."""
    try:
        process = process_of(record)
        await launch.end(process)
        if record.life is Life.ENDED:
            return  # proven: the process that the VM's starter wrote down, and no other QEMU has this UUID
    except StoreError as error:
        if record.process is not None or record.damage:
            _log.warning("%s", error)
    # Its starter died before it could write down the process, or the record is damaged.
    folder = paths.vm_dir(record.name) if is_plain(record.name) else None
    copy = await in_thread(recover.copy_of, folder, store.path) if folder else None
    for vm_uuid in {record.uuid, str(copy["uuid"]) if copy and record.damage else record.uuid}:
        if vm_uuid and (found := await in_thread(process_with, "-uuid", vm_uuid)) is not None:
            await _kill(record.name, *found)


def remove_overlays(record: StoredVM) -> None:
    """Remove what a clone wrote to its disks. Its QEMU must have ended. Calling it again is no error."""
    if is_plain(record.uuid):
        shutil.rmtree(paths.overlays_dir(record.uuid), ignore_errors=True)


def write_copy(folder: Path, record: StoredVM, process: Mapping[str, object]) -> None:
    """Put a copy of the VM's record beside its sockets, from which a lost store is made again."""
    document = {"name": record.name, "uuid": record.uuid, "created": record.created, "config": record.config}
    document["store"] = str(paths.store_file())
    path = folder / paths.RECORD_FILE
    try:
        with runtime.entered(folder) as here:
            temporary = here / f"{path.stem}.new"
            try:
                temporary.write_text(json.dumps({**document, "process": process}))
                temporary.replace(here / path.name)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except (OSError, SetupError) as error:
        _log.warning("no copy of the record of VM %s: %s", record.name, error)


def remove_copy(folder: Path, vm_uuid: str | None = None) -> None:
    """Remove the copy of the record, unless it is of another VM than that of `vm_uuid`. Gone before: no error."""
    path = folder / paths.RECORD_FILE
    if vm_uuid is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, SetupError):
            if json.loads(runtime.record(folder, path.name))["uuid"] != vm_uuid:
                return
    with suppress(FileNotFoundError, SetupError), runtime.entered(folder) as here:
        (here / path.name).unlink(missing_ok=True)


def _check_folder(record: StoredVM, folder: Path) -> None:
    """The lock lies in the runtime folder: processes that differ in it would both think that they own the VM."""
    theirs = str((record.process or {}).get("folder", folder))
    if theirs != str(folder):
        raise SetupError(
            f"VM {record.name} lives in {theirs}, and the runtime folder here is {folder.parent.parent}",
            vm=record.name,
            remedy=f"set UTILITYVM_RUNTIME_DIR to {Path(theirs).parent.parent}",
        )


async def _kill(name: str, pid: int, started: str) -> None:
    try:
        watch = Watch(pid, started)
    except VMGone:
        return
    try:
        watch.kill()
        if not await watch.wait(timeout_s=CONNECT_S):
            raise launch.does_not_end(name, pid)
    finally:
        watch.close()
