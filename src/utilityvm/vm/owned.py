"""A VM that this process owns: the parts of it, and the state that it is in.

`start`, `clone` and `open` put one together; `save` and `end` are what becomes of it; `UtilityVM` is its face. A VM has
one owner at a time: the process that started it, or opened it after that one let go or died.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from utilityvm.errors import InvalidRequest, UtilityVMError, VMGone, VMNotRunning
from utilityvm.guests.bridge_client import again
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.hosts.qemu.incoming import Incoming
from utilityvm.hosts.qemu.sealed import Sealed
from utilityvm.log import logger
from utilityvm.machine import paths
from utilityvm.machine.processes import is_running, own_start
from utilityvm.machine.threads import in_thread, to_the_end
from utilityvm.scsi.manager import ScsiManager, wrong_loop
from utilityvm.scsi.ports import Holder
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, StoredVM
from utilityvm.store.ownership import Ownership
from utilityvm.store.recover import open_store
from utilityvm.tasks import Deadline, Undo
from utilityvm.templates import catalog
from utilityvm.vm import lifecycle
from utilityvm.vm.config import VMConfig
from utilityvm.vm.state import OVER, REFUSING, TABLE, Event, State, next_state

ROOT_SLOT: Final = Slot(0, 0)
_END_SHOWS_S: Final = 0.3  # the connection to the guest may end so long before its QEMU is seen to have ended

_log = logger(__name__)


class Claim:
    """A VM's name, record and runtime folder, which are this process's: its parts before there is a QEMU."""

    def __init__(self, store: Store, record: StoredVM, ownership: Ownership, folder: Path) -> None:
        """Use `new` or `existing`."""
        self.store = store
        self.record = record
        self.ownership = ownership
        self.folder = folder

    @classmethod
    async def new(cls, undo: Undo, name: str, vm_uuid: str, document: Mapping[str, object]) -> Claim:
        """Own a new VM of that name; `undo` leaves nothing of it. See `lifecycle.claim_name` for the errors."""
        store = await in_thread(open_store, late=Store.close)
        undo.add(store.lane.run, store.close)
        claim = cls(store, *await lifecycle.claim_name(undo, store, name, vm_uuid, document))
        undo.add(claim._clear)
        return claim

    @classmethod
    async def existing(cls, undo: Undo, name: str, *, wait_s: float, must_run: bool = False) -> Claim:
        """Own a VM that there is; `undo` lets go of it. See `lifecycle.own` for the errors."""
        store = await in_thread(open_store, late=Store.close)
        undo.add(store.lane.run, store.close)
        record, ownership = await lifecycle.own(store, name, wait_s=wait_s, must_run=must_run)
        undo.add(in_thread, ownership.release, always=True)
        return cls(store, record, ownership, paths.vm_dir(name))

    @classmethod
    async def seized(cls, undo: Undo, name: str, *, wait_s: float) -> Claim | None:
        """Kill a VM and own what is left of it, whoever has it. See `lifecycle.seize`; None: nothing is left."""
        store = await in_thread(open_store, late=Store.close)
        undo.add(store.lane.run, store.close)
        if (seized := await lifecycle.seize(store, name, wait_s=wait_s)) is None:
            return None
        record, ownership = seized
        undo.add(in_thread, ownership.release, always=True)
        return cls(store, record, ownership, paths.vm_dir(name))

    async def start_qemu(
        self, undo: Undo, config: QemuConfig, *, deadline: Deadline, saved: Incoming | None = None
    ) -> QemuHost:
        """Start the VM's QEMU, and write down which process that is. `undo` ends it, before it forgets the VM.

        The guest runs only after that. So one whose owner died before it was written down is known by its command
        line, which nothing in it can have changed.
        """
        host = await QemuHost.start(
            replace(config, paused=True),
            folder=self.folder,
            saved=saved,
            who_uses=self.who_uses(),
            frozen_by=catalog.frozen_by,
            memory=self.store.formats,
            timeout_s=deadline.left(),
        )
        undo.add(host.close)
        process = host.process.to_json()
        self.record = replace(self.record, process=process)
        await self.store.lane.run(self.store.set_process, self.record, process)
        await to_the_end(lifecycle.write_copy, self.folder, self.record, process)
        if saved is None and not config.paused:
            await host.resume(timeout_s=deadline.left())
        return host

    def who_uses(self) -> Callable[[str], str | None]:
        """Which other VM has the disk of an identity, by the store."""

        def who(identity: str) -> str | None:
            user = self.store.user_of(identity, other_than=self.record)
            return f"VM {user}" if user else None

        return who

    async def _clear(self) -> None:
        """What is left of a start that failed goes. The record goes last: what cannot be ended can be found by it."""
        await lifecycle.clear(self.record, self.store)
        await in_thread(partial(self.ownership.release, remove=True), always=True)


class OwnedVM:
    """The parts of a VM that this process owns, and its state. For the event loop that made it."""

    def __init__(
        self,
        config: VMConfig,
        claim: Claim,
        host: QemuHost,
        guest: BridgeGuest,
        *,
        strays: Mapping[Slot, str] | None = None,
    ) -> None:
        """In state `starting`. `strays` are slots with disks that no journal knows."""
        self.config = config
        self.record = claim.record
        self.store = claim.store
        self.ownership = claim.ownership
        self.host = host
        self.guest = guest
        guest.allocated = host.allocated
        self.journal = SqliteJournal(claim.store, claim.record)
        self.state = State.STARTING
        self.findings: tuple[str, ...] = ()
        self.aliases: Mapping[str, str] = {}  # of disks; see `naming.template_paths`
        self.making: set[str] = set()  # images that `scratch` makes just now
        self.has_scratch = False  # there may be images of its own that no disk has
        self.ending = asyncio.Lock()  # one of save, stop and close at a time
        self.resuming: asyncio.Task[None] | None = None  # in state `resuming`
        self.shared: Sealed | None = None  # the memory that the clones of this process share; while the VM runs
        self._reason: UtilityVMError | None = None  # why calls are refused
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self.log = _log.bind(vm=config.name)
        self.scsi = ScsiManager(
            host,
            guest,
            self.journal,
            controllers=config.controllers,
            reserved={ROOT_SLOT: "the VM's root disk", **(strays or {})},
            vm=config.name,
        )
        host.gone.add_done_callback(lambda gone: self._died(gone.result()))

    @property
    def name(self) -> str:
        return self.config.name

    def take(self, event: Event, reason: UtilityVMError | None = None) -> None:
        """Go to the state that the table says. `reason` is what calls are refused with in it; None: as before."""
        self.state = next_state(self.state, event)
        self._reason = (reason or self._reason) if self.state in REFUSING else None
        if self.state in OVER:
            self.shared = None
        if self.state is State.ENDED:
            assert self._reason is not None
            self.scsi.mark_gone(self._reason)  # whoever waits for something of the VM is told now
        elif self.state is State.CLOSED:
            self.scsi.close()

    def check_here(self) -> None:
        """Refuse a call from another event loop or thread, before it waits for something of ours and hangs.

        Raises:
            WrongLoop: it is one.
        """
        try:
            is_ours = asyncio.get_running_loop() is self._loop
        except RuntimeError:  # a view, asked for while no loop runs
            is_ours = threading.get_ident() == self._thread
        if not is_ours:
            raise wrong_loop(self.name)

    def check(self) -> None:
        """Raises:
        VMNotRunning, VMGone: it takes no calls, and why.
        WrongLoop: as `check_here`.
        """
        self.check_here()
        if self._reason is not None:
            raise self._reason

    async def ready(self, deadline: Deadline) -> None:
        """Return when it takes calls: at once, but after a save that failed.

        Raises:
            DeadlineExceeded: it does not go on yet.
            VMNotRunning, VMGone: as `check`.
        """
        self.check()
        if self.state is State.RESUMING and self.resuming is not None:
            async with deadline.limit(f"VM {self.name} did not go on after a save that failed", vm=self.name):
                await asyncio.wait([self.resuming])
        self.check()

    @asynccontextmanager
    async def ends_told(self) -> AsyncIterator[None]:
        """For what asks the guest: if its connection ends with the VM, the error is the VM's end."""
        try:
            yield
        except VMGone as error:
            await asyncio.wait([self.host.gone], timeout=_END_SHOWS_S)  # the connection may end first
            if self._reason is None:
                raise
            raise again(self._reason) from error

    @property
    def is_running(self) -> bool:
        return self.state not in OVER

    def _died(self, reason: UtilityVMError) -> None:
        state = self.state
        if (state, Event.DIED) not in TABLE:
            return
        if state is State.STOPPING:
            reason = stopped(self)
        self.take(Event.DIED, reason)
        if state in (State.STARTING, State.STOPPING):
            return  # whoever starts or stops it tells of it
        self.log.error("the VM died: %s", reason)
        self.store.lane.aside(self._write_down_death)

    def _write_down_death(self) -> None:
        try:
            self.store.set_dead(self.record)
        except UtilityVMError as error:
            self.log.warning("not written down: %s", error)


def stopped(vm: OwnedVM) -> VMNotRunning:
    return VMNotRunning(f"VM {vm.name} was stopped", vm=vm.name)


def holder_of(name: str | None) -> Holder:
    """The holder of that name, which outlives this process; without a name, this process.

    Raises:
        InvalidRequest: it cannot be a name.
    """
    if name is None:
        return Holder(name=f"process {os.getpid()}", pid=os.getpid(), started=own_start())
    if not name or not name.isprintable():
        raise InvalidRequest(f"{name!r} cannot be a holder's name", remedy="use printable characters")
    return Holder(name=name)


def is_alive(holder: Holder) -> bool:
    """May the holder still come and release what it holds? A named one always may."""
    return holder.pid is None or holder.started is None or is_running(holder.pid, holder.started)
