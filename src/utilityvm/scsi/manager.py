"""The manager: who has reserved what, and what must be done to the bus and to the guest so that it is so.

It works by levels and not by edges. Callers only say what they want, as *claims* on a disk and a mount; each disk that
is not as its claims want it has one *worker*, a task that takes one step after the other until it is. So there is one
place that sends steps for a disk, a caller that goes away takes only its claim along, a second caller for the same disk
waits for the same work and gets the same answer, and whatever stops half-way is gone on with by whoever asks next.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal, TypeAlias

from utilityvm.errors import (
    AlreadyAttached,
    AlreadyReleased,
    DeadlineExceeded,
    InvalidRequest,
    Migrating,
    NoControllers,
    NotAttached,
    UtilityVMError,
    WrongState,
)
from utilityvm.log import logger
from utilityvm.scsi.book import Book
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.events import Events, ScsiEvent
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.migration import check_fits, locate
from utilityvm.scsi.mount import checked_config
from utilityvm.scsi.ports import DiskRequest, GuestBackend, Holder, HostBackend, Journal, MountConfig, Record
from utilityvm.scsi.reservation import Claim, Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.steps import Steps, StepTimeouts
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.scsi.views import MountView, SlotView, mount_view, slot_view
from utilityvm.scsi.worker import Workers, tell

DEFAULT_TIMEOUT_S: Final = 60.0
_MAX_BYTES: Final = (1 << 63) - 512  # QEMU's sizes are signed

_log = logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """One disk of a batch; see `ScsiManager.add`."""

    disk: DiskRequest
    mount: MountConfig | None = None
    guest_path: PurePosixPath | None = None


Which: TypeAlias = Literal["all", "each"]


class ScsiManager:
    """The disks of one VM. For one event loop; nothing here blocks it."""

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        journal: Journal,
        *,
        controllers: int,
        reserved: Mapping[Slot, str] | None = None,
        vm: str | None = None,
        timeouts: StepTimeouts | None = None,
        new_id: Callable[[], str] = lambda: secrets.token_hex(6),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A manager of `controllers` controllers with nothing attached.

        `reserved` slots are never handed out; its values say what is there.

        Raises:
            InvalidRequest: more than 4 controllers, or a reserved slot that there is not.
        """
        self._log = _log.bind(vm=vm)
        self._host = host
        self._guest = guest
        self._journal = journal
        self._timeouts = timeouts or StepTimeouts()
        self._clock = clock
        self._new_id = new_id
        self._vm = vm
        self._ledger = Ledger(journal, self._log)
        self._events = Events(self._log, clock)
        self._steps = Steps(host, guest, self._ledger, self._events, timeouts=self._timeouts, vm=vm)
        self._book = Book(
            self._ledger,
            controllers=controllers,
            reserved=reserved or {},
            check=lambda slot, config: self._guest.check(slot, config),
            checked_path=lambda path: self._guest.checked_path(path),
            new_id=new_id,
            clock=clock,
            vm=vm,
        )
        self._workers = Workers(self._book, self._steps, self._ledger, self._events, self._log)
        self._gone: UtilityVMError | None = None
        self._exported = False
        self._imported: tuple[ScsiState, Holder] | None = None
        self._resizing = 0
        self._still: str | None = None  # why nothing may change just now

    async def add(
        self,
        request: DiskRequest,
        *,
        mount: MountConfig | None = None,
        guest_path: PurePosixPath | None = None,
        holder: Holder,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Reservation:
        """Reserve a disk: it is attached, and mounted if `mount` says how.

        A disk that is attached already is shared if the request does not contradict it; so is a mount of the same
        config if `guest_path` is its path or None. Without a path and a mount to share, one is made up from the slot.

        If it fails, or its caller is cancelled, what only it needed is undone; if that fails as well, the disk stays
        visible in `slots` in the state that it reached, and the next call that touches it goes on from there.

        Raises:
            RequestError: cannot be met; nothing was sent. NoFreeSlot, ConfigDiffers, GuestPathInUse and others.
            ImageError: the disk's image is damaged or unsafe.
            HostRefused, GuestRefused: a step was refused.
            OutcomeUnknown: a step got no answer, and the truth could not be found out.
            DeadlineExceeded: it was not done within `timeout_s` seconds; it is undone in the background.
            StoreError: the journal took no intent; the step was not sent.
            VMGone: the VM died.
        """
        self._check_open()
        if mount is None and guest_path is not None:
            raise InvalidRequest(
                f"guest path {guest_path} without a mount", remedy="say how to mount it, or drop the path"
            )
        if mount is not None:
            mount = checked_config(mount, disk_read_only=request.read_only)
        if guest_path is not None:
            guest_path = self._guest.checked_path(guest_path)
        if not self._book.free.capacity:
            raise NoControllers("the VM has no SCSI controller", vm=self._vm, remedy="start it with 1 to 4 controllers")
        self._guest.check(None, mount)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                opened = await self._host.open(request)
                try:
                    self._check_open()
                    claim = self._book.claim(request, opened, mount, guest_path, holder)
                except BaseException:
                    opened.close()
                    raise
                await self._until_settled(claim)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"{request.host_path} was not attached within {timeout_s:g} s",
                vm=self._vm,
                host_path=request.host_path,
                remedy="what was begun is undone in the background; ask again later",
            ) from None
        return claim.reservation()

    async def release(
        self, reservation: Reservation | str, *, timeout_s: float = DEFAULT_TIMEOUT_S, force: bool = False
    ) -> None:
        """Give a reservation back. The last one of a mount unmounts it; the last one of a disk ejects and detaches it.

        Returns when that is done. If it fails the reservation is still there to be released, and the next release goes
        on from the step that failed. If the guest still uses it, and nothing was done yet, it is held as before.
        `force` unmounts and ejects what the guest still uses.

        Raises:
            AlreadyReleased: it was given back before, or is being given back.
            NotAttached: there is no such reservation.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown: a step failed; the disk is as `slots` shows it.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
        """
        self._check_not_migrating()
        id = reservation if isinstance(reservation, str) else reservation.id
        claim = self._book.claims.get(id)
        if claim is None:
            if self._workers.released.get(id) is False:
                self._workers.released[id] = (
                    True  # the release that failed before was finished since, and now its caller knows
                )
                return
            if id in self._workers.released:
                raise AlreadyReleased(f"reservation {id} was released before", vm=self._vm)
            raise NotAttached(
                f"there is no reservation {id}", vm=self._vm, remedy="`uvm ls` shows those that there are"
            )
        if claim.waiter is not None and not claim.waiter.done():
            raise AlreadyReleased(f"reservation {id} is being released", vm=self._vm)
        if force:
            claim.disk.force = True
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                self._begin_release(claim)
                if claim.id in self._book.claims:
                    await self._until_settled(claim)
                else:  # others hold on to all of it
                    await self._ledger.flush()
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"{claim.disk.request.host_path} was not released within {timeout_s:g} s",
                vm=self._vm,
                slot=claim.disk.slot,
                host_path=claim.disk.request.host_path,
                remedy="it goes on in the background; release it again to wait for it",
            ) from None

    async def remove(
        self,
        host_path: str,
        *,
        identity: str | None = None,
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        force: bool = False,
    ) -> None:
        """Drop one reference of the disk: the newest of `holder`, or the newest of all without one.

        Raises:
            NotAttached: the disk, or that holder's reservation, is not there.
            others: as `release`.
        """
        self._check_not_migrating()
        disk = self._book.find(host_path, identity)
        candidates = [
            claim
            for claim in (*disk.claims.values(), *disk.leaving.values())
            if holder is None or claim.holder.name == holder
        ]
        candidates = [claim for claim in candidates if claim.state is not ReservationState.PENDING]
        if not candidates:
            whose = f" of {holder}" if holder else ""
            raise NotAttached(f"{host_path}: there is no reservation{whose}", vm=self._vm, host_path=host_path)
        # One whose release failed before is taken first: it goes on where that stopped.
        newest = max(candidates, key=lambda claim: (claim.state is ReservationState.RELEASING, claim.since))
        await self.release(newest.id, timeout_s=timeout_s, force=force)

    async def add_many(
        self,
        requests: Sequence[AddRequest],
        *,
        which: Which = "all",
        holder: Holder,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Reservation | UtilityVMError]:
        """Add several disks at the same time.

        `each`: every result stands for itself, errors among them. `all`: if one fails, those that came are given back
        and its error is raised.
        """
        results = await asyncio.gather(
            *(
                self.add(item.disk, mount=item.mount, guest_path=item.guest_path, holder=holder, timeout_s=timeout_s)
                for item in requests
            ),
            return_exceptions=True,
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        unexpected = [failure for failure in failures if not isinstance(failure, UtilityVMError)]
        if failures and (which == "all" or unexpected):
            done = [result for result in results if isinstance(result, Reservation)]
            await asyncio.gather(*(self.release(one, timeout_s=timeout_s) for one in done), return_exceptions=True)
            raise (unexpected or failures)[0]
        return [result for result in results if isinstance(result, (Reservation, UtilityVMError))]

    async def remove_many(
        self, reservations: Iterable[Reservation | str], *, timeout_s: float = DEFAULT_TIMEOUT_S, force: bool = False
    ) -> list[UtilityVMError | None]:
        """Release several reservations at the same time; what became of each, in order."""
        results = await asyncio.gather(
            *(self.release(one, timeout_s=timeout_s, force=force) for one in reservations), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, UtilityVMError):
                raise result
        return [result if isinstance(result, UtilityVMError) else None for result in results]

    async def resize(
        self, host_path: str, size_bytes: int, *, identity: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        `timeout_s`: None: as the manager's timeouts say.

        Raises:
            NotAttached: it is not attached now.
            InvalidRequest: it is larger than that, or no disk can have that size.
            HostRefused, NotSupported: the host cannot; nothing changed.
            GuestRefused: the disk is larger now, a file system is not; ask again with the same size.
            DeadlineExceeded, OutcomeUnknown: no answer in time; ask again with the same size.
        """
        self._check_open()
        disk = self._book.find(host_path, identity)
        if disk.state is not DiskState.ATTACHED or disk.request.read_only:
            state = "read-only" if disk.request.read_only else disk.state
            raise NotAttached(f"{host_path} is {state}: it cannot be resized", vm=self._vm, slot=disk.slot)
        if size_bytes < disk.size_bytes:
            raise InvalidRequest(
                f"{host_path} has {disk.size_bytes} bytes; shrinking it to {size_bytes} would lose data",
                slot=disk.slot,
                host_path=host_path,
                remedy="give a larger size",
            )
        if size_bytes % 512 or size_bytes > _MAX_BYTES:
            remedy = f"give a multiple of 512, of {_MAX_BYTES} at the most"
            raise InvalidRequest(f"{host_path} cannot have {size_bytes} bytes", slot=disk.slot, remedy=remedy)
        ends = time.monotonic() + (self._timeouts.resize if timeout_s is None else timeout_s)
        self._resizing += 1
        try:
            if size_bytes > disk.size_bytes:
                await self._host.resize(disk.slot, attachment=disk.id, size_bytes=size_bytes, timeout_s=_left(ends))
                disk.size_bytes = size_bytes
                self._ledger.note([disk.record()])
                await self._ledger.flush()
            mounted = [(m.config, m.guest_path) for m in disk.mounts.values() if m.state is MountState.MOUNTED]
            await self._guest.grow(disk.slot, mounts=mounted, timeout_s=_left(ends))
        finally:
            self._resizing -= 1

    def guest_path(self, host_path: str, *, identity: str | None = None) -> PurePosixPath | None:
        """Where the disk is mounted first; None if it is attached only.

        Raises:
            NotAttached: it is not attached.
        """
        disk = self._book.find(host_path, identity)
        for mount in disk.mounts.values():
            if mount.state is MountState.MOUNTED:
                return mount.guest_path
        return None

    def references(self, reservation: Reservation | str) -> int:
        """How many reservations share the disk of this one; 0 if it was released."""
        claim = self._book.claims.get(reservation if isinstance(reservation, str) else reservation.id)
        return len(claim.disk.claims) if claim else 0

    def slots(self) -> list[SlotView]:
        """Every slot that is taken by a disk, in order. Reserved slots are not among them."""
        return [slot_view(disk) for disk in self._book.in_order()]

    def mounts(self) -> list[MountView]:
        """Every mount, in the order of slots."""
        disks = self._book.in_order()
        return [mount_view(mount) for disk in disks for mount in disk.mounts.values()]

    def reservations(self) -> list[Reservation]:
        """Every reservation that is held, the oldest first."""
        return [claim.reservation() for claim in self._book.claims.values() if claim.state is ReservationState.HELD]

    def events(self) -> AsyncIterator[ScsiEvent]:
        """What happens from now on. A listener that is slower than that is told how many it lost."""
        return self._events.listen()

    async def restore(self, *, is_alive: Callable[[Holder], bool], sizes: Mapping[str, int] | None = None) -> list[str]:
        """Take over from an owner that died: read the journal, and finish or undo what it was in the middle of.

        Reservations whose caller never got them, or was giving them back, or is dead, are given back. Says what was
        found, a line each; a disk that could not be settled stays visible in its state. `sizes` are what the host says
        that attachments have, in bytes: a resize may have been done and not written down.
        """
        return await self._take_up(self._journal.read(), is_alive, sizes or {})

    async def _take_up(
        self, records: Sequence[Record], is_alive: Callable[[Holder], bool], sizes: Mapping[str, int]
    ) -> list[str]:
        findings = self._book.restore(records, is_alive)
        for disk in self._book.disks.values():
            if (size_bytes := sizes.get(disk.id, disk.size_bytes)) != disk.size_bytes:
                findings.append(f"{disk.request.host_path} at {disk.slot} was being resized: it has {size_bytes} bytes")
                disk.size_bytes = size_bytes
                self._ledger.note([disk.record()])
        for disk in list(self._book.disks.values()):
            self._workers.kick(disk)
        await self.settle()
        for disk in self._book.disks.values():
            if disk.state is not DiskState.ATTACHED or not disk.is_wanted:
                findings.append(f"{disk.request.host_path} at {disk.slot} is left {disk.state}")
                continue
            findings += [
                f"{disk.request.host_path} at {mount.guest_path} is left {mount.state}"
                for mount in disk.mounts.values()
                if mount.state is not MountState.MOUNTED or not mount.is_wanted
            ]
        return findings

    async def export_state(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ScsiState:
        """The state as a document, for the owner of this VM on the host that it moves to.

        From then on every change is refused with `Migrating`, until `resume`: what the document says stays true. If
        this fails, the manager goes on as before. Another owner that opens the VM meanwhile knows nothing of it.

        Raises:
            WrongState: a disk or a mount is half-way, or is being resized; names it.
            DeadlineExceeded: what was under way did not end within `timeout_s` seconds.
        """
        self._check_open()
        self._exported = True
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                await self.settle()
            if self._gone is not None:
                raise self._gone
            if self._resizing:
                raise WrongState("a disk is being resized", vm=self._vm, remedy="export when that is done")
            state = ScsiState.of(self._book.in_order(), controllers=self._book.free.controllers)
            await self._ledger.flush()
        except BaseException as error:
            self._exported = False
            if isinstance(error, TimeoutError) and limit.expired():
                raise DeadlineExceeded(f"not settled within {timeout_s:g} s", vm=self._vm, remedy="ask again") from None
            raise
        return state

    def import_state(self, state: ScsiState, *, holder: Holder) -> None:
        """Take up what another manager exported, in a VM that has no disks yet. Nothing is sent, nothing is written.

        Every change is refused with `Migrating` until `resume`. Reservations keep their names; those of processes are
        `holder`'s from then on.

        Raises:
            AlreadyAttached: there are disks, or a slot is taken.
            InvalidRequest: the VM has fewer controllers.
            NotSupported: the guest cannot express a mount.
        """
        self._check_open()
        if self._book.disks:
            raise AlreadyAttached(
                f"the VM has {len(self._book.disks)} disks", vm=self._vm, remedy="import into a VM without disks"
            )
        check_fits(state, self._book.free, self._guest)
        self._imported = (state, holder)

    async def resume(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[str]:
        """Go on after `export_state`, if the VM stays; or after `import_state`, once it runs here.

        What was imported is looked for in the VM first. What is there is taken over; what is not is attached and
        mounted, in the slot and at the path that it had. Says what was left half-way, a line each. If this fails with
        an error nothing changed, and it can be called again.

        Raises:
            WrongState: nothing was exported or imported; or an encrypted mount is not there, and its key is nowhere.
            ConfigDiffers: a file is not the one that it was: another format or size, or two are one.
            DeadlineExceeded: not everything was looked at within `timeout_s` seconds.
            StoreError: the journal did not take it.
            others: as `add`, for a disk that cannot be opened here.
        """
        if self._gone is not None:
            raise self._gone
        if not self._exported and self._imported is None:
            raise WrongState("nothing was exported or imported", vm=self._vm)
        self._exported = False
        if self._imported is None:
            return []
        state, holder = self._imported
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                records = await locate(
                    state,
                    self._host,
                    self._guest,
                    holder=holder,
                    new_id=self._new_id,
                    timeout_s=self._timeouts.probe,
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"not everything was looked at within {timeout_s:g} s", vm=self._vm, remedy="resume again"
            ) from None
        if self._imported is None or self._gone is not None:
            raise self._gone or WrongState("it was resumed meanwhile", vm=self._vm)
        await self._journal.write(records)
        self._imported = None
        return await self._take_up(records, lambda _: True, {})

    def unreserve(self, slot: Slot) -> None:
        """A slot that was reserved is handed out like any other from now on. One that was not stays as it is."""
        self._book.unreserve(slot)

    async def repair(self) -> None:
        """Go on with every disk that stopped half-way.

        Raises:
            Migrating: the state was exported, and not resumed.
        """
        self._check_not_migrating()
        for disk in list(self._book.disks.values()):
            self._workers.kick(disk)
        await self.settle()

    async def settle(self) -> None:
        """Return when no work is under way in the background, and the journal has all that it takes."""
        while self._workers.tasks:
            await asyncio.wait(self._workers.tasks)
        await self._ledger.flush()

    def mark_gone(self, error: UtilityVMError) -> None:
        """The VM died. Whoever waits is told at once; nothing is attached any more, and the journal says so."""
        if self._gone is not None:
            return
        self._gone = error
        for worker in self._workers.tasks:
            worker.cancel()
        dropped: list[Record] = []
        for disk in self._book.disks.values():
            dropped += [disk.record(), *(mount.record() for mount in disk.mounts.values())]
            disk.close_opened()
            self._book.free.give_back(disk.slot)
        for claim in self._book.claims.values():
            dropped.append(claim.record())
            # What a release was to let go of is gone.
            tell(claim, None if claim.state is ReservationState.RELEASING else error)
            self._workers.remember_released(claim)
        self._book.disks.clear()
        self._book.paths.clear()
        self._book.claims.clear()
        self._ledger.note([], dropped)
        self._workers.write_soon()

    def _check_open(self) -> None:
        if self._gone is not None:
            raise self._gone
        self._check_not_migrating()

    @contextmanager
    def held_still(self, why: str) -> Iterator[None]:
        """Whoever asks for a change until the block ends is refused, with these words. What had begun goes on."""
        self._check_open()
        self._still = why
        try:
            yield
        finally:
            self._still = None

    def _check_not_migrating(self) -> None:
        if self._still is not None:
            raise Migrating(self._still, vm=self._vm, remedy="wait until that is done")
        if self._exported or self._imported:
            what = "exported" if self._exported else "imported, and not resumed"
            raise Migrating(f"the manager's state was {what}", vm=self._vm, remedy="resume it first")

    async def _until_settled(self, claim: Claim) -> None:
        """Wait until the claim is held, or gone. Who stops waiting for one that is not held gives it up."""
        disk = claim.disk
        if claim.waiter is None and disk.worker is None and self._workers.try_settle(claim):
            await self._ledger.flush()
            return
        claim.waiter = asyncio.get_running_loop().create_future()
        self._workers.kick(disk)
        try:
            await claim.waiter
        except asyncio.CancelledError:
            if claim.state is not ReservationState.RELEASING and claim.id in self._book.claims:
                self._begin_release(claim)
                self._workers.kick(disk)
            raise

    def _begin_release(self, claim: Claim) -> None:
        """From here on the claim wants nothing."""
        disk, mount = claim.disk, claim.mount
        claim.waiter = None
        if claim.state is not ReservationState.RELEASING:
            disk.claims.pop(claim.id, None)
            if mount is not None:
                mount.claims.pop(claim.id, None)
            claim.was_held = claim.state is ReservationState.HELD
            claim.state = ReservationState.RELEASING
            disk.leaving[claim.id] = claim
            self._ledger.note([claim.record()])
            if disk.worker is None:
                self._workers.try_settle(claim)


def _left(ends: float) -> float:
    """The seconds until then; what is late gets no time, and is not left out."""
    return max(ends - time.monotonic(), 0.001)
