"""Kept programs, as seen from the host: started, listed, followed, and found again by the next owner of the VM.

Such a program belongs to the guest. A *follow* of it lives on one connection to the guest; when that ends, the next one
goes on at the byte at which it stopped. Nothing here ends a program but `kill`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    InvalidRequest,
    OutcomeUnknown,
    ProgramNotFound,
    ProtocolError,
    UtilityVMError,
    VMGone,
    WrongState,
)
from utilityvm.guests import answers
from utilityvm.guests.bridge_client import BridgeClient, NotNegotiated, again
from utilityvm.guests.program import Limits, Said, run_request
from utilityvm.guests.streams import ProgramInput, ProgramOutput
from utilityvm.machine.oserrors import typed_errors

if TYPE_CHECKING:
    from utilityvm.guests.bridge_guest import BridgeGuest

RING_BYTES: Final = messages.RING_BYTES
_ASK_S: Final = 30.0
_MAX_PAGES: Final = 256
_MAX_ROUNDS: Final = 8  # of starting: the agent was started again each time
_MAX_SIGNAL: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """A program that the guest keeps, as it was when it was asked. Times are seconds since 1970, the guest's.

    Of each stream the bytes from `…_begin` to `…_end` are kept: those before were dropped.
    """

    number: int
    id: str
    name: str | None
    command: tuple[str, ...]  # cut, if it is long
    user: str | None
    pid: int | None
    started: float
    ended: float | None  # None: it runs
    exit_code: int | None  # negative for the signal that killed it
    out_of_memory: bool  # something of it was killed because it used all of the memory that it may
    takes_input: bool
    ring_bytes: int
    stdout_begin: int
    stdout_end: int
    stderr_begin: int
    stderr_end: int
    followers: int

    @property
    def is_running(self) -> bool:
        return self.exit_code is None


@dataclass(frozen=True, slots=True)
class ProgramPiece:
    """Some bytes of a program's output. `offset` counts the bytes of that stream from the program's start."""

    stream: Literal["stdout", "stderr"]
    offset: int
    data: bytes = field(repr=False)


class _Following:
    """One follow on one connection: what came and was not taken yet, a window of it at the most."""

    def __init__(self, number: int, client: BridgeClient, offsets: Mapping[str, int], stdin: ProgramInput) -> None:
        self.number = number
        self.client = client
        self.end: answers.FollowEnd | None = None
        self._expected = dict(offsets)
        self._stdin = stdin
        self._pieces: deque[tuple[str, int, bytes]] = deque()
        self._size = 0
        self._changed = asyncio.Event()

    def take(self, said: Said) -> None:
        """What the guest says of it.

        Raises:
            ProtocolError: it is more than was allowed, repeats something, or comes after the end.
        """
        if self.end is not None:
            raise ProtocolError(f"the guest speaks of follow {self.number}, which has ended", message=said)
        match said:
            case answers.Output():
                at = said.at if said.at is not None else -1
                if at < self._expected[said.stream]:
                    text = f"the guest repeats output: offset {at} after {self._expected[said.stream]}"
                    raise ProtocolError(text, message=said)
                self._size += len(said.data)
                if self._size > messages.OUTPUT_WINDOW_BYTES:
                    raise ProtocolError(f"the guest sent more than {messages.OUTPUT_WINDOW_BYTES} bytes at once")
                self._expected[said.stream] = at + len(said.data)
                self._pieces.append((said.stream, at, bytes(said.data)))
            case answers.Credit():
                self._stdin._took(said.at or 0)
            case answers.FollowEnd():
                self.end = said
            case _:
                raise ProtocolError(f"the guest says of follow {self.number} what fits another kind", message=said)
        self._changed.set()

    async def next(self) -> tuple[str, int, bytes] | None:
        """The next piece. None: it has ended.

        Raises:
            what the connection ended with.
        """
        gone = self.client.gone
        while not self._pieces and self.end is None:
            if gone.done():
                raise again(gone.result())
            self._changed.clear()
            waiting = asyncio.ensure_future(self._changed.wait())
            try:
                either: list[asyncio.Future[Any]] = [waiting, gone]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
        return self._pieces.popleft() if self._pieces else None

    def give_back(self, size: int) -> None:
        """So much of it was taken."""
        self._size -= size
        self.client.notify(messages.RUN_CREDIT, {"Process": self.number, "Bytes": size})


@typed_errors
class ProgramPieces(AsyncIterator[ProgramPiece]):
    """What a program writes, both streams in the order in which the guest read them. Made by `follow_program`.

    The iteration ends when the program has, and all of its output was given; `exit_code` is known then. A piece counts
    as taken when the next one is asked for; until then the guest keeps it. After a connection that broke it goes on by
    itself; another process goes on by following from `stdout_offset` and `stderr_offset`. Close it with `aclose` if it
    is not read to its end.
    """

    def __init__(
        self,
        guest: BridgeGuest,
        *,
        stdout: int = 0,
        stderr: int = 0,
        hold: bool = True,
        live: bool = True,
        output: bool = True,
        stdin: ProgramInput | None = None,
    ) -> None:
        """Use `UtilityVM.follow_program`."""
        self.info: ProgramInfo | None = None  # as it was at the beginning
        self.exit_code: int | None = None
        self.out_of_memory = False
        self._guest = guest
        self._offsets = {"out": stdout, "err": stderr}
        self._flags = {"Hold": hold, "Live": live, "Output": output, "Feed": stdin is not None}
        self._stdin = stdin or ProgramInput()
        self._following: _Following | None = None
        self._owed = 0  # bytes that were given, and not taken yet
        self._which: dict[str, Any] = {}
        self._is_over = False
        self._lost: UtilityVMError | None = None  # how a START was left without an answer

    @property
    def stdout_offset(self) -> int:
        """The offset of the next byte of its standard output."""
        return self._offsets["out"]

    @property
    def stderr_offset(self) -> int:
        """The offset of the next byte of its error output."""
        return self._offsets["err"]

    async def __anext__(self) -> ProgramPiece:
        while not self._is_over:
            if self._following is None:
                await self._attach(time.monotonic() + _ASK_S)
            following = self._following
            assert following is not None
            if self._owed:
                following.give_back(self._owed)
                self._owed = 0
            try:
                piece = await following.next()
            except (VMGone, OutcomeUnknown):
                self._leave()
                continue
            except BaseException:
                await self.aclose()
                raise
            if piece is None:
                assert following.end is not None
                self.exit_code, self.out_of_memory = following.end.exit_code, following.end.out_of_memory
                await self.aclose()
                break
            stream, at, data = piece
            self._offsets[stream] = at + len(data)
            self._owed = len(data)
            return ProgramPiece("stdout" if stream == "out" else "stderr", at, data)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Follow it no more. The program goes on."""
        self._is_over = True
        self._leave()

    async def _attach(self, deadline: float, *, start: dict[str, Any] | None = None, which: Any = None) -> None:
        """Begin to follow, or go on after a connection that broke; with `start`, start the program.

        For `KeptPrograms`, and for ourselves.

        Raises:
            ProgramNotFound: there is no such program.
            OutcomeUnknown: it may have been started by an agent that died.
            others: as every request.
        """
        if which is not None:
            self._which = which
        for attempt in itertools.count(1):
            client = await self._guest._connected(deadline)
            self._guest.need_programs(client, "keep programs")
            number = self._guest._new_number()
            following = _Following(number, client, self._offsets, self._stdin)
            follow = {"Process": number, "Out": self._offsets["out"], "Err": self._offsets["err"], **self._flags}
            self._guest._programs[number] = following
            client.is_watched = True
            self._following = following
            try:
                left = max(deadline - time.monotonic(), 0.0)
                kind, body = messages.FOLLOW, messages.request(**follow, **self._which)
                if start is not None:
                    kind, body = messages.START, {**start, "Follow": follow}
                body[messages.EXTENSION] = {"TimeoutMs": int(left * 1000)}
                answer = self._guest._checked(await client.request(kind, body, timeout_s=left + 0.4), None)
                started = answers.read(answers.Started, answer, vm=self._guest._vm)
            except NotNegotiated:  # it was not looked at: a new agent does not know us yet
                self._leave()
                if attempt == _MAX_ROUNDS:
                    raise
                continue
            except DeadlineExceeded:
                self._leave()
                raise
            except (VMGone, OutcomeUnknown) as error:
                self._leave()
                if attempt == _MAX_ROUNDS or time.monotonic() >= deadline:
                    raise
                if start is not None:  # is it there? A second one must not be started.
                    start, self._lost = None, error
                continue
            except GuestRefused as error:
                self._leave()
                if error.kind == "no_program" and self._lost is not None:
                    text = f"the agent was started again while the program was being started: {self._lost}"
                    raise OutcomeUnknown(text, vm=self._guest._vm) from error
                raise _typed(error) from error
            except BaseException:
                self._leave()
                raise
            self.info = _info(started.program)
            self._which = {"Number": started.program.number, "Id": str(started.program.id)}
            if self._flags["Feed"]:
                self._stdin._begin(started, _sender(client, number))
            return

    def _leave(self) -> None:
        following, self._following, self._owed = self._following, None, 0
        self._stdin._pause()
        if following is None:
            return
        self._guest._programs.pop(following.number, None)
        following.client.is_watched = bool(self._guest._programs)
        if following.end is None:
            with contextlib.suppress(UtilityVMError):
                following.client.notify(messages.UNFOLLOW, {"Process": following.number})


@typed_errors
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
                raise DeadlineExceeded(text, vm=self._programs.vm)
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
            raise WrongState(f"program {self.number} is not followed", vm=self._programs.vm)
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
            raise DeadlineExceeded(text, vm=self._programs.vm) from None
        out, err = (_whole(read) for read in reads)
        return out, err

    async def send_signal(self, signal: int, *, timeout_s: float = _ASK_S) -> None:
        """Send it a signal, and what it started in its process group.

        Raises:
            WrongState: it has ended.
            ProgramNotFound: it was forgotten.
        """
        await self._programs.send_signal(self.number, signal, id=self.id, timeout_s=timeout_s)

    async def terminate(self, *, timeout_s: float = _ASK_S) -> None:
        """Send it SIGTERM. See `send_signal`."""
        await self.send_signal(15, timeout_s=timeout_s)

    async def kill(self, *, timeout_s: float = _ASK_S) -> None:
        """Kill it with all that it started, daemons too; all of it has ended then. Ended before is no error.

        Raises:
            ProgramNotFound: it was forgotten.
            DeadlineExceeded: the guest's kernel did not let go of it within `timeout_s` seconds.
        """
        await self._programs.kill(self.number, id=self.id, timeout_s=timeout_s)

    async def forget(self, *, timeout_s: float = _ASK_S) -> None:
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
            await pieces._attach(time.monotonic() + _ASK_S, which={"Number": self.number, "Id": self.id})
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
    ) -> Program:
        """See `UtilityVM.start_program`."""
        body = run_request(command, env=env, cwd=cwd, takes_input=stdin, user=user, limits=limits, vm=self.vm)
        if not messages.MIN_RING_BYTES <= ring_bytes <= messages.MAX_RING_BYTES:
            text = f"ring_bytes {ring_bytes} is not from {messages.MIN_RING_BYTES} to {messages.MAX_RING_BYTES}"
            raise InvalidRequest(text, vm=self.vm)
        body["Id"] = os.urandom(8).hex() if id is None else id
        body["RingBytes"] = ring_bytes
        if name is not None:
            body["Name"] = name
        pieces = self.pieces(hold=follow, output=follow, stdin=ProgramInput() if stdin and follow else None)
        await pieces._attach(time.monotonic() + timeout_s, start=body, which={"Id": body["Id"]})
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

    async def find(self, which: int | str, *, timeout_s: float = _ASK_S) -> ProgramInfo:
        """The program of that number, name or id.

        Raises:
            ProgramNotFound: there is none.
        """
        for info in await self.list(timeout_s=timeout_s):
            if which in ((info.number,) if isinstance(which, int) else (info.name, info.id)):
                return info
        raise ProgramNotFound(f"the guest keeps no program {which}", vm=self.vm, remedy=_LIST)

    async def list(self, *, timeout_s: float = _ASK_S) -> list[ProgramInfo]:
        """See `UtilityVM.programs`."""
        deadline = time.monotonic() + timeout_s
        await self._need(deadline)
        found: list[ProgramInfo] = []
        for _ in range(_MAX_PAGES):
            after = found[-1].number if found else 0
            left = max(deadline - time.monotonic(), 0.0)
            answer = await self._guest._ask(messages.PROGRAMS, messages.request(After=after), left)
            page = answers.read(answers.Programs, answer, what="list of programs", vm=self.vm)
            if page.programs and page.programs[0].number <= after:
                raise ProtocolError(f"the guest's list of programs does not go on after {after}", vm=self.vm)
            found += [_info(program) for program in page.programs]
            if not page.more or not page.programs:
                return found
        raise ProtocolError(f"the guest's list of programs has no end: {len(found)} so far", vm=self.vm)

    async def send_signal(self, number: int, signal: int, *, id: str | None = None, timeout_s: float) -> None:
        """See `Program.send_signal`."""
        if isinstance(signal, bool) or not isinstance(signal, int) or not 0 < signal <= _MAX_SIGNAL:
            raise InvalidRequest(f"{signal!r} is no signal: they are 1 to {_MAX_SIGNAL}", vm=self.vm)
        await self._ask(messages.SIGNAL, number, id, timeout_s, Signal=int(signal))

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
            raise _typed(error) from error

    async def _need(self, deadline: float) -> None:
        self._guest.need_programs(await self._guest._connected(deadline), "keep programs")


_LIST: Final = "list the guest's programs: uvm programs NAME"


def _typed(error: GuestRefused) -> UtilityVMError:
    match error.kind:
        case "no_program":
            return ProgramNotFound(str(error), vm=error.vm, remedy=_LIST)
        case "ended":
            return WrongState(str(error), vm=error.vm)
        case "running":
            return WrongState(str(error), vm=error.vm, remedy="kill it first")
    return error


def _info(told: answers.Program) -> ProgramInfo:
    return ProgramInfo(
        number=told.number,
        id=str(told.id),
        name=None if told.name is None else str(told.name),
        command=tuple(map(str, told.argv)),
        user=None if told.user is None else str(told.user),
        pid=told.pid,
        started=told.started_ms / 1000,
        ended=None if told.ended_ms is None else told.ended_ms / 1000,
        exit_code=told.exit_code,
        out_of_memory=told.out_of_memory,
        takes_input=told.stdin,
        ring_bytes=told.ring_bytes,
        stdout_begin=told.out_begin,
        stdout_end=told.out_end,
        stderr_begin=told.err_begin,
        stderr_end=told.err_end,
        followers=told.follows,
    )


def _sender(client: BridgeClient, number: int) -> Callable[[dict[str, Any]], None]:
    return lambda body: client.notify(messages.RUN_INPUT, {"Process": number, **body})


def _look_at(task: asyncio.Task[None]) -> None:
    """Its error is told to those who wait: it is not unhandled."""
    if not task.cancelled():
        task.exception()


def _whole(read: bytes | BaseException) -> bytes:
    if isinstance(read, BaseException):
        raise read
    return read
