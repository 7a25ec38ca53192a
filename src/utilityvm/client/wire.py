"""HTTP/1.1 over the server's Unix socket.

h11 reads and writes the protocol. The connection is ours, because the process behind the socket is checked before a
byte is sent (machine/sockets.py).
"""

# pyright: reportMissingImports=false
# h11 is the extra [client].

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from utilityvm.errors import DeadlineExceeded, OutcomeUnknown, ProtocolError, SetupError
from utilityvm.log import logger

ANSWER_S: Final = 10.0  # beyond the time that a call itself may take
TRIES: Final = 4
PIECE_BYTES: Final = 65536
_HOST: Final = "utilityvm"

_log = logger(__name__)


class Transport(Protocol):
    """A connection. Each wait ends after `timeout_s` seconds with TimeoutError; None: when something comes."""

    async def send(self, data: bytes, *, timeout_s: float | None) -> None: ...
    async def receive(self, *, timeout_s: float | None) -> bytes: ...
    def close(self) -> None: ...


class Dialler(Protocol):
    """Makes connections to the server, and starts it if none answers."""

    async def dial(self) -> Transport: ...


@dataclass(slots=True)
class Answer:
    """The head of an answer; `pieces` has the rest, and must be read to its end or closed."""

    status: int
    headers: dict[bytes, bytes]
    pieces: AsyncIterator[bytes]

    async def content(self) -> bytes:
        content = bytearray()
        async for piece in self.pieces:
            content += piece
        return bytes(content)


@dataclass(slots=True, kw_only=True)
class Call:
    """A request. It is sent again if its answer is lost, unless it may come only `once`."""

    method: str
    target: str
    body: bytes = b""
    content_type: str = "application/json"
    timeout_s: float | None = ANSWER_S  # until the head of the answer; None: as long as it takes
    once: bool = False
    is_retry: bool = False  # it was sent before, and what came of that is not known

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


class Wire:
    """The connections of one client. They are kept for the next call; a fork of this process has no part in them."""

    def __init__(self, dialler: Dialler) -> None:
        self._dialler = dialler
        self._idle: list[_Connection] = []

    async def ask(self, call: Call) -> Answer:
        """The answer to a call. Its connection is used again once the answer was read to its end.

        Raises:
            DeadlineExceeded: no answer came in time.
            OutcomeUnknown: each connection broke before an answer came.
            SetupError: there is no server, and none can be started.
        """
        if call.once:
            self._close_idle()  # one of them may have been closed by the server, which is no answer
        for _ in range(1 if call.once else TRIES):
            _log.debug("--> %s", call)
            is_fresh = not self._idle
            connection = self._idle.pop() if self._idle else _Connection(await self._dialler.dial())
            try:
                answer = await connection.ask(call, then=self._idle.append)
                _log.debug("<-- %d", answer.status)
                return answer
            except TimeoutError:
                connection.close()
                raise no_answer(call) from None
            except (OSError, EOFError):  # the server ended, or this connection was idle for too long
                connection.close()
                call.is_retry = True
                if not is_fresh:
                    self._close_idle()
            except BaseException:
                connection.close()
                raise
        raise OutcomeUnknown("the server ended before it answered", remedy="see why: its log is beside its socket")

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def close(self) -> None:
        self._close_idle()


def no_answer(call: Call) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the server did not answer within {call.timeout_s:g} s",
        remedy="if its process stands still, let it go on (kill -CONT) or end it (kill -9): the VMs run on, and the "
        "next command starts another server",
    )


class _Connection:
    def __init__(self, transport: Transport) -> None:
        try:
            import h11
        except ModuleNotFoundError as error:
            transport.close()
            raise SetupError(
                "the client needs h11, which is not installed", remedy="pip install 'utilityvm[client]'"
            ) from error
        self._h11 = h11
        self._transport = transport
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, call: Call, *, then: Callable[[_Connection], object]) -> Answer:
        """Raises:
        EOFError, OSError: the connection broke.
        TimeoutError: no answer in time.
        """
        h11 = self._h11
        headers = [("Host", _HOST), ("Content-Length", str(len(call.body)))]
        if call.body or call.method in ("PUT", "POST"):
            headers.append(("Content-Type", call.content_type))
        request = self._http.send(h11.Request(method=call.method, target=call.target, headers=headers))
        data = self._http.send(h11.Data(data=call.body)) if call.body else b""
        end = self._http.send(h11.EndOfMessage())
        await self._transport.send(b"".join((request or b"", data or b"", end or b"")), timeout_s=call.timeout_s)
        until = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        head = await self._event(until)
        if not isinstance(head, h11.Response):
            raise ProtocolError(f"the server answered {type(head).__name__}")
        return Answer(head.status_code, dict(head.headers), self._pieces(then))

    async def _pieces(self, then: Callable[[_Connection], object]) -> AsyncIterator[bytes]:
        h11 = self._h11
        is_whole = False
        try:
            while True:
                event = await self._event(None)
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                    continue
                is_whole = isinstance(event, h11.EndOfMessage)
                return
        finally:
            if is_whole and self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                self._http.start_next_cycle()
                then(self)
            else:
                self.close()

    async def _event(self, until: float | None) -> Any:
        while True:
            try:
                event = self._http.next_event()
            except self._h11.RemoteProtocolError as error:
                raise ProtocolError(f"the server does not speak HTTP: {error}") from error
            if event is not self._h11.NEED_DATA:
                return event
            left = None if until is None else max(until - time.monotonic(), 0.001)
            data = await self._transport.receive(timeout_s=left)
            if not data:
                raise EOFError  # the server says how long each answer is, so this is no end of one
            self._http.receive_data(data)

    def close(self) -> None:
        self._transport.close()


def own_id() -> str:
    """Random bits for an id of a request; the same is used in each retry of it."""
    return os.urandom(8).hex()
