"""What differs between a VM's journal, its QEMU and its guest, and the mending of it.

Three places know of a VM's disks: the journal knows what was wanted and how far it came, QEMU has the devices, the
guest has the mounts. `examine_vm` compares them and changes nothing. `repair_vm` makes them agree: it finishes or
undoes what is half done, gives back the reservations of the dead, and takes out of the VM what no journal knows and
nobody uses.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from utilityvm.errors import UtilityVMError, VMGone
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import Attachment, QemuHost
from utilityvm.machine.names import check_text
from utilityvm.machine.oserrors import typed
from utilityvm.machine.threads import in_thread
from utilityvm.scsi.ports import DiskRecord, MountRecord, Record, ReservationRecord
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState
from utilityvm.store import SqliteJournal, Store, VMState
from utilityvm.store.recover import open_store
from utilityvm.tasks import Deadline
from utilityvm.upkeep.strays import remove_strays
from utilityvm.vm import lifecycle
from utilityvm.vm.arguments import checked
from utilityvm.vm.lifecycle import CONNECT_S
from utilityvm.vm.owned import ROOT_SLOT, is_alive
from utilityvm.vm.utility_vm import OPEN_S, UtilityVM


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two places that do not agree about a VM's disks."""

    slot: Slot | None  # None: it is not of one slot
    what: str
    remedy: str  # what `repair_vm` does about it


@typed
@checked
async def examine_vm(name: str, *, wait_s: float = 0.0, timeout_s: float = OPEN_S) -> list[Difference]:
    """Compare the three; nothing is changed. `wait_s` is for the queue, if another process uses the VM.

    Raises:
        VMNotFound, VMNotRunning: there is no such VM, or nothing of it to compare.
        VMOwned: another process owns it, which keeps the three in step itself.
        DeadlineExceeded: QEMU does not answer within `timeout_s` seconds.
    """
    check_text("VM", name)
    limit = Deadline(wait_s + timeout_s).limit(f"VM {name} was not examined", vm=name)
    async with limit, _looking(name, wait_s=wait_s) as (journal, host, guest):
        if guest is None:
            remedy = "let it go on, as the VM that it was"
            return [Difference(slot=None, what="saving it as a template was cut short", remedy=remedy)]
        mounts = await _mounts_of(guest, timeout_s=min(CONNECT_S, timeout_s / 2))
        silent = [] if not isinstance(mounts, UtilityVMError) else [_silence(mounts)]
        told = None if isinstance(mounts, UtilityVMError) else mounts
        return silent + compare(await in_thread(journal.read), await host.attachments(), told)


@typed
@checked
async def repair_vm(name: str, *, wait_s: float = 0.0, timeout_s: float = OPEN_S) -> list[str]:
    """Make the three agree within `timeout_s` seconds, and say what was done, a line each.

    `wait_s` is for the queue, if another process uses the VM. Out of time, the rest is left for the next call.

    Raises:
        As `examine_vm`; and GuestBusy and others, if a disk that no journal knows cannot be taken out.
    """
    check_text("VM", name)
    deadline = Deadline(wait_s + timeout_s)
    async with deadline.limit(f"VM {name} was not repaired", vm=name):
        await _doubt(name, wait_s=wait_s)
        vm = await UtilityVM.open(name, wait_s=wait_s, timeout_s=deadline.left())
        try:
            await vm._scsi.repair()
            return [*vm.findings, *await remove_strays(vm._vm, timeout_s=deadline.left())]
        finally:
            await vm.close(timeout_s=deadline.left_to_undo())


async def _doubt(name: str, *, wait_s: float) -> None:
    """What the journal has and is not there: write down that nobody knows, so that it is looked for and done anew."""
    async with _looking(name, wait_s=wait_s) as (journal, host, guest):
        if guest is None:
            return
        on_bus = {one.attachment for one in await host.attachments() if one.whole}
        mounts = await guest.mounts()
        in_guest = {str(mount["MountPath"]) for mount in mounts}
        doubtful: list[Record] = []
        for record in await in_thread(journal.read):
            if isinstance(record, DiskRecord) and record.state == DiskState.ATTACHED:
                if record.attachment not in on_bus:
                    doubtful.append(replace(record, state=DiskState.ATTACH_UNKNOWN))
            elif isinstance(record, MountRecord) and record.state == MountState.MOUNTED:
                is_there = str(record.guest_path) in in_guest and record.attachment in on_bus
                doubtful += [] if is_there else [replace(record, state=MountState.MOUNT_UNKNOWN)]
        if doubtful:
            await journal.write(doubtful)


@asynccontextmanager
async def _looking(name: str, *, wait_s: float) -> AsyncIterator[tuple[SqliteJournal, QemuHost, BridgeGuest | None]]:
    """The three places, owned for the block, and left as they are. The guest is None if it stands still, half saved."""
    async with AsyncExitStack() as closing:
        store = await in_thread(open_store, late=Store.close)
        closing.push_async_callback(store.lane.run, store.close)
        record, ownership = await lifecycle.own(store, name, wait_s=wait_s, must_run=True)
        closing.push_async_callback(in_thread, ownership.release, always=True)
        await in_thread(lifecycle.refuse_unfinished, record)
        process = lifecycle.process_of(record)
        try:
            host = await QemuHost.connect(process, timeout_s=CONNECT_S)
        except VMGone as error:
            raise lifecycle.not_running(record) from error
        closing.push_async_callback(host.close)
        guest = None
        if record.state is not VMState.SAVING:
            guest = BridgeGuest.later(process.agent, vm=name)
            closing.push_async_callback(guest.close)
        yield SqliteJournal(store, record), host, guest


async def _mounts_of(guest: BridgeGuest, *, timeout_s: float) -> list[dict[str, Any]] | UtilityVMError:
    """What the agent tells; or why it tells nothing, which keeps nobody from seeing what the host has."""
    try:
        return await guest.mounts(timeout_s=timeout_s)
    except UtilityVMError as error:
        return error


def _silence(error: UtilityVMError) -> Difference:
    what = f"the guest does not tell what it has mounted: {error}"
    return Difference(slot=None, what=what, remedy="nothing; take a disk from such a guest with `uvm detach --force`")


def compare(
    records: Sequence[Record], attachments: Sequence[Attachment], mounts: Sequence[Mapping[str, Any]] | None
) -> list[Difference]:
    """What differs. `mounts` are those that the agent tells: MountPath, Controller, Lun and others. None: nothing."""
    disks = {record.attachment: record for record in records if isinstance(record, DiskRecord)}
    on_bus = {one.attachment: one for one in attachments}
    found = [*_disks(disks, on_bus), *_reservations(records, disks)]
    if mounts is not None:
        in_guest = {str(mount["MountPath"]): Slot(mount.get("Controller", 0), mount.get("Lun", 0)) for mount in mounts}
        found += _mounts(records, disks, in_guest)
    return sorted(found, key=lambda one: (one.slot or ROOT_SLOT, one.what))


def _disks(disks: Mapping[str, DiskRecord], on_bus: Mapping[str, Attachment]) -> list[Difference]:
    found = []
    for disk in disks.values():
        is_there = disk.attachment in on_bus
        if disk.state == DiskState.ATTACHED and not is_there:
            found.append(
                Difference(slot=disk.slot, what=f"{disk.host_path} is not on the bus", remedy="attach it again")
            )
        elif disk.state != DiskState.ATTACHED:
            there = "is on the bus" if is_there else "is not on the bus"
            found.append(
                Difference(
                    slot=disk.slot,
                    what=f"{disk.host_path} was left {disk.state}, and {there}",
                    remedy="finish it if somebody wants it, else undo it",
                )
            )
    for one in on_bus.values():
        if one.attachment not in disks:
            what = "a disk that no journal knows" if one.whole else "half of a disk that no journal knows"
            found.append(Difference(slot=one.slot, what=what, remedy="take it out, unless it is in use"))
    return found


def _mounts(
    records: Sequence[Record], disks: Mapping[str, DiskRecord], in_guest: Mapping[str, Slot]
) -> list[Difference]:
    found = []
    known: set[str] = set()
    for record in records:
        if not isinstance(record, MountRecord):
            continue
        path = str(record.guest_path)
        known.add(path)
        disk = disks.get(record.attachment)
        slot = disk.slot if disk else None
        if record.state == MountState.MOUNTED and in_guest.get(path) != slot:
            found.append(Difference(slot=slot, what=f"{path} is not mounted in the guest", remedy="mount it again"))
        elif record.state != MountState.MOUNTED:
            found.append(
                Difference(
                    slot=slot,
                    what=f"{path} was left {record.state}",
                    remedy="finish it if somebody wants it, else undo it",
                )
            )
    for path, slot in in_guest.items():
        if path not in known:
            what = f"{path} is mounted, and no journal knows it"
            found.append(Difference(slot=slot, what=what, remedy="unmount it, unless it is in use"))
    return found


def _reservations(records: Sequence[Record], disks: Mapping[str, DiskRecord]) -> list[Difference]:
    return [
        Difference(
            slot=disks[record.attachment].slot if record.attachment in disks else None,
            what=f"reservation {record.reservation} is held by {record.holder.name}, which is dead",
            remedy="give it back",
        )
        for record in records
        if isinstance(record, ReservationRecord) and not is_alive(record.holder)
    ]
