"""Take over a VM that runs, from an owner that let go of it or died."""

from __future__ import annotations

from utilityvm.errors import DeadlineExceeded, OutcomeUnknown, ProtocolError, UtilityVMError, VMGone
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost
from utilityvm.machine.threads import in_thread
from utilityvm.store import SqliteJournal, StoredVM, VMState
from utilityvm.tasks import Deadline, Undo
from utilityvm.templates import catalog
from utilityvm.vm import end, lifecycle, scratch
from utilityvm.vm.config import VMConfig
from utilityvm.vm.naming import template_paths
from utilityvm.vm.owned import Claim, OwnedVM, is_alive
from utilityvm.vm.state import Event


async def open_running(name: str, *, wait_s: float, timeout_s: float, needs_guest: bool) -> OwnedVM:
    """See `UtilityVM.open`."""
    whole = Deadline(wait_s + timeout_s)
    async with whole.limit(f"VM {name} was not taken over"), Undo(whole) as waiting:
        claim = await Claim.existing(waiting, name, wait_s=wait_s, must_run=True)
        deadline = Deadline(min(timeout_s, whole.left()))  # the time in the queue is not its
        async with deadline.limit(f"VM {name} was not taken over"), Undo(deadline) as undo:
            vm = await _take_over(undo, claim, deadline, needs_guest=needs_guest)
    for finding in vm.findings:
        vm.log.warning("%s", finding)
    return vm


async def _take_over(undo: Undo, claim: Claim, deadline: Deadline, *, needs_guest: bool) -> OwnedVM:
    record, store = claim.record, claim.store
    await in_thread(lifecycle.refuse_unfinished, record)
    process = lifecycle.process_of(record)
    try:
        host = await QemuHost.connect(
            process,
            who_uses=claim.who_uses(),
            frozen_by=catalog.frozen_by,
            memory=store.formats,
            timeout_s=min(deadline.left(), lifecycle.CONNECT_S),
        )
    except VMGone as error:
        raise lifecycle.not_running(record) from error
    undo.add(host.close)
    found = list[str]()
    if record.state is VMState.SAVING:
        found.append("saving it as a template was cut short: it goes on")
        await host.resume(timeout_s=deadline.left())
    needs_guest = needs_guest or record.state is VMState.SAVING
    patience_s = deadline.left() if needs_guest else min(deadline.left() / 2, lifecycle.CONNECT_S)
    try:
        guest = await BridgeGuest.connect(process.agent, timeout_s=patience_s, vm=record.name)
    except (DeadlineExceeded, OutcomeUnknown, ProtocolError, VMGone) as error:
        if needs_guest:
            raise
        found.append(f"the guest's agent does not answer: {error}")
        guest = BridgeGuest.later(process.agent, vm=record.name)
    undo.add(guest.close)
    if record.state is VMState.SAVING:
        await guest.thaw(timeout_s=deadline.left())
        await store.lane.run(store.set_state, record, VMState.RUNNING)
    strays = await lifecycle.strays(host, SqliteJournal(store, record))
    vm = OwnedVM(VMConfig.from_json(record.config), claim, host, guest, strays=strays)
    undo.add(end.hang_up, vm)
    found += [f"slot {slot} has a disk that is in no journal: it stays taken" for slot in strays]
    records = await store.lane.run(vm.journal.read)
    vm.findings = (*found, *await vm.scsi.restore(is_alive=is_alive, sizes=await host.sizes(), records=records))
    vm.aliases = await in_thread(_aliases, record)
    await scratch.take_over(vm)
    if record.state is not VMState.RUNNING:
        await store.lane.run(
            store.set_state, record, VMState.RUNNING
        )  # its owner died when it started, or was about to stop
    vm.check()
    vm.take(Event.UP)
    return vm


def _aliases(record: StoredVM) -> dict[str, str]:
    try:
        template = catalog.parent_of(record.config)
    except UtilityVMError:  # somebody removed or changed its folder: its disks have their other names
        return {}
    return template_paths(template, record.uuid) if template is not None else {}
