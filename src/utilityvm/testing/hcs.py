"""An HCS in memory: one VM with a bus, a guest, and files, which records what it is sent and refuses what HCS refuses.

`HcsWorld` is the VM; it is a `ComputeSystem` for `HcsHost` and `HcsGuest`, its `guest_connection` a direct one into
the guest, and its `disks` the host's files. What HCS refuses with which code is in part a guess, and marked as one.
A Linux guest is hcsshim's gcs (`testing.gcs`), with what it does to disks and files. What a right client never does
is noted in `harm`.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from utilityvm.errors import GuestRefused, InvalidRequest, OutcomeUnknown
from utilityvm.hosts.hcs import winpath
from utilityvm.hosts.hcs.disk import DiskFacts
from utilityvm.hosts.hcs.documents import GuestOS, Schema, controller_name, parse_evd
from utilityvm.hosts.hcs.system import (
    E_ACCESSDENIED,
    E_FAIL,
    E_INVALIDARG,
    HCS_E_INVALID_JSON,
    HCS_E_SYSTEM_ALREADY_STOPPED,
    HRESULT_ERROR_ALREADY_EXISTS,
    HRESULT_ERROR_FILE_NOT_FOUND,
    HRESULT_ERROR_NOT_FOUND,
    HRESULT_ERROR_SHARING_VIOLATION,
    failure,
)
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest
from utilityvm.scsi.slot import LUNS_PER_CONTROLLER, Slot
from utilityvm.testing.fakes import Break
from utilityvm.testing.gcs import Content, Failed, Gcs, NoAnswer

_PATH: Final = re.compile(r"VirtualMachine/Devices/Scsi/([^/]+)/Attachments/([0-9]+)")
_REQUEST_FIELDS: Final = {"ResourcePath", "RequestType", "Settings", "GuestRequest"}


@dataclass(kw_only=True)
class HcsFile:
    """A file, or a physical disk, of the host."""

    path: str
    format: DiskFormat = DiskFormat.VHDX
    size_bytes: int = 1 << 30
    blank: bool = False  # without a file system, and without data
    content: Content = field(default_factory=Content)
    rights: set[str] = field(default_factory=set)  # ids of VMs; "group" for all of them
    opened_by: dict[str, bool] = field(default_factory=dict)  # who has it open, and whether only to read

    def __post_init__(self) -> None:
        if self.blank:
            self.content = Content(filesystem="", has_data=False)


@dataclass(frozen=True)
class Sent:
    """A document, and whom it was sent to."""

    to: str  # hcs, or gcs: over the direct connection
    json: str


class Refused(Exception):
    """HCS, or the guest behind it, says no."""

    def __init__(self, hresult: int, message: str) -> None:
        super().__init__(message)
        self.hresult = hresult


class HcsWorld:
    """A VM as HCS runs it."""

    def __init__(
        self,
        id: str = "vm-1",
        *,
        os: GuestOS = GuestOS.LINUX,
        schema: Schema = Schema.HEAD,
        controllers: int = 4,
        files: Mapping[str, HcsFile] | None = None,
    ) -> None:
        self._id = id
        self.os = os
        self.schema = schema
        self.controllers = {controller_name(number, schema): number for number in range(controllers)}
        self.files: dict[str, HcsFile] = {}
        for path, file in (files or {}).items():
            self.files[winpath.same_file_key(path)] = file
        self.state = "Running"
        self.bus: dict[Slot, dict[str, Any]] = {}
        self.gcs = Gcs(self._content_at, is_read_only=lambda slot: bool(self.bus[slot].get("ReadOnly")))
        self._windows_mounts: dict[str, Slot] = {}
        self._other_contents: dict[str, Content] = defaultdict(Content)  # of disks that are no files
        self.devices = self.gcs.devices  # that the guest knows
        self.busy = self.gcs.busy  # guest paths that a program uses
        self.sent: list[Sent] = []
        self.log: list[str] = []  # every step, and every right given and taken
        self.harm = self.gcs.harm
        self.breaks: dict[str, list[Break]] = defaultdict(list)
        self.held: dict[str, asyncio.Event] = {}
        self.disks = StandInDisks(self)
        self.guest_connection = StandInGuestConnection(self)

    @property
    def mounts(self) -> dict[str, Slot]:
        """Which disk is at which guest path."""
        if self.os is GuestOS.WINDOWS:
            return dict(self._windows_mounts)
        return {path: stack[-1] for path, stack in self.gcs.mounts.items() if stack}

    def put_mount(self, path: str, slot: Slot) -> None:
        """As if the disk had been mounted there."""
        if self.os is GuestOS.WINDOWS:
            self._windows_mounts[path] = slot
        else:
            self.gcs.mounts[path] = [slot]

    def add_file(self, path: str, **facts: Any) -> HcsFile:
        """Make a file, which no VM has a right to."""
        file = self.files[winpath.same_file_key(path)] = HcsFile(path=path, **facts)
        return file

    def file(self, path: str) -> HcsFile | None:
        return self.files.get(winpath.same_file_key(path))

    def fail_next(self, step: str, how: Break = Break.REFUSE, *, times: int = 1) -> None:
        """Break the next `times` steps of that kind.

        Kinds: attach, detach, mount, unmount, eject, properties; grant and revoke, which are always refused.
        """
        self.breaks[step] += [how] * times

    def hold(self, step: str) -> asyncio.Event:
        """Steps of that kind are not answered, nor done, before the event is set: HCS takes its time.

        Kinds: as in `fail_next`; and `modify`, which is not even taken.
        """
        self.held[step] = asyncio.Event()
        return self.held[step]

    # As a ComputeSystem.

    @property
    def id(self) -> str:
        return self._id

    async def modify(self, document: str) -> StandInOperation:
        await self._wait("modify")
        self.sent.append(Sent("hcs", document))
        return StandInOperation(self, document)

    async def properties(self, query: str | None = None) -> StandInOperation:
        return StandInOperation(self, None)

    async def grant(self, path: str, *, group: bool) -> None:
        await self._wait("grant")
        self.log.append(f"grant {'group' if group else self._id} {path}")
        self._change_right("grant", path)
        self._existing(path).rights.add("group" if group else self._id)

    async def revoke(self, path: str, *, group: bool) -> None:
        await self._wait("revoke")
        self.log.append(f"revoke {'group' if group else self._id} {path}")
        self._change_right("revoke", path)
        self._existing(path).rights.discard("group" if group else self._id)

    async def _wait(self, step: str) -> None:
        await asyncio.sleep(0)
        if step in self.held:
            await self.held[step].wait()

    def _change_right(self, step: str, path: str) -> None:
        if self.breaks[step]:
            self.breaks[step].pop(0)
            raise failure(f"{step} {path}", E_ACCESSDENIED, vm=self._id)

    def _existing(self, path: str) -> HcsFile:
        if (file := self.file(path)) is None:
            raise failure(f"access to {path}", HRESULT_ERROR_FILE_NOT_FOUND, vm=self._id)
        return file

    # What HCS does with a document.

    def steps(self, document: str) -> list[str]:
        """The kinds of the steps that a document asks for."""
        request = _parsed(document)
        kinds = []
        if "ResourcePath" in request:
            kinds.append("attach" if request.get("RequestType") == "Add" else "detach")
        if "GuestRequest" in request:
            kinds.append(guest_step(request["GuestRequest"]))
        return kinds if request.get("RequestType") != "Remove" else kinds[::-1]

    def apply(self, document: str) -> None:
        """Do what the document says, all of it or nothing.

        Raises:
            Refused: with HCS's code.
        """
        request = _parsed(document)
        if self.state == "Stopped":
            raise Refused(HCS_E_SYSTEM_ALREADY_STOPPED, "the compute system is stopped")
        guest = request.get("GuestRequest")
        if "ResourcePath" not in request:
            if guest is None:
                raise Refused(E_INVALIDARG, "nothing is asked for")
            self.ask_guest(guest)
            return
        slot = self._slot(request["ResourcePath"])
        if request.get("RequestType") == "Add":
            self._attach(slot, request.get("Settings"))
            if guest is not None:
                try:
                    self.ask_guest(guest)
                except Refused:
                    self._detach(slot)
                    raise
        elif request.get("RequestType") == "Remove":
            if guest is not None:
                self.ask_guest(guest)
            self._detach(slot)
        else:
            raise Refused(E_INVALIDARG, f"request type {request.get('RequestType')}")

    def _slot(self, resource_path: str) -> Slot:
        match = _PATH.fullmatch(resource_path)
        if match is None:
            raise Refused(E_INVALIDARG, f"resource path {resource_path}")
        if match[1] not in self.controllers or int(match[2]) >= LUNS_PER_CONTROLLER:
            raise Refused(HRESULT_ERROR_NOT_FOUND, f"no such location: {resource_path}")  # the code is a guess
        return Slot(self.controllers[match[1]], int(match[2]))

    def _attach(self, slot: Slot, settings: Any) -> None:
        if not isinstance(settings, dict) or not settings.get("Type") or not settings.get("Path"):
            raise Refused(E_INVALIDARG, "an attachment needs a type and a path")
        if slot in self.bus:
            raise Refused(HRESULT_ERROR_ALREADY_EXISTS, f"location {slot} is in use")  # the code is a guess
        if settings["Type"] != AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
            file = self.file(settings["Path"])
            if file is None:
                raise Refused(HRESULT_ERROR_FILE_NOT_FOUND, f"{settings['Path']} does not exist")
            if not file.rights & {self._id, "group"}:
                raise Refused(E_ACCESSDENIED, f"the VM may not open {file.path}")
            read_only = bool(settings.get("ReadOnly"))
            if file.opened_by and not (read_only and all(file.opened_by.values())):
                raise Refused(HRESULT_ERROR_SHARING_VIOLATION, f"{file.path} is in use")
            file.opened_by[f"{self._id} {slot}"] = read_only
        self.bus[slot] = settings
        self.devices.add(slot)

    def _detach(self, slot: Slot) -> None:
        if slot not in self.bus:
            raise Refused(HRESULT_ERROR_NOT_FOUND, f"there is nothing at {slot}")  # the code is a guess
        for path, where in self.mounts.items():
            if where == slot:
                self.harm.append(f"the disk at {slot} was pulled while it was mounted at {path}")
                self._windows_mounts.pop(path, None)
                self.gcs.mounts.pop(path, None)
        if (file := self.file(self.bus[slot]["Path"])) is not None:
            file.opened_by.pop(f"{self._id} {slot}", None)
        del self.bus[slot]
        self.devices.discard(slot)

    # What the guest does.

    def ask_guest(self, request: Mapping[str, Any]) -> None:
        """Do what a guest request says.

        Raises:
            Refused: with the guest's code.
        """
        if self.os is GuestOS.WINDOWS:
            self._ask_windows(request)
            return
        settings = request.get("Settings") or {}
        what = str(request.get("RequestType")), str(request.get("ResourceType"))
        try:
            self.gcs.modify(*what, settings)
            if self.schema is Schema.SEED and what == ("Remove", "MappedVirtualDisk"):  # it did both in those days
                self.gcs.modify("Remove", "SCSIDevice", settings)
        except (Failed, NoAnswer) as error:  # of what is never answered HCS says so in the end
            raise Refused(E_FAIL, str(error)) from error

    def _ask_windows(self, request: Mapping[str, Any]) -> None:
        settings = request.get("Settings") or {}
        slot, path = Slot(0, settings.get("Lun", 0)), settings.get("ContainerPath", "")
        step = guest_step(request)
        if step not in ("mount", "unmount") or not path:
            raise Refused(HCS_E_INVALID_JSON, f"a Windows guest does not know {dict(request)}")
        if slot not in self.devices:
            raise Refused(E_FAIL, f"no device at {slot}")
        there = self._windows_mounts.get(path)
        if step == "mount":
            if there is not None:
                raise Refused(E_FAIL, f"{path} is in use")
            content = self._content_at(slot)
            if request.get("ResourceType") == "MappedVirtualDiskForContainerScratch":
                if content.has_data:
                    self.harm.append(f"the data of the disk at {slot} was lost: it was formatted with refs")
                content.filesystem, content.has_data = "refs", False
            elif not content.filesystem:
                raise Refused(E_FAIL, f"no volume on the disk at {slot}")
            self._windows_mounts[path] = slot
            return
        if path in self.busy:
            raise Refused(E_FAIL, f"{path} is in use")
        if there not in (None, slot):
            self.harm.append(f"{path} of the disk at {there} was unmounted for the one at {slot}")
        self._windows_mounts.pop(path, None)

    def _content_at(self, slot: Slot) -> Content:
        path = self.bus[slot]["Path"]
        file = self.file(path)
        return file.content if file is not None else self._other_contents[path]


class StandInOperation:
    """A document under way. It is done when somebody asks for its result and it is not held."""

    def __init__(self, world: HcsWorld, document: str | None) -> None:
        self._world = world
        self._document = document
        self._answering: asyncio.Task[str] | None = None

    async def result(self, *, timeout_s: float) -> str:
        if self._answering is None:
            self._answering = asyncio.get_running_loop().create_task(self._run())
        done, _ = await asyncio.wait({self._answering}, timeout=timeout_s)
        if not done:
            raise failure(f"modify {self._world.id}", 0x80370118, vm=self._world.id)
        return self._answering.result()

    async def _run(self) -> str:
        world = self._world
        if self._document is None:
            await self._let_through(["properties"])
            state = {"Id": world.id, "SystemType": "VirtualMachine", "State": world.state}
            return msgspec.json.encode(state).decode()
        what = f"modify {world.id}"
        try:
            steps = world.steps(self._document)
            lost = await self._let_through(steps)
            world.log += steps
            world.apply(self._document)
        except Refused as error:
            document = msgspec.json.encode({"Error": error.hresult - (1 << 32), "ErrorMessage": str(error)}).decode()
            raise failure(what, error.hresult, document, vm=world.id) from error
        if lost:
            raise OutcomeUnknown(f"{what}: HCS was disconnected", vm=world.id)
        return ""

    async def _let_through(self, steps: list[str]) -> bool:
        """Wait until the steps may be done. True: the answer is to be lost."""
        world = self._world
        await asyncio.sleep(0)
        for step in steps:
            if step in world.held:
                await world.held[step].wait()
        lost = False
        for step in steps:
            how = world.breaks[step].pop(0) if world.breaks[step] else None
            if how is Break.REFUSE:
                raise Refused(E_FAIL, f"{step}: no")
            if how is Break.LOSE_REQUEST:
                raise OutcomeUnknown(f"{step}: HCS was disconnected", vm=world.id)
            lost |= how is Break.LOSE_ANSWER
        return lost


class StandInGuestConnection:
    """A direct connection into the guest. Implements `modify.GuestConnection`."""

    def __init__(self, world: HcsWorld) -> None:
        self._world = world

    async def modify(self, document: str, *, timeout_s: float) -> None:
        world = self._world
        world.sent.append(Sent("gcs", document))
        request = msgspec.json.decode(document)
        step = guest_step(request)
        await asyncio.sleep(0)
        how = world.breaks[step].pop(0) if world.breaks[step] else None
        if how is Break.LOSE_REQUEST:
            raise OutcomeUnknown(f"{step}: no answer", vm=world.id)
        try:
            if how is Break.REFUSE:
                raise Refused(E_FAIL, f"{step}: no")
            world.ask_guest(request)
        except Refused as error:
            raise GuestRefused(str(error), vm=world.id) from error
        if how is Break.LOSE_ANSWER:
            raise OutcomeUnknown(f"{step}: no answer", vm=world.id)


class StandInDisks:
    """The host's files, as `HcsHost.open` looks at them. Implements `disk.Disks`."""

    def __init__(self, world: HcsWorld) -> None:
        self._world = world

    def identity(self, request: DiskRequest) -> str:
        if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
            return f"evd:{'/'.join(parse_evd(request.host_path))}"
        if self._world.file(request.host_path) is None:
            raise InvalidRequest(f"{request.host_path}: there is no such file", host_path=request.host_path)
        return f"path:{winpath.same_file_key(request.host_path)}"

    def read(self, request: DiskRequest) -> DiskFacts:
        if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
            return DiskFacts(format=DiskFormat.RAW, size_bytes=0)
        file = self._world.file(request.host_path)
        if file is None:
            raise InvalidRequest(f"{request.host_path}: there is no such file", host_path=request.host_path)
        physical = request.kind is AttachmentType.PASS_THRU
        return DiskFacts(format=DiskFormat.RAW if physical else file.format, size_bytes=file.size_bytes)


def guest_step(request: Mapping[str, Any]) -> str:
    """The kind of step that a guest request is."""
    settings = request.get("Settings") or {}
    match request.get("RequestType"), request.get("ResourceType"):
        case "Add", "MappedVirtualDisk" | "MappedVirtualDiskForContainerScratch":
            return "mount"
        case "Remove", "MappedVirtualDisk":
            return "unmount" if settings.get("MountPath") or settings.get("ContainerPath") else "eject"
        case "Remove", "SCSIDevice":
            return "eject"
        case _:
            return "unknown"


def _parsed(document: str) -> dict[str, Any]:
    try:
        request = msgspec.json.decode(document)
    except msgspec.DecodeError as error:
        raise Refused(HCS_E_INVALID_JSON, f"no JSON: {error}") from error
    if not isinstance(request, dict) or not _REQUEST_FIELDS.issuperset(request):
        raise Refused(HCS_E_INVALID_JSON, f"no modify request: {document}")
    return request
