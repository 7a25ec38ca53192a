"""The guest backend over HCS: what is asked of the guest goes through HCS, which hands it on.

So it is for a VM without a connection of ours into the guest; with one, `guests.bridge_guest` asks the guest itself,
and HCS does only the host's part. What runs in the guest is Windows' guest service or hcsshim's gcs, of today. Neither
can be asked what is mounted. So this keeps what was answered, waits for what was not, and sends nothing that does harm
there:

* no second mount at a path in use, and none at all at a path of unknown state (a failed second mount deletes what is
  on the disk); none above or below another, nor where the guest may have files (`bridge.hazards`);
* no word that it ignores, and none that makes it format a disk with data, unless the caller says that it may go;
* no unmount after an eject, and no mount without a device (the Linux guest then waits for the device for ever);
* no eject of a disk that is mounted.

Source: hcsshim internal/uvm/scsi/backend.go; its guest, internal/guest/runtime/hcsv2/uvm.go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final

from utilityvm.bridge import hazards
from utilityvm.errors import (
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    UtilityVMError,
    WrongState,
)
from utilityvm.hosts.hcs import winpath
from utilityvm.hosts.hcs.documents import (
    GuestMount,
    GuestOS,
    GuestRequest,
    check_expressible,
    eject_request,
    encode,
    forwarded,
    mount_request,
    unmount_request,
)
from utilityvm.hosts.hcs.system import ComputeSystem, HcsRefused, Step
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.mount import GENERATED_BELOW, checked_guest_path
from utilityvm.scsi.ports import CallerKey, DiskRecord, MountConfig, MountRecord, Record
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import MountState

REFS: Final = "refs"
_BUSY: Final = "device or resource busy"  # Go's text of EBUSY, which is all that a Linux guest says
WINDOWS_BELOW: Final = PurePosixPath("/C:/mounts/scsi")


class _State(StrEnum):
    MOUNTING = "mounting"  # sent, and not answered
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"  # sent, and not answered


@dataclass(slots=True)
class _Mount:
    """What the guest may have at a guest path."""

    slot: Slot
    guest_path: PurePosixPath
    state: _State = _State.MOUNTING
    step: Step = field(default_factory=Step)


@dataclass(slots=True)
class _Eject:
    """What was asked of the guest about a device."""

    is_done: bool = False
    step: Step = field(default_factory=Step)


@typed_errors
class HcsGuest:
    """Implements `scsi.ports.GuestBackend` on a running VM of HCS's."""

    def __init__(
        self,
        system: ComputeSystem,
        os: GuestOS,
        *,
        is_read_only: Callable[[Slot], bool | None] | None = None,
    ) -> None:
        """`is_read_only` says how the disk at a slot is attached, if that is known: `HcsHost.is_read_only`."""
        self._system = system
        self._os = os
        self._is_read_only = is_read_only
        self._mounts: dict[str, _Mount] = {}  # by the guest path, in the one form in which this guest knows it
        self._ejects: dict[Slot, _Eject] = {}
        self._vouched: set[PurePosixPath] = set()

    def allow_mounts_below(self, folder: PurePosixPath) -> None:
        """Vouch for it that a Linux guest keeps no files below `folder`: gcs removes what is at a mount's path.

        Raises:
            InvalidRequest: it is no path in a guest, or the system's own.
        """
        self._vouched.add(checked_guest_path(folder))

    def adopt(self, records: Iterable[Record]) -> None:
        """Take over the mounts that another owner of this VM wrote into its journal (`Journal.read`).

        What was answered is taken as it was: nobody else mounts in this VM. Of what was not, nobody will ever know.
        """
        slots: dict[str, Slot] = {}
        for record in records:
            if isinstance(record, DiskRecord):
                slots[record.attachment] = record.slot
            elif isinstance(record, MountRecord) and record.attachment in slots:
                if record.state in (MountState.RESERVED, MountState.UNMOUNTED):
                    continue
                state = _State.MOUNTED if record.state == MountState.MOUNTED else _State.UNMOUNTING
                mount = _Mount(slots[record.attachment], record.guest_path, state)
                self._mounts[self._key(record.guest_path)] = mount

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        """Refuse what this guest cannot be told, or would do otherwise than it is meant. See `GuestBackend.check`."""
        if slot is not None:
            Slot.checked(*slot)
        if config is not None:
            _check_words(self._os, config)
            check_expressible(self._os, slot, guest_mount(config))

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        """See `GuestBackend.checked_path`. A Windows guest's may be written as Windows does: `C:\\mounts\\data`."""
        if self._os is GuestOS.WINDOWS:
            return winpath.checked_guest_path(_in_windows(guest_path))
        path = checked_guest_path(guest_path)
        self._check_place(path)
        return path

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        """See `GuestBackend.mount`.

        Raises:
            GuestPathInUse: a disk is mounted there, or above or below it, or another may be; nothing was sent.
            NotSupported: the guest may have files there; nothing was sent.
            WrongState: this disk may be mounted there; nothing was sent.
            OutcomeUnknown: an eject of the device was not answered; nothing was sent.
        """
        self.check(slot, config)
        if self._os is GuestOS.WINDOWS and config.read_only and self._is_writable(slot):
            raise NotSupported(
                "a Windows guest cannot be told to mount a writable disk read-only",
                vm=self._system.id,
                slot=slot,
                remedy="attach the disk read-only",
            )
        if self._os is GuestOS.LINUX:
            self._check_harmless(slot, guest_path)
        key = self._key(guest_path)
        if there := self._mounts.get(key):
            is_doubtful = there.slot == slot and there.state is not _State.MOUNTED
            kind = WrongState if is_doubtful else GuestPathInUse
            raise kind(
                f"guest path {there.guest_path} is {there.state} with the disk at {there.slot}",
                vm=self._system.id,
                slot=slot,
            )
        if (eject := self._ejects.get(slot)) and not eject.is_done:
            raise self._unknown(f"whether the guest still has the disk at {slot}", slot)
        request = mount_request(self._os, slot, self._path(guest_path), guest_mount(config))
        self._ejects.pop(slot, None)  # what was ejected is not there any more; this is a new device
        mount = self._mounts[key] = _Mount(slot, guest_path)
        try:
            await self._send(mount.step, request, time.monotonic() + timeout_s)
        except HostRefused as error:
            del self._mounts[key]
            raise self._refused(error, f"mount {guest_path}", slot) from error
        mount.state = _State.MOUNTED
        return ()

    def check_force(self, slot: Slot) -> None:
        """See `GuestBackend.check_force`.

        Raises:
            NotSupported: always: gcs has no word for it.
        """
        raise NotSupported(
            "this guest's agent knows no force",
            vm=self._system.id,
            slot=slot,
            remedy="end what uses the disk in the guest, and release it without force; or end the VM",
        )

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        """See `GuestBackend.unmount`.

        Raises:
            InvalidRequest: another disk is mounted there; nothing was sent.
            NotSupported: `force`, which these guests do not know; nothing was sent.
            NotSupported, GuestPathInUse: it is not known to be mounted, and as `mount`; nothing was sent.
        """
        self._refuse_force(slot, force=force)
        deadline, key = time.monotonic() + timeout_s, self._key(guest_path)
        if self._is_ejected(slot):
            self._mounts.pop(key, None)
            return
        if key not in self._mounts and self._os is GuestOS.LINUX:
            self._check_harmless(slot, guest_path)  # where nothing is mounted, an unmount removes the path
        mount = self._mounts.setdefault(key, _Mount(slot, guest_path, _State.MOUNTED))
        if mount.slot != slot:
            raise InvalidRequest(
                f"{guest_path} holds the disk at {mount.slot}, not the one at {slot}", vm=self._system.id, slot=slot
            )
        await self._settle(key, deadline)
        if key not in self._mounts:
            return
        if mount.state is not _State.MOUNTED and self._os is GuestOS.LINUX:
            self._check_harmless(slot, guest_path)
        before, mount.state = mount.state, _State.UNMOUNTING
        request = unmount_request(self._os, slot, self._path(guest_path), guest_mount(config))
        try:
            await self._send(mount.step, request, deadline)
        except HostRefused as error:
            mount.state = before
            raise self._refused(error, f"unmount {guest_path}", slot) from error
        del self._mounts[key]

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        """See `GuestBackend.eject`. A Windows guest needs no such thing, and is sent nothing.

        Raises:
            GuestBusy: it is mounted; nothing was sent.
            NotSupported: `force`, which these guests do not know; nothing was sent.
        """
        self._refuse_force(slot, force=force)
        if users := [str(mount.guest_path) for mount in self._mounts.values() if mount.slot == slot]:
            raise GuestBusy(
                f"the disk at {slot} is mounted at {', '.join(users)}", holders=users, vm=self._system.id, slot=slot
            )
        request = eject_request(self._os, slot)
        if request is None:
            return
        # Always sent, also if the slot's last device was ejected: this may be another one, and no device is no harm.
        eject = self._ejects[slot] = _Eject()
        try:
            await self._send(eject.step, request, time.monotonic() + timeout_s)
        except HostRefused as error:
            del self._ejects[slot]
            raise self._refused(error, f"eject {slot}", slot) from error
        eject.is_done = True

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        """See `GuestBackend.probe_mount`.

        Raises:
            OutcomeUnknown: the last step has no answer, and none will come.
        """
        key = self._key(guest_path)
        if key in self._mounts:
            await self._settle(key, time.monotonic() + timeout_s)
        mount = self._mounts.get(key)
        if mount is None or mount.slot != slot:
            return False
        if mount.state is not _State.MOUNTED:
            raise self._unknown(f"whether {guest_path} is mounted", slot)
        return True

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        """See `GuestBackend.probe_device`.

        Raises:
            OutcomeUnknown: the last eject has no answer, and none will come.
        """
        if self._os is GuestOS.WINDOWS:
            return False  # it lets go by itself
        eject = self._ejects.get(slot)
        if eject is None:
            return True
        if eject.step.may_be_answered:
            try:
                await eject.step.answer(time.monotonic() + timeout_s)
            except HostRefused:
                del self._ejects[slot]
                return True
            eject.is_done = True
        if not eject.is_done:
            raise self._unknown(f"whether the guest has the disk at {slot}", slot)
        return False

    async def check_grow(self, slot: Slot, *, size_bytes: int, timeout_s: float) -> None:
        """Raises NotSupported, as `grow` would."""
        await self.grow(slot, mounts=[], timeout_s=timeout_s)

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        """These guests have no request for this.

        Raises:
            NotSupported: always.
        """
        raise NotSupported("this guest grows no disks", vm=self._system.id, slot=slot, remedy="attach it again")

    # Steps.

    async def _send(self, step: Step, request: GuestRequest, deadline: float) -> None:
        await step.send(self._system, encode(forwarded(request)), deadline)

    async def _settle(self, key: str, deadline: float) -> None:
        """Take the answer of the step that was sent before, if it may still come."""
        mount = self._mounts[key]
        if not mount.step.may_be_answered:
            return
        was_mounting = mount.state is _State.MOUNTING
        try:
            await mount.step.answer(deadline)
        except HostRefused:
            is_there = not was_mounting
        except OutcomeUnknown:
            if mount.step.may_be_answered:
                raise
            return
        else:
            is_there = was_mounting
        if is_there:
            mount.state = _State.MOUNTED
        else:
            del self._mounts[key]

    def _check_place(self, guest_path: PurePosixPath) -> None:
        if not hazards.is_for_mounts(guest_path, self._vouched):
            reason, remedy = hazards.place_objection(guest_path)
            raise NotSupported(reason, vm=self._system.id, remedy=remedy)

    def _check_harmless(self, slot: Slot, guest_path: PurePosixPath) -> None:
        self._check_place(guest_path)
        if other := hazards.overlapping(guest_path, (mount.guest_path for mount in self._mounts.values())):
            raise GuestPathInUse(
                f"{guest_path} overlaps with {other}, where another disk is: this guest may remove what is there along "
                "with it",
                vm=self._system.id,
                slot=slot,
                remedy="choose a path beside it",
            )

    def _is_writable(self, slot: Slot) -> bool:
        return self._is_read_only is not None and self._is_read_only(slot) is False

    def _is_ejected(self, slot: Slot) -> bool:
        eject = self._ejects.get(slot)
        return eject is not None and eject.is_done

    def _path(self, guest_path: PurePosixPath) -> str:
        """The path as the guest knows it."""
        if self._os is GuestOS.LINUX:
            return str(guest_path)
        return winpath.guest_path(_in_windows(guest_path))

    def _key(self, guest_path: PurePosixPath) -> str:
        path = self._path(guest_path)
        return path if self._os is GuestOS.LINUX else winpath.same_file_key(path)

    def _refuse_force(self, slot: Slot, *, force: bool) -> None:
        if force:
            self.check_force(slot)

    def _refused(self, error: HostRefused, what: str, slot: Slot) -> UtilityVMError:
        reason = error.reason if isinstance(error, HcsRefused) else str(error)
        if _BUSY in reason:
            return GuestBusy(f"{what}: {reason}", vm=self._system.id, slot=slot, remedy="end what uses it")
        return GuestRefused(f"{what}: {reason}", vm=self._system.id, slot=slot)

    def _unknown(self, what: str, slot: Slot) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"nobody knows {what}: HCS did not answer, and this guest cannot be asked",
            vm=self._system.id,
            slot=slot,
            remedy="end the VM; its disks are free then",
        )


def _in_windows(guest_path: PurePosixPath) -> PurePosixPath:
    """Paths that the manager makes up are where hcsshim's are."""
    if guest_path.is_relative_to(GENERATED_BELOW):
        return WINDOWS_BELOW / guest_path.relative_to(GENERATED_BELOW)
    return guest_path


def _check_words(os: GuestOS, config: MountConfig) -> None:
    """Refuse what hcsshim has no words for, and words that do something else than they say.

    A Windows guest formats a container's scratch disk with ReFS whatever is on it, so that takes `reformat`.

    Raises:
        NotSupported: names it.
    """
    is_windows = os is GuestOS.WINDOWS
    for wanted, what in (
        (isinstance(config.encryption, CallerKey), "key of the caller's"),
        (config.verity is not None, "dm-verity"),
        (is_windows and config.reformat and not _is_refs_scratch(config), "reformatting but with ReFS"),
    ):
        if wanted:
            raise NotSupported(f"this guest's agent knows no {what}", remedy="use utilityvm's guest image")
    if is_windows:
        if _is_refs_scratch(config) and not config.reformat:
            raise NotSupported(
                "a Windows guest formats a ReFS scratch disk whatever is on it",
                remedy="say reformat=True if all that is on the disk may go",
            )
    elif objection := hazards.objection(
        filesystem=config.named_filesystem,
        ensure_filesystem=config.ensure_filesystem,
        reformat=config.reformat,
        encrypted=config.encryption is not None,
        block_device=config.block_device,
        options=config.mount_options,
    ):
        raise NotSupported(objection.reason, remedy=objection.remedy)


def _is_refs_scratch(config: MountConfig) -> bool:
    return config.ensure_filesystem and config.filesystem == REFS


def guest_mount(config: MountConfig) -> GuestMount:
    """The mount in hcsshim's words."""
    formats_with_refs = _is_refs_scratch(config)
    return GuestMount(
        partition=config.partition,
        read_only=config.read_only,
        encrypted=config.encryption is not None,
        block_dev=config.block_device,
        options=config.mount_options,
        ensure_filesystem=config.ensure_filesystem and not formats_with_refs,
        filesystem="" if formats_with_refs else config.named_filesystem or "",
        format_with_refs=formats_with_refs,
    )
