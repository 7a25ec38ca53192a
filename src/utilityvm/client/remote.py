"""The verbs of a VM for a process that does not own it: the server's, over its socket."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from inspect import isawaitable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import msgspec

from utilityvm.client.api import ENDED, FAILED, Api
from utilityvm.client.starting import Starting
from utilityvm.client.values import disk_of, encryption_of, info_of, limits_of, slot_view_of, verity_of
from utilityvm.client.wire import Wire, own_id
from utilityvm.errors import AlreadyReleased, NotAttached, UtilityVMError, VMGone, VMNotRunning
from utilityvm.machine.hostpath import HostPath, absolute
from utilityvm.machine.oserrors import raises_callers_errors, typed, typed_errors
from utilityvm.scsi.slot import Slot
from utilityvm.server import problems, types

if TYPE_CHECKING:
    from utilityvm.guests.copying import Copies, CopyResult, EscapingLinks
    from utilityvm.guests.follow import ProgramPiece
    from utilityvm.guests.program import CommandResult, Limits, OutputSink
    from utilityvm.guests.programinfo import ProgramInfo
    from utilityvm.scsi.ports import CallerKey, ScratchKey, Verity
    from utilityvm.scsi.reservation import ForceArgument
    from utilityvm.scsi.views import SlotView
    from utilityvm.vm.config import DiskSpec

DEFAULT_TIMEOUT_S: Final = 60.0
SHUTDOWN_S: Final = 15.0
_STDOUT: Final = 1
_KILL_S: Final = 5.0


@typed
def connect(*, start: bool = True) -> Client:
    """A client of this user's server, which is started if none runs and `start` is true. For one event loop.

    Nothing happens before the first call. Any number of clients use a VM at the same time.
    """
    return Client(Api(Wire(Starting(start=start))))


@typed_errors
class Client:
    """The server of this user and store. Made by `connect`; leaving `async with` closes its connections."""

    def __init__(self, api: Api) -> None:
        """Use `utilityvm.connect`."""
        self._api = api

    async def vms(self) -> list[str]:
        """The names of the VMs that there are, whatever state they are in."""
        return [vm.name for vm in await self._api.vms()]

    async def vm(self, name: str, *, wait_s: float = 0.0) -> RemoteVM:
        """Use a VM that runs and outlives its owner. The server owns it from then on, and lets go when nobody uses it
        and another process waits for it.

        Raises:
            VMNotFound: there is no VM of that name.
            VMNotRunning: its QEMU has ended.
            VMOwned: another process owns it, also after waiting for `wait_s` seconds.
            SetupError: there is no server, and none can be started.
        """
        found = await self._api.vm(name, wait_s=wait_s)
        return RemoteVM(self._api, found.name, found.uuid, findings=tuple(found.findings))

    def at(self, name: str, *, wait_s: float = 0.0, needs_guest: bool = True) -> RemoteVM:
        """As `vm`, without asking: each call of the VM has the server take it over if need be, and raises as `vm`.

        Each waits for up to `wait_s` seconds while another process owns the VM. Without `needs_guest` the VM is taken
        over also if its guest does not answer: for what needs no guest.
        """
        return RemoteVM(self._api, name, "", wait_s=wait_s, needs_guest=needs_guest)

    async def stop(
        self, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = SHUTDOWN_S
    ) -> list[str]:
        """End a VM, whatever state it is in, and remove all that is left of it: as `UtilityVM.remove`.

        Programs and calls of other clients end with `VMNotRunning`.
        """
        return await self._api.stop(name, wait_s=wait_s, force=force, timeout_s=timeout_s)

    async def close(self) -> None:
        """Close the connections. What was reserved stays."""
        self._api.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@typed_errors
class RemoteVM:
    """A VM that the server owns. Its calls are those of `UtilityVM`, from any number of processes at the same time.

    A call whose answer is lost is made again, to the next server if need be, and does nothing twice.
    """

    def __init__(
        self,
        api: Api,
        name: str,
        uuid: str,
        *,
        findings: tuple[str, ...] = (),
        wait_s: float = 0.0,
        needs_guest: bool = True,
    ) -> None:
        """Use `Client.vm`."""
        self._api = api
        self.name = name
        self.uuid = uuid
        self._wait_s = wait_s
        self._needs_guest = needs_guest
        self.findings = findings  # what was found half done, if this call made the server take the VM over

    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: str | PurePosixPath | None = None,
        *,
        generated: bool = False,
        holder: str = "client",
        read_only: bool = False,
        options: Sequence[str] = (),
        access: str = "individual",
        partition: int = 0,
        format: str | None = None,
        sector_size_bytes: int | None = None,
        filesystem: str | None = None,
        ensure_filesystem: bool = False,
        reformat: bool = False,
        block_device: bool = False,
        encryption: ScratchKey | CallerKey | None = None,
        verity: Verity | None = None,
        untrusted: bool = False,
        physical: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Adding:
        """Reserve a disk: `UtilityVM.add_scsi` says what the arguments mean. Await it, or enter it with `async with`.

        `generated`: the server chooses the guest path. The reservation belongs to `holder`, and stays until it is
        given back, also if this process ends.
        """
        body = types.AddDisk(
            host_path=absolute(host_path),
            guest_path=None if guest_path is None else str(guest_path),
            generated=generated,
            holder=holder,
            read_only=read_only,
            options=list(options),
            access=str(access),
            partition=partition,
            format=None if format is None else str(format),
            sector_size_bytes=sector_size_bytes,
            filesystem=filesystem,
            ensure_filesystem=ensure_filesystem,
            reformat=reformat,
            block_device=block_device,
            encryption=encryption_of(encryption),
            verity=verity_of(verity),
            untrusted=untrusted,
            physical=physical,
            timeout_s=timeout_s,
        )
        return Adding(self, body)

    def add(self, disk: DiskSpec, *, holder: str = "client", timeout_s: float = DEFAULT_TIMEOUT_S) -> Adding:
        """`add_scsi` for a disk that is described by a value."""
        return Adding(self, disk_of(disk, holder=holder, timeout_s=timeout_s))

    async def remove_scsi(
        self,
        host_path: HostPath,
        *,
        holder: str | None = None,
        force: ForceArgument = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> str | None:
        """Drop one reference to the disk: the newest, or the newest of `holder`. The last one detaches it.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `RemoteMount.release`.
        """
        gone = await self._api.remove(
            self.name,
            host_path=absolute(host_path),
            holder=holder,
            force=force,
            timeout_s=timeout_s,
            wait_s=self._wait_s,
        )
        return gone.overruled

    async def release(
        self, reservation: str, *, force: ForceArgument = False, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> str | None:
        """Give back a reservation by its id. See `RemoteMount.release`."""
        released = await self._api.release(
            self.name, reservation, force=force, timeout_s=timeout_s, wait_s=self._wait_s
        )
        return released.overruled

    async def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image and the file systems on it: as `UtilityVM.resize_scsi`."""
        body = types.Resize(host_path=absolute(host_path), size_bytes=size_bytes, timeout_s=timeout_s)
        await self._api.resize(self.name, body, wait_s=self._wait_s)

    async def find_scsi(self, host_path: HostPath, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> SlotView:
        """The disk, by any of its names: as `UtilityVM.find_scsi`."""
        found = await self._api.find(self.name, absolute(host_path), wait_s=self._wait_s, needs_guest=self._needs_guest)
        return slot_view_of(found.disk)

    async def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order."""
        disks = await self._api.disks(self.name, wait_s=self._wait_s, needs_guest=self._needs_guest)
        return [slot_view_of(disk) for disk in disks]

    async def scsi_reservations(self) -> list[RemoteMount]:
        """Every reservation that is held, whichever process made it; the oldest first."""
        held = await self._api.reservations(self.name, wait_s=self._wait_s, needs_guest=self._needs_guest)
        return [RemoteMount(self, one) for one in held]

    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes]:
        """Run a program in the guest to its end: as `UtilityVM.run`, with fewer settings.

        Raises:
            OutcomeUnknown: the server ended meanwhile, and the program with it.
            others: as `UtilityVM.run`.
        """
        from utilityvm.guests.program import CommandResult

        out, err = bytearray(), bytearray()

        async def given() -> AsyncIterator[bytes]:
            if stdin:
                yield stdin

        code = await self.run_streaming(
            command,
            stdout=out.extend,
            stderr=err.extend,
            stdin=None if stdin is None else given(),
            env=env,
            cwd=cwd,
            user=user,
            limits=limits,
            timeout_s=timeout_s,
        )
        return CommandResult(exit_code=code, stdout=bytes(out), stderr=bytes(err))

    @raises_callers_errors
    async def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdout: OutputSink,
        stderr: OutputSink,
        stdin: AsyncIterator[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code. Cancelled, it kills the program."""
        program = types.RunProgram(
            command=[str(word) for word in command],
            stdin=stdin is not None,
            env=dict(env or {}),
            cwd=None if cwd is None else str(cwd),
            user=user,
            limits=limits_of(limits),
            timeout_s=timeout_s,
        )
        return await run_program(
            self._api, self.name, program, stdin=stdin, stdout=stdout, stderr=stderr, wait_s=self._wait_s
        )

    @raises_callers_errors
    async def put(
        self, src: HostPath | AsyncIterable[bytes], guest_path: str | PurePosixPath, *, timeout_s: float | None = None
    ) -> CopyResult:
        """Copy a file, a link or a folder of this process's machine into the guest: as `UtilityVM.put`."""
        return await self._copies.put(src, guest_path, timeout_s=timeout_s)

    @raises_callers_errors
    async def get(
        self,
        guest_path: str | PurePosixPath,
        dst: HostPath | OutputSink,
        *,
        links: EscapingLinks = "refuse",
        max_bytes: int = 16 << 30,
        timeout_s: float | None = None,
    ) -> CopyResult:
        """Copy a file, a link or a folder of the guest to this process's machine: as `UtilityVM.get`."""
        return await self._copies.get(guest_path, dst, links=links, max_bytes=max_bytes, timeout_s=timeout_s)

    async def read_bytes(
        self, guest_path: str | PurePosixPath, *, max_bytes: int = 64 << 20, timeout_s: float | None = None
    ) -> bytes:
        """The bytes of a file in the guest: as `UtilityVM.read_bytes`."""
        return await self._copies.read_bytes(guest_path, max_bytes=max_bytes, timeout_s=timeout_s)

    async def write_bytes(
        self,
        guest_path: str | PurePosixPath,
        data: bytes | bytearray | memoryview,
        *,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make `data` the content of a file in the guest: as `UtilityVM.write_bytes`."""
        await self._copies.write_bytes(guest_path, bytes(data), mode=mode, timeout_s=timeout_s)

    @property
    def _copies(self) -> Copies:
        from utilityvm.guests.copying import Copies

        return Copies(self.run_streaming, vm=self.name)

    async def start_program(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        name: str | None = None,
        follow: Literal[False] = False,
    ) -> RemoteProgram:
        """Start a program that belongs to the guest: as `UtilityVM.start_program`, without input, and not followed."""
        program = types.RunProgram(
            command=[str(word) for word in command],
            env=dict(env or {}),
            cwd=None if cwd is None else str(cwd),
            user=user,
            limits=limits_of(limits),
            keep=True,
            name=name,
        )
        return RemoteProgram(self, await self._api.keep_program(self.name, program, wait_s=self._wait_s))

    async def program(self, number: int | str, *, follow: Literal[False] = False) -> RemoteProgram:
        """A program that the guest keeps, by its number, name or id.

        Raises:
            ProgramNotFound: there is no such program.
        """
        return RemoteProgram(self, await self._api.kept_program(self.name, number, wait_s=self._wait_s))

    async def programs(self) -> list[ProgramInfo]:
        """The programs that the guest keeps: as `UtilityVM.programs`."""
        return [info_of(one) for one in await self._api.kept_programs(self.name, wait_s=self._wait_s)]

    async def follow_program(
        self, number: int | str, *, stdout_offset: int = 0, stderr_offset: int = 0, live: bool = True
    ) -> RemotePieces:
        """The output of a program that the guest keeps: as `UtilityVM.follow_program`. It is not held back.

        A server that ends meanwhile is replaced, and the output goes on at the byte at which it stopped.
        """
        await self._api.kept_program(self.name, number, wait_s=self._wait_s)
        frames = self._api.log(
            self.name, number, stdout=stdout_offset, stderr=stderr_offset, live=live, wait_s=self._wait_s
        )
        return RemotePieces(frames)

    async def stop(self, *, timeout_s: float = SHUTDOWN_S) -> None:
        """End the VM: as `UtilityVM.stop`. Programs and calls of other clients end with `VMNotRunning`."""
        await self._api.stop(self.name, timeout_s=timeout_s)

    def __repr__(self) -> str:
        return f"<RemoteVM {self.name}>"


@typed_errors
class RemoteProgram:
    """A program that the guest keeps. It goes on whatever becomes of this process and the server."""

    def __init__(self, vm: RemoteVM, kept: types.KeptProgram) -> None:
        """Use `RemoteVM.start_program` or `program`."""
        self._vm = vm
        self._kept = kept

    @property
    def number(self) -> int:
        return self._kept.number

    @property
    def id(self) -> str:
        return self._kept.id

    @property
    def pid(self) -> int | None:
        """Its process number in the guest."""
        return self._kept.pid

    async def send_signal(self, signal: int) -> None:
        """Send it a signal, and what it started in its process group: as `Program.send_signal`."""
        await self._vm._api.signal(self._vm.name, self.id, signal, wait_s=self._vm._wait_s)

    async def kill(self) -> None:
        """Kill it with all that it started: as `Program.kill`."""
        await self._vm._api.kill(self._vm.name, self.id, wait_s=self._vm._wait_s)

    def __repr__(self) -> str:
        return f"<RemoteProgram {self.number}>"


@typed_errors
class RemotePieces(AsyncIterator["ProgramPiece"]):
    """What a program writes, as `ProgramPieces`. `exit_code` is known when the iteration has ended."""

    def __init__(self, frames: AsyncIterator[tuple[int, int, bytes]]) -> None:
        """Use `RemoteVM.follow_program`."""
        self.exit_code: int | None = None
        self._frames = frames

    async def __anext__(self) -> ProgramPiece:
        from utilityvm.guests.follow import ProgramPiece

        stream, at, data = await anext(self._frames)
        if stream == ENDED:
            self.exit_code = msgspec.json.decode(data, type=int | None)
            await self.aclose()
            raise StopAsyncIteration
        return ProgramPiece("stdout" if stream == _STDOUT else "stderr", at, data)

    async def aclose(self) -> None:
        """Follow it no more. The program goes on."""
        await self._frames.aclose()  # type: ignore[attr-defined]


@typed_errors
class RemoteMount:
    """One reservation of a disk, held by a name. Leaving `async with` gives it back."""

    def __init__(self, vm: RemoteVM, reservation: types.Reservation) -> None:
        """Use `RemoteVM.add_scsi`."""
        self._vm = vm
        self._reservation = reservation

    @property
    def id(self) -> str:
        """The reservation's name, which `uvm detach` takes as well."""
        return self._reservation.id

    @property
    def host_path(self) -> Path:
        return Path(self._reservation.host_path)

    @property
    def guest_path(self) -> PurePosixPath | None:
        """Where it is mounted in the guest; None: it is attached only."""
        path = self._reservation.guest_path
        return None if path is None else PurePosixPath(path)

    @property
    def slot(self) -> Slot:
        return Slot.parse(self._reservation.slot)

    @property
    def read_only(self) -> bool:
        return self._reservation.read_only

    @property
    def holder(self) -> str:
        return self._reservation.holder

    @property
    def ref_count(self) -> int:
        """The references on its disk, this one among them, as of when it was asked for."""
        return self._reservation.references

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of its mount: as `SCSIMount.notes`."""
        return tuple(self._reservation.notes)

    async def release(self, *, force: ForceArgument = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> str | None:
        """Give it back: as `SCSIMount.release`."""
        return await self._vm.release(self.id, force=force, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.release()
        except (AlreadyReleased, NotAttached, VMGone, VMNotRunning):
            return  # by another call, or with the VM
        except UtilityVMError as failure:
            if error is None:
                raise
            error.add_note(f"{self.host_path} at {self.slot} was not released: {failure}")

    def __repr__(self) -> str:
        at = f" at {self.guest_path}" if self.guest_path else ""
        return f"<RemoteMount {self.id}: {self.host_path} in {self.slot}{at}>"


@typed_errors
class Adding:
    """What `RemoteVM.add_scsi` gives: await it for the reservation, or enter it with `async with`."""

    def __init__(self, vm: RemoteVM, body: types.AddDisk) -> None:
        """Use `RemoteVM.add_scsi`."""
        self._vm = vm
        self._body = body
        self._made: RemoteMount | None = None

    async def _add(self) -> RemoteMount:
        return RemoteMount(self._vm, await self._vm._api.add(self._vm.name, self._body, wait_s=self._vm._wait_s))

    def __await__(self) -> Generator[Any, None, RemoteMount]:
        return self._add().__await__()

    async def __aenter__(self) -> RemoteMount:
        self._made = made = await self._add()
        return made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        await self._made.__aexit__(kind, error, trace)


async def run_program(
    api: Api,
    vm: str,
    program: types.RunProgram,
    *,
    stdin: AsyncIterator[bytes] | None,
    stdout: OutputSink,
    stderr: OutputSink,
    wait_s: float = 0.0,
    begun: Callable[[], object] = lambda: None,
) -> int:
    """Run a program to its end; gives its exit code. `begun` is called once the VM has it."""
    import asyncio  # late: see client/blocking.py

    id = own_id()
    await api.start_program(vm, id, program, wait_s=wait_s)
    begun()
    feeding = None if stdin is None else asyncio.create_task(_feed(api, vm, id, stdin), name=f"input of {id}")
    try:
        return await _deliver(api.output(vm, id), stdout, stderr)
    except BaseException:
        with suppress(UtilityVMError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_KILL_S):
                await api.kill(vm, id)
        raise
    finally:
        if feeding is not None:
            feeding.cancel()
            await asyncio.wait([feeding])


async def _deliver(output: AsyncIterator[tuple[int, bytes]], stdout: OutputSink, stderr: OutputSink) -> int:
    try:
        async for stream, payload in output:
            if stream == FAILED:
                raise problems.error_of(msgspec.json.decode(payload, type=types.Problem))
            if stream == ENDED:
                return msgspec.json.decode(payload, type=types.Program).exit_code or 0
            taken = (stdout if stream == _STDOUT else stderr)(payload)
            if isawaitable(taken):
                await taken
    finally:
        await output.aclose()  # type: ignore[attr-defined]
    raise AssertionError("the output has an end, or an error")


async def _feed(api: Api, vm: str, id: str, stdin: AsyncIterator[bytes]) -> None:
    at = 0
    with suppress(UtilityVMError):  # the program has ended, or its end says more
        async for data in stdin:
            await api.feed(vm, id, data, at=at)
            at += len(data)
        await api.feed(vm, id, b"", at=at, last=True)
