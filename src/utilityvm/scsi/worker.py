"""The workers: a task for each disk that is not as its claims want it, which takes step after step until it is.

So there is one place that sends steps for a disk. Whoever changes a claim kicks the worker; whoever waits for a claim
is told by it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from utilityvm.errors import GuestBusy, UtilityVMError
from utilityvm.log import BoundLogger
from utilityvm.scsi.book import Book
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.events import Events
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.reservation import Claim
from utilityvm.scsi.steps import StepFailed, Steps, as_ours
from utilityvm.scsi.transitions import DiskState, Event, MountState, ReservationState

_REMEMBERED: Final = 4096  # released reservations whose second release gets its own error


class Workers:
    """The workers of one VM's disks."""

    def __init__(self, book: Book, steps: Steps, ledger: Ledger, events: Events, log: BoundLogger) -> None:
        self._book = book
        self._steps = steps
        self._ledger = ledger
        self._events = events
        self._log = log
        self.released: OrderedDict[str, bool] = OrderedDict()  # False: its caller was told that it failed
        self.tasks: set[asyncio.Task[None]] = set()

    def kick(self, disk: Disk) -> None:
        """See to it that the disk becomes as its claims want it."""
        disk.stuck.clear()
        disk.halted = False
        disk.is_kicked = True
        if disk.worker is None:
            disk.worker = asyncio.get_running_loop().create_task(self._work(disk))
            self.tasks.add(disk.worker)
            disk.worker.add_done_callback(self.tasks.discard)

    def write_soon(self) -> None:
        """Have the journal take what was noted, in the background."""
        task = asyncio.get_running_loop().create_task(self._ledger.flush())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _work(self, disk: Disk) -> None:
        failed: list[tuple[Claim, UtilityVMError]] = []
        try:
            goes_on = True
            while goes_on or (disk.is_kicked and disk.identity in self._book.disks):
                disk.is_kicked = False
                try:
                    goes_on = await self._advance(disk)
                except StepFailed as failure:
                    self._note_failure(disk, failure, failed)
                    goes_on = not disk.halted
                await self._settle_claims(disk)
        except Exception as error:  # a mistake of ours: nobody may wait for ever because of it
            self._log.error("the worker of %s failed: %r", disk.slot, error, host_path=disk.request.host_path)
            ours = as_ours(error, f"{disk.request.host_path} at {disk.slot}")
            for claim in (*disk.claims.values(), *disk.leaving.values()):
                tell(claim, ours)
        finally:
            disk.worker = None
            disk.force = False
            if disk.state is DiskState.ATTACHED:
                disk.close_opened()
            try:
                await self._ledger.flush()
            finally:
                for claim, why in failed:
                    tell(claim, why)

    async def _settle_claims(self, disk: Disk) -> None:
        settled = [
            claim
            for claim in (*disk.claims.values(), *disk.leaving.values())
            if claim.state is not ReservationState.HELD and self.try_settle(claim)
        ]
        if not settled:
            return
        waiters = [claim.waiter for claim in settled]  # those of now: a claim that is held can be given back meanwhile
        try:
            await self._ledger.flush()
        finally:
            for waiter in waiters:
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)

    def _note_failure(self, disk: Disk, failure: StepFailed, failed: list[tuple[Claim, UtilityVMError]]) -> None:
        """Tell those who waited for the step. New claims fail, once it is undone; released ones stay to be retried."""
        mount, error = failure.mount, failure.error
        self._events.emit(disk, mount, "failed", error=str(error))
        for claim in list(disk.claims.values()):
            if claim.state is ReservationState.PENDING and mount in (None, claim.mount):
                self._book.drop_claim(claim)
                self._ledger.note([], [claim.record()])
                failed.append((claim, error))
        leaving = list(disk.leaving.values())
        held = [claim for claim in leaving if _is_whole(claim, mount)] if isinstance(error, GuestBusy) else []
        for claim in held:
            self._book.take_back(claim)
            tell(claim, error)
        for claim in leaving if not held else []:  # what is held again is wanted, so that the others need wait no more
            if mount is None or claim.mount is mount or not disk.is_wanted:
                tell(claim, error)
        if not any(claim.waiter is not None for claim, _ in failed) and not disk.leaving:
            self._log.warning("%s", error, slot=disk.slot, host_path=disk.request.host_path)
        # Who still wants it now, held it in another VM: it is tried again when somebody asks, and not for ever.
        if mount is not None:
            if mount.state is not MountState.RESERVED or mount.is_wanted:
                disk.stuck.add(mount.id)
        elif disk.state is DiskState.RESERVED:
            disk.halted = disk.is_wanted
        elif disk.state is not DiskState.ATTACHED or not disk.is_wanted:
            disk.halted = True

    async def _advance(self, disk: Disk) -> bool:
        """Take the next step. False: there is none."""
        match disk.state:
            case DiskState.RESERVED:
                if not disk.is_wanted:
                    self._steps.enter_disk(disk, Event.UNUSED)
                    return True
                await self._steps.attach(disk)
            case DiskState.ATTACH_UNKNOWN | DiskState.EJECT_UNKNOWN | DiskState.DETACH_UNKNOWN:
                await self._steps.probe_disk(disk)
            case DiskState.ATTACHED:
                todo = [mount for mount in disk.mounts.values() if self._has_work(mount)]
                if todo:
                    await self._advance_mounts(disk, todo)
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
            case DiskState.ATTACHING | DiskState.EJECTING | DiskState.DETACHING:
                raise AssertionError(f"{disk.slot} is {disk.state}, and nobody waits for the answer")
        return True

    def _has_work(self, mount: Mount) -> bool:
        return mount.id not in mount.disk.stuck and not (mount.state is MountState.MOUNTED and mount.is_wanted)

    async def _advance_mounts(self, disk: Disk, mounts: Sequence[Mount]) -> None:
        if len(mounts) == 1:
            await self._advance_mount(mounts[0])
            return
        results = await asyncio.gather(*map(self._advance_mount, mounts), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures[1:]:
            if isinstance(failure, StepFailed) and failure.mount is not None:
                # One failure is told at a time; the others' mounts show theirs when they are tried next.
                disk.stuck.discard(failure.mount.id)
        if failures:
            raise failures[0]

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
            case MountState.MOUNTING | MountState.UNMOUNTING:
                raise AssertionError(f"{mount.guest_path} is {mount.state}, and nobody waits for the answer")

    def try_settle(self, claim: Claim) -> bool:
        """Is what the claim waits for true? Then it is held, or gone, from now on."""
        disk, mount = claim.disk, claim.mount
        if claim.state is ReservationState.PENDING:
            if disk.state is not DiskState.ATTACHED or (mount is not None and mount.state is not MountState.MOUNTED):
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
        self.released[claim.id] = claim.waiter is None or not claim.waiter.done()
        if len(self.released) > _REMEMBERED:
            self.released.popitem(last=False)


def _is_whole(claim: Claim, refused: Mount | None) -> bool:
    """Was it given back, does its caller wait for that, and is all of it still as it was?"""
    mount, waiter = claim.mount, claim.waiter
    if not claim.was_held or waiter is None or waiter.done() or claim.disk.state is not DiskState.ATTACHED:
        return False
    return mount is refused and (mount is None or mount.state is MountState.MOUNTED)


def tell(claim: Claim, error: UtilityVMError | None) -> None:
    """End the wait of the claim's caller, if it still waits."""
    if claim.waiter is None or claim.waiter.done():
        return
    if error is None:
        claim.waiter.set_result(None)
    else:
        claim.waiter.set_exception(error)
