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
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal, TypeAlias

from utilityvm.errors import (
    AlreadyReleased,
    DeadlineExceeded,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    Migrating,
    NoControllers,
    NoFreeSlot,
    NotAttached,
    OutcomeUnknown,
    RequestError,
    StoreError,
    UtilityVMError,
)
from utilityvm.log import logger
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.mount import GENERATED_BELOW, Mount, check_beside, checked_config, checked_guest_path, same_mount
from utilityvm.scsi.ports import (
    CallerKey,
    DiskRecord,
    DiskRequest,
    GuestBackend,
    Holder,
    HostBackend,
    Journal,
    MountConfig,
    MountRecord,
    OpenDisk,
    Record,
    ReservationRecord,
)
from utilityvm.scsi.reservation import Claim, Reservation
from utilityvm.scsi.slot import FreeSlots, Slot
from utilityvm.scsi.transitions import DiskState, Event, MountState, ReservationState

DEFAULT_TIMEOUT_S: Final = 60.0
_REMEMBERED: Final = 4096  # released reservations whose second release gets its own error
_EVENTS_WAITING: Final = 1024

_log = logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeouts:
    """How long each step may take before its outcome counts as unknown, in seconds. Not the callers' deadlines."""

    attach: float = 30.0
    mount: float = 120.0
    unmount: float = 60.0
    eject: float = 30.0
    detach: float = 30.0
    probe: float = 10.0
    resize: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """A slot that is taken, as it was when asked."""

    slot: Slot
    attachment: str
    host_path: str
    identity: str
    format: str
    read_only: bool
    size_bytes: int
    state: str
    guest_paths: tuple[PurePosixPath, ...]
    references: int
    holders: tuple[str, ...]
    since: float
    phases: Mapping[str, float]  # seconds that the last step of each kind took


@dataclass(frozen=True, slots=True, kw_only=True)
class MountView:
    """A mount, as it was when asked."""

    slot: Slot
    host_path: str
    guest_path: PurePosixPath
    config: MountConfig
    state: str
    references: int
    holders: tuple[str, ...]
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiEvent:
    """Something happened: `what` is a state that was entered, `lost` (with `count`), or `failed` (with `error`)."""

    what: str
    at: float
    slot: Slot | None = None
    host_path: str | None = None
    guest_path: PurePosixPath | None = None
    seconds: float | None = None  # how long the step took that led here
    error: str | None = None
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """One disk of a batch; see `ScsiManager.add`."""

    disk: DiskRequest
    mount: MountConfig | None = None
    guest_path: PurePosixPath | None = None


class _StepFailed(Exception):
    """A step did not do what it should. The state says how far it came."""

    def __init__(self, error: UtilityVMError, mount: Mount | None = None) -> None:
        super().__init__(error)
        self.error = error
        self.mount = mount


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
        self._reserved = dict(reserved or {})
        self._free = FreeSlots(controllers, reserved=self._reserved)
        self._host = host
        self._guest = guest
        self._journal = journal
        self._timeouts = timeouts or StepTimeouts()
        self._new_id = new_id
        self._clock = clock
        self._vm = vm
        self._log = _log.bind(vm=vm)
        self._by_identity: dict[str, Disk] = {}
        self._paths: dict[PurePosixPath, Mount] = {}
        self._claims: dict[str, Claim] = {}
        self._released: OrderedDict[str, bool] = OrderedDict()  # False: its caller was told that it failed
        self._workers: set[asyncio.Task[None]] = set()
        self._listeners: set[_Listener] = set()
        self._unwritten: dict[str, tuple[Record, bool]] = {}  # outcomes that the journal lacks; True: forget it
        self._gone: UtilityVMError | None = None
        self._migrating = False

    # What callers ask.

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
            guest_path = checked_guest_path(guest_path)
        if not self._free.capacity:
            raise NoControllers("the VM has no SCSI controller", vm=self._vm, remedy="start it with 1 to 4 controllers")
        self._guest.check(None, mount)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                opened = await self._host.open(request)
                try:
                    self._check_open()
                    claim = self._claim(request, opened, mount, guest_path, holder)
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
        on from the step that failed. `force` unmounts and ejects what the guest still uses.

        Raises:
            AlreadyReleased: it was given back before, or is being given back.
            NotAttached: there is no such reservation.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown: a step failed; the disk is as `slots` shows it.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
        """
        id = reservation if isinstance(reservation, str) else reservation.id
        claim = self._claims.get(id)
        if claim is None:
            if self._released.get(id) is False:
                self._released[id] = True  # the release that failed before was finished since, and now its caller knows
                return
            if id in self._released:
                raise AlreadyReleased(f"reservation {id} was released before", vm=self._vm)
            raise NotAttached(
                f"there is no reservation {id}", vm=self._vm, remedy="`uvm ls` shows those that there are"
            )
        self._check_not_migrating()
        if claim.waiter is not None and not claim.waiter.done():
            raise AlreadyReleased(f"reservation {id} is being released", vm=self._vm)
        if force:
            claim.disk.force = True
        self._begin_release(claim)
        if claim.id not in self._claims:
            return  # others hold on to all of it
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                await self._until_settled(claim)
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
        disk = self._find(host_path, identity)
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

    async def resize(self, host_path: str, size_bytes: int, *, identity: str | None = None) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        Raises:
            NotAttached: it is not attached now.
            InvalidRequest: the size is not larger than what it is.
            HostRefused, NotSupported: the host cannot; nothing changed.
            GuestRefused: the disk is larger now, a file system is not; ask again with the same size.
        """
        self._check_open()
        disk = self._find(host_path, identity)
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
        if size_bytes % 512:
            raise InvalidRequest(f"{size_bytes} bytes", remedy="give a multiple of 512")
        limit = self._timeouts.resize
        if size_bytes > disk.size_bytes:
            await self._host.resize(disk.slot, attachment=disk.id, size_bytes=size_bytes, timeout_s=limit)
            disk.size_bytes = size_bytes
            self._write_outcome([disk.record()])
            self._flush_outcomes()
        mounted = [(m.config, m.guest_path) for m in disk.mounts.values() if m.state is MountState.MOUNTED]
        await self._guest.grow(disk.slot, mounts=mounted, timeout_s=limit)

    # What callers look at.

    def guest_path(self, host_path: str, *, identity: str | None = None) -> PurePosixPath | None:
        """Where the disk is mounted first; None if it is attached only.

        Raises:
            NotAttached: it is not attached.
        """
        disk = self._find(host_path, identity)
        for mount in disk.mounts.values():
            if mount.state is MountState.MOUNTED:
                return mount.guest_path
        return None

    def references(self, reservation: Reservation | str) -> int:
        """How many reservations share the disk of this one; 0 if it was released."""
        claim = self._claims.get(reservation if isinstance(reservation, str) else reservation.id)
        return len(claim.disk.claims) if claim else 0

    def slots(self) -> list[SlotView]:
        """Every slot that is taken by a disk, in order. Reserved slots are not among them."""
        return [_slot_view(disk) for disk in sorted(self._by_identity.values(), key=lambda disk: disk.slot)]

    def mounts(self) -> list[MountView]:
        """Every mount, in the order of slots."""
        disks = sorted(self._by_identity.values(), key=lambda disk: disk.slot)
        return [_mount_view(mount) for disk in disks for mount in disk.mounts.values()]

    def reservations(self) -> list[Reservation]:
        """Every reservation that is held, the oldest first."""
        return [claim.reservation() for claim in self._claims.values() if claim.state is ReservationState.HELD]

    async def events(self) -> AsyncIterator[ScsiEvent]:
        """What happens from now on. A listener that is slower than that is told how many it lost."""
        listener = _Listener(asyncio.Queue(_EVENTS_WAITING))
        self._listeners.add(listener)
        try:
            while True:
                event = await listener.queue.get()
                if listener.lost and listener.queue.empty():
                    yield ScsiEvent(what="lost", at=self._clock(), count=listener.lost)
                    listener.lost = 0
                yield event
        finally:
            self._listeners.discard(listener)

    # Beginning and end.

    async def restore(self, *, is_alive: Callable[[Holder], bool]) -> list[str]:
        """Take over from an owner that died: read the journal, and finish or undo what it was in the middle of.

        Reservations whose caller never got them, or was giving them back, or is dead, are given back. Says what was
        found, a line each; a disk that could not be settled stays visible in its state.
        """
        findings = self._read_journal(is_alive)
        for disk in list(self._by_identity.values()):
            self._kick(disk)
        await self.settle()
        for disk in self._by_identity.values():
            if disk.state is not DiskState.ATTACHED or not disk.is_wanted:
                findings.append(f"{disk.request.host_path} at {disk.slot} is left {disk.state}")
        return findings

    async def repair(self) -> None:
        """Go on with every disk that stopped half-way."""
        for disk in list(self._by_identity.values()):
            self._kick(disk)
        await self.settle()

    async def settle(self) -> None:
        """Return when no work is under way in the background."""
        while self._workers:
            await asyncio.wait(self._workers)

    def mark_gone(self, error: UtilityVMError) -> None:
        """The VM died. Whoever waits is told at once; nothing is attached any more, and the journal says so."""
        if self._gone is not None:
            return
        self._gone = error
        for worker in self._workers:
            worker.cancel()
        dropped: list[Record] = []
        for disk in self._by_identity.values():
            dropped += [disk.record(), *(mount.record() for mount in disk.mounts.values())]
            disk.close_opened()
            self._free.give_back(disk.slot)
        for claim in self._claims.values():
            dropped.append(claim.record())
            # What a release was to let go of is gone.
            _tell(claim, None if claim.state is ReservationState.RELEASING else error)
            self._remember_released(claim)
        self._by_identity.clear()
        self._paths.clear()
        self._claims.clear()
        self._write_outcome([], dropped)
        self._flush_outcomes()

    # Claims.

    def _check_open(self) -> None:
        if self._gone is not None:
            raise self._gone
        self._check_not_migrating()

    def _check_not_migrating(self) -> None:
        if self._migrating:
            raise Migrating("the manager's state was exported", vm=self._vm, remedy="resume it first")

    def _find(self, host_path: str, identity: str | None) -> Disk:
        # What the path leads to now comes first: another file may have taken the name of one that is attached.
        if identity is not None and (found := self._by_identity.get(identity)):
            return found
        for disk in self._by_identity.values():
            if disk.request.host_path == host_path:
                return disk
        raise NotAttached(f"{host_path} is not attached", vm=self._vm, host_path=host_path)

    def _claim(
        self,
        request: DiskRequest,
        opened: OpenDisk,
        config: MountConfig | None,
        path: PurePosixPath | None,
        holder: Holder,
    ) -> Claim:
        """Enter a claim, all of it or nothing. From here to the first step nothing waits, so nothing comes between."""
        now = self._clock()
        disk = self._by_identity.get(opened.identity)
        if disk is not None:
            disk.check_same(request, opened)
            mount = self._share_or_make_mount(disk, config, path, now)
        else:
            disk = self._new_disk(request, opened, now)
            try:
                self._guest.check(disk.slot, config)
                mount = self._share_or_make_mount(disk, config, path, now)
            except BaseException:
                self._free.give_back(disk.slot)
                raise
            self._by_identity[disk.identity] = disk
        if mount is not None and mount.id not in disk.mounts:
            disk.mounts[mount.id] = mount
            self._paths[mount.guest_path] = mount
        if disk.opened is None and disk.state is not DiskState.ATTACHED:
            disk.opened = opened
        elif disk.opened is not opened:
            opened.close()
        claim = Claim(self._new_id(), disk, mount, holder, now)
        self._claims[claim.id] = claim
        disk.claims[claim.id] = claim
        if mount is not None:
            mount.claims[claim.id] = claim
        return claim

    def _new_disk(self, request: DiskRequest, opened: OpenDisk, now: float) -> Disk:
        try:
            slot = self._free.take_lowest()
        except NoFreeSlot:
            raise self._full(request) from None
        return Disk(
            self._new_id(), slot, request, opened.identity, opened.format, opened.size_bytes, now, opened=opened
        )

    def _full(self, request: DiskRequest) -> NoFreeSlot:
        lines = [f"{slot}: {what} (reserved)" for slot, what in sorted(self._reserved.items())]
        for view in self.slots():
            lines.append(f"{view.slot}: {view.host_path} ({view.state}, held by {', '.join(view.holders) or 'nobody'})")
        capacity = self._free.capacity
        return NoFreeSlot(
            f"attach {request.host_path}: no free slot ({capacity} of {capacity} used)",
            holders=lines,
            vm=self._vm,
            host_path=request.host_path,
            remedy="release a disk that is not needed any more; the error's holders say who has what",
        )

    def _share_or_make_mount(
        self, disk: Disk, config: MountConfig | None, path: PurePosixPath | None, now: float
    ) -> Mount | None:
        if config is None:
            return None
        for mount in disk.mounts.values():
            if same_mount(mount.config, config) and path in (None, mount.guest_path):
                return mount
        if path is not None and (taken := self._paths.get(path)):
            raise GuestPathInUse(
                f"guest path {path} is in use by {taken.disk.request.host_path} at {taken.disk.slot}",
                vm=self._vm,
                slot=taken.disk.slot,
                remedy="choose another, or release that one first",
            )
        for mount in disk.mounts.values():
            where = f"{disk.request.host_path} at {mount.guest_path}"
            check_beside(mount.config, config, where=where)
        return Mount(self._new_id(), disk, path or self._generated_path(disk.slot, config.partition), config, now)

    def _generated_path(self, slot: Slot, partition: int) -> PurePosixPath:
        base = GENERATED_BELOW / f"{slot.controller}_{slot.lun}_{partition}"
        path, number = base, 1
        while path in self._paths:
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        return path

    async def _until_settled(self, claim: Claim) -> None:
        """Wait until the claim is held, or gone. Who stops waiting for one that is not held gives it up."""
        disk = claim.disk
        if claim.waiter is None and disk.worker is None and self._try_settle(claim):
            self._flush_outcomes()
            return
        claim.waiter = asyncio.get_running_loop().create_future()
        self._kick(disk)
        try:
            await claim.waiter
        except asyncio.CancelledError:
            if claim.state is not ReservationState.RELEASING and claim.id in self._claims:
                self._begin_release(claim)
                self._kick(disk)
            raise

    def _begin_release(self, claim: Claim) -> None:
        """From here on the claim wants nothing."""
        disk, mount = claim.disk, claim.mount
        claim.waiter = None
        if claim.state is not ReservationState.RELEASING:
            disk.claims.pop(claim.id, None)
            if mount is not None:
                mount.claims.pop(claim.id, None)
            claim.state = ReservationState.RELEASING
            disk.leaving[claim.id] = claim
            self._write_outcome([claim.record()])
            if disk.worker is None and self._try_settle(claim):
                self._flush_outcomes()

    def _try_settle(self, claim: Claim) -> bool:
        """Is what the claim waits for true? Then it is held, or gone, from now on."""
        disk, mount = claim.disk, claim.mount
        if claim.state is ReservationState.PENDING:
            if disk.state is not DiskState.ATTACHED or (mount is not None and mount.state is not MountState.MOUNTED):
                return False
            claim.state = ReservationState.HELD
            self._write_outcome([claim.record()])
            self._log_claim("reserved", claim)
        elif claim.state is ReservationState.RELEASING:
            if mount is not None and not mount.is_wanted and mount.id in disk.mounts:
                return False
            if not disk.is_wanted and disk.state is not DiskState.DETACHED:
                return False
            disk.leaving.pop(claim.id, None)
            self._claims.pop(claim.id, None)
            self._remember_released(claim)
            self._write_outcome([], [claim.record()])
            self._log_claim("released", claim)
        return True

    def _remember_released(self, claim: Claim) -> None:
        self._released[claim.id] = claim.waiter is None or not claim.waiter.done()
        if len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)

    def _drop_claim(self, claim: Claim) -> None:
        """The claim could not be met: it is as if it had never been."""
        claim.disk.claims.pop(claim.id, None)
        if claim.mount is not None:
            claim.mount.claims.pop(claim.id, None)
        self._claims.pop(claim.id, None)

    # The worker of a disk.

    def _kick(self, disk: Disk) -> None:
        """See to it that the disk becomes as its claims want it."""
        disk.stuck.clear()
        disk.halted = False
        if disk.worker is None:
            disk.worker = asyncio.get_running_loop().create_task(self._work(disk))
            self._workers.add(disk.worker)
            disk.worker.add_done_callback(self._workers.discard)

    async def _work(self, disk: Disk) -> None:
        failed: list[tuple[Claim, UtilityVMError]] = []
        try:
            while True:
                try:
                    goes_on = await self._advance(disk)
                except _StepFailed as failure:
                    self._note_failure(disk, failure, failed)
                    goes_on = not disk.halted
                self._settle_claims(disk)
                if not goes_on:
                    break
        except Exception as error:  # a mistake of ours: nobody may wait for ever because of it
            self._log.error("the worker of %s failed: %r", disk.slot, error, host_path=disk.request.host_path)
            ours = _as_ours(error, f"{disk.request.host_path} at {disk.slot}")
            for claim in (*disk.claims.values(), *disk.leaving.values()):
                _tell(claim, ours)
        finally:
            disk.worker = None
            disk.force = False
            if disk.state is DiskState.ATTACHED:
                disk.close_opened()
            self._settle_claims(disk)
            self._flush_outcomes()
            for claim, why in failed:
                _tell(claim, why)

    def _settle_claims(self, disk: Disk) -> None:
        settled = [
            claim
            for claim in (*disk.claims.values(), *disk.leaving.values())
            if claim.state is not ReservationState.HELD and self._try_settle(claim)
        ]
        if settled:
            self._flush_outcomes()
        for claim in settled:
            _tell(claim, None)

    def _note_failure(self, disk: Disk, failure: _StepFailed, failed: list[tuple[Claim, UtilityVMError]]) -> None:
        """Tell those who waited for the step. New claims fail, once it is undone; released ones stay to be retried."""
        mount, error = failure.mount, failure.error
        self._emit(disk, mount, "failed", error=str(error))
        for claim in list(disk.claims.values()):
            if claim.state is ReservationState.PENDING and mount in (None, claim.mount):
                self._drop_claim(claim)
                self._write_outcome([], [claim.record()])
                failed.append((claim, error))
        for claim in disk.leaving.values():
            if mount is None or claim.mount is mount or not disk.is_wanted:
                _tell(claim, error)
        if not any(claim.waiter is not None for claim, _ in failed) and not disk.leaving:
            self._log.warning("%s", error, slot=disk.slot, host_path=disk.request.host_path)
        if mount is not None:
            if mount.state is not MountState.RESERVED:
                disk.stuck.add(mount.id)
        elif disk.state is not DiskState.RESERVED and not (disk.state is DiskState.ATTACHED and disk.is_wanted):
            disk.halted = True

    async def _advance(self, disk: Disk) -> bool:
        """Take the next step. False: there is none."""
        match disk.state:
            case DiskState.RESERVED:
                if not disk.is_wanted:
                    self._enter_disk(disk, Event.UNUSED)
                    return True
                await self._attach(disk)
            case DiskState.ATTACH_UNKNOWN | DiskState.EJECT_UNKNOWN | DiskState.DETACH_UNKNOWN:
                await self._probe_disk(disk)
            case DiskState.ATTACHED:
                todo = [mount for mount in disk.mounts.values() if self._has_work(mount)]
                if todo:
                    await self._advance_mounts(disk, todo)
                elif disk.is_wanted or disk.mounts:
                    return False
                else:
                    await self._disk_step(
                        disk,
                        "eject",
                        lambda: self._guest.eject(disk.slot, timeout_s=self._timeouts.eject, force=disk.force),
                    )
            case DiskState.EJECTED:
                await self._disk_step(
                    disk,
                    "detach",
                    lambda: self._host.detach(disk.slot, attachment=disk.id, timeout_s=self._timeouts.detach),
                )
            case DiskState.DETACHED:
                if not disk.is_wanted:
                    self._forget(disk)
                    return False
                self._renew(disk)
            case DiskState.ATTACHING | DiskState.EJECTING | DiskState.DETACHING:
                raise AssertionError(f"{disk.slot} is {disk.state}, and nobody waits for the answer")
        return True

    async def _attach(self, disk: Disk) -> None:
        if disk.opened is None:
            try:
                opened = await self._host.open(disk.request)
            except UtilityVMError as error:
                raise _StepFailed(error) from error
            if opened.identity != disk.identity:
                opened.close()
                raise _StepFailed(
                    HostRefused(
                        f"{disk.request.host_path} is another file than before",
                        slot=disk.slot,
                        host_path=disk.request.host_path,
                    )
                )
            disk.opened = opened
        handle = disk.opened
        await self._disk_step(
            disk,
            "attach",
            lambda: self._host.attach(disk.slot, handle, attachment=disk.id, timeout_s=self._timeouts.attach),
        )

    def _renew(self, disk: Disk) -> None:
        """It is wanted again: as a new attachment, in the slot that it has."""
        old: list[Record] = [disk.record(), *(mount.record() for mount in disk.mounts.values())]
        disk.id = self._new_id()
        disk.state = disk.after(Event.WANTED)
        claims = [claim.record() for claim in (*disk.claims.values(), *disk.leaving.values())]
        self._write_outcome([disk.record(), *(mount.record() for mount in disk.mounts.values()), *claims], old[:1])

    def _forget(self, disk: Disk) -> None:
        """Nothing of it is left: the slot is free."""
        disk.close_opened()
        for mount in list(disk.mounts.values()):  # asked for, and never mounted: the disk did not come so far
            self._enter_mount(mount, Event.UNUSED)
            self._forget_mount(mount)
        del self._by_identity[disk.identity]
        self._free.give_back(disk.slot)
        self._write_outcome([], [disk.record()])
        self._log.debug("the slot is free", slot=disk.slot, host_path=disk.request.host_path)

    async def _disk_step(self, disk: Disk, phase: str, send: Callable[[], Awaitable[None]]) -> None:
        self._intend([disk.record(disk.after(Event.BEGIN))])
        self._enter_disk(disk, Event.BEGIN, write=False)
        begun = time.perf_counter()
        try:
            await send()
        except (HostRefused, GuestRefused, RequestError) as error:
            self._enter_disk(disk, Event.REFUSED)
            raise _StepFailed(error) from error
        except Exception as error:
            self._enter_disk(disk, Event.NO_ANSWER)
            disk.doubt = _as_ours(error, f"{phase} {disk.request.host_path} at {disk.slot}")
            return
        disk.phases[phase] = time.perf_counter() - begun
        self._enter_disk(disk, Event.DONE, seconds=disk.phases[phase])

    async def _probe_disk(self, disk: Disk) -> None:
        """Look whether the step that got no answer was done."""
        asks_guest = disk.state is DiskState.EJECT_UNKNOWN
        try:
            if asks_guest:
                found = await self._guest.probe_device(disk.slot, timeout_s=self._timeouts.probe)
            else:
                found = await self._host.probe(disk.slot, attachment=disk.id, timeout_s=self._timeouts.probe)
        except Exception as error:
            raise _StepFailed(self._undecided(disk, disk, error)) from error
        doubt, disk.doubt = disk.doubt, None
        was_adding = disk.state is DiskState.ATTACH_UNKNOWN
        self._enter_disk(disk, Event.FOUND if found else Event.ABSENT)
        if doubt is not None and found is not was_adding:
            raise _StepFailed(doubt)

    def _undecided(self, disk: Disk, thing: Disk | Mount, error: Exception) -> UtilityVMError:
        doubt, thing.doubt = thing.doubt, None  # told now; a retry begins without it
        state = thing.state
        why = f"{doubt}; then {error}" if doubt is not None and str(doubt) != str(error) else str(error)
        kind = DeadlineExceeded if isinstance(doubt or error, DeadlineExceeded) else OutcomeUnknown
        return kind(
            f"{disk.request.host_path} at {disk.slot} is {state}: {why}",
            vm=self._vm,
            slot=disk.slot,
            host_path=disk.request.host_path,
            remedy="the slot stays taken until the VM answers; ask again",
        )

    # Mounts.

    def _has_work(self, mount: Mount) -> bool:
        return mount.id not in mount.disk.stuck and not (mount.state is MountState.MOUNTED and mount.is_wanted)

    async def _advance_mounts(self, disk: Disk, mounts: Sequence[Mount]) -> None:
        if len(mounts) == 1:
            await self._advance_mount(mounts[0])
            return
        results = await asyncio.gather(*map(self._advance_mount, mounts), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures[1:]:
            if isinstance(failure, _StepFailed) and failure.mount is not None:
                # One failure is told at a time; the others' mounts show theirs when they are tried next.
                disk.stuck.discard(failure.mount.id)
        if failures:
            raise failures[0]

    async def _advance_mount(self, mount: Mount) -> None:
        disk, config = mount.disk, mount.config
        match mount.state:
            case MountState.RESERVED if mount.is_wanted:
                await self._mount_step(
                    mount,
                    "mount",
                    lambda: self._guest.mount(
                        disk.slot, config, guest_path=mount.guest_path, timeout_s=self._timeouts.mount
                    ),
                )
            case MountState.RESERVED:
                self._enter_mount(mount, Event.UNUSED)
            case MountState.MOUNT_UNKNOWN | MountState.UNMOUNT_UNKNOWN:
                await self._probe_mount(mount)
            case MountState.MOUNTED:
                await self._mount_step(
                    mount,
                    "unmount",
                    lambda: self._guest.unmount(
                        disk.slot,
                        config,
                        guest_path=mount.guest_path,
                        timeout_s=self._timeouts.unmount,
                        force=disk.force,
                    ),
                )
            case MountState.UNMOUNTED if mount.is_wanted:
                self._enter_mount(mount, Event.WANTED)
            case MountState.UNMOUNTED:
                self._forget_mount(mount)
            case MountState.MOUNTING | MountState.UNMOUNTING:
                raise AssertionError(f"{mount.guest_path} is {mount.state}, and nobody waits for the answer")

    def _forget_mount(self, mount: Mount) -> None:
        """Nothing of it is left: the guest path is free."""
        del mount.disk.mounts[mount.id]
        del self._paths[mount.guest_path]
        self._write_outcome([], [mount.record()])

    async def _mount_step(self, mount: Mount, phase: str, send: Callable[[], Awaitable[None]]) -> None:
        disk = mount.disk
        self._intend([mount.record(mount.after(Event.BEGIN))], mount)
        self._enter_mount(mount, Event.BEGIN, write=False)
        begun = time.perf_counter()
        try:
            await send()
        except (HostRefused, GuestRefused, RequestError) as error:
            self._enter_mount(mount, Event.REFUSED)
            raise _StepFailed(error, mount) from error
        except Exception as error:
            self._enter_mount(mount, Event.NO_ANSWER)
            mount.doubt = _as_ours(error, f"{phase} {disk.request.host_path} at {mount.guest_path}")
            return
        disk.phases[phase] = time.perf_counter() - begun
        self._enter_mount(mount, Event.DONE, seconds=disk.phases[phase])

    async def _probe_mount(self, mount: Mount) -> None:
        disk = mount.disk
        try:
            found = await self._guest.probe_mount(
                disk.slot, guest_path=mount.guest_path, timeout_s=self._timeouts.probe
            )
        except Exception as error:
            raise _StepFailed(self._undecided(disk, mount, error), mount) from error
        doubt, mount.doubt = mount.doubt, None
        was_adding = mount.state is MountState.MOUNT_UNKNOWN
        self._enter_mount(mount, Event.FOUND if found else Event.ABSENT)
        if doubt is not None and found is not was_adding:
            raise _StepFailed(doubt, mount)

    # States and the journal.

    def _enter_disk(self, disk: Disk, event: Event, *, write: bool = True, seconds: float | None = None) -> None:
        disk.state = disk.after(event)
        if write:
            self._write_outcome([disk.record()])
        self._emit(disk, None, disk.state, seconds=seconds)

    def _enter_mount(self, mount: Mount, event: Event, *, write: bool = True, seconds: float | None = None) -> None:
        mount.state = mount.after(event)
        if write:
            self._write_outcome([mount.record()])
        self._emit(mount.disk, mount, mount.state, seconds=seconds)

    def _intend(self, records: list[Record], mount: Mount | None = None) -> None:
        """Write an intent. What is not written is not sent."""
        pending: list[Record] = []
        for record in records:
            if isinstance(record, DiskRecord) and record.state == DiskState.ATTACHING:
                disk = self._by_identity[record.identity]
                pending += [m.record() for m in disk.mounts.values()]
                pending += [claim.record() for claim in disk.claims.values() if claim.state is ReservationState.PENDING]
            elif isinstance(record, MountRecord) and record.state == MountState.MOUNTING and mount is not None:
                pending += [
                    claim.record() for claim in mount.claims.values() if claim.state is ReservationState.PENDING
                ]
        for record in pending:
            self._unwritten[_key(record)] = (record, False)
        try:
            self._flush(records)
        except StoreError as error:
            raise _StepFailed(error, mount) from error

    def _write_outcome(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        """Note what is so. It is written with the next intent, or before the next caller is told, whichever is first.

        Until then the journal holds the intent, which a later owner probes: nothing is lost by its being behind.
        """
        for record in put:
            self._unwritten[_key(record)] = (record, False)
        for record in drop:
            self._unwritten[_key(record)] = (record, True)

    def _flush(self, intents: Sequence[Record] = ()) -> None:
        put = [record for record, gone in self._unwritten.values() if not gone]
        drop = [record for record, gone in self._unwritten.values() if gone]
        self._journal.write([*put, *intents], drop)
        self._unwritten.clear()

    def _flush_outcomes(self) -> None:
        if not self._unwritten:
            return
        try:
            self._flush()
        except StoreError as error:
            self._log.warning("the journal is behind: %s", error)

    def _read_journal(self, is_alive: Callable[[Holder], bool]) -> list[str]:
        findings: list[str] = []
        disks: dict[str, Disk] = {}
        mounts: dict[str, Mount] = {}
        for record in self._journal.read():
            if isinstance(record, DiskRecord):
                disks[record.attachment] = self._restored_disk(record, findings)
            elif isinstance(record, MountRecord):
                if (disk := disks.get(record.attachment)) is None:
                    self._write_outcome([], [record])
                    continue
                mounts[record.mount] = self._restored_mount(record, disk, findings)
            else:
                self._restore_claim(record, disks, mounts, is_alive, findings)
        return findings

    def _restored_disk(self, record: DiskRecord, findings: list[str]) -> Disk:
        request = DiskRequest(
            host_path=record.host_path,
            read_only=record.read_only,
            kind=record.kind,
            format=record.format,
            access=record.access,
        )
        disk = Disk(
            record.attachment, record.slot, request, record.identity, record.format, record.size_bytes, record.since
        )
        disk.state = DiskState(record.state)
        if disk.state in (DiskState.ATTACHING, DiskState.EJECTING, DiskState.DETACHING):
            findings.append(f"{record.host_path} at {record.slot} was {disk.state}")
            disk.state = disk.after(Event.NO_ANSWER)
        self._free.take(disk.slot)
        self._by_identity[disk.identity] = disk
        return disk

    def _restored_mount(self, record: MountRecord, disk: Disk, findings: list[str]) -> Mount:
        mount = Mount(record.mount, disk, record.guest_path, record.config, record.since)
        mount.state = MountState(record.state)
        if mount.state in (MountState.MOUNTING, MountState.UNMOUNTING):
            findings.append(f"{disk.request.host_path} at {mount.guest_path} was {mount.state}")
            mount.state = mount.after(Event.NO_ANSWER)
        disk.mounts[mount.id] = mount
        self._paths[mount.guest_path] = mount
        return mount

    def _restore_claim(
        self,
        record: ReservationRecord,
        disks: Mapping[str, Disk],
        mounts: Mapping[str, Mount],
        is_alive: Callable[[Holder], bool],
        findings: list[str],
    ) -> None:
        disk = disks.get(record.attachment)
        mount = mounts.get(record.mount) if record.mount else None
        whole = disk is not None and (record.mount is None or mount is not None)
        if not whole or record.state != ReservationState.HELD or not is_alive(record.holder):
            if record.state == ReservationState.HELD:
                findings.append(f"reservation {record.reservation} of {record.holder.name} was given back: it is dead")
            self._write_outcome([], [record])
            return
        assert disk is not None
        claim = Claim(record.reservation, disk, mount, record.holder, record.since, ReservationState.HELD)
        self._claims[claim.id] = claim
        disk.claims[claim.id] = claim
        if mount is not None:
            mount.claims[claim.id] = claim
            lost_key = isinstance(mount.config.encryption, CallerKey) and mount.state is not MountState.MOUNTED
            if lost_key:
                self._drop_claim(claim)
                self._write_outcome([], [record])
                findings.append(f"{mount.guest_path} cannot be mounted again: its key was not kept")

    # Telling.

    def _emit(
        self, disk: Disk, mount: Mount | None, what: str, *, seconds: float | None = None, error: str | None = None
    ) -> None:
        path = mount.guest_path if mount else None
        if self._log.is_enabled_for(10):
            self._log.debug(
                "%s",
                what,
                slot=disk.slot,
                host_path=disk.request.host_path,
                guest_path=path,
                references=len(disk.claims),
            )
        if not self._listeners:
            return
        event = ScsiEvent(
            what=what,
            at=self._clock(),
            slot=disk.slot,
            host_path=disk.request.host_path,
            guest_path=path,
            seconds=seconds,
            error=error,
        )
        for listener in self._listeners:
            try:
                listener.queue.put_nowait(event)
            except asyncio.QueueFull:
                listener.lost += 1

    def _log_claim(self, what: str, claim: Claim) -> None:
        if self._log.is_enabled_for(10):
            self._log.debug(
                "%s",
                what,
                slot=claim.disk.slot,
                host_path=claim.disk.request.host_path,
                guest_path=claim.mount.guest_path if claim.mount else None,
                references=len(claim.disk.claims),
                reservation=claim.id,
                holder=claim.holder.name,
            )


def _key(record: Record) -> str:
    match record:
        case DiskRecord():
            return f"disk {record.attachment}"
        case MountRecord():
            return f"mount {record.mount}"
        case ReservationRecord():
            return f"reservation {record.reservation}"


@dataclass(eq=False, slots=True)
class _Listener:
    queue: asyncio.Queue[ScsiEvent]
    lost: int = 0


def _tell(claim: Claim, error: UtilityVMError | None) -> None:
    """End the wait of the claim's caller, if it still waits."""
    if claim.waiter is None or claim.waiter.done():
        return
    if error is None:
        claim.waiter.set_result(None)
    else:
        claim.waiter.set_exception(error)


def _as_ours(error: Exception, what: str) -> UtilityVMError:
    """An error of ours for anything that a backend raised."""
    return error if isinstance(error, UtilityVMError) else OutcomeUnknown(f"{what}: {type(error).__name__}: {error}")


def _holders(claims: Iterable[Claim]) -> tuple[str, ...]:
    return tuple(claim.holder.name for claim in sorted(claims, key=lambda claim: (claim.since, claim.id)))


def _slot_view(disk: Disk) -> SlotView:
    return SlotView(
        slot=disk.slot,
        attachment=disk.id,
        host_path=disk.request.host_path,
        identity=disk.identity,
        format=disk.format,
        read_only=disk.request.read_only,
        size_bytes=disk.size_bytes,
        state=disk.state,
        guest_paths=tuple(mount.guest_path for mount in disk.mounts.values()),
        references=len(disk.claims),
        holders=_holders(disk.claims.values()),
        since=disk.since,
        phases=dict(disk.phases),
    )


def _mount_view(mount: Mount) -> MountView:
    return MountView(
        slot=mount.disk.slot,
        host_path=mount.disk.request.host_path,
        guest_path=mount.guest_path,
        config=mount.config,
        state=mount.state,
        references=len(mount.claims),
        holders=_holders(mount.claims.values()),
        since=mount.since,
    )
