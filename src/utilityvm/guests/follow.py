"""Following a kept program: its output, and its end, piece by piece.

A *follow* lives on one connection to the guest; when that ends, the next one goes on at the byte at which it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    OutcomeUnknown,
    ProtocolError,
    UtilityVMError,
    VMGone,
)
from utilityvm.guests import answers
from utilityvm.guests.bridge_client import BridgeClient, NotNegotiated, again
from utilityvm.guests.loops import of_one_loop
from utilityvm.guests.program import Said
from utilityvm.guests.programinfo import ProgramInfo, info_of, typed
from utilityvm.guests.streams import ProgramInput
from utilityvm.machine.oserrors import typed_errors

if TYPE_CHECKING:
    from utilityvm.guests.bridge_guest import BridgeGuest

ASK_S: Final = 30.0
_MIXED_PIECES: Final = 256  # with more that were not taken, the streams lose their order between them, not their own
_MAX_PIECES: Final = 4096
_MAX_ROUNDS: Final = 8  # of starting: the agent was started again each time


@dataclass(frozen=True, slots=True)
class ProgramPiece:
    """Some bytes of a program's output. `offset` counts the bytes of that stream from the program's start."""

    stream: Literal["stdout", "stderr"]
    offset: int
    data: bytes = field(repr=False)


class Following:
    """One follow on one connection: what came and was not taken yet, a window of it at the most."""

    def __init__(self, number: int, client: BridgeClient, offsets: Mapping[str, int], stdin: ProgramInput) -> None:
        self.number = number
        self.client = client
        self.end: answers.FollowEnd | None = None
        self._expected = dict(offsets)
        self._stdin = stdin
        self._pieces: deque[tuple[str, int, bytearray]] = deque()  # few, however small the guest cuts them
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
                self._keep(said.stream, at, said.data)
            case answers.Credit():
                self._stdin._took(said.at or 0)
            case answers.FollowEnd():
                self.end = said
            case _:
                raise ProtocolError(f"the guest says of follow {self.number} what fits another kind", message=said)
        self._changed.set()

    def _keep(self, stream: str, at: int, data: bytes) -> None:
        mixed = 2 if len(self._pieces) >= _MIXED_PIECES else 1
        for last in list(itertools.islice(reversed(self._pieces), mixed)):
            if last[0] == stream:
                if last[1] + len(last[2]) == at:
                    last[2].extend(data)
                    return
                break  # output between the two was dropped
        if len(self._pieces) >= _MAX_PIECES:
            raise ProtocolError(f"the guest sent more than {_MAX_PIECES} pieces of output at once")
        self._pieces.append((stream, at, bytearray(data)))

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
        if not self._pieces:
            return None
        stream, at, data = self._pieces.popleft()
        return stream, at, bytes(data)

    def give_back(self, size: int) -> None:
        """So much of it was taken."""
        self._size -= size
        self.client.notify(messages.RUN_CREDIT, {"Process": self.number, "Bytes": size})


@typed_errors
@of_one_loop
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
        self._following: Following | None = None
        self._owed = 0  # bytes that were given, and not taken yet
        self._which: dict[str, Any] = {}
        self._is_over = False
        self._lost: UtilityVMError | None = None  # how a START was left without an answer

    @property
    def _where(self) -> dict[str, object]:
        """For the errors of its calls."""
        return {"vm": self._guest._vm}

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
                await self._attach(time.monotonic() + ASK_S)
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
            following = Following(number, client, self._offsets, self._stdin)
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
                started = answers.read(answers.Started, answer)
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
                    raise OutcomeUnknown(text) from error
                raise typed(error) from error
            except BaseException:
                self._leave()
                raise
            self.info = info_of(started.program)
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


def _sender(client: BridgeClient, number: int) -> Callable[[dict[str, Any]], None]:
    return lambda body: client.notify(messages.RUN_INPUT, {"Process": number, **body})
