"""The guest backend over HCS: what is asked of the guest goes through HCS, which hands it on.

So it is for a VM without a connection of ours into the guest; with one, `guests.bridge_guest` asks the guest itself,
and HCS does only the host's part. What runs in the guest is Windows' guest service or hcsshim's gcs, of today. Neither
can be asked what is mounted. So this keeps what was answered, waits for what was not, and sends nothing that does harm
there:

* no second mount at a path in use, and none at all at a path of unknown state (a failed second mount deletes what is
  on the disk); none above or below another, nor on a folder of the guest's own (a failed one deletes what is there);
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
from utilityvm.scsi.mount import GENERATED_BELOW
from utilityvm.scsi.ports import DiskRecord, MountConfig, MountRecord, Record, ScratchKey
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
        """Refuse what this guest cannot be told. See `GuestBackend.check`."""
        if slot is not None:
            Slot.checked(*slot)
        if config is not None:
            check_expressible(self._os, slot, guest_mount(config))

    async def mount(self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float) -> None:
        """See `GuestBackend.mount`.

        Raises:
            GuestPathInUse: a disk is mounted there, or above or below it, or another may be; nothing was sent.
            NotSupported: a folder of the guest's own; nothing was sent.
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

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        """See `GuestBackend.unmount`.

        Raises:
            InvalidRequest: another disk is mounted there; nothing was sent.
            NotSupported: `force`, which these guests do not know; nothing was sent.
        """
        self._check_force(slot, force=force)
        deadline, key = time.monotonic() + timeout_s, self._key(guest_path)
        if self._is_ejected(slot):
            self._mounts.pop(key, None)
            return
        mount = self._mounts.setdefault(key, _Mount(slot, guest_path, _State.MOUNTED))
        if mount.slot != slot:
            raise InvalidRequest(
                f"{guest_path} holds the disk at {mount.slot}, not the one at {slot}", vm=self._system.id, slot=slot
            )
        await self._settle(key, deadline)
        if key not in self._mounts:
            return
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
        self._check_force(slot, force=force)
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

    def _check_harmless(self, slot: Slot, guest_path: PurePosixPath) -> None:
        if hazards.is_precious(guest_path):
            raise NotSupported(
                f"{guest_path} is a folder of the guest's own, and this guest removes it if the mount fails",
                vm=self._system.id,
                slot=slot,
                remedy="mount it at a path of its own, such as /run/mounts/data",
            )
        if other := hazards.overlapping(guest_path, (mount.guest_path for mount in self._mounts.values())):
            raise GuestPathInUse(
                f"{guest_path} overlaps with {other}, where another disk is: if the mount failed, this guest would "
                "remove what is there",
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
        """The path as the guest knows it. Those that the manager makes up are where hcsshim's are."""
        if self._os is GuestOS.LINUX:
            return str(guest_path)
        if guest_path.is_relative_to(GENERATED_BELOW):
            guest_path = WINDOWS_BELOW / guest_path.relative_to(GENERATED_BELOW)
        return winpath.guest_path(guest_path)

    def _key(self, guest_path: PurePosixPath) -> str:
        path = self._path(guest_path)
        return path if self._os is GuestOS.LINUX else winpath.same_file_key(path)

    def _check_force(self, slot: Slot, *, force: bool) -> None:
        if force:
            raise NotSupported("this guest's agent knows no force", vm=self._system.id, slot=slot)

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


def guest_mount(config: MountConfig) -> GuestMount:
    """The mount in hcsshim's words.

    A Windows guest formats a container's scratch disk with ReFS whatever is on it, so that takes `reformat`.

    Raises:
        NotSupported: hcsshim has no words for it.
    """
    formats_with_refs = config.ensure_filesystem and config.reformat and config.filesystem == REFS
    for wanted, what in (
        (config.encryption is not None and not isinstance(config.encryption, ScratchKey), "a key of the caller's"),
        (config.verity is not None, "dm-verity"),
        (config.reformat and not formats_with_refs, "reformatting"),
    ):
        if wanted:
            raise NotSupported(f"this guest's agent knows no {what}", remedy="use utilityvm's guest image")
    return GuestMount(
        partition=config.partition,
        read_only=config.read_only,
        encrypted=config.encryption is not None,
        block_dev=config.block_device,
        options=config.options,
        ensure_filesystem=config.ensure_filesystem and not formats_with_refs,
        filesystem="" if formats_with_refs else config.filesystem or "",
        format_with_refs=formats_with_refs,
    )
