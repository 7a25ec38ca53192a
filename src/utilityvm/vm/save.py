"""Make a template of a running VM, which ends; or let it go on, if that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from utilityvm.errors import GuestRefused, UtilityVMError, VMNotRunning
from utilityvm.machine.threads import in_thread
from utilityvm.store import VMState
from utilityvm.tasks import Deadline, finish, to_the_end, wait_for
from utilityvm.templates import catalog
from utilityvm.templates import save as saving
from utilityvm.templates.catalog import Template
from utilityvm.templates.draft import Draft
from utilityvm.vm import end
from utilityvm.vm.owned import OwnedVM
from utilityvm.vm.state import Event, State

_RESUME_S: Final = 5.0  # for one step; what stands still is asked again
_THAW_S: Final = 10.0
_PAUSE_S: Final = 0.1
_GO_ON_S: Final = 3600.0  # a QEMU that was stopped goes on when it is let go on


async def save(vm: OwnedVM, name: str, *, timeout_s: float) -> Template:
    """See `UtilityVM.save_as_template`."""
    deadline = Deadline(timeout_s)
    await vm.ready(deadline)
    await in_thread(catalog.refuse_taken, name)
    draft = Draft(name)
    failure: BaseException | None = None
    limit = deadline.limit(f"VM {vm.name} was not saved as template {name}")
    async with limit, vm.ending:
        await vm.ready(deadline)
        with vm.scsi.held_still(f"VM {vm.name} is being saved as template {name}"):
            try:
                await _write(vm, draft, deadline)
            except BaseException as error:
                if not draft.is_there:
                    await _let_go_on(vm, deadline, error)
                    raise
                failure = error  # too late
        remedy = f"clone it: uvm clone {name} NAME"
        vm.take(Event.SAVED, VMNotRunning(f"VM {vm.name} was saved as template {name}", vm=vm.name, remedy=remedy))
        vm.log.info("saved as template %s", name)
        try:
            await finish(end.clear_away(vm), deadline=deadline)
        except UtilityVMError as error:  # what was asked for is done
            vm.log.warning("saved as template %s, and the VM is not cleared away yet: %s", name, error)
    if isinstance(failure, asyncio.CancelledError) and not limit.is_over:
        raise failure
    return await in_thread(catalog.load, name)


async def _write(vm: OwnedVM, draft: Draft, deadline: Deadline) -> None:
    await vm.scsi.settle()
    records = await vm.store.lane.run(vm.journal.read)
    saving.check(records, had_key=await vm.store.lane.run(vm.journal.had_key), vm=vm.name)
    parent = await in_thread(catalog.parent_of, vm.record.config)
    kernel = str((await vm.guest.info(timeout_s=deadline.left()))["Kernel"])
    vm.check()
    vm.take(Event.SAVE)
    await vm.store.lane.run(vm.store.set_state, vm.record, VMState.SAVING)
    await vm.guest.quiesce(timeout_s=deadline.left())
    await vm.guest.hang_up()
    await saving.write(
        draft,
        host=vm.host,
        config=vm.config,
        root=Path(str(vm.record.config["root"])) if parent is None else parent.root,
        kernel=kernel,
        records=records,
        parent=parent,
        deadline=deadline,
    )


async def _let_go_on(vm: OwnedVM, deadline: Deadline, error: BaseException) -> None:
    """Wait until the VM runs as before, but no longer than the caller does: it goes on in the background."""
    if vm.state is not State.SAVING:
        return
    vm.take(Event.NOT_SAVED)
    vm.resuming = asyncio.ensure_future(to_the_end(lambda: _go_on(vm), within_s=_GO_ON_S))
    cancelled = await wait_for(vm.resuming, deadline)
    if cancelled is not None and not isinstance(error, asyncio.CancelledError):
        raise cancelled from error


async def _go_on(vm: OwnedVM) -> None:
    """Let the VM run as before, as soon as QEMU and the guest do it."""
    told = ""
    while vm.state is State.RESUMING:
        try:
            await vm.host.resume(timeout_s=_RESUME_S)
            await vm.guest.thaw(timeout_s=_THAW_S)
        except GuestRefused as error:
            vm.log.warning("after a save that failed: %s", error)  # it runs, and says what does not
        except UtilityVMError as error:
            if vm.host.gone.done():
                return
            if told != str(error):
                told = str(error)
                vm.log.warning("after a save that failed the VM does not go on yet: %s", error)
            await asyncio.sleep(_PAUSE_S)
            continue
        try:
            await vm.store.lane.run(vm.store.set_state, vm.record, VMState.RUNNING)
        except UtilityVMError as error:
            vm.log.warning("not written down: %s", error)
        if vm.state is State.RESUMING:
            vm.take(Event.RESUMED)
