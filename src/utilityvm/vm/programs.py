"""Programs in the guest, as `UtilityVM` runs, starts and follows them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final, Literal, overload

from utilityvm.errors import ProgramFailed
from utilityvm.guests.follow import ProgramPieces
from utilityvm.guests.kept import RING_BYTES, Program
from utilityvm.guests.program import CommandResult, Limits, OutputSink, as_text
from utilityvm.guests.programinfo import ProgramInfo
from utilityvm.guests.running import MAX_OUTPUT_BYTES
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S
from utilityvm.vm.arguments import timed
from utilityvm.vm.face import Face

_SHOWN: Final = 300  # characters of what a program said last


@typed_errors
class VMPrograms(Face):
    """The part of `UtilityVM` that speaks with the guest."""

    @overload
    async def run(
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
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes]: ...

    @overload
    async def run(
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
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        timeout_s: float | None = None,
    ) -> CommandResult[str]: ...

    @timed
    async def run(
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
        max_output_bytes: int = MAX_OUTPUT_BYTES,
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
        self._vm.check()
        async with self._vm.ends_told():
            result = await self._vm.guest.run(
                command,
                stdin=stdin,
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                timeout_s=timeout_s,
                max_output_bytes=max_output_bytes,
            )
        return finished(result, command, check=check, text=text)

    @timed
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
        """Like `run`, with input and output as they come; gives the exit code."""
        self._vm.check()
        async with self._vm.ends_told():
            return await self._vm.guest.run_streaming(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                timeout_s=timeout_s,
            )

    @timed
    async def start_program(
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
        ring_bytes: int = RING_BYTES,
        terminal: tuple[int, int] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
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
        self._vm.check()
        async with self._vm.ends_told():
            return await self._vm.guest.kept.start(
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

    @timed
    async def program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        follow: bool = True,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Program:
        """A program that the guest keeps, by its number, name or id.

        Its output is read from these offsets on; what the guest has dropped of it is counted in `stdout.lost`. With
        the offsets up to which another process had come, no byte is lost or repeated. See `start_program` for `follow`.

        Raises:
            ProgramNotFound: there is no such program.
            InvalidRequest: it has not written so much.
            others: as `start_program`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._vm.guest.kept.get(
                number, stdout=stdout_offset, stderr=stderr_offset, follow=follow, timeout_s=timeout_s
            )

    @timed
    async def programs(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ProgramInfo]:
        """The programs that the guest keeps, in the order in which they were started; those that ended are among them.

        Raises:
            NotSupported: the guest image is too old: build it anew.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._vm.guest.kept.list(timeout_s=timeout_s)

    @timed
    async def follow_program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        hold: bool = False,
        live: bool = True,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> ProgramPieces:
        """The output of a program that the guest keeps, both streams in their order, from these offsets on.

        With `hold` the program waits for its reader, else the guest drops what is not read in time: the next piece's
        offset tells. Without `live` it ends with what there is now.

        Raises:
            as `program`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._vm.guest.kept.follow(
                number, stdout=stdout_offset, stderr=stderr_offset, hold=hold, live=live, timeout_s=timeout_s
            )

    @timed
    async def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the guest's agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        self._vm.check()
        async with self._vm.ends_told():
            await self._vm.guest.ping(timeout_s=timeout_s)


def finished(
    result: CommandResult[bytes], command: Sequence[str], *, check: bool, text: bool
) -> CommandResult[bytes] | CommandResult[str]:
    """The result of a program, as text if that is wanted.

    Raises:
        ProgramFailed: with `check`, it ended with another code than 0.
    """
    shown: CommandResult[bytes] | CommandResult[str] = as_text(result) if text else result
    if check and result.exit_code:
        raise ProgramFailed(
            f"{command[0]} {_how(result.exit_code)}{_last_words(result.stderr)}",
            exit_code=result.exit_code,
            stdout=shown.stdout,
            stderr=shown.stderr,
        )
    return shown


def _how(exit_code: int) -> str:
    return f"ended with {exit_code}" if exit_code > 0 else f"was killed by signal {-exit_code}"


def _last_words(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:_SHOWN]}" if lines else ""
