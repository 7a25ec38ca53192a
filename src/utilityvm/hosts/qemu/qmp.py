"""One connection to QEMU's monitor: commands in flight side by side, file descriptors, events, and the end of it.

How QEMU reads this socket decides how we write to it (monitor/qmp.c and chardev/char-socket.c, measured on 7.2):

* It reads **one byte a turn** of its monitor thread, some 3.6 us each. The length of a command is most of its price, so
  commands are written without blanks and line ends, and with short names.
* It reads on while a command runs, and answers in the order of the questions. So commands may be written back to
  back, answers are told apart by their order (the `id` is one digit, which has to fit), and nothing is gained by the
  out-of-band mode, which is left off.
* It keeps **one** received descriptor: the next one to arrive replaces it, also when `add-fd` has not yet fetched the
  first. Two in flight could put one caller's file on another caller's disk. So a descriptor travels in the same
  `sendmsg` as its `add-fd`, and the next one waits for that answer.
* One client is served at a time; a second one is accepted by the kernel and hears nothing.
* What a client leaves behind reaches the next one: the rest of an answer that was not all written, before the
  greeting, and the answer to the command that QEMU was busy with, after it. So nothing is looked at before the
  greeting, and from there nothing before the answer to our first command, whose `id` nobody else has.

This is why the library `qemu.qmp` is not used here: see docs/decisions/0003-own-qmp-client.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, cast

from utilityvm.errors import DeadlineExceeded, HostRefused, ProtocolError, UtilityVMError, VMGone
from utilityvm.log import logger
from utilityvm.machine import oserrors, sockets
from utilityvm.machine.sockets import Listener
from utilityvm.text import clean

Arguments: TypeAlias = Mapping[str, object]
Command: TypeAlias = tuple[str, Arguments]

_SUSPECT: Final = re.compile(rb'[\x7f-\xff]|\\[^"\\/nt]')  # what cannot be in a text that needs no cleaning
LONGEST_MESSAGE: Final = 64 << 20  # bytes; query-named-block-nodes of a full VM is about one hundredth of it
_READ: Final = 1 << 18
_IDS: Final = 10
_ARGUMENTS: Final = json.JSONEncoder(separators=(",", ":"))
_SHOWN: Final = 400  # characters of a message that an error or a log line may carry

_log = logger(__name__)


class QmpRefused(HostRefused):
    """QEMU answered a command with an error; `kind` is its class, `description` its words."""

    def __init__(self, command: str, kind: str, description: str, *, vm: str | None = None) -> None:
        super().__init__(f"QEMU refused {command}: {description}", vm=vm)
        self.command = command
        self.kind = kind
        self.description = description


@dataclass(frozen=True, slots=True)
class Event:
    """Something that QEMU told without being asked."""

    name: str
    data: Mapping[str, Any]

    @property
    def device(self) -> str | None:
        """The qdev id that it is about, where it is about a device that has one."""
        value = self.data.get("device")
        return value if isinstance(value, str) else None


Answer: TypeAlias = "Any | QmpRefused"


@dataclass(slots=True, eq=False)
class _Chunk:
    """Bytes on their way to QEMU, and the descriptor that goes with the first of them; None once that has gone."""

    data: memoryview
    fd: int | None = None


@dataclass(slots=True, eq=False)
class _Question:
    command: str
    text: bytes
    future: asyncio.Future[Answer]
    id: int = -1


@dataclass(slots=True, eq=False)
class _Batch:
    questions: list[_Question]
    fd: int  # the caller's, who closes it as soon as he is answered
    chunk: _Chunk | None = None  # where it is on its way to QEMU


@dataclass(slots=True, eq=False)
class _Waiter:
    events: frozenset[str]
    device: str | None
    future: asyncio.Future[Event]


class Qmp:
    """A connection whose greeting and negotiation are done. Owned by the event loop that made it."""

    def __init__(self, sock: socket.socket, *, vm: str) -> None:
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._vm = vm
        self._log = _log.bind(vm=vm)
        self._received = bytearray()
        self._searched = 0
        self._out: deque[_Chunk] = deque()
        self._with_fd: deque[_Batch] = deque()  # those that wait for the answer to an add-fd before them
        self._fd_in_flight: asyncio.Future[Answer] | None = None
        self._next_id = _IDS + int.from_bytes(os.urandom(6))  # of the first; then they are digits
        self._is_in_step = False  # the first answer came
        self._pending: deque[_Question] = deque()  # sent, in this order
        self._waiters: list[_Waiter] = []
        self._greeting: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.last_shutdown: Event | None = None
        self.on_event: Callable[[Event], None] | None = None  # told of every event, in order
        self.gone: asyncio.Future[UtilityVMError] = self._loop.create_future()
        self.version = ""
        self._loop.add_reader(self._socket, self._readable)

    @classmethod
    async def connect(cls, path: Path | Listener, *, vm: str, timeout_s: float) -> Self:
        """Connect to the monitor socket at `path` and agree on its capabilities.

        Raises:
            VMGone: nobody listens there, or whoever does hung up before it had greeted. Whether QEMU runs is another
                question: ask its process.
            DeadlineExceeded: no greeting within `timeout_s` seconds: another client is connected, or QEMU hangs.
            SetupError: we cannot connect: the path is too long for a socket's, or too many files are open.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        try:
            sock = await sockets.connect(path, timeout_s=timeout_s, vm=vm)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise VMGone(f"QEMU of VM {vm} does not listen at {path}: {error.strerror}", vm=vm) from error
        except OSError as error:
            raise oserrors.as_ours(error, f"cannot connect to {path}", vm=vm) from error
        qmp = cls(sock, vm=vm)
        try:
            async with asyncio.timeout_at(until):
                greeting = await qmp._first(qmp._greeting)
                qmp.version = _version(greeting)
                await qmp._negotiate(timeout_s=timeout_s)
        except TimeoutError as error:
            qmp.close()
            raise DeadlineExceeded(
                f"QEMU of VM {vm} did not greet within {timeout_s:g} s",
                vm=vm,
                remedy="it serves one client at a time: end the other one, or stop the VM if QEMU hangs",
            ) from error
        except BaseException:
            qmp.close()
            raise
        return qmp

    async def execute(self, command: str, arguments: Arguments | None = None, *, timeout_s: float) -> Any:
        """Have one command done and give what it returned.

        Raises:
            QmpRefused: QEMU said no.
            DeadlineExceeded: no answer within `timeout_s` seconds; QEMU may still do it.
            VMGone: the connection ended, now or before.
            ProtocolError: QEMU sent what is not QMP.
        """
        (answer,) = await self.execute_all([(command, arguments or {})], timeout_s=timeout_s)
        if isinstance(answer, QmpRefused):
            raise answer
        return answer

    async def execute_all(
        self, commands: Sequence[Command], *, timeout_s: float, fd: int | None = None
    ) -> list[Answer]:
        """Send commands back to back and give their answers in order; a refusal is given, not raised.

        QEMU does each whether or not one before it was refused, so a later one must be harmless then. `fd` goes with
        the first, which must be `add-fd`; it stays the caller's to close, and is not used after this has returned. A
        batch whose descriptor was not sent when its time is up, or its caller is cancelled, is never sent.

        Raises:
            DeadlineExceeded: not all were answered within `timeout_s` seconds; QEMU may still do them.
            VMGone, ProtocolError: as `execute`.
        """
        if self.gone.done():
            raise _again(self.gone.result())
        questions = [
            _Question(command, _ARGUMENTS.encode(arguments).encode(), self._loop.create_future())
            for command, arguments in commands
        ]
        batch = None
        if fd is None:
            self._put(questions)
        else:
            batch = _Batch(questions, fd)
            self._with_fd.append(batch)
            self._send_next_fd()
        try:
            async with asyncio.timeout(timeout_s):
                return [await question.future for question in questions]
        except TimeoutError as error:
            names = ", ".join(command for command, _ in commands)
            raise DeadlineExceeded(f"no answer from QEMU to {names} within {timeout_s:g} s", vm=self._vm) from error
        finally:
            if batch is not None:
                self._withdraw(batch)
            for question in questions:
                if question.future.done() and not question.future.cancelled():
                    question.future.exception()  # the first of them was raised; the others say the same

    @contextmanager
    def expecting(self, *events: str, device: str | None = None) -> Generator[asyncio.Future[Event]]:
        """A future of the next such event (about `device`, if given), listened for from here on.

        Enter it before the command that causes the event is sent. It raises VMGone when the connection ends.
        """
        future: asyncio.Future[Event] = self._loop.create_future()
        waiter = _Waiter(frozenset(events), device, future)
        if self.gone.done():
            future.set_exception(_again(self.gone.result()))
        self._waiters.append(waiter)
        try:
            yield future
        finally:
            self._waiters.remove(waiter)
            if not future.cancel() and not future.cancelled():
                future.exception()

    def close(self) -> None:
        """Hang up. Everyone who waits gets VMGone. Twice is once."""
        self._end(VMGone(f"the connection to QEMU of VM {self._vm} was closed", vm=self._vm))

    async def _negotiate(self, *, timeout_s: float) -> None:
        try:
            await self.execute("qmp_capabilities", timeout_s=timeout_s)
        except QmpRefused as error:
            if error.kind != "CommandNotFound":
                raise
            # That of a client that died was done when ours had connected already. Source: monitor/qmp-cmds-control.c

    # From here on: what the event loop calls.

    def _put(self, questions: Sequence[_Question], fd: int | None = None) -> _Chunk:
        parts: list[bytes] = []
        for question in questions:
            question.id, self._next_id = self._next_id, (self._next_id + 1) % _IDS
            parts.append(
                b'{"execute":"%s","arguments":%s,"id":%d}' % (question.command.encode(), question.text, question.id)
            )
        self._pending.extend(questions)
        data = b"".join(parts)
        self._log.debug("--> %s", data)
        chunk = _Chunk(memoryview(data), fd)
        self._out.append(chunk)
        if len(self._out) == 1:
            self._writable()
        return chunk

    def _send_next_fd(self) -> None:
        if self._fd_in_flight is None and self._with_fd:
            batch = self._with_fd.popleft()
            self._fd_in_flight = batch.questions[0].future
            batch.chunk = self._put(batch.questions, batch.fd)

    def _withdraw(self, batch: _Batch) -> None:
        """Its caller goes away: its descriptor must not be sent any more. What was sent stays sent."""
        if batch in self._with_fd:
            self._with_fd.remove(batch)
        elif batch.chunk is not None and batch.chunk.fd is not None and batch.chunk in self._out:
            self._out.remove(batch.chunk)
            for question in batch.questions:
                self._pending.remove(question)
            self._fd_in_flight = None
            self._send_next_fd()

    def _writable(self) -> None:
        while self._out:
            chunk = self._out[0]
            try:
                if chunk.fd is None:
                    sent = self._socket.send(chunk.data)
                else:
                    sent = socket.send_fds(self._socket, [chunk.data], [chunk.fd])
                    chunk.fd = None
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._writable)
                return
            except OSError as error:
                self._lost(error)
                return
            chunk.data = chunk.data[sent:]
            if not chunk.data:
                self._out.popleft()
        self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if not data:
            self._lost(None)
            return
        self._received += data
        while (end := self._received.find(b"\n", self._searched)) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            self._searched = 0
            try:
                self._take(line)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                self._end(
                    ProtocolError(
                        f"QEMU of VM {self._vm} sent what is not QMP: {clean(repr(error))}",
                        message=clean(line[:_SHOWN].decode(errors="replace")),
                        vm=self._vm,
                    )
                )
            if self.gone.done():
                return
        self._searched = len(self._received)
        if self._searched > LONGEST_MESSAGE:
            self._end(ProtocolError(f"QEMU of VM {self._vm} sent a message without an end", vm=self._vm))

    def _take(self, line: bytes) -> None:
        self._log.debug("<-- %s", line[:_SHOWN])
        if not self._greeting.done():
            self._take_greeting(line)
            return
        message = _read(line)
        if "event" in message:
            self._take_event(Event(str(message["event"]), dict(message.get("data", {}))))
        elif "QMP" in message:
            raise ValueError("a second greeting")
        elif self._is_in_step or (self._pending and message.get("id") == self._pending[0].id):
            self._is_in_step = True
            self._take_answer(message)

    def _take_greeting(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, RecursionError):
            message = _read(line)
            if "QMP" in message:
                self._greeting.set_result(message)

    def _take_answer(self, message: dict[str, Any]) -> None:
        question = self._pending[0]  # taken off only when the message made sense: if it does not, this one is told too
        if message["id"] != question.id:
            raise ValueError(f"the answer to {question.command} has id {message['id']}, not {question.id}")
        answer: Answer
        if "error" in message:
            answer = QmpRefused(question.command, message["error"]["class"], message["error"]["desc"], vm=self._vm)
        else:
            answer = message["return"]
        self._pending.popleft()
        if question.future is self._fd_in_flight:
            self._fd_in_flight = None
            self._send_next_fd()
        if not question.future.done():
            question.future.set_result(answer)

    def _take_event(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            self.last_shutdown = event
        if self.on_event is not None:
            self.on_event(event)
        for waiter in self._waiters:
            if event.name in waiter.events and waiter.device in (None, event.device) and not waiter.future.done():
                waiter.future.set_result(event)

    def _lost(self, error: OSError | None) -> None:
        why = f": {error.strerror}" if error else ""
        if self.last_shutdown:
            why = f" after {self.last_shutdown.data.get('reason', 'a shutdown')}"
        self._end(VMGone(f"QEMU of VM {self._vm} hung up{why}", vm=self._vm))

    def _end(self, reason: UtilityVMError) -> None:
        if self.gone.done():
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self.gone.set_result(reason)
        for question in chain(self._pending, *(batch.questions for batch in self._with_fd)):
            if not question.future.done():
                question.future.set_exception(_again(reason))
        self._out.clear()
        self._with_fd.clear()
        self._pending.clear()
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(_again(reason))

    async def _first(self, future: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        """The future's result, or the end of the connection if that comes first."""
        await asyncio.wait({asyncio.ensure_future(future), self.gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise _again(self.gone.result())
        return future.result()


def _again(reason: UtilityVMError) -> UtilityVMError:
    """The same error for one more caller: an exception that is raised twice keeps both stacks."""
    if isinstance(reason, ProtocolError):
        return ProtocolError(str(reason), message=reason.message, vm=reason.vm)
    return VMGone(str(reason), vm=reason.vm, remedy=reason.remedy)


def _read(line: bytes) -> Any:
    """A message, without what a terminal would obey: it may be of a QEMU that its guest has taken over.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    message = json.loads(line)
    return _cleaned(message) if _SUSPECT.search(line) else message


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(one) for name, one in cast(dict[str, Any], value).items()}
    return value


def _version(greeting: Mapping[str, Any]) -> str:
    version = greeting["QMP"]["version"]["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"
