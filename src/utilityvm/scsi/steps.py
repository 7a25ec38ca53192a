"""One step of one disk or mount: its intent, the question, and what each of the three answers means."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    HostRefused,
    ImageError,
    NotSupported,
    OutcomeUnknown,
    RequestError,
    StoreError,
    UtilityVMError,
    VMGone,
)
from utilityvm.log import BoundLogger
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.events import Events
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.ports import GuestBackend, HostBackend
from utilityvm.scsi.reservation import Force
from utilityvm.scsi.transitions import DiskState, Event, MountState, ReservationState

_REFUSALS: Final = (HostRefused, GuestRefused, ImageError, RequestError)
_LAST_WORD_S: Final = 2.0  # for a guest that was overruled before


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
    overrule: float = 15.0  # of a step in the guest, before the host goes on without it


class StepFailed(Exception):
    """A step did not do what it should. The state says how far it came."""

    def __init__(self, error: UtilityVMError, mount: Mount | None = None, *, of_resize: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.mount = mount
        self.of_resize = of_resize  # the disk is as it was, for all but the caller who asked for another size


class Steps:
    """Takes steps. Returns when the answer was "done", or "none" and the state says what to look for.

    Each raises `StepFailed` when it did not do what it should; the disk or mount is then in the state that is true.
    """

    def __init__(
        self,
        host: HostBackend,
        guest: GuestBackend,
        ledger: Ledger,
        events: Events,
        *,
        timeouts: StepTimeouts,
        log: BoundLogger,
        vm: str | None,
    ) -> None:
        self._log = log
        self._host = host
        self._guest = guest
        self._ledger = ledger
        self._events = events
        self._timeouts = timeouts
        self._vm = vm

    async def attach(self, disk: Disk) -> None:
        if disk.opened is None:
            try:
                opened = await self._host.open(disk.request)
            except UtilityVMError as error:
                raise StepFailed(error) from error
            if opened.identity != disk.identity:
                opened.close()
                raise StepFailed(
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
            still=lambda: disk.is_wanted,
        )

    async def eject(self, disk: Disk) -> None:
        """Have the guest let go of the disk."""
        await self._disk_step(
            disk,
            "eject",
            lambda: self._guest.eject(
                disk.slot, timeout_s=self._patience(disk, self._timeouts.eject), force=self._tells(disk, disk.force)
            ),
            still=lambda: not disk.is_wanted or disk.overruled is not None,
            of_guest=True,
        )

    async def detach(self, disk: Disk) -> None:
        """Have the host take the disk off the bus."""
        await self._disk_step(
            disk,
            "detach",
            lambda: self._host.detach(disk.slot, attachment=disk.id, timeout_s=self._timeouts.detach),
            still=lambda: True,  # the guest has no device any more, whoever wants it
        )

    async def probe_disk(self, disk: Disk) -> None:
        """Look whether the step that got no answer was done."""
        if disk.state is DiskState.RESIZE_UNKNOWN:
            await self._probe_size(disk)
            return
        asks_guest = disk.state is DiskState.EJECT_UNKNOWN
        try:
            if asks_guest:
                found = await self._guest.probe_device(disk.slot, timeout_s=self._timeouts.probe)
            else:
                found = await self._host.probe(disk.slot, attachment=disk.id, timeout_s=self._timeouts.probe)
        except Exception as error:
            if not (asks_guest and disk.is_overruling):
                raise StepFailed(self._undecided(disk, disk, error)) from error
            self._overrule(disk, None, error)
            found = False
        doubt, disk.doubt = disk.doubt, None
        was_adding = disk.state is DiskState.ATTACH_UNKNOWN
        self.enter_disk(disk, Event.FOUND if found else Event.ABSENT)
        if doubt is not None and found is not was_adding and not (asks_guest and disk.is_overruling):
            raise StepFailed(doubt)

    async def resize(self, disk: Disk, size_bytes: int) -> None:
        """Have the host grow the disk, unless the guest says that what is mounted could not follow."""

        async def send() -> None:
            await self._guest.check_grow(disk.slot, size_bytes=size_bytes, timeout_s=self._timeouts.probe)
            disk.size_bytes = await self._host.resize(
                disk.slot, attachment=disk.id, size_bytes=size_bytes, timeout_s=self._timeouts.resize
            )

        try:
            await self._disk_step(disk, "resize", send, still=lambda: disk.is_wanted, begin=Event.RESIZE)
        except StepFailed as failure:
            raise StepFailed(failure.error, of_resize=True) from failure.__cause__

    async def _probe_size(self, disk: Disk) -> None:
        try:
            size_bytes = await self._host.size(disk.slot, attachment=disk.id, timeout_s=self._timeouts.probe)
        except NotSupported:  # this host grows no disk, and so did not grow this one
            size_bytes = disk.size_bytes
        except Exception as error:
            raise StepFailed(self._undecided(disk, disk, error)) from error
        doubt, disk.doubt = disk.doubt, None
        has_grown = size_bytes != disk.size_bytes
        disk.size_bytes = size_bytes
        self.enter_disk(disk, Event.FOUND if has_grown else Event.ABSENT)
        if doubt is not None and not has_grown:
            raise StepFailed(doubt, of_resize=True)

    async def grow(self, disk: Disk) -> None:
        """Have the guest see the disk's size, and grow what is mounted. It changes no state, and can be asked anew."""
        mounted = [(m.config, m.guest_path) for m in disk.mounts.values() if m.state is MountState.MOUNTED]
        begun = time.perf_counter()
        try:
            await self._guest.grow(disk.slot, mounts=mounted, timeout_s=self._timeouts.resize)
        except Exception as error:
            raise StepFailed(as_ours(error, f"grow {disk.request.host_path}"), of_resize=True) from error
        disk.phases["grow"] = time.perf_counter() - begun

    async def mount(self, mount: Mount) -> None:
        """Have the guest mount it."""

        async def send() -> None:
            mount.notes = tuple(
                await self._guest.mount(
                    mount.disk.slot, mount.config_to_send, guest_path=mount.guest_path, timeout_s=self._timeouts.mount
                )
            )

        await self._mount_step(mount, "mount", send, still=lambda: mount.is_wanted)

    async def unmount(self, mount: Mount) -> None:
        """Have the guest unmount it."""
        disk = mount.disk
        await self._mount_step(
            mount,
            "unmount",
            lambda: self._guest.unmount(
                disk.slot,
                mount.config,
                guest_path=mount.guest_path,
                timeout_s=self._patience(disk, self._timeouts.unmount),
                force=self._tells(disk, mount.force),
            ),
            still=lambda: not mount.is_wanted or disk.overruled is not None,
            is_release=True,
        )

    async def probe_mount(self, mount: Mount) -> None:
        disk = mount.disk
        try:
            found = await self._guest.probe_mount(
                disk.slot, guest_path=mount.guest_path, timeout_s=self._timeouts.probe
            )
        except Exception as error:
            if not disk.is_overruling:
                raise StepFailed(self._undecided(disk, mount, error), mount) from error
            self._overrule(disk, mount, error)
            found = False
        doubt, mount.doubt = mount.doubt, None
        was_adding = mount.state is MountState.MOUNT_UNKNOWN
        self.enter_mount(mount, Event.FOUND if found else Event.ABSENT)
        if doubt is not None and found is not was_adding and not disk.is_overruling:
            raise StepFailed(doubt, mount)

    def enter_disk(self, disk: Disk, event: Event, *, write: bool = True, seconds: float | None = None) -> None:
        disk.state = disk.after(event)
        if write:
            self._ledger.note([disk.record()])
        self._events.emit(disk, None, disk.state, seconds=seconds)

    def enter_mount(self, mount: Mount, event: Event, *, write: bool = True, seconds: float | None = None) -> None:
        mount.state = mount.after(event)
        if write:
            self._ledger.note([mount.record()])
        self._events.emit(mount.disk, mount, mount.state, seconds=seconds)

    async def _disk_step(
        self,
        disk: Disk,
        phase: str,
        send: Callable[[], Awaitable[None]],
        *,
        still: Callable[[], bool],
        begin: Event = Event.BEGIN,
        of_guest: bool = False,
    ) -> None:
        """`still`: is the step wanted, now that its intent is written? That may have taken a while.

        `of_guest`: the guest takes it, and the host can do without.
        """
        await self._intend_disk(disk, begin)
        if not still():
            self._ledger.note([disk.record()])
            return
        self.enter_disk(disk, begin, write=False)
        begun = time.perf_counter()
        try:
            await send()
        except Exception as error:
            if of_guest and disk.is_overruling:
                self._overrule(disk, None, error)
            elif isinstance(error, _REFUSALS):
                self.enter_disk(disk, Event.REFUSED)
                raise StepFailed(error) from error
            else:
                self.enter_disk(disk, Event.NO_ANSWER)
                disk.doubt = as_ours(error, f"{phase} {disk.request.host_path} at {disk.slot}")
                return
        disk.phases[phase] = time.perf_counter() - begun
        self.enter_disk(disk, Event.DONE, seconds=disk.phases[phase])

    async def _mount_step(
        self,
        mount: Mount,
        phase: str,
        send: Callable[[], Awaitable[None]],
        *,
        still: Callable[[], bool],
        is_release: bool = False,
    ) -> None:
        disk = mount.disk
        await self._intend_mount(mount)
        if not still():
            self._ledger.note([mount.record()])
            return
        self.enter_mount(mount, Event.BEGIN, write=False)
        begun = time.perf_counter()
        try:
            await send()
        except Exception as error:
            if is_release and disk.is_overruling:
                self._overrule(disk, mount, error)
            elif isinstance(error, _REFUSALS):
                self.enter_mount(mount, Event.REFUSED)
                raise StepFailed(error, mount) from error
            else:
                self.enter_mount(mount, Event.NO_ANSWER)
                mount.doubt = as_ours(error, f"{phase} {disk.request.host_path} at {mount.guest_path}")
                return
        disk.phases[phase] = time.perf_counter() - begun
        self.enter_mount(mount, Event.DONE, seconds=disk.phases[phase])

    def _patience(self, disk: Disk, seconds: float) -> float:
        """How long a step of the guest's may take."""
        if disk.overruled is not None:
            return min(seconds, _LAST_WORD_S)  # it has had its say
        return min(seconds, self._timeouts.overrule) if disk.is_overruling else seconds

    def _tells(self, disk: Disk, force: Force) -> bool:
        """Is the guest told to force the step? One that knows no force is asked, and overruled if it refuses."""
        if force is Force.HOST:
            try:
                self._guest.check_force(disk.slot)
            except NotSupported:
                return False
        return force is not Force.NO

    def _overrule(self, disk: Disk, mount: Mount | None, error: Exception) -> None:
        """The guest's answer counts for nothing from here on: the disk leaves the bus, whoever asks for it now."""
        where = f" at {mount.guest_path}" if mount else ""
        said = str(as_ours(error, "it failed"))
        self._log.warning(
            "the guest does not let go of %s%s (%s): the host takes the disk away; what the guest has not written to "
            "it is lost",
            disk.request.host_path,
            where,
            said,
            slot=disk.slot,
        )
        if disk.overruled is None:
            disk.overruled = said
        for claim in disk.leaving.values():
            claim.overruled = disk.overruled
        self._events.emit(disk, mount, "overruled", error=said)

    def _undecided(self, disk: Disk, thing: Disk | Mount, error: Exception) -> UtilityVMError:
        doubt, thing.doubt = thing.doubt, None  # told now; a retry begins without it
        if isinstance(error, VMGone):
            return error  # there is nobody to ask any more, nor a slot to be taken
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

    async def _intend_disk(self, disk: Disk, begin: Event) -> None:
        """Write down that the next step of the disk is about to be sent, and for whom it is attached."""
        state = disk.after(begin)
        if state is DiskState.ATTACHING:
            self._ledger.note([mount.record() for mount in disk.mounts.values()])
            self._ledger.note(
                [claim.record() for claim in disk.claims.values() if claim.state is ReservationState.PENDING]
            )
        try:
            await self._ledger.intend(disk.record(state))
        except StoreError as error:
            raise StepFailed(error) from error

    async def _intend_mount(self, mount: Mount) -> None:
        state = mount.after(Event.BEGIN)
        if state is MountState.MOUNTING:
            self._ledger.note(
                [claim.record() for claim in mount.claims.values() if claim.state is ReservationState.PENDING]
            )
        try:
            await self._ledger.intend(mount.record(state))
        except StoreError as error:
            raise StepFailed(error, mount) from error


def as_ours(error: Exception, what: str) -> UtilityVMError:
    """An error of ours for anything that a backend raised."""
    return error if isinstance(error, UtilityVMError) else OutcomeUnknown(f"{what}: {type(error).__name__}: {error}")
