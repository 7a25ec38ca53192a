"""The workers: a task for each disk that is not as its claims want it, which takes step after step until it is.

So there is one place that sends steps for a disk. Whoever changes a claim kicks the worker; a caller that waits for a
claim is told by it. A worker never ends while somebody waits for its disk.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from utilityvm.errors import InvalidRequest, NotAttached, OutcomeUnknown, UtilityVMError
from utilityvm.log import BoundLogger
from utilityvm.scsi.book import Book
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.events import Events
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.reservation import Claim, Force
from utilityvm.scsi.steps import StepFailed, Steps, as_ours
from utilityvm.scsi.transitions import WAITING, DiskState, Event, MountState, ReservationState

_REMEMBERED: Final = 4096  # released reservations whose second release gets its own error
_MISTAKES: Final = 3  # of ours in one run, and the disk stays as it is until somebody asks again

Waiter: TypeAlias = "asyncio.Future[None] | None"


@dataclass(slots=True)
class _Run:
    """What one run of a worker has to tell. `undone`: callers of adds that failed, told when all is undone."""

    told: list[tuple[Waiter, UtilityVMError | None]] = field(default_factory=list)
    undone: list[tuple[Waiter, UtilityVMError]] = field(default_factory=list)
    last: UtilityVMError | None = None  # the failure that came last
    mistakes: int = 0


class Workers:
    """The workers of one VM's disks."""

    def __init__(self, book: Book, steps: Steps, ledger: Ledger, events: Events, log: BoundLogger) -> None:
        self._book = book
        self._steps = steps
        self._ledger = ledger
        self._events = events
        self._log = log
        self.released: OrderedDict[str, bool] = OrderedDict()  # True: the caller of its release knows
        self.tasks: set[asyncio.Task[None]] = set()
        self._is_still = False
        self._kicked_meanwhile: set[Disk] = set()

    def kick(self, disk: Disk) -> None:
        """See to it that the disk becomes as its claims want it; when all is held still, afterwards."""
        disk.stuck.clear()
        disk.halted = False
        disk.is_kicked = True
        if disk.worker is not None:
            return
        if self._is_still:
            self._kicked_meanwhile.add(disk)
            return
        disk.worker = self._spawn(self._work(disk))

    def hold_still(self, is_still: bool) -> None:
        """Begin no work while this is so. What is under way goes on to its end."""
        self._is_still = is_still
        while self._kicked_meanwhile and not is_still:
            disk = self._kicked_meanwhile.pop()
            if self._book.has(disk):
                self.kick(disk)

    def write_soon(self) -> None:
        """Have the journal take what was noted, in the background."""
        self._spawn(self._ledger.flush())

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _work(self, disk: Disk) -> None:
        run = _Run()
        try:
            goes_on = True
            while goes_on or (disk.is_kicked and self._book.has(disk)):
                disk.is_kicked = False
                try:
                    goes_on = await self._advance(disk, run)
                except StepFailed as failure:
                    self._note_failure(disk, failure, run)
                    goes_on = not disk.halted
                except Exception as error:  # a mistake of ours goes the way of every failure
                    self._log.error("a step of %s failed: %r", disk.slot, error, host_path=disk.request.host_path)
                    ours = as_ours(error, f"{disk.request.host_path} at {disk.slot}")
                    self._note_failure(disk, StepFailed(ours), run)
                    run.mistakes += 1
                    disk.halted = run.mistakes == _MISTAKES
                    goes_on = not disk.halted
                await self._tell(disk, run)
        except Exception as error:
            self._log.error("the worker of %s failed: %r", disk.slot, error, host_path=disk.request.host_path)
            run.last = as_ours(error, f"{disk.request.host_path} at {disk.slot}")
        finally:
            disk.worker = None
            if disk.state is DiskState.ATTACHED:
                disk.close_opened()
            self._leave_nobody_waiting(disk, run)
            try:
                await self._ledger.flush()
            finally:
                for waiter, outcome in (*run.told, *run.undone):
                    resolve(waiter, outcome)

    async def _tell(self, disk: Disk, run: _Run) -> None:
        """Tell those whose claim is settled, or was refused, once the journal has it."""
        for claim in (*disk.claims.values(), *disk.leaving.values()):
            if claim.state is not ReservationState.HELD:
                waiter = claim.waiter  # that of now: what is held can be given back while the journal is written
                if self.try_settle(claim):
                    run.told.append((waiter, None))
        if run.told:
            await self._ledger.flush()
            for waiter, error in run.told:
                resolve(waiter, error)
            run.told.clear()

    def _leave_nobody_waiting(self, disk: Disk, run: _Run) -> None:
        """Nobody may wait for a worker that has ended."""
        error = run.last or OutcomeUnknown(f"{disk.request.host_path} at {disk.slot} is left {disk.state}")
        error.fill(vm=self._book.vm, slot=disk.slot, host_path=disk.request.host_path)
        for claim in (*disk.claims.values(), *disk.leaving.values()):
            if claim.is_awaited and not any(claim.waiter is waiter for waiter, _ in run.told):
                if _is_whole(claim):
                    self._book.take_back(claim)
                run.told.append((claim.waiter, error))
        run.told += [(waiter, error) for waiter in disk.take_resizes()]

    def _note_failure(self, disk: Disk, failure: StepFailed, run: _Run) -> None:
        """A step failed. Adds that need it fail, once they are undone; of releases, those that changed nothing are as
        if they had never been asked for, and the others stay to be retried."""
        mount, error = failure.mount, failure.error
        error.fill(vm=self._book.vm, slot=disk.slot, host_path=disk.request.host_path)
        run.last = error
        self._events.emit(disk, mount, "failed", error=str(error))
        if failure.of_resize:
            self._end_resize(disk, error, run)
            return
        before = len(run.told) + len(run.undone)
        for claim in list(disk.claims.values()):
            if claim.state is ReservationState.PENDING and mount in (None, claim.mount) and not claim.is_met:
                self._book.drop_claim(claim)
                self._ledger.note([], [claim.record()])
                run.undone.append((claim.waiter, error))
        blocked = [c for c in disk.leaving.values() if mount is None or c.mount is mount or not disk.is_wanted]
        whole = [claim for claim in blocked if claim.is_awaited and _is_whole(claim)]
        whole = [claim for claim in whole if claim.mount is mount] or whole
        # What is held again is wanted, and so lets go those who asked for force; nobody else need wait any more.
        least = min((claim.force for claim in whole), default=Force.NO)
        back = [claim for claim in whole if claim.force is least]
        for claim in back:
            self._book.take_back(claim)
        run.told += [(claim.waiter, error) for claim in back or blocked]
        if mount is None:
            run.told += [(waiter, error) for waiter in disk.take_resizes()]
        if len(run.told) + len(run.undone) == before:
            self._log.warning("%s", error, slot=disk.slot, host_path=disk.request.host_path)
        # Who still wants it now, held it in another VM: it is tried again when somebody asks, and not for ever.
        if mount is not None:
            if mount.state is not MountState.RESERVED or mount.is_wanted:
                disk.stuck.add(mount.id)
        elif disk.state is DiskState.RESERVED:
            disk.halted = disk.is_wanted
        elif disk.state is not DiskState.ATTACHED or not disk.is_wanted:
            disk.halted = True

    async def _advance(self, disk: Disk, run: _Run) -> bool:
        """Take the next step. False: there is none."""
        if disk.state in WAITING:  # a worker before this one failed by a mistake of ours
            self._steps.enter_disk(disk, Event.NO_ANSWER)
        match disk.state:
            case DiskState.RESERVED:
                if not disk.is_wanted:
                    self._steps.enter_disk(disk, Event.UNUSED)
                    return True
                await self._steps.attach(disk)
            case DiskState.ATTACHED:
                todo = [mount for mount in disk.mounts.values() if self._has_work(mount)]
                if todo:
                    await self._advance_mounts(disk, todo, run)
                elif disk.overruled is not None:
                    if disk.stuck:
                        return False
                    await self._steps.eject(disk)
                elif disk.resizing or disk.resizes:
                    await self._advance_resize(disk, run)
                elif disk.is_wanted or disk.mounts:
                    return False
                else:
                    await self._steps.eject(disk)
            case DiskState.EJECTED:
                await self._steps.detach(disk)
            case DiskState.DETACHED:
                if not disk.is_wanted:
                    self._book.forget_disk(disk)
                    return False
                self._book.renew(disk)
            case _:
                await self._steps.probe_disk(disk)
        return True

    def _has_work(self, mount: Mount) -> bool:
        if mount.id in mount.disk.stuck:
            return False
        if mount.disk.overruled is not None:  # it goes with its disk; who wants it gets it when that has come again
            return not (mount.state is MountState.RESERVED and mount.is_wanted)
        return not (mount.state is MountState.MOUNTED and mount.is_wanted)

    async def _advance_mounts(self, disk: Disk, mounts: Sequence[Mount], run: _Run) -> None:
        if len(mounts) == 1:
            await self._advance_mount(mounts[0])
            return
        results = await asyncio.gather(*map(self._advance_mount, mounts), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, StepFailed):
                raise failure
            self._note_failure(disk, failure, run)

    async def _advance_mount(self, mount: Mount) -> None:
        match mount.state:
            case MountState.RESERVED if mount.is_wanted:
                await self._steps.mount(mount)
            case MountState.RESERVED:
                self._steps.enter_mount(mount, Event.UNUSED)
            case MountState.MOUNT_UNKNOWN | MountState.UNMOUNT_UNKNOWN:
                await self._steps.probe_mount(mount)
            case MountState.MOUNTED:
                await self._steps.unmount(mount)
            case MountState.UNMOUNTED if mount.is_wanted:
                self._steps.enter_mount(mount, Event.WANTED)
            case MountState.UNMOUNTED:
                self._book.forget_mount(mount)
            case MountState.MOUNTING | MountState.UNMOUNTING:  # as `WAITING`
                self._steps.enter_mount(mount, Event.NO_ANSWER)

    async def _advance_resize(self, disk: Disk, run: _Run) -> None:
        """One request after the other, in the order of asking."""
        if disk.resizing is None:
            disk.resizing = disk.resizes.popleft()
        wanted = disk.resizing.size_bytes
        if not disk.is_wanted:
            raise StepFailed(_released(disk), of_resize=True)
        if wanted < disk.size_bytes:
            raise StepFailed(would_shrink(disk, wanted, disk.size_bytes), of_resize=True)
        if wanted > disk.size_bytes:
            await self._steps.resize(disk, wanted)
        else:
            await self._steps.grow(disk)
            self._end_resize(disk, None, run)

    def _end_resize(self, disk: Disk, error: UtilityVMError | None, run: _Run) -> None:
        if disk.resizing is not None:
            run.told.append((disk.resizing.waiter, error))
            disk.resizing = None

    def try_settle(self, claim: Claim) -> bool:
        """Is what the claim waits for true? Then it is held, or gone, from now on."""
        disk, mount = claim.disk, claim.mount
        if claim.state is ReservationState.PENDING:
            if not claim.is_met:
                return False
            claim.state = ReservationState.HELD
            self._ledger.note([claim.record()])
            self._events.tell_claim("reserved", claim)
        elif claim.state is ReservationState.RELEASING:
            if mount is not None and not mount.is_wanted and mount.id in disk.mounts:
                return False
            if not disk.is_wanted and disk.state is not DiskState.DETACHED:
                return False
            disk.leaving.pop(claim.id, None)
            self._book.claims.pop(claim.id, None)
            self.remember_released(claim)
            self._ledger.note([], [claim.record()])
            self._events.tell_claim("released", claim)
        return True

    def remember_released(self, claim: Claim) -> None:
        """It is released; its caller does not know yet."""
        self.released[claim.id] = False
        if len(self.released) > _REMEMBERED:
            self.released.popitem(last=False)


def _is_whole(claim: Claim) -> bool:
    """Is it being given back, and is all of it still as it was?"""
    return claim.state is ReservationState.RELEASING and claim.was_held and claim.is_met


def _released(disk: Disk) -> NotAttached:
    return NotAttached(f"{disk.request.host_path} is being released", slot=disk.slot, host_path=disk.request.host_path)


def would_shrink(disk: Disk, size_bytes: int, has_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        f"{disk.request.host_path} has {has_bytes} bytes, and cannot shrink to {size_bytes}",
        slot=disk.slot,
        host_path=disk.request.host_path,
        remedy="give a larger size",
    )


def resolve(waiter: Waiter, error: UtilityVMError | None) -> None:
    """End a caller's wait, if it still waits."""
    if waiter is None or waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
        waiter.exception()  # its caller may be gone, and that is nothing to complain about
