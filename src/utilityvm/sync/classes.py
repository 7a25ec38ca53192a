"""The asynchronous classes, synchronous. Do not edit: `generate.py` writes this file, which is why it is so long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, overload

import utilityvm
from utilityvm.sync.portal import Synchronous, call, feed, sink, stands_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path, PurePosixPath
    from types import TracebackType
    from typing import Literal, Unpack

    from utilityvm import (
        CallerKey,
        CommandResult,
        CopyResult,
        Difference,
        DiskSettings,
        DiskSpec,
        EscapingLinks,
        Finding,
        ForceArgument,
        GuestImage,
        GuestPath,
        HostPath,
        Leftover,
        Limits,
        MountSettings,
        MountView,
        OnBusy,
        ProgramInfo,
        ProgramPiece,
        QemuProcess,
        Reservation,
        ScratchKey,
        ScsiEvent,
        ScsiState,
        Slot,
        SlotView,
        SomeGuestPath,
        Template,
        UtilityVMError,
        Verity,
        VMConfig,
    )


@stands_for(utilityvm.Client)
class Client(Synchronous):
    """The server of this user and store. Made by `connect`; leaving `with` closes its connections."""

    def vms(self) -> list[str]:
        """The names of the VMs that there are, whatever state they are in."""
        result: list[str] = call(self._async.vms)
        return result

    def vm(self, name: str, *, wait_s: float = 0.0) -> RemoteVM:
        """Use a VM that runs and outlives its owner. The server owns it from then on, and lets go when nobody uses it
        and another process waits for it.

        Raises:
            VMNotFound: there is no VM of that name.
            VMNotRunning: its QEMU has ended.
            VMOwned: another process owns it, also after waiting for `wait_s` seconds.
            SetupError: there is no server, and none can be started.
        """
        result: RemoteVM = call(self._async.vm, name, wait_s=wait_s)
        return result

    def at(self, name: str, *, wait_s: float = 0.0, needs_guest: bool = True) -> RemoteVM:
        """As `vm`, without asking: each call of the VM has the server take it over if need be, and raises as `vm`.

        Each waits for up to `wait_s` seconds while another process owns the VM. Without `needs_guest` the VM is taken
        over also if its guest does not answer: for what needs no guest.
        """
        result: RemoteVM = call(self._async.at, name, wait_s=wait_s, needs_guest=needs_guest)
        return result

    def stop(self, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = 15.0) -> list[str]:
        """End a VM, whatever state it is in, and remove all that is left of it: as `UtilityVM.remove`.

        Programs and calls of other clients end with `VMNotRunning`.
        """
        result: list[str] = call(self._async.stop, name, wait_s=wait_s, force=force, timeout_s=timeout_s)
        return result

    def close(self) -> None:
        """Close the connections. What was reserved stays."""
        call(self._async.close)

    def __enter__(self) -> Self:
        call(self._async.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        call(self._async.__aexit__, *_)


@stands_for(utilityvm.ClonePool)
class ClonePool(Synchronous):
    """Keeps `size` clones of a template waiting. They end with this process, however it ends.

    ::

        with ClonePool("warm", size=4) as pool:
            with pool.acquire() as vm:
                vm.run(["make", "test"])

    What was handed out is the caller's to close.
    """

    def __init__(self, template: str, size: int, *, prefix: str | None = None) -> None:
        """`prefix` begins the names of the VMs; by default it is made of the template's name and this process's id.

        Raises:
            InvalidRequest: the size, or a name, cannot be.
        """
        self._async = call(lambda: utilityvm.ClonePool(template, size, prefix=prefix))

    @property
    def ready(self) -> int:
        """How many clones wait now."""
        result: int = self._get("ready")
        return result

    def __enter__(self) -> Self:
        """The filling begins; nothing is waited for.

        Raises:
            TemplateNotFound, TemplateDamaged: there is no such template.
        """
        call(self._async.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call(self._async.__aexit__, kind, error, trace)

    def acquire(self, *, timeout_s: float = 60.0) -> UtilityVM:
        """A running clone, which is the caller's from now on. Waits for one if none is ready.

        Raises:
            DeadlineExceeded: none was ready, and answered, within `timeout_s` seconds.
            VMNotRunning: the pool was closed.
            others: what `UtilityVM.clone` raises, if that is why none is ready.
        """
        result: UtilityVM = call(self._async.acquire, timeout_s=timeout_s)
        return result

    def close(self, *, timeout_s: float = 60.0) -> None:
        """End the filling and every clone that waits. Calling it again is no error.

        Every clone is tried, also if one cannot be ended; call again for those that are left.

        Raises:
            OutcomeUnknown, StoreError: what the first that could not be ended said.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
        """
        call(self._async.close, timeout_s=timeout_s)

    @property
    def template(self) -> str:
        result: str = self._get("template")
        return result

    @property
    def size(self) -> int:
        result: int = self._get("size")
        return result


@stands_for(utilityvm.Program)
class Program(Synchronous):
    """A program that the guest keeps, like `asyncio.subprocess.Process`. Made by `start_program` and `program`.

    It goes on when this object, its owner or the connection ends; only `kill` ends it. While it is followed, output
    that nobody reads holds it back: at 1 MiB here, and as much in the guest. `stop_following` ends that.
    """

    @property
    def pid(self) -> int | None:
        """Its process number in the guest."""
        result: int | None = self._get("pid")
        return result

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None if we do not know that it has ended."""
        result: int | None = self._get("returncode")
        return result

    def wait(self, *, timeout_s: float | None = None) -> int:
        """Its exit code, when it has ended. Nothing of its output is taken: read it at the same time.

        Raises:
            DeadlineExceeded: it did not end within `timeout_s` seconds. It goes on.
            ProgramNotFound: it was forgotten, or ended with the guest's agent.
            VMGone: the VM ended, or was let go of.
        """
        result: int = call(self._async.wait, timeout_s=timeout_s)
        return result

    def communicate(self, input: bytes | None = None, *, timeout_s: float | None = None) -> tuple[bytes, bytes]:
        """Give it all of `input`, and read all of its output, until it has ended.

        Raises:
            WrongState: it is not followed.
            DeadlineExceeded: it did not end within `timeout_s` seconds. It goes on.
            others: as `wait`.
        """
        result: tuple[bytes, bytes] = call(self._async.communicate, input, timeout_s=timeout_s)
        return result

    def send_signal(self, signal: int, *, timeout_s: float = 30.0) -> None:
        """Send it a signal, and what it started in its process group.

        Raises:
            WrongState: it has ended.
            ProgramNotFound: it was forgotten.
        """
        call(self._async.send_signal, signal, timeout_s=timeout_s)

    def resize(self, rows: int, cols: int, *, timeout_s: float = 30.0) -> None:
        """Tell it the size of its terminal: the job in the foreground gets SIGWINCH. One that has ended takes nothing.

        Raises:
            InvalidRequest: it was started without a terminal, or that is no size.
            ProgramNotFound: it was forgotten.
        """
        call(self._async.resize, rows, cols, timeout_s=timeout_s)

    def terminate(self, *, timeout_s: float = 30.0) -> None:
        """Send it SIGTERM. See `send_signal`."""
        call(self._async.terminate, timeout_s=timeout_s)

    def kill(self, *, timeout_s: float = 30.0) -> None:
        """Kill it with all that it started, daemons too; all of it has ended then. Ended before is no error.

        Raises:
            ProgramNotFound: it was forgotten.
            DeadlineExceeded: the guest's kernel did not let go of it within `timeout_s` seconds.
        """
        call(self._async.kill, timeout_s=timeout_s)

    def forget(self, *, timeout_s: float = 30.0) -> None:
        """Have the guest drop what it keeps of it: output and exit code. It must have ended.

        Raises:
            WrongState: it runs.
        """
        call(self._async.forget, timeout_s=timeout_s)

    def stop_following(self) -> None:
        """Let it write what nobody reads: its oldest output is dropped then. What has come can still be read."""
        call(self._async.stop_following)

    def __enter__(self) -> Program:
        call(self._async.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it: it goes on."""
        call(self._async.__aexit__, *_)

    @property
    def number(self) -> int:
        result: int = self._get("number")
        return result

    @property
    def id(self) -> str:
        result: str = self._get("id")
        return result

    @property
    def info(self) -> ProgramInfo:
        result: ProgramInfo = self._get("info")
        return result

    @property
    def stdin(self) -> ProgramInput | None:
        result: ProgramInput | None = self._get("stdin")
        return result

    @property
    def stdout(self) -> ProgramOutput:
        result: ProgramOutput = self._get("stdout")
        return result

    @property
    def stderr(self) -> ProgramOutput:
        result: ProgramOutput = self._get("stderr")
        return result

    @property
    def out_of_memory(self) -> bool:
        result: bool = self._get("out_of_memory")
        return result


@stands_for(utilityvm.ProgramInput)
class ProgramInput(Synchronous):
    """A program's input, as asyncio's StreamWriter. What is written is kept until the guest has it, also if the
    connection to the guest ends meanwhile.
    """

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Give it to the program. Call `drain` before there is too much that it has not taken.

        Raises:
            WrongState: it was closed.
            GuestBusy: another handle writes the program's input.
            NotSupported: the program was started without input.
        """
        call(self._async.write, data)

    def writelines(self, data: Iterable[bytes]) -> None:
        """`write` each."""
        call(self._async.writelines, data)

    def drain(self) -> None:
        """Return when at most 64 KiB are left that the program has not taken; also if it takes no more.

        Raises:
            VMGone: the VM ended, or was let go of.
        """
        call(self._async.drain)

    def close(self) -> None:
        """What was written is the last of it: the program reads its end then."""
        call(self._async.close)

    def write_eof(self) -> None:
        """`close`."""
        call(self._async.write_eof)

    def is_closing(self) -> bool:
        result: bool = call(self._async.is_closing)
        return result

    def wait_closed(self) -> None:
        """Return when the program has taken all of it.

        Raises:
            VMGone: as `drain`.
        """
        call(self._async.wait_closed)


@stands_for(utilityvm.ProgramOutput)
class ProgramOutput(Synchronous):
    """One of a program's two streams, as it comes. One reader at a time; lines end with a newline, as the bytes do.

    `offset` is that of the next byte that will be read, counted from the program's start. `lost` is how many bytes
    were dropped by the guest before we could have them: only if nobody followed the program.
    """

    def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes, as soon as there are some; with -1 all until its end. Empty at its end.

        Raises:
            VMGone: the VM ended, or was let go of. What came before can be read first.
        """
        result: bytes = call(self._async.read, n)
        return result

    def readexactly(self, n: int) -> bytes:
        """`n` bytes.

        Raises:
            asyncio.IncompleteReadError: the stream ended before; it has what came.
            VMGone: as `read`.
        """
        result: bytes = call(self._async.readexactly, n)
        return result

    def readline(self) -> bytes:
        """A line with its newline; the last may have none. Empty at its end.

        A line of more than 64 KiB comes in pieces.

        Raises:
            VMGone: as `read`.
        """
        result: bytes = call(self._async.readline)
        return result

    def at_eof(self) -> bool:
        """Has all of it been read?"""
        result: bool = call(self._async.at_eof)
        return result

    def __next__(self) -> bytes:
        try:
            result: bytes = call(self._async.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        return result

    @property
    def lost(self) -> int:
        result: int = self._get("lost")
        return result

    @property
    def offset(self) -> int:
        result: int = self._get("offset")
        return result

    def __iter__(self) -> Self:
        return self


@stands_for(utilityvm.RemoteMount)
class RemoteMount(Synchronous):
    """One reservation of a disk, held by a name. Leaving `with` gives it back."""

    @property
    def id(self) -> str:
        """The reservation's name, which `uvm detach` takes as well."""
        result: str = self._get("id")
        return result

    @property
    def host_path(self) -> Path:
        result: Path = self._get("host_path")
        return result

    @property
    def guest_path(self) -> PurePosixPath | None:
        """Where it is mounted in the guest; None: it is attached only."""
        result: PurePosixPath | None = self._get("guest_path")
        return result

    @property
    def slot(self) -> Slot:
        result: Slot = self._get("slot")
        return result

    @property
    def read_only(self) -> bool:
        result: bool = self._get("read_only")
        return result

    @property
    def holder(self) -> str:
        result: str = self._get("holder")
        return result

    @property
    def ref_count(self) -> int:
        """The references on its disk, this one among them, as of when it was asked for."""
        result: int = self._get("ref_count")
        return result

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of its mount: as `SCSIMount.notes`."""
        result: tuple[str, ...] = self._get("notes")
        return result

    def release(self, *, force: ForceArgument = False, timeout_s: float = 60.0) -> str | None:
        """Give it back: as `SCSIMount.release`."""
        result: str | None = call(self._async.release, force=force, timeout_s=timeout_s)
        return result

    def __enter__(self) -> Self:
        call(self._async.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call(self._async.__aexit__, kind, error, trace)


@stands_for(utilityvm.RemoteProgram)
class RemoteProgram(Synchronous):
    """A program that the guest keeps. It goes on whatever becomes of this process and the server."""

    @property
    def number(self) -> int:
        result: int = self._get("number")
        return result

    @property
    def id(self) -> str:
        result: str = self._get("id")
        return result

    @property
    def pid(self) -> int | None:
        """Its process number in the guest."""
        result: int | None = self._get("pid")
        return result

    def send_signal(self, signal: int) -> None:
        """Send it a signal, and what it started in its process group: as `Program.send_signal`."""
        call(self._async.send_signal, signal)

    def kill(self) -> None:
        """Kill it with all that it started: as `Program.kill`."""
        call(self._async.kill)


@stands_for(utilityvm.RemoteVM)
class RemoteVM(Synchronous):
    """A VM that the server owns. Its calls are those of `UtilityVM`, from any number of processes at the same time.

    A call whose answer is lost is made again, to the next server if need be, and does nothing twice.
    """

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
        timeout_s: float = 60.0,
    ) -> RemoteMount:
        """Reserve a disk: `UtilityVM.add_scsi` says what the arguments mean. Call it, or enter it with `with`.

        `generated`: the server chooses the guest path. The reservation belongs to `holder`, and stays until it is
        given back, also if this process ends.
        """
        result: RemoteMount = call(
            self._async.add_scsi,
            host_path,
            guest_path,
            generated=generated,
            holder=holder,
            read_only=read_only,
            options=options,
            access=access,
            partition=partition,
            format=format,
            sector_size_bytes=sector_size_bytes,
            filesystem=filesystem,
            ensure_filesystem=ensure_filesystem,
            reformat=reformat,
            block_device=block_device,
            encryption=encryption,
            verity=verity,
            untrusted=untrusted,
            physical=physical,
            timeout_s=timeout_s,
        )
        return result

    def add(self, disk: DiskSpec, *, holder: str = "client", timeout_s: float = 60.0) -> RemoteMount:
        """`add_scsi` for a disk that is described by a value."""
        result: RemoteMount = call(self._async.add, disk, holder=holder, timeout_s=timeout_s)
        return result

    def remove_scsi(
        self, host_path: HostPath, *, holder: str | None = None, force: ForceArgument = False, timeout_s: float = 60.0
    ) -> str | None:
        """Drop one reference to the disk: the newest, or the newest of `holder`. The last one detaches it.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `RemoteMount.release`.
        """
        result: str | None = call(self._async.remove_scsi, host_path, holder=holder, force=force, timeout_s=timeout_s)
        return result

    def release(self, reservation: str, *, force: ForceArgument = False, timeout_s: float = 60.0) -> str | None:
        """Give back a reservation by its id. See `RemoteMount.release`."""
        result: str | None = call(self._async.release, reservation, force=force, timeout_s=timeout_s)
        return result

    def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image and the file systems on it: as `UtilityVM.resize_scsi`."""
        call(self._async.resize_scsi, host_path, size_bytes, timeout_s=timeout_s)

    def find_scsi(self, host_path: HostPath, *, timeout_s: float = 60.0) -> SlotView:
        """The disk, by any of its names: as `UtilityVM.find_scsi`."""
        result: SlotView = call(self._async.find_scsi, host_path, timeout_s=timeout_s)
        return result

    def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order."""
        result: list[SlotView] = call(self._async.scsi_slots)
        return result

    def scsi_reservations(self) -> list[RemoteMount]:
        """Every reservation that is held, whichever process made it; the oldest first."""
        result: list[RemoteMount] = call(self._async.scsi_reservations)
        return result

    def run(
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
        result: CommandResult[bytes] = call(
            self._async.run, command, stdin=stdin, env=env, cwd=cwd, user=user, limits=limits, timeout_s=timeout_s
        )
        return result

    def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        stdin: Iterable[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code. Cancelled, it kills the program."""
        result: int = call(
            self._async.run_streaming,
            command,
            stdout=sink(stdout),
            stderr=sink(stderr),
            stdin=feed(stdin),
            env=env,
            cwd=cwd,
            user=user,
            limits=limits,
            timeout_s=timeout_s,
        )
        return result

    def put(
        self, src: HostPath | Iterable[bytes], guest_path: str | PurePosixPath, *, timeout_s: float | None = None
    ) -> CopyResult:
        """Copy a file, a link or a folder of this process's machine into the guest: as `UtilityVM.put`."""
        result: CopyResult = call(self._async.put, feed(src), guest_path, timeout_s=timeout_s)
        return result

    def get(
        self,
        guest_path: str | PurePosixPath,
        dst: HostPath | Callable[[bytes], object],
        *,
        links: EscapingLinks = "refuse",
        max_bytes: int = 16 << 30,
        timeout_s: float | None = None,
    ) -> CopyResult:
        """Copy a file, a link or a folder of the guest to this process's machine: as `UtilityVM.get`."""
        result: CopyResult = call(
            self._async.get, guest_path, sink(dst), links=links, max_bytes=max_bytes, timeout_s=timeout_s
        )
        return result

    def read_bytes(
        self, guest_path: str | PurePosixPath, *, max_bytes: int = 64 << 20, timeout_s: float | None = None
    ) -> bytes:
        """The bytes of a file in the guest: as `UtilityVM.read_bytes`."""
        result: bytes = call(self._async.read_bytes, guest_path, max_bytes=max_bytes, timeout_s=timeout_s)
        return result

    def write_bytes(
        self,
        guest_path: str | PurePosixPath,
        data: bytes | bytearray | memoryview,
        *,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make `data` the content of a file in the guest: as `UtilityVM.write_bytes`."""
        call(self._async.write_bytes, guest_path, data, mode=mode, timeout_s=timeout_s)

    def start_program(
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
        result: RemoteProgram = call(
            self._async.start_program, command, env=env, cwd=cwd, user=user, limits=limits, name=name, follow=follow
        )
        return result

    def program(self, number: int | str, *, follow: Literal[False] = False) -> RemoteProgram:
        """A program that the guest keeps, by its number, name or id.

        Raises:
            ProgramNotFound: there is no such program.
        """
        result: RemoteProgram = call(self._async.program, number, follow=follow)
        return result

    def programs(self) -> list[ProgramInfo]:
        """The programs that the guest keeps: as `UtilityVM.programs`."""
        result: list[ProgramInfo] = call(self._async.programs)
        return result

    def follow_program(
        self, number: int | str, *, stdout_offset: int = 0, stderr_offset: int = 0, live: bool = True
    ) -> RemotePieces:
        """The output of a program that the guest keeps: as `UtilityVM.follow_program`. It is not held back.

        A server that ends meanwhile is replaced, and the output goes on at the byte at which it stopped.
        """
        result: RemotePieces = call(
            self._async.follow_program, number, stdout_offset=stdout_offset, stderr_offset=stderr_offset, live=live
        )
        return result

    def stop(self, *, timeout_s: float = 15.0) -> None:
        """End the VM: as `UtilityVM.stop`. Programs and calls of other clients end with `VMNotRunning`."""
        call(self._async.stop, timeout_s=timeout_s)

    @property
    def name(self) -> str:
        result: str = self._get("name")
        return result

    @property
    def uuid(self) -> str:
        result: str = self._get("uuid")
        return result

    @property
    def findings(self) -> tuple[str, ...]:
        result: tuple[str, ...] = self._get("findings")
        return result


@stands_for(utilityvm.SCSIMount)
class SCSIMount(Synchronous):
    """One reservation of a disk of a VM, mounted in its guest unless it was asked for without a guest path.

    Leaving `with` gives it back, unless that was done inside, by whatever call. If the guest still uses it then,
    `GuestBusy` is raised, or it is released by force, as `on_busy` of the call that made it says. If the block failed,
    its error is raised, and has a note that says what is still attached.
    """

    @property
    def id(self) -> str:
        """The reservation's name, which `uvm detach` takes as well."""
        result: str = self._get("id")
        return result

    @property
    def host_path(self) -> Path:
        result: Path = self._get("host_path")
        return result

    @property
    def guest_path(self) -> PurePosixPath | None:
        """Where it is mounted in the guest; None: it is attached only."""
        result: PurePosixPath | None = self._get("guest_path")
        return result

    @property
    def slot(self) -> Slot:
        result: Slot = self._get("slot")
        return result

    @property
    def controller(self) -> int:
        result: int = self._get("controller")
        return result

    @property
    def lun(self) -> int:
        result: int = self._get("lun")
        return result

    @property
    def read_only(self) -> bool:
        result: bool = self._get("read_only")
        return result

    @property
    def holder(self) -> str:
        result: str = self._get("holder")
        return result

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of its mount, a sentence each: that it is read-only, as its file system cannot be
        written to; that a journal was replayed; that the disk's partition table lacks its backup.

        The guest says it when the disk is mounted. It is journalled, so that a later owner of the VM has it too.
        """
        result: tuple[str, ...] = self._get("notes")
        return result

    @property
    def ref_count(self) -> int:
        """How many reservations there are on the disk now; 0 when this one was given back."""
        result: int = self._get("ref_count")
        return result

    def release(self, *, force: ForceArgument = False, timeout_s: float = 60.0) -> str | None:
        """Give it back. The last one of a mount unmounts it; the last one of a disk ejects and detaches it.

        If it fails and nothing was done, as when the guest still uses it, it is held as before. If something was done,
        release it again, and that goes on with the step that failed. `force` unmounts and ejects what is in use, and
        what can no longer be written out; a step by which others leave too is forced only if they asked for it as well.
        `force="host"` takes the disk from a guest that refuses even that, or does not answer, unless somebody else
        needs it. Its guest may still have a mount of what is gone, and what it had not written is lost.

        Returns what the guest said if the host took the disk away; None: the guest let go of it.

        Raises:
            AlreadyReleased: it was given back before.
            NotSupported: `force`, which this guest does not know; nothing changed.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown, StoreError: a step failed; nothing after it was done.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
            VMGone, VMNotRunning: the VM died, or was stopped; the disk is free by that.
        """
        result: str | None = call(self._async.release, force=force, timeout_s=timeout_s)
        return result

    def __enter__(self) -> Self:
        call(self._async.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call(self._async.__aexit__, kind, error, trace)


@stands_for(utilityvm.MountedDisk)
class MountedDisk(SCSIMount):
    """A reservation that was asked for with a guest path, so that it has one."""

    @property
    def guest_path(self) -> PurePosixPath:
        """Where it is mounted in the guest."""
        result: PurePosixPath = self._get("guest_path")
        return result


@stands_for(utilityvm.ProgramPieces)
class ProgramPieces(Synchronous):
    """What a program writes, both streams in the order in which the guest read them. Made by `follow_program`.

    The iteration ends when the program has, and all of its output was given; `exit_code` is known then. A piece counts
    as taken when the next one is asked for; until then the guest keeps it. After a connection that broke it goes on by
    itself; another process goes on by following from `stdout_offset` and `stderr_offset`. Close it with `close` if it
    is not read to its end.
    """

    @property
    def stdout_offset(self) -> int:
        """The offset of the next byte of its standard output."""
        result: int = self._get("stdout_offset")
        return result

    @property
    def stderr_offset(self) -> int:
        """The offset of the next byte of its error output."""
        result: int = self._get("stderr_offset")
        return result

    def __next__(self) -> ProgramPiece:
        try:
            result: ProgramPiece = call(self._async.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        return result

    def close(self) -> None:
        """Follow it no more. The program goes on."""
        call(self._async.aclose)

    @property
    def info(self) -> ProgramInfo | None:
        result: ProgramInfo | None = self._get("info")
        return result

    @property
    def exit_code(self) -> int | None:
        result: int | None = self._get("exit_code")
        return result

    @property
    def out_of_memory(self) -> bool:
        result: bool = self._get("out_of_memory")
        return result

    def __iter__(self) -> Self:
        return self


@stands_for(utilityvm.RemotePieces)
class RemotePieces(Synchronous):
    """What a program writes, as `ProgramPieces`. `exit_code` is known when the iteration has ended."""

    def __next__(self) -> ProgramPiece:
        try:
            result: ProgramPiece = call(self._async.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        return result

    def close(self) -> None:
        """Follow it no more. The program goes on."""
        call(self._async.aclose)

    @property
    def exit_code(self) -> int | None:
        result: int | None = self._get("exit_code")
        return result

    def __iter__(self) -> Self:
        return self


@stands_for(utilityvm.ScsiEvents)
class ScsiEvents(Synchronous):
    """What happens to disks and mounts, from the call that made it on. The iteration ends with the VM, or `close`.

    A listener that leaves too much unread loses what is new, and is told how much that was.
    """

    def __next__(self) -> ScsiEvent:
        try:
            result: ScsiEvent = call(self._async.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        return result

    def close(self) -> None:
        """Hear no more; an iteration that waits ends."""
        call(self._async.aclose)

    def __iter__(self) -> Self:
        return self


@stands_for(utilityvm.UtilityVM)
class UtilityVM(Synchronous):
    """A running utility VM that this process owns. Made by `start` and `open`."""

    @classmethod
    def start(cls, config: VMConfig | str, *, image: GuestImage | None = None, timeout_s: float = 120.0) -> UtilityVM:
        """Start a VM; its guest's agent answers. A name stands for a `VMConfig` of that name.

        Without `keep` the VM ends with this process. If this fails no
        process, record, folder or lock is left. A dead VM of that name is replaced.

        Raises:
            InvalidRequest: a value of `config` cannot be.
            VMExists: the name is taken by a VM that runs.
            VMOwned: another process is just starting or ending a VM of that name.
            SetupError: QEMU, the guest image (`uvm image build`), a right or memory is missing.
            StartFailed: it did not come up within `timeout_s` seconds, or died; the message has its last words.
        """
        result: UtilityVM = call(utilityvm.UtilityVM.start, config, image=image, timeout_s=timeout_s)
        return result

    @classmethod
    def clone(
        cls,
        template: str,
        name: str,
        *,
        keep: bool = False,
        replace: Mapping[Slot, DiskSpec] | None = None,
        timeout_s: float = 60.0,
    ) -> UtilityVM:
        """Start a VM that goes on where the template's was saved, as a VM of its own.

        Its disks are at the same slots and guest paths, each mount with one reference of a holder named after the
        template. What is read-only is shared; what is writable is an overlay of the clone's, which goes when the clone
        is stopped. Its random numbers, clock, host name, machine id and boot id are its own before this returns, and
        the template's hooks have run. `replace` puts another disk of the same size at a slot that has no mount.

        As `start` for threads, names and what is left after a failure: no process, record, folder, lock or overlay.

        Raises:
            TemplateNotFound, TemplateInUse: there is no such template, or it is just being removed.
            TemplateDiffers: QEMU or the processor is another one than the template was saved with.
            TemplateDamaged: one of its files, or a disk under it, is not what was saved.
            others: as `start`.
        """
        result: UtilityVM = call(
            utilityvm.UtilityVM.clone, template, name, keep=keep, replace=replace, timeout_s=timeout_s
        )
        return result

    @classmethod
    def open(cls, name: str, *, wait_s: float = 0.0, timeout_s: float = 60.0, needs_guest: bool = True) -> UtilityVM:
        """Own a running VM whose owner let go of it, or died. What an owner left half done is finished or undone.

        Reservations of processes that are dead are given back; those of named holders stay. `findings` says what was
        found. If this fails nothing changed.

        Without `needs_guest` the VM is opened also if its agent does not answer: `findings` says so, and each call that
        needs the guest asks it anew.

        Raises:
            VMNotFound: there is no VM of that name.
            VMNotRunning: its QEMU has ended.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds.
            DeadlineExceeded: QEMU or the agent does not answer within `timeout_s` seconds.
        """
        result: UtilityVM = call(
            utilityvm.UtilityVM.open, name, wait_s=wait_s, timeout_s=timeout_s, needs_guest=needs_guest
        )
        return result

    @classmethod
    def remove(cls, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = 15.0) -> list[str]:
        """End a VM, whatever state it is in, and remove all that is left of it.

        Its guest is asked to write out everything and to power off, within `timeout_s` seconds. If it cannot be asked,
        or does not, it is killed. The result says that, and what the guest left unwritten, a line each; it is empty
        otherwise.

        `force` asks nobody: the VM is killed at once, whoever owns it. Its owner gets VMGone; one that stands still
        gets it when it goes on.

        Raises:
            VMNotFound: there is no VM of that name.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds. Not with `force`.
            OutcomeUnknown: the kernel does not let QEMU go; call again.
        """
        result: list[str] = call(utilityvm.UtilityVM.remove, name, wait_s=wait_s, force=force, timeout_s=timeout_s)
        return result

    @property
    def uuid(self) -> str:
        result: str = self._get("uuid")
        return result

    @property
    def process(self) -> QemuProcess:
        """The QEMU that runs it."""
        result: QemuProcess = self._get("process")
        return result

    @property
    def accelerator(self) -> str:
        """What runs its processors, and why."""
        result: str = self._get("accelerator")
        return result

    @property
    def is_running(self) -> bool:
        result: bool = self._get("is_running")
        return result

    def console(self) -> str:
        """The end of its console and of QEMU's own messages."""
        result: str = call(self._async.console)
        return result

    def save_as_template(self, name: str, *, timeout_s: float = 120.0) -> Template:
        """Make the VM a template, from which clones start in a fraction of a second: see `clone`.

        True on return: the template is there; the VM has ended and cannot run again; its disks stay as they are for as
        long as the template exists, and nobody can attach one of them for writing. The programs in it go on in each
        clone. Everything in its memory is in the template's files, keys of scratch disks among them.

        If this fails there is no such template, and the VM goes on.

        Raises:
            InvalidRequest, TemplateExists: the name cannot be, or is taken.
            WrongState: a disk or a mount is half-way.
            NotSupported: a mount has a key of a caller's.
            GuestBusy: a program that `run` started still runs, or somebody follows one that `start_program` did: it
                could not answer to anybody.
            GuestRefused: the guest did not quiesce, or a hook of its refused.
            SetupError: no space, or no right to read the VM's memory.
            HostRefused, OutcomeUnknown, VMGone: QEMU did not save its state.
        """
        result: Template = call(self._async.save_as_template, name, timeout_s=timeout_s)
        return result

    def wait(self, *, timeout_s: float | None = None) -> UtilityVMError:
        """Return when the VM has ended, with the reason; `console` has its last words then.

        Raises:
            DeadlineExceeded: it did not end within `timeout_s` seconds (None: wait for ever).
        """
        result: UtilityVMError = call(self._async.wait, timeout_s=timeout_s)
        return result

    def stop(self, *, timeout_s: float = 15.0) -> list[str]:
        """End the VM: the guest writes out everything and powers off, or is killed after `timeout_s` seconds.

        True on return: no process, socket, lock or record of it is left; its disks are free. Stopped before: no error.
        The result says what the guest left unwritten, and whether it was killed, a line each; it is empty otherwise.

        Raises:
            OutcomeUnknown: the kernel does not let QEMU go; call again.
            StoreError: it has ended, and the store keeps its record; call again.
        """
        result: list[str] = call(self._async.stop, timeout_s=timeout_s)
        return result

    def close(self, *, timeout_s: float = 15.0) -> None:
        """Let go of the VM. With `keep` it runs on, and another process can open it; without, it is stopped.

        Work in the background is waited for, for some seconds; the next owner continues the rest of it.
        Calling it again is no error.
        """
        call(self._async.close, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        call(self._async.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        call(self._async.__aexit__, *_)

    @overload
    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: SomeGuestPath,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[DiskSettings],
    ) -> MountedDisk: ...

    @overload
    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[DiskSettings],
    ) -> SCSIMount: ...

    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[DiskSettings],
    ) -> SCSIMount:
        """Reserve a disk image: it is attached, and mounted at `guest_path`.

        Without a guest path the disk is only attached, and nothing is asked of the guest. With `GENERATED` utilityvm
        chooses the guest path. A disk that is already attached is shared, and so is a mount with the same settings. If
        this fails, what only this call needed is undone.

        `holder` names the reservation's holder, and makes it outlive this process; otherwise it is this process, and a
        later owner of the VM gives the reservation back when this process is dead. `partition` counts from 1; 0 is the
        whole disk. `options` are those of mount(8). `on_busy`: what leaving `with` does if the guest still uses
        the disk: raise `GuestBusy`, or release it by force.

        `format` None: what was decided when the image was first opened, by its header; a format that is given is
        remembered in its place. `sector_size_bytes` is 512, or 4096 for a copy of a disk with such sectors.

        Raises:
            RequestError: it cannot be met; nothing was sent. InvalidRequest, NoFreeSlot, ConfigDiffers, GuestPathInUse,
                DiskInUse, AccessDenied and others.
            ImageError: the image is damaged, or would make QEMU open something else.
            HostRefused, GuestRefused: a step was refused.
            OutcomeUnknown: a step got no answer, and the truth could not be found out.
            DeadlineExceeded: it was not done within `timeout_s` seconds; it is undone in the background.
            VMGone: the VM died. VMNotRunning: it had ended before.
        """
        result: SCSIMount = call(
            self._async.add_scsi, host_path, guest_path, holder=holder, on_busy=on_busy, timeout_s=timeout_s, **settings
        )
        return result

    @overload
    def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: SomeGuestPath,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[MountSettings],
    ) -> MountedDisk: ...

    @overload
    def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[MountSettings],
    ) -> SCSIMount: ...

    def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
        **settings: Unpack[MountSettings],
    ) -> SCSIMount:
        """Reserve a physical disk, a block device of the host, for this VM alone. Otherwise as `add_scsi`.

        Raises:
            DiskInUse: the host has it mounted, or uses it otherwise.
            others: as `add_scsi`.
        """
        result: SCSIMount = call(
            self._async.add_scsi_physical_disk,
            host_path,
            guest_path,
            holder=holder,
            on_busy=on_busy,
            timeout_s=timeout_s,
            **settings,
        )
        return result

    def add(
        self, disk: DiskSpec, *, holder: str | None = None, on_busy: OnBusy = "raise", timeout_s: float = 60.0
    ) -> SCSIMount:
        """`add_scsi` and `add_scsi_physical_disk` in one, for a disk that is described by a value."""
        result: SCSIMount = call(self._async.add, disk, holder=holder, on_busy=on_busy, timeout_s=timeout_s)
        return result

    def add_scratch(
        self,
        size_bytes: int,
        guest_path: SomeGuestPath = utilityvm.GENERATED,
        *,
        filesystem: str | None = None,
        options: Sequence[str] = (),
        encryption: ScratchKey | None = None,
        untrusted: bool = False,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = 60.0,
    ) -> MountedDisk:
        """Make an empty disk of this size, with a file system, mounted at `guest_path`.

        The image is the VM's own, in the state folder. It takes space as it is written to, and is removed when the disk
        is released for the last time, or with the VM. A template that is saved of the VM has the disk as it is then.

        `filesystem` is `ext4`, the default, or `xfs`. The rest is as in `add_scsi`. If this fails no image is left.

        Raises:
            InvalidRequest: the size is no multiple of 512, or too small or large; or another value is wrong.
            SetupError: no space, or no right, in the state folder.
            GuestRefused: the guest cannot make such a file system in that size; the message has the reason.
            others: as `add_scsi`.
        """
        result: MountedDisk = call(
            self._async.add_scratch,
            size_bytes,
            guest_path,
            filesystem=filesystem,
            options=options,
            encryption=encryption,
            untrusted=untrusted,
            holder=holder,
            on_busy=on_busy,
            timeout_s=timeout_s,
        )
        return result

    @overload
    def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all"] = "all",
        holder: str | None = None,
        timeout_s: float = 60.0,
    ) -> list[SCSIMount]: ...

    @overload
    def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all", "each"],
        holder: str | None = None,
        timeout_s: float = 60.0,
    ) -> list[SCSIMount | UtilityVMError]: ...

    def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all", "each"] = "all",
        holder: str | None = None,
        timeout_s: float = 60.0,
    ) -> list[SCSIMount] | list[SCSIMount | UtilityVMError]:
        """Reserve several disks at the same time, in order.

        `all`: if one fails, those that came are given back and its error is raised. `each`: every result stands for
        itself, errors among them.
        """
        result: list[SCSIMount] | list[SCSIMount | UtilityVMError] = call(
            self._async.add_scsi_many, disks, which=which, holder=holder, timeout_s=timeout_s
        )
        return result

    def remove_scsi(
        self, host_path: HostPath, *, holder: str | None = None, force: ForceArgument = False, timeout_s: float = 60.0
    ) -> str | None:
        """Drop one reference to the disk: the newest, or the newest of `holder`. The last one detaches it.

        `host_path` is any name of the disk, as in `find_scsi`. A guest path stands for the reservations of its mount.

        `force`, and what is returned, are those of `SCSIMount.release`. A disk that nobody has a reservation of any
        more, because an undo failed, is taken out.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `SCSIMount.release`.
        """
        result: str | None = call(self._async.remove_scsi, host_path, holder=holder, force=force, timeout_s=timeout_s)
        return result

    def remove_scsi_many(
        self, mounts: Iterable[SCSIMount | Reservation | str], *, force: ForceArgument = False, timeout_s: float = 60.0
    ) -> list[UtilityVMError | None]:
        """Give back several reservations, or those of these ids, at the same time; what became of each, in order.

        None: it is done.
        """
        result: list[UtilityVMError | None] = call(
            self._async.remove_scsi_many, mounts, force=force, timeout_s=timeout_s
        )
        return result

    def release(
        self, reservation: Reservation | str, *, force: ForceArgument = False, timeout_s: float = 60.0
    ) -> str | None:
        """Give back a reservation, also one that this object did not make. See `SCSIMount.release`."""
        result: str | None = call(self._async.release, reservation, force=force, timeout_s=timeout_s)
        return result

    def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        `host_path` is any name of the disk, as in `find_scsi`.

        Raises:
            NotAttached: it is not attached.
            InvalidRequest: it would not be larger, or the size is not a multiple of 512.
            NotSupported, HostRefused: the image cannot grow; nothing changed.
            GuestRefused: a file system cannot grow, and nothing changed; or it did not, though the disk is larger now:
                ask again with the same size.
            DeadlineExceeded, OutcomeUnknown: no answer within `timeout_s` seconds (None: as long as a step may take
                by itself); ask again with the same size.
        """
        call(self._async.resize_scsi, host_path, size_bytes, timeout_s=timeout_s)

    def find_scsi(self, host_path: HostPath, *, timeout_s: float = 60.0) -> SlotView:
        """The disk of that name, as `scsi_slots` has it.

        A disk's names are every path of its image; the path by which it was attached, if no file is there any more; its
        guest paths; and in a clone the path that it has in the template.

        Raises:
            NotAttached: no disk has that name.
            InvalidRequest: it is a path of one disk's image, and the guest path of another.
        """
        result: SlotView = call(self._async.find_scsi, host_path, timeout_s=timeout_s)
        return result

    def scsi_guest_path(self, host_path: HostPath) -> PurePosixPath | None:
        """Where the disk of that name is mounted in the guest; None if it is attached only. See `find_scsi`.

        Raises:
            NotAttached, InvalidRequest: as `find_scsi`.
        """
        result: PurePosixPath | None = call(self._async.scsi_guest_path, host_path)
        return result

    def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order; the VM's own root disk is not among them."""
        result: list[SlotView] = call(self._async.scsi_slots)
        return result

    def scsi_mounts(self) -> list[MountView]:
        """Every mount in the guest, in the order of slots."""
        result: list[MountView] = call(self._async.scsi_mounts)
        return result

    def scsi_reservations(self) -> list[SCSIMount]:
        """Every reservation that is held, whichever process made it; the oldest first."""
        result: list[SCSIMount] = call(self._async.scsi_reservations)
        return result

    def scsi_events(self) -> ScsiEvents:
        """What happens to disks and mounts from this call on. The iteration ends when the VM ends, or is closed."""
        result: ScsiEvents = call(self._async.scsi_events)
        return result

    def export_scsi_state(self, *, timeout_s: float = 60.0) -> ScsiState:
        """Export disks, mounts and reservations as a document, for the owner of the VM, or one like it, after a move.

        From then on every change of them is refused with `Migrating`, until `resume_scsi` or the VM's end. If this
        fails they are as before.

        Raises:
            WrongState: a disk or a mount is half-way, or is being resized; names it.
            DeadlineExceeded: what was under way did not end within `timeout_s` seconds.
        """
        result: ScsiState = call(self._async.export_scsi_state, timeout_s=timeout_s)
        return result

    def import_scsi_state(self, state: ScsiState) -> None:
        """Take up what another VM's owner exported; this VM has no disks yet. Nothing is sent until `resume_scsi`.

        Until then every change is refused with `Migrating`. Reservations keep their names; those of processes are this
        process's from then on.

        Raises:
            AlreadyAttached: there are disks, or a slot is taken.
            InvalidRequest: the VM has fewer controllers.
            NotSupported: the guest cannot express a mount.
        """
        call(self._async.import_scsi_state, state)

    def resume_scsi(self, *, timeout_s: float = 60.0) -> list[str]:
        """Go on after `export_scsi_state` or `import_scsi_state`. Says what was left half-way, a line each.

        What was imported is looked for in the VM: what is there is taken over, the rest is attached and mounted in its
        slot and at its path. If this fails with an error nothing changed, and it can be called again.

        Raises:
            WrongState: nothing was exported or imported; or an encrypted mount is not there, and its key is nowhere.
            ConfigDiffers: a file is not the one that it was: another format or size, or two are one.
            DeadlineExceeded: not everything was looked at within `timeout_s` seconds.
            others: as `add_scsi`, for a disk that cannot be opened here.
        """
        result: list[str] = call(self._async.resume_scsi, timeout_s=timeout_s)
        return result

    @overload
    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: Literal[False] = False,
        max_output_bytes: int = 67108864,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes]: ...

    @overload
    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: Literal[True],
        max_output_bytes: int = 67108864,
        timeout_s: float | None = None,
    ) -> CommandResult[str]: ...

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: bool = False,
        max_output_bytes: int = 67108864,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes] | CommandResult[str]:
        """Run a program in the guest to its end. Cancelled or out of time, it is killed with all that it started.

        It has ended when its own process has. What its children write to its output within half a second of that is
        kept, and later output is dropped. The children go on running: a server can be started so.

        `user` is a name or a number of the guest's; None: root. With `text` its output is decoded as UTF-8, with
        U+FFFD for what is none. It ends with this process; `start_program` starts one that does not.

        Raises:
            ProgramFailed: with `check`, it ended with another code than 0.
            GuestRefused: it could not be started, or wrote more than `max_output_bytes` and was killed; the message
                has the reason.
            InvalidRequest: the guest has no such user, or a limit cannot be.
            NotSupported: the guest image is too old for `user` and `limits`: build it anew.
            DeadlineExceeded: it did not end within `timeout_s` seconds; has what it wrote in `stdout` and `stderr`.
            VMGone: the VM died.
        """
        result: CommandResult[bytes] | CommandResult[str] = call(
            self._async.run,
            command,
            stdin=stdin,
            env=env,
            cwd=cwd,
            user=user,
            limits=limits,
            check=check,
            text=text,
            max_output_bytes=max_output_bytes,
            timeout_s=timeout_s,
        )
        return result

    def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        stdin: Iterable[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code."""
        result: int = call(
            self._async.run_streaming,
            command,
            stdout=sink(stdout),
            stderr=sink(stderr),
            stdin=feed(stdin),
            env=env,
            cwd=cwd,
            user=user,
            limits=limits,
            timeout_s=timeout_s,
        )
        return result

    def start_program(
        self,
        command: Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        name: str | None = None,
        id: str | None = None,
        follow: bool = True,
        ring_bytes: int = 1048576,
        terminal: tuple[int, int] | None = None,
        timeout_s: float = 60.0,
    ) -> Program:
        """Start a program that belongs to the guest: it goes on when this process, or the VM's owner, ends.

        The guest keeps the last `ring_bytes` of its output, and its exit code until it is forgotten. The next owner
        of the VM finds it with `programs`, and goes on with `program`. With `follow` this object reads its output
        from the first byte, and output that is not read holds the program back; without, its oldest output is dropped
        when there is too much. With `stdin` it waits for the input that it is given, else it has none.

        `name` is a name for people, which no other program of the guest has. A second start with the same
        `id`, letters and digits, gives the program that there is: so it can be asked for again after a lost answer.

        With `terminal`, its rows and columns, the program has one: for input, output and errors, which all come as
        `stdout`. Ctrl-C in the input is SIGINT for the job in the foreground, and so on; see `Program.resize`.

        Clones of a template go on with such a program. Saving is refused while its output is followed.

        Raises:
            GuestRefused: it could not be started, or there is no room for one more; the message has the reason.
            InvalidRequest: a value is wrong, the name is taken, or the guest has no such user.
            NotSupported: the guest image is too old: build it anew.
            OutcomeUnknown, DeadlineExceeded: no answer came; look for it with `programs`.
            VMGone: the VM died.
        """
        result: Program = call(
            self._async.start_program,
            command,
            stdin=stdin,
            env=env,
            cwd=cwd,
            user=user,
            limits=limits,
            name=name,
            id=id,
            follow=follow,
            ring_bytes=ring_bytes,
            terminal=terminal,
            timeout_s=timeout_s,
        )
        return result

    def program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        follow: bool = True,
        timeout_s: float = 60.0,
    ) -> Program:
        """A program that the guest keeps, by its number, name or id.

        Its output is read from these offsets on; what the guest has dropped of it is counted in `stdout.lost`. With
        the offsets up to which another process had come, no byte is lost or repeated. See `start_program` for `follow`.

        Raises:
            ProgramNotFound: there is no such program.
            InvalidRequest: it has not written so much.
            others: as `start_program`.
        """
        result: Program = call(
            self._async.program,
            number,
            stdout_offset=stdout_offset,
            stderr_offset=stderr_offset,
            follow=follow,
            timeout_s=timeout_s,
        )
        return result

    def programs(self, *, timeout_s: float = 60.0) -> list[ProgramInfo]:
        """The programs that the guest keeps, in the order in which they were started; those that ended are among them.

        Raises:
            NotSupported: the guest image is too old: build it anew.
        """
        result: list[ProgramInfo] = call(self._async.programs, timeout_s=timeout_s)
        return result

    def follow_program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        hold: bool = False,
        live: bool = True,
        timeout_s: float = 60.0,
    ) -> ProgramPieces:
        """The output of a program that the guest keeps, both streams in their order, from these offsets on.

        With `hold` the program waits for its reader, else the guest drops what is not read in time: the next piece's
        offset tells. Without `live` it ends with what there is now.

        Raises:
            as `program`.
        """
        result: ProgramPieces = call(
            self._async.follow_program,
            number,
            stdout_offset=stdout_offset,
            stderr_offset=stderr_offset,
            hold=hold,
            live=live,
            timeout_s=timeout_s,
        )
        return result

    def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the guest's agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        call(self._async.ping, timeout_s=timeout_s)

    def put(
        self, src: HostPath | Iterable[bytes], guest_path: str | PurePosixPath, *, timeout_s: float | None = None
    ) -> CopyResult:
        """Copy a file, a link or a folder of this host into the guest; or bytes as they come, as a file.

        If `guest_path` is a folder, the copy gets the name of `src` in it; else `guest_path` is its name, and the
        folder above must be there. `src` that ends with `/.` means what is in that folder. Modes, times and symbolic
        links are kept, owners as numbers if the agent runs as root; files with holes keep them. Hard links become
        files of their own, and extended attributes are not copied. Sockets, FIFOs and devices are left out: see
        `CopyResult.skipped`.

        No file has its final name before it is complete, also if the guest dies; nor has a folder that was not there
        before. If this fails, files that were complete may be there, if they were copied into an existing folder.

        Raises:
            InvalidRequest: `src` is not there, or is no file, link or folder; or `guest_path` is not absolute.
            AccessDenied: `src` may not be read.
            GuestRefused: the guest could not write it; `kind` is "not_found" if the folder above is not there.
            DeadlineExceeded: it was not done within `timeout_s` seconds.
            NotSupported: the guest image is too old: build it anew.
            VMGone: the VM died.
        """
        result: CopyResult = call(self._async.put, feed(src), guest_path, timeout_s=timeout_s)
        return result

    def get(
        self,
        guest_path: str | PurePosixPath,
        dst: HostPath | Callable[[bytes], object],
        *,
        links: EscapingLinks = "refuse",
        max_bytes: int = 17179869184,
        timeout_s: float | None = None,
    ) -> CopyResult:
        """Copy a file, a link or a folder of the guest to this host; or give the bytes of a file to `dst`, a function.

        Names and kept is as with `put`, but for set-user-id, set-group-id and sticky bits, which are dropped. Nothing
        outside of the destination is touched, whatever the guest sends. `links` says what becomes of symbolic links
        that lead out of what is copied: all absolute ones do.

        Raises:
            UnsafePath: the guest sent a link that leads out, or a name that does.
            GuestRefused: the guest could not read it, it has more than `max_bytes` ("limit"), or is not there
                ("not_found").
            InvalidRequest: what is at `dst` is in the way, or the folder above is not there.
            AccessDenied, SetupError: this host could not write it.
            ProtocolError: what the guest sent makes no sense.
            others: as `put`.
        """
        result: CopyResult = call(
            self._async.get, guest_path, sink(dst), links=links, max_bytes=max_bytes, timeout_s=timeout_s
        )
        return result

    def read_bytes(
        self, guest_path: str | PurePosixPath, *, max_bytes: int = 67108864, timeout_s: float | None = None
    ) -> bytes:
        """The bytes of a file in the guest. Links are followed.

        Raises:
            GuestRefused: it cannot be read, has more than `max_bytes` ("limit"), or is not there ("not_found").
            others: as `put`.
        """
        result: bytes = call(self._async.read_bytes, guest_path, max_bytes=max_bytes, timeout_s=timeout_s)
        return result

    def write_bytes(
        self,
        guest_path: str | PurePosixPath,
        data: bytes | bytearray | memoryview,
        *,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make `data` the content of a file in the guest: whole, or the file is as it was.

        A file that is replaced leaves its mode and owner; a new one is root's, with `mode`, or 0644. A link is
        replaced, and not followed.

        Raises:
            GuestRefused: it cannot be written, or the folder above is not there ("not_found").
            others: as `put`.
        """
        call(self._async.write_bytes, guest_path, data, mode=mode, timeout_s=timeout_s)

    @property
    def name(self) -> str:
        """The VM's name, which no other VM of this user has."""
        result: str = self._get("name")
        return result

    @property
    def config(self) -> VMConfig:
        result: VMConfig = self._get("config")
        return result

    @property
    def findings(self) -> list[str]:
        result: list[str] = self._get("findings")
        return result


def connect(*, start: bool = True) -> Client:
    """A client of this user's server, which is started if none runs and `start` is true.

    Nothing happens before the first call. Any number of clients use a VM at the same time.
    """
    result: Client = call(utilityvm.connect, start=start)
    return result


def doctor() -> list[Finding]:
    """Look at everything that VMs need on this machine; the findings are in the order in which to mend them.

    Nothing is changed. VMs can run if no verdict is "fault".
    """
    result: list[Finding] = call(utilityvm.doctor)
    return result


def examine_vm(name: str, *, wait_s: float = 0.0, timeout_s: float = 60.0) -> list[Difference]:
    """Compare the three; nothing is changed. `wait_s` is for the queue, if another process uses the VM.

    Raises:
        VMNotFound, VMNotRunning: there is no such VM, or nothing of it to compare.
        VMOwned: another process owns it, which keeps the three in step itself.
        DeadlineExceeded: QEMU does not answer within `timeout_s` seconds.
    """
    result: list[Difference] = call(utilityvm.examine_vm, name, wait_s=wait_s, timeout_s=timeout_s)
    return result


def remove_leftover(leftover: Leftover, *, timeout_s: float = 60.0) -> bool:
    """Remove it, if it is still one. False: another process took it up meanwhile, or it is gone.

    Raises:
        UtilityVMError: it cannot be removed; the others can all the same.
        DeadlineExceeded: not done within `timeout_s` seconds; call again.
    """
    result: bool = call(utilityvm.remove_leftover, leftover, timeout_s=timeout_s)
    return result


def remove_leftovers(leftovers: Iterable[Leftover]) -> list[bool | UtilityVMError]:
    """As `remove_leftover` each, and quick for many; instead of one that cannot be removed its error is in the list.

    Dead VMs are removed some at a time, and the rest after them, in the order of the list. Cancelled, those that were
    removed are gone, and the others can be removed by another call.
    """
    result: list[bool | UtilityVMError] = call(utilityvm.remove_leftovers, leftovers)
    return result


def repair_vm(name: str, *, wait_s: float = 0.0, timeout_s: float = 60.0) -> list[str]:
    """Make the three agree within `timeout_s` seconds, and say what was done, a line each.

    `wait_s` is for the queue, if another process uses the VM. Out of time, the rest is left for the next call.

    Raises:
        As `examine_vm`; and GuestBusy and others, if a disk that no journal knows cannot be taken out.
    """
    result: list[str] = call(utilityvm.repair_vm, name, wait_s=wait_s, timeout_s=timeout_s)
    return result
