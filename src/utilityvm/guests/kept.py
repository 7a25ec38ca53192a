"""Kept programs, as seen from the host: started, listed, and found again by the next owner of the VM.

Such a program belongs to the guest: nothing here ends it but `kill`. `follow` reads what it writes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    InvalidRequest,
    ProgramNotFound,
    ProtocolError,
    UtilityVMError,
    WrongState,
)
from utilityvm.guests import answers
from utilityvm.guests.follow import ASK_S, ProgramPieces
from utilityvm.guests.loops import of_one_loop
from utilityvm.guests.program import Limits, run_request
from utilityvm.guests.programinfo import ProgramInfo, info_of, list_them, typed
from utilityvm.guests.streams import ProgramInput, ProgramOutput
from utilityvm.machine.oserrors import typed_errors

if TYPE_CHECKING:
    from utilityvm.guests.bridge_guest import BridgeGuest

RING_BYTES: Final = messages.RING_BYTES
_MAX_PAGES: Final = 256
_MAX_SIGNAL: Final = 64


@typed_errors
@of_one_loop
class Program:
    """A program that the guest keeps, like `asyncio.subprocess.Process`. Made by `start_program` and `program`.

    It goes on when this object, its owner or the connection ends; only `kill` ends it. While it is followed, output
    that nobody reads holds it back: at 1 MiB here, and as much in the guest. `stop_following` ends that.
    """

    def __init__(self, programs: KeptPrograms, info: ProgramInfo, pieces: ProgramPieces | None) -> None:
        """Use `UtilityVM.start_program` or `program`."""
        self.number = info.number
        self.id = info.id
        self.info = info  # as it was when this object was made
        self.stdin = pieces._stdin if pieces and info.takes_input else None
        self.stdout = ProgramOutput(pieces.stdout_offset if pieces else 0)
        self.stderr = ProgramOutput(pieces.stderr_offset if pieces else 0)
        self.out_of_memory = info.out_of_memory
        self._programs = programs
        self._exit_code = info.exit_code
        self._pieces = pieces
        self._pump: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        if pieces:
            self._pump = asyncio.create_task(self._follow(pieces))
            self._pump.add_done_callback(_look_at)

    @property
    def _where(self) -> dict[str, object]:
        """For the errors of its calls."""
        return {"vm": self._programs.vm}

    @property
    def pid(self) -> int | None:
        """Its process number in the guest."""
        return self.info.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None if we do not know that it has ended."""
        return self._exit_code

    async def wait(self, *, timeout_s: float | None = None) -> int:
        """Its exit code, when it has ended. Nothing of its output is taken: read it at the same time.

        Raises:
            DeadlineExceeded: it did not end within `timeout_s` seconds. It goes on.
            ProgramNotFound: it was forgotten, or ended with the guest's agent.
            VMGone: the VM ended, or was let go of.
        """
        if self._exit_code is None:
            if self._ending is None or self._ending.done():
                self._ending = asyncio.create_task(self._watch())
                self._ending.add_done_callback(_look_at)
            done, _ = await asyncio.wait([self._ending], timeout=timeout_s)
            if not done:
                text = f"program {self.number} did not end within {timeout_s:g} s"
                raise DeadlineExceeded(text)
            self._ending.result()
        assert self._exit_code is not None
        return self._exit_code

    async def communicate(self, input: bytes | None = None, *, timeout_s: float | None = None) -> tuple[bytes, bytes]:
        """Give it all of `input`, and read all of its output, until it has ended.

        Raises:
            WrongState: it is not followed.
            DeadlineExceeded: it did not end within `timeout_s` seconds. It goes on.
            others: as `wait`.
        """
        if self._pieces is None:
            raise WrongState(f"program {self.number} is not followed")
        if input is not None:
            if self.stdin is None:
                raise InvalidRequest(f"program {self.number} takes no input", remedy="start it with stdin=True")
            self.stdin.write(input)
        if self.stdin is not None:
            self.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                reads = await asyncio.gather(self.stdout.read(), self.stderr.read(), return_exceptions=True)
                await self.wait()
        except TimeoutError:
            text = f"program {self.number} did not end within {timeout_s} s"
            raise DeadlineExceeded(text) from None
        out, err = (_whole(read) for read in reads)
        return out, err

    async def send_signal(self, signal: int, *, timeout_s: float = ASK_S) -> None:
        """Send it a signal, and what it started in its process group.

        Raises:
            WrongState: it has ended.
            ProgramNotFound: it was forgotten.
        """
        await self._programs.send_signal(self.number, signal, id=self.id, timeout_s=timeout_s)

    async def resize(self, rows: int, cols: int, *, timeout_s: float = ASK_S) -> None:
        """Tell it the size of its terminal: the job in the foreground gets SIGWINCH. One that has ended takes nothing.

        Raises:
            InvalidRequest: it was started without a terminal, or that is no size.
            ProgramNotFound: it was forgotten.
        """
        size = _size_of(rows, cols, vm=self._programs.vm)
        if not self.info.has_terminal:
            remedy = "start it with terminal=(rows, cols)"
            raise InvalidRequest(f"program {self.number} has no terminal", vm=self._programs.vm, remedy=remedy)
        await self._programs.resize(self.number, size, id=self.id, timeout_s=timeout_s)

    async def terminate(self, *, timeout_s: float = ASK_S) -> None:
        """Send it SIGTERM. See `send_signal`."""
        await self.send_signal(15, timeout_s=timeout_s)

    async def kill(self, *, timeout_s: float = ASK_S) -> None:
        """Kill it with all that it started, daemons too; all of it has ended then. Ended before is no error.

        Raises:
            ProgramNotFound: it was forgotten.
            DeadlineExceeded: the guest's kernel did not let go of it within `timeout_s` seconds.
        """
        await self._programs.kill(self.number, id=self.id, timeout_s=timeout_s)

    async def forget(self, *, timeout_s: float = ASK_S) -> None:
        """Have the guest drop what it keeps of it: output and exit code. It must have ended.

        Raises:
            WrongState: it runs.
        """
        await self._programs.forget(self.number, id=self.id, timeout_s=timeout_s)

    async def stop_following(self) -> None:
        """Let it write what nobody reads: its oldest output is dropped then. What has come can still be read."""
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()
            await asyncio.wait([self._pump])
        self._end_streams(None)

    async def __aenter__(self) -> Program:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let go of it: it goes on."""
        await self.stop_following()
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.wait([self._ending])

    def __repr__(self) -> str:
        return f"<Program {self.number}: {'running' if self._exit_code is None else self._exit_code}>"

    async def _follow(self, pieces: ProgramPieces) -> None:
        try:
            async for piece in pieces:
                await (self.stdout if piece.stream == "stdout" else self.stderr)._put(piece.offset, piece.data)
            self._has_ended(pieces)
            self._end_streams(None)
        except UtilityVMError as error:
            self._end_streams(error)
        except Exception as error:  # a mistake of ours: who reads must not wait for ever
            self._end_streams(UtilityVMError(f"following program {self.number} failed: {error!r}"))
            raise
        finally:
            await pieces.aclose()

    async def _watch(self) -> None:
        pieces = self._programs.pieces(output=False, hold=False)
        try:
            await pieces._attach(time.monotonic() + ASK_S, which={"Number": self.number, "Id": self.id})
            async for _ in pieces:
                pass
            self._has_ended(pieces)
        finally:
            await pieces.aclose()

    def _has_ended(self, pieces: ProgramPieces) -> None:
        if pieces.exit_code is not None:
            self._exit_code, self.out_of_memory = pieces.exit_code, pieces.out_of_memory

    def _end_streams(self, error: UtilityVMError | None) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                stream._end(error)


class KeptPrograms:
    """Those of one guest. `BridgeGuest.kept`."""

    def __init__(self, guest: BridgeGuest) -> None:
        self._guest = guest

    @property
    def vm(self) -> str | None:
        return self._guest._vm

    def pieces(self, **settings: Any) -> ProgramPieces:
        """A follow that has not begun; see `ProgramPieces`."""
        return ProgramPieces(self._guest, **settings)

    async def start(
        self,
        command: Sequence[str],
        *,
        stdin: bool,
        env: Mapping[str, str] | None,
        cwd: PurePosixPath | str | None,
        user: str | int | None,
        limits: Limits | None,
        name: str | None,
        id: str | None,
        follow: bool,
        ring_bytes: int,
        timeout_s: float,
        terminal: tuple[int, int] | None = None,
    ) -> Program:
        """See `UtilityVM.start_program`."""
        stdin = stdin or terminal is not None
        body = run_request(command, env=env, cwd=cwd, takes_input=stdin, user=user, limits=limits)
        if not messages.MIN_RING_BYTES <= ring_bytes <= messages.MAX_RING_BYTES:
            text = f"ring_bytes {ring_bytes} is not from {messages.MIN_RING_BYTES} to {messages.MAX_RING_BYTES}"
            raise InvalidRequest(text)
        body["Id"] = os.urandom(8).hex() if id is None else id
        body["RingBytes"] = ring_bytes
        deadline = time.monotonic() + timeout_s
        if terminal is not None:
            body["Terminal"] = _size_of(*terminal, vm=self.vm)
            self._guest.need_terminals(await self._guest._connected(deadline))
        if name is not None:
            body["Name"] = name
        pieces = self.pieces(hold=follow, output=follow, stdin=ProgramInput() if stdin and follow else None)
        await pieces._attach(deadline, start=body, which={"Id": body["Id"]})
        return self._handle(pieces, follow=follow)

    async def get(self, which: int | str, *, stdout: int, stderr: int, follow: bool, timeout_s: float) -> Program:
        """See `UtilityVM.program`."""
        info = await self.find(which, timeout_s=timeout_s)
        stdin = ProgramInput() if info.takes_input and follow else None
        pieces = self.pieces(stdout=stdout, stderr=stderr, hold=follow, output=follow, stdin=stdin)
        if follow:
            await pieces._attach(time.monotonic() + timeout_s, which={"Number": info.number, "Id": info.id})
            return self._handle(pieces, follow=True)
        return Program(self, info, None)

    async def follow(
        self, which: int | str, *, stdout: int, stderr: int, hold: bool, live: bool, timeout_s: float
    ) -> ProgramPieces:
        """See `UtilityVM.follow_program`."""
        info = await self.find(which, timeout_s=timeout_s)
        pieces = self.pieces(stdout=stdout, stderr=stderr, hold=hold, live=live)
        await pieces._attach(time.monotonic() + timeout_s, which={"Number": info.number, "Id": info.id})
        return pieces

    def _handle(self, pieces: ProgramPieces, *, follow: bool) -> Program:
        assert pieces.info is not None
        if not follow:
            pieces._is_over = True
            pieces._leave()
        return Program(self, pieces.info, pieces if follow else None)

    async def find(self, which: int | str, *, timeout_s: float = ASK_S) -> ProgramInfo:
        """The program of that number, name or id.

        Raises:
            ProgramNotFound: there is none.
        """
        for info in await self.list(timeout_s=timeout_s):
            if which in ((info.number,) if isinstance(which, int) else (info.name, info.id)):
                return info
        raise ProgramNotFound(f"the guest keeps no program {which!r}", remedy=list_them(self.vm))

    async def list(self, *, timeout_s: float = ASK_S) -> list[ProgramInfo]:
        """See `UtilityVM.programs`."""
        deadline = time.monotonic() + timeout_s
        await self._need(deadline)
        found: list[ProgramInfo] = []
        for _ in range(_MAX_PAGES):
            after = found[-1].number if found else 0
            left = max(deadline - time.monotonic(), 0.0)
            answer = await self._guest._ask(messages.PROGRAMS, messages.request(After=after), left)
            page = answers.read(answers.Programs, answer, what="list of programs")
            if page.programs and page.programs[0].number <= after:
                raise ProtocolError(f"the guest's list of programs does not go on after {after}")
            found += [info_of(program) for program in page.programs]
            if not page.more or not page.programs:
                return found
        raise ProtocolError(f"the guest's list of programs has no end: {len(found)} so far")

    async def send_signal(self, number: int, signal: int, *, id: str | None = None, timeout_s: float) -> None:
        """See `Program.send_signal`."""
        if isinstance(signal, bool) or not isinstance(signal, int) or not 0 < signal <= _MAX_SIGNAL:
            raise InvalidRequest(f"{signal!r} is no signal: they are 1 to {_MAX_SIGNAL}")
        await self._ask(messages.SIGNAL, number, id, timeout_s, Signal=int(signal))

    async def resize(self, number: int, size: dict[str, int], *, id: str | None = None, timeout_s: float) -> None:
        """See `Program.resize`."""
        await self._ask(messages.RESIZE, number, id, timeout_s, **size)

    async def kill(self, number: int, *, id: str | None = None, timeout_s: float) -> None:
        """See `Program.kill`."""
        await self._ask(messages.KILL, number, id, timeout_s)

    async def forget(self, number: int, *, id: str | None = None, timeout_s: float) -> None:
        """See `Program.forget`."""
        await self._ask(messages.FORGET, number, id, timeout_s)

    async def _ask(self, kind: int, number: int, id: str | None, timeout_s: float, **more: Any) -> None:
        deadline = time.monotonic() + timeout_s
        await self._need(deadline)
        which = {"Number": number} if id is None else {"Number": number, "Id": id}
        try:
            left = max(deadline - time.monotonic(), 0.0)
            await self._guest._ask(kind, messages.request(**which, **more), left)
        except GuestRefused as error:
            raise typed(error) from error

    async def _need(self, deadline: float) -> None:
        self._guest.need_programs(await self._guest._connected(deadline), "keep programs")


def _size_of(rows: int, cols: int, *, vm: str | None) -> dict[str, int]:
    """Raises:
    InvalidRequest: that is no size of a terminal.
    """
    for value in (rows, cols):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= messages.MAX_TERMINAL:
            remedy = f"give rows and columns, each from 1 to {messages.MAX_TERMINAL}"
            raise InvalidRequest(f"({rows!r}, {cols!r}) is no size of a terminal", vm=vm, remedy=remedy)
    return {"Rows": rows, "Cols": cols}


def _look_at(task: asyncio.Task[None]) -> None:
    """Its error is told to those who wait: it is not unhandled."""
    if not task.cancelled():
        task.exception()


def _whole(read: bytes | BaseException) -> bytes:
    if isinstance(read, BaseException):
        raise read
    return read
