"""The calls that there are: one table, from which requests are dispatched and the OpenAPI document is made.

A retry is safe, whatever became of the answer: a reservation and a program have an id that the client made, so the same
request again finds what the first one did. That holds for a reservation also if another server took over meanwhile: its
id is in the VM's journal. Giving back what is not there, and ending a VM that is not there, say so by their error, and
a client that asked before knows what that means.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from utilityvm.errors import InvalidRequest, NotAttached
from utilityvm.machine import paths
from utilityvm.machine.hostpath import identity_within
from utilityvm.machine.threads import in_thread
from utilityvm.scsi.reservation import ForceArgument
from utilityvm.server import types
from utilityvm.server.keeper import Keeper, stored
from utilityvm.server.logs import follow
from utilityvm.server.programs import Programs
from utilityvm.vm.mount import SCSIMount, mounted
from utilityvm.vm.owned import holder_of
from utilityvm.vm.utility_vm import UtilityVM

MOST_BODY_BYTES: Final = 1 << 20
_FIND_S: Final = 2.0  # of a name whose storage does not answer; half of it is waited for
_LEAST_ID: Final = 12  # digits

Stream: TypeAlias = AsyncIterator[bytes]
Flag: TypeAlias = Annotated[str, Meta(pattern="^(true|false)$")]
_Limit: TypeAlias = Annotated[
    float, Meta(ge=0.001, le=types.LONGEST_S, description="How long it may take, in seconds.")
]
_Offset: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


FORCES: Final[dict[types.Force, ForceArgument]] = {"false": False, "true": True, "host": "host"}


class Nothing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No parameters."""


class Waits(Nothing, frozen=True, kw_only=True):
    """Parameters of each call that uses a VM."""

    wait_s: types.Wait = 0.0
    needs_guest: Flag = "true"  # "false": take the VM over although its guest does not answer


class Finds(Waits, frozen=True, kw_only=True):
    name: types.PathText


class Releases(Waits, frozen=True, kw_only=True):
    force: types.Force = "false"
    timeout_s: _Limit = 60.0


class Stops(Waits, frozen=True, kw_only=True):
    force: Flag = "false"
    timeout_s: _Limit = 15.0


class Reads(Nothing, frozen=True, kw_only=True):
    at: _Offset = 0


class Follows(Waits, frozen=True, kw_only=True):
    stdout: _Offset = 0
    stderr: _Offset = 0
    live: Flag = "true"


class Feeds(Nothing, frozen=True, kw_only=True):
    at: _Offset
    last: Flag = "false"


@dataclass(slots=True)
class Service:
    """What the calls work on."""

    keeper: Keeper
    programs: Programs
    info: Callable[[], types.ServerInfo]
    adding: dict[tuple[str, str], asyncio.Task[types.Reservation]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that was read and checked."""

    path: dict[str, str]
    query: Any
    body: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A call. `answer` None: no content; bytes: a stream of `media_type`."""

    method: str
    path: str
    call: Callable[[Service, Request], Awaitable[Any]]
    answer: Any
    query: type[msgspec.Struct] = Nothing
    body: type[msgspec.Struct] | type[bytes] | None = None
    media_type: str = "application/json"
    status: int = 200

    @property
    def name(self) -> str:
        return self.call.__name__

    @property
    def summary(self) -> str:
        return (self.call.__doc__ or "").strip()


def _use(service: Service, request: Request) -> AbstractAsyncContextManager[UtilityVM]:
    query = request.query
    return service.keeper.use(request.path["vm"], wait_s=query.wait_s, needs_guest=query.needs_guest == "true")


async def server(service: Service, request: Request) -> types.ServerInfo:
    """Say which server this is, and which VMs it owns at the moment."""
    return service.info()


async def list_vms(service: Service, request: Request) -> list[types.VM]:
    """List the VMs of this user, from the store."""
    return [types.vm_of(vm) for vm in await in_thread(stored)]


async def open_vm(service: Service, request: Request) -> types.VM:
    """Take a VM over, unless the server owns it already, and describe it."""
    async with _use(service, request) as vm:
        return types.vm_of(vm._vm.record, service.keeper.told(vm.name))


async def stop_vm(service: Service, request: Request) -> types.Stopped:
    """End a VM, whatever uses it, and remove all that is left of it, as `UtilityVM.remove` does."""
    query = request.query
    lost = await service.keeper.stop(
        request.path["vm"], wait_s=query.wait_s, force=query.force == "true", timeout_s=query.timeout_s
    )
    return types.Stopped(lost=lost)


async def list_disks(service: Service, request: Request) -> list[types.Disk]:
    """List the disks of a VM, in the order of their slots."""
    async with _use(service, request) as vm:
        return [types.disk_of(view) for view in vm.scsi_slots()]


async def find_disk(service: Service, request: Request) -> types.Found:
    """Find a disk of a VM by any of its names, as `UtilityVM.find_scsi` does."""
    name = request.query.name
    async with _use(service, request) as vm:
        vm._vm.check()
        row, guest_path = vm._named(name, await identity_within(name, _FIND_S))
        return types.Found(disk=types.disk_of(row), guest_path=None if guest_path is None else str(guest_path))


async def list_mounts(service: Service, request: Request) -> list[types.Mount]:
    """List the mounts in a VM's guest."""
    async with _use(service, request) as vm:
        return [types.mount_of(view) for view in vm.scsi_mounts()]


async def list_reservations(service: Service, request: Request) -> list[types.Reservation]:
    """List the reservations on a VM's disks, the oldest first."""
    async with _use(service, request) as vm:
        return [types.reservation_of(one) for one in vm.scsi_reservations()]


async def add_disk(service: Service, request: Request) -> types.Reservation:
    """Reserve a disk under an id: it is attached, and mounted. The same request again gives the same reservation."""
    key = request.path["vm"], request.path["reservation"]
    adding = service.adding.get(key)
    if adding is None:
        adding = asyncio.create_task(_add(service, request), name=f"add {key[1]}")
        service.adding[key] = adding
        adding.add_done_callback(lambda _: service.adding.pop(key, None))
    try:
        return await asyncio.shield(adding)
    except asyncio.CancelledError:
        if not adding.done():
            adding.cancel()  # its client is gone: it is undone
            await asyncio.wait([adding])
        raise


async def _add(service: Service, request: Request) -> types.Reservation:
    body: types.AddDisk = request.body
    id = request.path["reservation"]
    item = types.spec_of(body).request()  # what is wrong by itself is told before the VM is waited for
    holder = holder_of(body.holder)
    async with _use(service, request) as vm:
        if (known := _held(vm, id)) is not None:
            if str(known.host_path) != body.host_path:
                raise InvalidRequest(
                    f"reservation {id} is of {known.host_path}, and this request is for {body.host_path}",
                    remedy="make a new id for each reservation",
                )
            return _answer_of(vm, known)
        vm._vm.check()
        made = await vm._vm.scsi.add(
            item.disk, mount=item.mount, guest_path=item.guest_path, holder=holder, id=id, timeout_s=body.timeout_s
        )
        return _answer_of(vm, mounted(vm, made))


def _answer_of(vm: UtilityVM, mount: SCSIMount) -> types.Reservation:
    """The reservation with the references that its disk had when it was made: others may have come since."""
    before = [one.id for one in vm.scsi_reservations() if one.slot == mount.slot]
    return msgspec.structs.replace(types.reservation_of(mount), references=before.index(mount.id) + 1)


def _held(vm: UtilityVM, id: str) -> SCSIMount | None:
    return next((one for one in vm.scsi_reservations() if one.id == id), None)


async def release_disk(service: Service, request: Request) -> types.Released:
    """Give a reservation back. One that is being made is waited for. The last one detaches the disk."""
    id, query = request.path["reservation"], request.query
    if (adding := service.adding.get((request.path["vm"], id))) is not None:
        await asyncio.wait([adding])
    async with _use(service, request) as vm:
        slots = vm.scsi_slots()
        held = _held(vm, id)
        before = next((view for view in slots if held is not None and view.slot == held.slot), None)
        overruled = await vm.release(id, force=FORCES[query.force], timeout_s=query.timeout_s)
        left = [view for view in vm.scsi_slots() if before is not None and view.attachment == before.attachment]
        return types.Released(
            host_path=before.host_path if before is not None else "",
            references=left[0].references if left else 0,
            overruled=overruled,
        )


async def remove_disk(service: Service, request: Request) -> types.Released:
    """Drop one reference to a disk: one whose release failed half-way, or else the newest. Not to be tried again."""
    body: types.Remove = request.body
    async with _use(service, request) as vm:
        before = await vm.find_scsi(body.host_path)
        overruled = await vm.remove_scsi(
            body.host_path, holder=body.holder, force=FORCES[body.force], timeout_s=body.timeout_s
        )
        left = [view for view in vm.scsi_slots() if view.attachment == before.attachment]
        return types.Released(
            host_path=before.host_path, references=left[0].references if left else 0, overruled=overruled
        )


async def resize_disk(service: Service, request: Request) -> types.Disk:
    """Grow a disk, its image, and the file systems that are mounted from all of it."""
    body: types.Resize = request.body
    async with _use(service, request) as vm:
        before = await vm.find_scsi(body.host_path)
        await vm.resize_scsi(body.host_path, body.size_bytes, timeout_s=body.timeout_s)
        for view in vm.scsi_slots():
            if view.attachment == before.attachment:
                return types.disk_of(view)
        raise NotAttached(f"{body.host_path} was detached meanwhile", vm=vm.name, host_path=body.host_path)


async def start_program(service: Service, request: Request) -> types.Program:
    """Start a program in the guest under an id. One that is not kept is killed when nobody reads its output."""
    path = request.path
    try:
        msgspec.convert(path["program"], types.Id)
    except msgspec.ValidationError:
        raise InvalidRequest(
            f"{path['program']!r} is no id", remedy="make one of 12 to 32 hexadecimal digits"
        ) from None
    return await service.programs.start(path["vm"], path["program"], request.body, wait_s=request.query.wait_s)


async def list_programs(service: Service, request: Request) -> list[types.KeptProgram]:
    """List the programs that the guest keeps, the oldest first."""
    async with _use(service, request) as vm:
        return [types.kept_of(info) for info in await vm.programs()]


async def get_program(service: Service, request: Request) -> types.Program:
    """Say whether a program runs, or how it ended: one that a client runs, or one that the guest keeps."""
    path = request.path
    if service.programs.has(path["vm"], path["program"]):
        return service.programs.get(path["vm"], path["program"])
    async with _use(service, request) as vm:
        kept = (await vm.program(_which(path["program"]), follow=False)).info
        return types.Program(
            id=kept.id,
            state="running" if kept.is_running else "ended",
            exit_code=kept.exit_code,
            kept=types.kept_of(kept),
        )


def _which(text: str) -> int | str:
    """A number is shorter than an id."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < _LEAST_ID else text


async def read_log(service: Service, request: Request) -> Stream:
    """Stream what a program that the guest keeps has written, as frames; `server/programs.py` describes them."""
    pieces = follow(_use(service, request), _which(request.path["program"]), request.query)
    await anext(pieces)  # it is followed, or why not
    return pieces


async def signal_program(service: Service, request: Request) -> types.Program:
    """Send a signal to a program that the guest keeps, and to its process group."""
    async with _use(service, request) as vm:
        program = await vm.program(_which(request.path["program"]), follow=False)
        await program.send_signal(request.body.signal)
        return types.Program(id=program.id, state="running", kept=types.kept_of(program.info))


async def read_output(service: Service, request: Request) -> Stream:
    """Stream a program's output, as frames, from byte `at` of the frames on; `server/programs.py` describes them."""
    vm, program = request.path["vm"], request.path["program"]
    service.programs.get(vm, program)
    return service.programs.read(vm, program, request.query.at)


async def feed_program(service: Service, request: Request) -> None:
    """Give a program input. `at` says where in all of its input the body belongs: what was taken before is left out."""
    await service.programs.feed(
        request.path["vm"],
        request.path["program"],
        request.body,
        at=request.query.at,
        last=request.query.last == "true",
    )


async def kill_program(service: Service, request: Request) -> None:
    """Kill a program with all that it started: one that a client runs, or one that the guest keeps."""
    path = request.path
    if service.programs.has(path["vm"], path["program"]):
        await service.programs.kill(path["vm"], path["program"])
        return
    async with _use(service, request) as vm:
        await (await vm.program(_which(path["program"]), follow=False)).kill()


_VM: Final = "/v1/vms/{vm}"
_RESERVATION: Final = f"{_VM}/reservations/{{reservation}}"
_PROGRAM: Final = f"{_VM}/programs/{{program}}"
OUTPUT: Final = "application/vnd.utilityvm.output"
LOG: Final = "application/vnd.utilityvm.log"
OCTETS: Final = "application/octet-stream"

ROUTES: Final = (
    Route(method="GET", path="/v1", call=server, answer=types.ServerInfo),
    Route(method="GET", path="/v1/vms", call=list_vms, answer=list[types.VM]),
    Route(method="GET", path=_VM, call=open_vm, answer=types.VM, query=Waits),
    Route(method="DELETE", path=_VM, call=stop_vm, answer=types.Stopped, query=Stops),
    Route(method="GET", path=f"{_VM}/disks", call=list_disks, answer=list[types.Disk], query=Waits),
    Route(method="GET", path=f"{_VM}/disk", call=find_disk, answer=types.Found, query=Finds),
    Route(method="GET", path=f"{_VM}/mounts", call=list_mounts, answer=list[types.Mount], query=Waits),
    Route(
        method="GET", path=f"{_VM}/reservations", call=list_reservations, answer=list[types.Reservation], query=Waits
    ),
    Route(method="PUT", path=_RESERVATION, call=add_disk, answer=types.Reservation, query=Waits, body=types.AddDisk),
    Route(method="DELETE", path=_RESERVATION, call=release_disk, answer=types.Released, query=Releases),
    Route(method="POST", path=f"{_VM}/remove", call=remove_disk, answer=types.Released, query=Waits, body=types.Remove),
    Route(method="POST", path=f"{_VM}/resize", call=resize_disk, answer=types.Disk, query=Waits, body=types.Resize),
    Route(method="PUT", path=_PROGRAM, call=start_program, answer=types.Program, query=Waits, body=types.RunProgram),
    Route(method="GET", path=f"{_VM}/programs", call=list_programs, answer=list[types.KeptProgram], query=Waits),
    Route(method="GET", path=_PROGRAM, call=get_program, answer=types.Program, query=Waits),
    Route(method="DELETE", path=_PROGRAM, call=kill_program, answer=None, query=Waits, status=204),
    Route(
        method="POST",
        path=f"{_PROGRAM}/signal",
        call=signal_program,
        answer=types.Program,
        query=Waits,
        body=types.Signal,
    ),
    Route(method="GET", path=f"{_PROGRAM}/log", call=read_log, answer=bytes, query=Follows, media_type=LOG),
    Route(method="GET", path=f"{_PROGRAM}/output", call=read_output, answer=bytes, query=Reads, media_type=OUTPUT),
    Route(method="PUT", path=f"{_PROGRAM}/input", call=feed_program, answer=None, query=Feeds, body=bytes, status=204),
)

# What the parts of a path may be.
PARTS: Final[dict[str, Any]] = {"vm": types.Name, "reservation": types.Id, "program": types.Which}


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


PATTERNS: Final = [(_pattern(route.path), route) for route in ROUTES]


def info_of(keeper: Keeper, *, version: str, pid: int) -> types.ServerInfo:
    return types.ServerInfo(version=version, pid=pid, state_folder=str(paths.state_dir()), vms=keeper.names)
