"""A program that runs in the guest, as seen from the host: bytes in, bytes out, and how it ended."""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import Any, AnyStr, Final, Generic, TypeAlias

from utilityvm.bridge import messages
from utilityvm.errors import InvalidRequest, ProtocolError
from utilityvm.guests import answers

OutputSink: TypeAlias = Callable[[bytes], object]
"""Takes output. What it gives is awaited if it can be: until then the program is held back."""

Notify: TypeAlias = Callable[[int, dict[str, Any]], None]

_MAX_PIECES: Final = 256

Said: TypeAlias = answers.Output | answers.Credit | answers.Exit | answers.FollowEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult(Generic[AnyStr]):
    """How a program in the guest ended. `exit_code` is negative for the signal that killed it."""

    exit_code: int
    stdout: AnyStr
    stderr: AnyStr


def as_text(result: CommandResult[bytes]) -> CommandResult[str]:
    """The result with its output as text: UTF-8, with U+FFFD for what is none."""
    out, err = (data.decode(errors="replace") for data in (result.stdout, result.stderr))
    return CommandResult(exit_code=result.exit_code, stdout=out, stderr=err)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program in the guest, and all that it starts, may use together. None: as much as there is.

    A program that uses more memory is killed with all that it started.
    """

    memory_bytes: int | None = None  # 1 MiB or more
    pids: int | None = None  # processes and threads
    cpus: float | None = None  # processors: 0.5 is half of one

    def told(self, vm: str | None = None) -> dict[str, int]:
        """For the agent.

        Raises:
            InvalidRequest: one of them is no such number.
        """
        least = {"memory_bytes": 1 << 20, "pids": 1, "cpus": 0.01}
        most = {"memory_bytes": 1 << 50, "pids": 1 << 22, "cpus": 1024}
        for name, lowest in least.items():
            value = getattr(self, name)
            kinds = (int, float) if name == "cpus" else int
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if value is not None and not (is_number and lowest <= value <= most[name]):
                remedy = f"give a number from {lowest} to {most[name]}"
                raise InvalidRequest(f"the limit {name}={value!r} is out of range", vm=vm, remedy=remedy)
        told = {
            "MemoryBytes": self.memory_bytes,
            "Pids": self.pids,
            "MilliCpus": None if self.cpus is None else round(self.cpus * 1000),
        }
        return {name: value for name, value in told.items() if value is not None}


def heard(kind: int, body: dict[str, Any], *, vm: str | None = None) -> Said:
    """What a guest says about a program.

    Raises:
        ProtocolError: it is not about a program, or makes no sense.
    """
    what = f"message {kind:#010x} about a program"
    match kind:
        case messages.RUN_OUTPUT:
            return answers.read(answers.Output, body, what=what, vm=vm)
        case messages.RUN_CREDIT:
            return answers.read(answers.Credit, body, what=what, vm=vm)
        case messages.RUN_EXIT:
            return answers.read(answers.Exit, body, what=what, vm=vm)
        case messages.FOLLOW_END:
            return answers.read(answers.FollowEnd, body, what=what, vm=vm)
    raise ProtocolError(f"the guest sent {kind:#010x}, which we do not know", message=body, vm=vm)


def run_request(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: PurePosixPath | str | None,
    takes_input: bool,
    user: str | int | None = None,
    limits: Limits | None = None,
    vm: str | None = None,
) -> dict[str, Any]:
    """The request to start a program, without its number.

    Raises:
        InvalidRequest: a word, a name or a value is none.
    """
    if not command or not str(command[0]):
        raise InvalidRequest("the command names no program", vm=vm, remedy="give the program as its first word")
    words = [_text(word, f"word {number} of the command", vm) for number, word in enumerate(command, 1)]
    variables = {
        _text(name, "the name of a variable", vm): _text(value, name, vm) for name, value in (env or {}).items()
    }
    for name in variables:
        if not name or "=" in name:
            raise InvalidRequest(f"{name!r} cannot be the name of a variable", vm=vm)
    more: dict[str, Any] = {}
    if user is not None:
        more["User"] = _text(str(user), "the user", vm)
    if limits is not None and (told := limits.told(vm)):
        more["Limits"] = told
    folder = "" if cwd is None else _text(str(cwd), "the folder", vm)
    if cwd is not None and not folder.startswith("/"):
        raise InvalidRequest(f"the folder {folder!r} is not absolute", vm=vm, remedy="write it as /srv/work")
    return messages.request(Argv=words, Env=variables, Cwd=folder, Stdin=takes_input, **more)


def _text(value: object, what: object, vm: str | None) -> str:
    if isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidRequest(f"{what} is no text, but {type(value).__name__}", vm=vm, remedy="give it as str(...)")
    if "\0" in value:
        raise InvalidRequest(f"{what} has a NUL in it", vm=vm)
    return value


class GuestProgram:
    """One program. Holds no more than a window of its output, in few pieces, whatever the guest sends."""

    def __init__(self, number: int, notify: Notify, *, stdout: OutputSink, stderr: OutputSink) -> None:
        self.number = number
        self._notify = notify
        self._sinks = {"out": stdout, "err": stderr}
        self._output: deque[tuple[str, bytearray]] = deque()  # no two in a row are of the same stream
        self._output_size = 0
        self._input_credit = messages.INPUT_WINDOW_BYTES
        self._exit_code: int | None = None
        self._changed = asyncio.Event()  # there is output, or the end
        self._may_feed = asyncio.Event()
        self._may_feed.set()

    def take(self, said: Said) -> None:
        """What the guest says about it.

        Raises:
            ProtocolError: it is more output than was allowed, or comes after the end.
        """
        if self._exit_code is not None:
            raise ProtocolError(f"the guest speaks of process {self.number}, which has ended", message=said)
        match said:
            case answers.Output():
                self._take_output(said.stream, said.data)
            case answers.Credit():
                self._input_credit = min(self._input_credit + said.bytes, messages.INPUT_WINDOW_BYTES)
                self._may_feed.set()
            case answers.Exit():
                self._exit_code = said.exit_code
                self._changed.set()
            case answers.FollowEnd():
                raise ProtocolError(f"the guest says of process {self.number} what fits another kind", message=said)

    def _take_output(self, stream: str, data: bytes) -> None:
        self._output_size += len(data)
        if self._output_size > messages.OUTPUT_WINDOW_BYTES:
            raise ProtocolError(f"the guest sent more than the {messages.OUTPUT_WINDOW_BYTES} bytes it was allowed")
        if self._output and self._output[-1][0] == stream:
            self._output[-1][1].extend(data)
        elif len(self._output) < _MAX_PIECES:
            self._output.append((stream, bytearray(data)))
        else:  # A byte of each in turn, say. The two streams keep their own order, and lose that between them.
            self._output[-2][1].extend(data)
        self._changed.set()

    @property
    def has_ended(self) -> bool:
        """Has the guest said how it ended?"""
        return self._exit_code is not None

    @property
    def is_held_back(self) -> bool:
        """Is there output that its caller has not taken?"""
        return self._output_size > 0

    @property
    def progress(self) -> str:
        """How far it got, as the beginning of a sentence that ends with why."""
        return "was killed, for" if self._exit_code is None else f"ended with {self._exit_code}, but"

    async def deliver(self) -> int:
        """Hand on its output until it has ended; gives its exit code, negative for the signal that killed it."""
        while True:
            while self._output:
                stream, data = self._output.popleft()
                taken = self._sinks[stream](bytes(data))
                if asyncio.iscoroutine(taken) or asyncio.isfuture(taken):
                    await taken
                self._output_size -= len(data)
                self._notify(messages.RUN_CREDIT, {"Process": self.number, "Bytes": len(data)})
            if self._exit_code is not None:
                return self._exit_code
            self._changed.clear()
            await self._changed.wait()

    async def feed(self, stdin: AsyncIterator[bytes]) -> None:
        """Give it input as it takes it, until `stdin` ends."""
        async for data in stdin:
            rest = memoryview(data)
            while rest:
                while self._input_credit <= 0:
                    self._may_feed.clear()
                    await self._may_feed.wait()
                size = min(len(rest), self._input_credit, messages.CHUNK_BYTES)
                self._input_credit -= size
                self._send_input(bytes(rest[:size]), last=False)
                rest = rest[size:]
        self._send_input(b"", last=True)

    def signal(self, number: int) -> None:
        """Send it a signal, and what it started in its process group."""
        self._notify(messages.RUN_SIGNAL, {"Process": self.number, "Signal": number})

    def cancel(self) -> None:
        """Kill it with all that it started. No more is heard of it."""
        self._notify(messages.RUN_CANCEL, {"Process": self.number})

    def _send_input(self, data: bytes, *, last: bool) -> None:
        body: dict[str, Any] = {"Process": self.number, "Data": base64.b64encode(data).decode()}
        if last:
            body["Eof"] = True
        self._notify(messages.RUN_INPUT, body)
