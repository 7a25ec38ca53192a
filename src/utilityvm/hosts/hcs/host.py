"""The host backend on HCS: disks on the bus of one VM, and the right that the VM has to their files.

HCS opens a disk's file as the VM's own account, so a right is given before a disk is attached (`VMAccess`), and taken
back when it is detached or could not be attached.

What is not known is asked: a modification that was not answered in time goes on, and `probe` first waits for its
answer. If there will be none, `probe` finishes the matter: the schema of HCS's properties has no disks, so nobody can
be asked whether one is at a slot, but removing it leaves no doubt. (The properties do say whether the VM still runs.)

Source: hcsshim internal/uvm/scsi.go and modify.go; HCS schema, Properties and ModifySettingRequest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from utilityvm.errors import (
    AccessDenied,
    AlreadyAttached,
    DiskInUse,
    HostRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    ProtocolError,
    UtilityVMError,
    VMGone,
)
from utilityvm.hosts.hcs.disk import DiskFacts, Disks, HcsDisk, LocalDisks, attachment_for
from utilityvm.hosts.hcs.documents import Schema, attach_request, detach_request, encode
from utilityvm.hosts.hcs.system import (
    E_ACCESSDENIED,
    HRESULT_ERROR_NOT_FOUND,
    HRESULT_ERROR_SHARING_VIOLATION,
    ComputeSystem,
    HcsRefused,
    Step,
)
from utilityvm.log import logger
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.ports import AttachmentType, DiskRecord, DiskRequest, Holder, OpenDisk, Record, VMAccess
from utilityvm.scsi.slot import LUNS_PER_CONTROLLER, MAX_CONTROLLERS, Slot
from utilityvm.scsi.transitions import DiskState

# A guess: hcsshim takes it for "does not exist", and nothing says what HCS answers for an empty slot.
NOT_THERE: Final = frozenset({HRESULT_ERROR_NOT_FOUND})

# A journal's disks whose last step of ours was answered, and left the disk on the bus.
_ANSWERED: Final = frozenset({DiskState.ATTACHED, DiskState.EJECTING, DiskState.EJECT_UNKNOWN, DiskState.EJECTED})

_TAKE_RIGHT_S: Final = 10.0

_log = logger(__name__)


class _State(StrEnum):
    ATTACHING = "attaching"  # sent, and not answered
    ATTACHED = "attached"
    DETACHING = "detaching"  # sent, and not answered


@dataclass(slots=True)
class _Attachment:
    """A disk that HCS may have on the bus."""

    slot: Slot
    host_path: str
    access: VMAccess
    identity: str
    read_only: bool
    facts: DiskFacts
    state: _State = _State.ATTACHING
    step: Step = field(default_factory=Step)


class GroupAccess:
    """How many attachments of this process need the group's right to a file. It goes with the last of them.

    The right is the file's, and not one VM's: who gives it in several processes should set `keep`.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._users: Counter[str] = Counter()
        self._changing = asyncio.Lock()

    async def give(self, system: ComputeSystem, identity: str, path: str) -> None:
        async with self._changing:
            await system.grant(path, group=True)
            self._users[identity] += 1

    def adopt(self, identity: str) -> None:
        self._users[identity] += 1

    async def take(self, system: ComputeSystem, identity: str, path: str) -> None:
        async with self._changing:
            self._users[identity] -= 1
            if self._users[identity] > 0 or self._keep:
                return
            del self._users[identity]
            await system.revoke(path, group=True)


_everybodys_group_access = GroupAccess()


@typed_errors
class HcsHost:
    """Implements `scsi.ports.HostBackend` on a running VM of HCS's."""

    def __init__(
        self,
        system: ComputeSystem,
        *,
        controllers: int = MAX_CONTROLLERS,
        schema: Schema = Schema.HEAD,
        disks: Disks | None = None,
        group_access: GroupAccess | None = None,
        not_there: Collection[int] = NOT_THERE,
    ) -> None:
        """`controllers` and `schema` as in the document that the VM was created from.

        `not_there`: the codes by which HCS refuses to remove what is not there.
        """
        self._system = system
        self._controllers = controllers
        self._schema = schema
        self._disks = disks or LocalDisks()
        self._group = group_access or _everybodys_group_access
        # Every attachment that HCS may have, from before its document is sent. What is not here is not there.
        self._attachments: dict[str, _Attachment] = {}
        self._not_there = frozenset(not_there)
        self._log = _log.bind(vm=system.id)

    def adopt(self, records: Iterable[Record]) -> None:
        """Take over the disks that another owner of this VM wrote into its journal (`Journal.read`).

        What was answered is taken as it was: nobody else changes this VM's bus. What was not is for `probe`.
        """
        for record in records:
            if not isinstance(record, DiskRecord) or record.state in (DiskState.RESERVED, DiskState.DETACHED):
                continue
            state = _State.ATTACHED if record.state in _ANSWERED else _State.DETACHING
            facts = DiskFacts(format=record.format, size_bytes=record.size_bytes)
            self._attachments[record.attachment] = _Attachment(
                slot=record.slot,
                host_path=record.host_path,
                access=VMAccess.NOOP if record.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK else record.access,
                identity=record.identity,
                read_only=record.read_only,
                facts=facts,
                state=state,
            )
            if record.access is VMAccess.GROUP:
                self._group.adopt(record.identity)

    async def adopt_state(self, state: ScsiState) -> list[Record]:
        """Take over the disks of a VM that has moved here, before its manager resumes. Gives what `HcsGuest` adopts.

        HCS has moved the VM's bus with it, and cannot be asked what is there: what was exported is taken as it was.

        Raises:
            RequestError: a disk is not there, or may not be looked at; nothing was taken over.
        """
        records: list[Record] = []
        for disk in state.disks:
            identity = await asyncio.to_thread(self._disks.identity, disk.request())
            records += disk.records(identity, holder=Holder(name=self._system.id))
        self.adopt(record for record in records if record.attachment not in self._attachments)
        return records

    # The HostBackend protocol.

    async def open(self, request: DiskRequest) -> OpenDisk:
        """Look at a disk. HCS opens the file later, by the same path.

        Raises:
            InvalidRequest: no such file, or one that cannot be a disk of this kind; a relative path.
            NotSupported: a format other than VHD and VHDX.
            DiskInUse, AccessDenied: it cannot be read now, or not by this user.
            ImageError: the image is damaged, or names other files.
        """
        attachment = attachment_for(request)
        identity = await asyncio.to_thread(self._disks.identity, request)
        facts = next((entry.facts for entry in self._attachments.values() if entry.identity == identity), None)
        if facts is None:  # the VM does not have it open
            facts = await asyncio.to_thread(self._disks.read, request)
        return HcsDisk(request, attachment, identity, facts)

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        """Put the disk at `slot`. True on return: HCS has it there, and the VM the right to it.

        Raises:
            AlreadyAttached: the slot, or the name, is taken; nothing changed.
            AccessDenied: the right could not be given, or HCS could not open the file; nothing changed.
            DiskInUse: HCS says that somebody else has the file open; nothing changed.
            HostRefused: HCS said no; nothing changed.
            OutcomeUnknown: no answer; probe.
            VMGone: the VM ended.
        """
        if not isinstance(disk, HcsDisk):
            raise InvalidRequest(f"{disk!r} was not opened by this host", vm=self._system.id, slot=slot)
        self._check_free(slot, attachment)
        request = disk.request
        document = encode(attach_request(slot, disk.attachment, schema=self._schema))
        entry = _Attachment(
            slot=slot,
            host_path=request.host_path,
            access=_access_for(request),
            identity=disk.identity,
            read_only=request.read_only,
            facts=disk.facts,
        )
        self._attachments[attachment] = entry
        deadline = time.monotonic() + timeout_s
        try:
            await self._give_right(entry, timeout_s)
        except BaseException:
            del self._attachments[attachment]
            raise
        try:
            await entry.step.send(self._system, document, deadline)
        except HcsRefused as error:
            await self._forget(attachment)
            raise self._attach_error(error, slot, request.host_path) from error
        entry.state = _State.ATTACHED

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        """Take the disk off the bus, and its file from the VM. Calling it again is no error.

        Raises:
            HostRefused: HCS said no; the disk is still attached.
            OutcomeUnknown: no answer; probe, or call again.
            VMGone: the VM ended, and the disk is free by that.
        """
        deadline = time.monotonic() + timeout_s
        if attachment in self._attachments:
            await self._settle(attachment, deadline)
        if attachment in self._attachments:
            await self._remove(attachment, deadline)

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        """Is the disk on the bus? If it is not known and will not be, it is taken off.

        Raises:
            OutcomeUnknown: HCS does not answer, or does not remove what may be there.
            VMGone: the VM ended.
        """
        deadline = time.monotonic() + timeout_s
        if attachment not in self._attachments:
            return False
        await self.check_running(timeout_s=timeout_s)
        await self._settle(attachment, deadline)
        entry = self._attachments.get(attachment)
        if entry is None or entry.state is _State.ATTACHED:
            return entry is not None
        await self._remove(attachment, deadline)
        return False

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        """HCS has no modification for this.

        Raises:
            NotSupported: always.
        """
        raise self._no_resize(slot)

    async def size(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        """See `HostBackend.size`.

        Raises:
            NotSupported: always, as for `resize`.
        """
        raise self._no_resize(slot)

    def _no_resize(self, slot: Slot) -> NotSupported:
        return NotSupported(
            "HCS does not grow a disk of a running VM",
            vm=self._system.id,
            slot=slot,
            remedy="detach it, grow it with Resize-VHD, and attach it again",
        )

    # What others ask beside that.

    def is_read_only(self, slot: Slot) -> bool | None:
        """Is the disk at `slot` attached read-only? None: there is none."""
        return next((entry.read_only for entry in self._attachments.values() if entry.slot == slot), None)

    async def check_running(self, *, timeout_s: float) -> None:
        """Return if the VM runs (or is paused).

        Raises:
            VMGone: it does not.
            OutcomeUnknown: HCS does not answer.
            ProtocolError: the answer is no properties document.
        """
        query = await self._system.properties()
        text = await query.result(timeout_s=timeout_s)
        try:
            properties = msgspec.json.decode(text or "{}", type=_Properties)
        except msgspec.DecodeError as error:
            raise ProtocolError("HCS's properties are no properties", message=text[:200], vm=self._system.id) from error
        if properties.stopped or properties.state in ("Stopped", "SavedAsTemplate"):
            raise VMGone(f"compute system {self._system.id} is {properties.state or 'Stopped'}", vm=self._system.id)

    # Steps.

    def _check_free(self, slot: Slot, attachment: str) -> None:
        where = Slot.checked(*slot)
        if where.controller >= self._controllers:
            raise InvalidRequest(
                f"slot {where}: the VM has {self._controllers} SCSI controllers of {LUNS_PER_CONTROLLER} slots",
                vm=self._system.id,
            )
        if attachment in self._attachments:
            raise AlreadyAttached(f"attachment {attachment} exists", vm=self._system.id, slot=slot)
        if taken := next((entry for entry in self._attachments.values() if entry.slot == slot), None):
            raise AlreadyAttached(f"slot {slot} is taken by {taken.host_path}", vm=self._system.id, slot=slot)

    async def _settle(self, attachment: str, deadline: float) -> None:
        """Take the answer of the step that was sent before, if it may still come."""
        entry = self._attachments[attachment]
        if not entry.step.may_be_answered:
            return
        was_attaching = entry.state is _State.ATTACHING
        try:
            await entry.step.answer(deadline)
        except HcsRefused as error:
            is_there = not was_attaching and error.hresult not in self._not_there
        except OutcomeUnknown:
            if entry.step.may_be_answered:
                raise
            return
        else:
            is_there = was_attaching
        if is_there:
            entry.state = _State.ATTACHED
        else:
            await self._forget(attachment)

    async def _remove(self, attachment: str, deadline: float) -> None:
        entry = self._attachments[attachment]
        before, entry.state = entry.state, _State.DETACHING
        try:
            document = encode(detach_request(entry.slot, schema=self._schema))
            await entry.step.send(self._system, document, deadline)
        except HcsRefused as error:
            if error.hresult not in self._not_there:
                entry.state = before
                if before is _State.ATTACHED:
                    raise
                raise OutcomeUnknown(
                    f"{entry.host_path} may be at {entry.slot}, and cannot be removed: {error.reason}",
                    vm=self._system.id,
                    slot=entry.slot,
                    host_path=entry.host_path,
                    remedy="the slot stays taken; ask again",
                ) from error
            self._log.debug("%s was not there (it was %s)", entry.host_path, before, slot=entry.slot)
        await self._forget(attachment)

    async def _forget(self, attachment: str) -> None:
        """It is not on the bus: the VM needs no right to it any more."""
        entry = self._attachments.pop(attachment, None)
        if entry is None:
            return  # another detach of it was quicker
        try:
            async with asyncio.timeout(_TAKE_RIGHT_S):
                if entry.access is VMAccess.GROUP:
                    await self._group.take(self._system, entry.identity, entry.host_path)
                elif entry.access is VMAccess.INDIVIDUAL:
                    await self._system.revoke(entry.host_path, group=False)
        except (UtilityVMError, TimeoutError) as error:
            # The disk is off the bus, which is what was asked for; the right is the lesser evil.
            why = error if isinstance(error, UtilityVMError) else f"no answer within {_TAKE_RIGHT_S:g} s"
            self._log.warning("the VM keeps its right to %s: %s", entry.host_path, why, slot=entry.slot)

    async def _give_right(self, entry: _Attachment, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if entry.access is VMAccess.GROUP:
                    await self._group.give(self._system, entry.identity, entry.host_path)
                elif entry.access is VMAccess.INDIVIDUAL:
                    await self._system.grant(entry.host_path, group=False)
        except TimeoutError as error:
            raise HostRefused(
                f"attach {entry.host_path} at {entry.slot}: its file's rights were not changed in {timeout_s:g} s",
                vm=self._system.id,
                slot=entry.slot,
                host_path=entry.host_path,
                remedy="nothing was attached; look at the file's storage, and ask again",
            ) from error
        except VMGone:
            raise
        except UtilityVMError as error:
            raise AccessDenied(
                f"{entry.host_path}: the VM cannot be given the right to it: {error}",
                vm=self._system.id,
                slot=entry.slot,
                host_path=entry.host_path,
                remedy="own the file, or give the right yourself and ask for VMAccess.NOOP",
            ) from error

    def _attach_error(self, error: HcsRefused, slot: Slot, host_path: str) -> UtilityVMError:
        kind: type[UtilityVMError] = HostRefused
        remedy = None
        if error.hresult == HRESULT_ERROR_SHARING_VIOLATION:
            kind, remedy = DiskInUse, "detach it there, or attach it read-only in both"
        elif error.hresult == E_ACCESSDENIED:
            kind, remedy = AccessDenied, "attach it with VMAccess.INDIVIDUAL"
        return kind(
            f"attach {host_path} at {slot}: {error.reason}",
            vm=self._system.id,
            slot=slot,
            host_path=host_path,
            remedy=remedy,
        )


def _access_for(request: DiskRequest) -> VMAccess:
    """The right that the VM needs; an extensible virtual disk is no file that one could be given to."""
    return VMAccess.NOOP if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK else request.access


class _Properties(msgspec.Struct, rename="pascal"):
    """What is read of HCS's properties. Source: HCS schema, Properties."""

    state: str = ""
    stopped: bool = False
