"""The manager: who has reserved what, and what must be done to the bus and to the guest so that it is so.

It is level-triggered. Callers state what they want, as *claims* on a disk and a mount; each disk that
is not as its claims want it has one *worker*, a task that takes one step after the other until it is. So there is one
place that sends steps for a disk, a caller that goes away takes only its claim along, a second caller for the same disk
waits for the same work and gets the same answer, and the next caller for the disk resumes what stopped half-way.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
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
    WrongLoop,
    WrongState,
)
from utilityvm.log import logger
from utilityvm.scsi.book import Book
from utilityvm.scsi.disk import Disk, Resize
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.events import Events, ScsiEvents
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.migration import check_fits, locate
from utilityvm.scsi.mount import checked_config
from utilityvm.scsi.ports import DiskRequest, GuestBackend, Holder, HostBackend, Journal, MountConfig, Record
from utilityvm.scsi.reservation import Claim, Force, ForceArgument, Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.steps import Steps, StepTimeouts
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.scsi.views import MountView, SlotView, mount_view, slot_view
from utilityvm.scsi.worker import Workers, resolve, would_shrink

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
        self._steps = Steps(host, guest, self._ledger, self._events, timeouts=self._timeouts, log=self._log, vm=vm)
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
        self._still: str | None = None  # why nothing may change just now
        self._is_resuming = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def add(
        self,
        request: DiskRequest,
        *,
        mount: MountConfig | None = None,
        guest_path: PurePosixPath | None = None,
        holder: Holder,
        id: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Reservation:
        """Reserve a disk: it is attached, and mounted if `mount` says how.

        `id` names the reservation, so that a caller who lost the answer can look for it; None: a new one.

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
            WrongLoop: the manager is for another event loop. So says every call.
        """
        self._enter()
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
        remedy = "what was begun is undone in the background; ask again later"
        async with self._deadline(f"{request.host_path} was not attached", timeout_s, remedy, request):
            opened = await self._host.open(request)
            try:
                self._check_open()
                claim = self._book.claim(request, opened, mount, guest_path, holder, id=id)
            except BaseException:
                opened.close()
                raise
            try:
                await self._until_settled(claim)
            except BaseException:
                self._give_up(claim)  # its caller does not get it, whatever the reason, and so leaves it to nobody
                raise
        return claim.reservation()

    async def release(
        self, reservation: Reservation | str, *, timeout_s: float = DEFAULT_TIMEOUT_S, force: ForceArgument = False
    ) -> str | None:
        """Give a reservation back. The last one of a mount unmounts it; the last one of a disk ejects and detaches it.

        Returns when that is done. If it fails and nothing was done, it is held as before. If something was done, it is
        there to be released, and the next release goes on from the step that failed.

        `force` unmounts and ejects what the guest still uses, and what can no longer be written out. It belongs to this
        call: a step by which others leave as well is forced only if they asked for it too. `force="host"` takes the
        disk from a guest that refuses even that, or does not answer, unless somebody else needs the disk.

        Returns what the guest said if the host took the disk away; what the guest had not written to it is lost. None:
        the guest let go of it.

        Raises:
            AlreadyReleased: it was given back before, or is being given back.
            NotAttached: there is no such reservation.
            NotSupported: `force`, which this guest does not know; nothing changed.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown, StoreError: a step failed; the disk is as `slots`
                shows it.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
        """
        self._enter()
        claim = self._begin_release(reservation, force=force)
        if claim is None:
            return None
        await self._until_released(claim, timeout_s)
        return claim.overruled

    async def remove(
        self,
        host_path: str,
        *,
        identity: str | None = None,
        guest_path: PurePosixPath | None = None,
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        force: ForceArgument = False,
    ) -> str | None:
        """Drop one reference of the disk: the newest of `holder`, or the newest of all without one.

        With `guest_path` it is the newest of the mount at that path.

        One that is being released is no longer among them, so that two calls at once drop two. A disk that nobody has a
        reservation of, because an undo failed, is taken out. Returns what `release` does.

        Raises:
            NotAttached: the disk, or that holder's reservation, is not there.
            others: as `release`.
        """
        self._enter()
        self._check_not_migrating()
        disk = self._book.find(host_path, identity)
        candidates = [
            claim
            for claim in (*disk.claims.values(), *disk.leaving.values())
            if (holder is None or claim.holder.name == holder)
            and (guest_path is None or (claim.mount is not None and claim.mount.guest_path == guest_path))
            and claim.state is not ReservationState.PENDING
            and not claim.is_awaited
        ]
        if not candidates and holder is None and not disk.claims and not disk.leaving:
            candidates = [self._book.claim_of_nobody(disk)]
        if not candidates:
            whose = f" of {holder}" if holder else ""
            where = f" at {guest_path}" if guest_path else ""
            raise NotAttached(f"there is no reservation{whose} of {host_path}{where}", vm=self._vm, host_path=host_path)
        # One whose release failed before is taken first: it goes on where that stopped.
        newest = max(candidates, key=lambda claim: (claim.state is ReservationState.RELEASING, claim.since))
        return await self.release(newest.id, timeout_s=timeout_s, force=force)

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
        and its error is raised. Cancelled: all of them are given back, in the background.
        """
        self._enter()
        adding = [
            asyncio.ensure_future(
                self.add(item.disk, mount=item.mount, guest_path=item.guest_path, holder=holder, timeout_s=timeout_s)
            )
            for item in requests
        ]
        try:
            if adding:
                await asyncio.wait(adding)
        except BaseException:
            for one in adding:
                one.cancel()
                one.add_done_callback(self._give_up_result)  # also what was there before, or came all the same
            raise
        failures = [error for one in adding if (error := _failure(one)) is not None]
        unexpected = [failure for failure in failures if not isinstance(failure, UtilityVMError)]
        if failures and (which == "all" or unexpected):
            await self._give_up_all([one.result() for one in adding if _failure(one) is None], timeout_s)
            raise (unexpected or failures)[0]
        results = [_failure(one) or one.result() for one in adding]
        return [result for result in results if isinstance(result, (Reservation, UtilityVMError))]

    async def remove_many(
        self,
        reservations: Iterable[Reservation | str],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        force: ForceArgument = False,
    ) -> list[UtilityVMError | None]:
        """Release several reservations at the same time; what became of each, in order.

        All of them are being released when this first waits: cancelled, it leaves that to go on in the background.
        """
        self._enter()
        claims: list[Claim | UtilityVMError | None] = []
        for one in reservations:
            try:
                claims.append(self._begin_release(one, force=force))
            except UtilityVMError as error:
                claims.append(error)
        waiting = [self._until_released(claim, timeout_s) for claim in claims if isinstance(claim, Claim)]
        ends = iter(await asyncio.gather(*waiting, return_exceptions=True))
        results = [next(ends) if isinstance(claim, Claim) else claim for claim in claims]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, UtilityVMError):
                raise result
        return [result if isinstance(result, UtilityVMError) else None for result in results]

    async def resize(
        self, host_path: str, size_bytes: int, *, identity: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        Requests for one disk are met one after the other, in the order of asking; it never shrinks. `timeout_s`: None:
        as the manager's timeouts say.

        Raises:
            NotAttached: it is not attached now.
            InvalidRequest: it is larger than that, or is just getting larger; or no disk can have that size.
            HostRefused, NotSupported: the host cannot; nothing changed.
            GuestRefused: a file system cannot grow, and nothing changed; or it did not, though the disk is larger now:
                ask again with the same size.
            DeadlineExceeded: no answer in time; what was begun goes on in the background. Ask again with the same size.
            OutcomeUnknown: no answer; ask again with the same size.
        """
        self._enter()
        self._check_open()
        disk = self._book.find(host_path, identity)
        if not disk.is_on_bus or not disk.is_wanted or disk.request.read_only:
            state = "read-only" if disk.request.read_only else disk.state if disk.is_wanted else "being released"
            raise NotAttached(f"{host_path} is {state}: it cannot be resized", vm=self._vm, slot=disk.slot)
        if size_bytes < disk.wanted_bytes:
            raise would_shrink(disk, size_bytes, disk.wanted_bytes)
        if size_bytes % 512 or size_bytes > _MAX_BYTES:
            remedy = f"give a multiple of 512, of {_MAX_BYTES} at the most"
            raise InvalidRequest(f"{host_path} cannot have {size_bytes} bytes", slot=disk.slot, remedy=remedy)
        resize = Resize(size_bytes, asyncio.get_running_loop().create_future())
        disk.resizes.append(resize)
        self._workers.kick(disk)
        seconds = self._timeouts.resize if timeout_s is None else timeout_s
        try:
            async with self._deadline(f"{host_path} was not resized", seconds, "ask again with the same size", disk):
                await resize.waiter
        finally:
            if resize in disk.resizes:  # nothing was sent, and nothing will be
                disk.resizes.remove(resize)

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

    def events(self) -> ScsiEvents:
        """What happens from this call on, until the VM's end. A listener that is too slow is told how many it lost."""
        return self._events.listen()

    async def restore(
        self,
        *,
        is_alive: Callable[[Holder], bool],
        sizes: Mapping[str, int] | None = None,
        records: Sequence[Record] | None = None,
    ) -> list[str]:
        """Take over from an owner that died: finish or undo what it was in the middle of, by `records`.

        They are what the journal holds; None: it is read here, which blocks.

        Reservations whose caller never got them, or was giving them back, or is dead, are given back. Says what was
        found, a line each; a disk that could not be settled stays visible in its state. `sizes` are what the host says
        that attachments have, in bytes: a resize may have been done and not written down.
        """
        return await self._take_up(self._journal.read() if records is None else records, is_alive, sizes or {})

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
            WrongState: a disk or a mount is half-way; names it.
            DeadlineExceeded: what was under way did not end within `timeout_s` seconds.
        """
        self._enter()
        self._check_open()
        self._exported = True
        self._workers.hold_still(True)
        try:
            async with self._deadline("the disks were not settled", timeout_s, "ask again"):
                await self.settle()
            if self._gone is not None:
                raise self._gone
            state = ScsiState.of(self._book.in_order(), controllers=self._book.free.controllers)
            await self._ledger.flush()
        except BaseException:
            self._exported = False
            self._workers.hold_still(False)
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
        self._enter()
        if self._gone is not None:
            raise self._gone
        if self._is_resuming or not (self._exported or self._imported):
            why = "it is being resumed" if self._is_resuming else "nothing was exported or imported"
            raise WrongState(why, vm=self._vm)
        if self._imported is None:
            self._exported = False
            self._workers.hold_still(False)
            return []
        state, holder = self._imported
        self._is_resuming = True
        try:
            async with self._deadline("not everything was looked at", timeout_s, "resume again"):
                records = await locate(
                    state,
                    self._host,
                    self._guest,
                    holder=holder,
                    new_id=self._new_id,
                    timeout_s=self._timeouts.probe,
                )
                if self._gone is not None:
                    raise self._gone
                await self._journal.write(records)
        finally:
            self._is_resuming = False
        if self._gone is not None:
            raise self._gone
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
        self._enter()
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
        self._events.end()
        for worker in self._workers.tasks:
            worker.cancel()
        dropped: list[Record] = []
        for disk in self._book.disks.values():
            dropped += [disk.record(), *(mount.record() for mount in disk.mounts.values())]
            disk.close_opened()
            self._book.free.give_back(disk.slot)
            for waiter in disk.take_resizes():
                resolve(waiter, error)
        for claim in self._book.claims.values():
            dropped.append(claim.record())
            # What a release was to let go of is gone.
            resolve(claim.waiter, None if claim.state is ReservationState.RELEASING else error)
            self._workers.remember_released(claim)
        self._book.disks.clear()
        self._book.paths.clear()
        self._book.claims.clear()
        self._ledger.note([], dropped)
        self._workers.write_soon()

    @contextmanager
    def held_still(self, why: str) -> Iterator[None]:
        """Whoever asks for a change until the block ends is refused, with these words. What had begun goes on.

        Once `settle` has returned nothing more is sent, also to undo what a caller gives up: that waits for the end.
        """
        self._enter()
        self._check_open()
        self._still = why
        self._workers.hold_still(True)
        try:
            yield
        finally:
            self._still = None
            self._workers.hold_still(False)

    def close(self) -> None:
        """Nobody will ask any more: subscriptions end. Work that is under way goes on."""
        self._events.end()

    def _enter(self) -> None:
        """The first call decides which event loop the manager is for.

        Raises:
            WrongLoop: it is for another.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif loop is not self._loop:
            raise wrong_loop(self._vm)

    def _check_open(self) -> None:
        if self._gone is not None:
            raise self._gone
        self._check_not_migrating()

    def _check_not_migrating(self) -> None:
        if self._still is not None:
            raise Migrating(self._still, vm=self._vm, remedy="wait until that is done")
        if self._exported or self._imported:
            what = "exported" if self._exported else "imported, and not resumed"
            raise Migrating(f"the manager's state was {what}", vm=self._vm, remedy="resume it first")

    @asynccontextmanager
    async def _deadline(
        self, what: str, seconds: float, remedy: str, about: Disk | DiskRequest | None = None
    ) -> AsyncIterator[None]:
        """Raises:
        DeadlineExceeded: the block did not end within that time; says what was not done, and what to do.
        """
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            request = about.request if isinstance(about, Disk) else about
            raise DeadlineExceeded(
                f"{what} within {seconds:g} s",
                vm=self._vm,
                slot=about.slot if isinstance(about, Disk) else None,
                host_path=None if request is None else request.host_path,
                remedy=remedy,
            ) from None

    async def _until_settled(self, claim: Claim) -> None:
        """Return when the claim is held."""
        if self._workers.try_settle(claim):
            await self._ledger.flush()
            return
        claim.waiter = asyncio.get_running_loop().create_future()
        self._workers.kick(claim.disk)
        await claim.waiter

    def _begin_release(self, reservation: Reservation | str, *, force: ForceArgument) -> Claim | None:
        """Everything that can be refused is refused here. None: it is gone, and nobody had been told so."""
        self._check_not_migrating()
        id = reservation if isinstance(reservation, str) else reservation.id
        claim = self._book.claims.get(id)
        if claim is None:
            if self._workers.released.get(id) is False:
                self._workers.released[id] = True
                return None
            if id in self._workers.released:
                raise AlreadyReleased(f"reservation {id} was released before", vm=self._vm)
            raise NotAttached(
                f"there is no reservation {id}", vm=self._vm, remedy="`uvm ls` shows those that there are"
            )
        if claim.is_awaited:
            doing = "made" if claim.state is ReservationState.PENDING else "released"
            raise AlreadyReleased(f"reservation {id} is being {doing}", vm=self._vm)
        if Force.of(force) is Force.GUEST:
            self._guest.check_force(claim.disk.slot)
        self._book.give_back(claim, force=Force.of(force))
        claim.waiter = None
        if not self._workers.try_settle(claim):
            claim.waiter = asyncio.get_running_loop().create_future()
            self._workers.kick(claim.disk)
        return claim

    async def _until_released(self, claim: Claim, timeout_s: float) -> None:
        path, remedy = claim.disk.request.host_path, "it goes on in the background; release it again to wait for it"
        async with self._deadline(f"{path} was not released", timeout_s, remedy, claim.disk):
            if claim.waiter is not None:
                await claim.waiter
            else:  # others hold on to all of it
                await self._ledger.flush()
        self._workers.released[claim.id] = True

    def _give_up(self, claim: Claim) -> None:
        """A claim of which nobody knows: it is undone in the background."""
        if self._book.claims.get(claim.id) is claim and claim.state is not ReservationState.RELEASING:
            self._book.give_back(claim, force=Force.NO)
            claim.was_held, claim.waiter = False, None
            self._workers.try_settle(claim)
            self._workers.kick(claim.disk)

    def _give_up_result(self, adding: asyncio.Future[Reservation]) -> None:
        if _failure(adding) is None and (claim := self._book.claims.get(adding.result().id)) is not None:
            self._give_up(claim)

    async def _give_up_all(self, held: Sequence[Reservation], timeout_s: float) -> None:
        """Give back what a batch had, and wait until that is done or has failed."""
        claims = [claim for one in held if (claim := self._book.claims.get(one.id)) is not None]
        for claim in claims:
            self._give_up(claim)
        if workers := [claim.disk.worker for claim in claims if claim.disk.worker is not None]:
            await asyncio.wait(workers, timeout=timeout_s)


def wrong_loop(vm: str | None) -> WrongLoop:
    return WrongLoop(
        "the VM belongs to another event loop: the one that started or opened it",
        vm=vm,
        remedy="do all of it in one asyncio.run; or start the VM with keep, and open it in this loop",
    )


def _failure(adding: asyncio.Future[Reservation]) -> BaseException | None:
    return asyncio.CancelledError() if adding.cancelled() else adding.exception()
