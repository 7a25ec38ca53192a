"""The host's end of the bridge: one connection, many requests under way at once.

Right after connecting, the stream may begin with the rest of what the guest had meant for the host before us. So
nothing is believed until the answer to our negotiate is found in it; from there on every byte counts. A negotiate that
is sent before the guest has opened its port is lost: it is sent again until it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.bridge.frame import HEADER, MAX_SIZE, Decoder, Frame, FrameError, encode, host_json
from utilityvm.errors import DeadlineExceeded, OutcomeUnknown, ProtocolError, VMGone
from utilityvm.log import logger

_log = logger(__name__)

_READ_BYTES: Final = 65536
_NEGOTIATE_AGAIN_S: Final = 0.5
_SECRETS: Final = ("Key",)

Notified = Callable[[int, dict[str, Any]], None]


class BridgeClient:
    """A connection to the guest that was negotiated. Use `connect`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, vm: str | None, on_notify: Notified | None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._vm = vm
        self._on_notify = on_notify
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._given_up: set[int] = set()  # their answers may come late
        self._reading: asyncio.Task[None] | None = None
        self.capabilities: dict[str, Any] = {}
        # Resolves with the reason when the connection is over; every request that waits ends with it.
        self.gone: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(
        cls, path: Path, *, timeout_s: float, vm: str | None = None, on_notify: Notified | None = None
    ) -> BridgeClient:
        """Connect to the guest's end at the Unix socket `path`, and negotiate.

        Raises:
            VMGone: nobody listens there.
            DeadlineExceeded: the guest did not answer within `timeout_s` seconds.
            ProtocolError: it answered what is no answer, or speaks another version.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError as error:
            raise VMGone(f"nobody answers at {path}: {error.strerror}", vm=vm) from error
        return await cls.over(reader, writer, timeout_s=timeout_s, vm=vm, on_notify=on_notify)

    @classmethod
    async def over(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        timeout_s: float,
        vm: str | None = None,
        on_notify: Notified | None = None,
    ) -> BridgeClient:
        """Negotiate over streams that are connected already, such as those of a guest that dialled us."""
        client = cls(reader, writer, vm=vm, on_notify=on_notify)
        try:
            await client._negotiate(timeout_s)
        except BaseException:
            writer.close()
            raise
        client._reading = asyncio.create_task(client._read())
        return client

    async def request(self, kind: int, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and give the body of its response, whatever its Result.

        Raises:
            DeadlineExceeded: no answer came in time. The connection lives on; the answer is dropped when it comes.
            VMGone: the connection ended first.
            OutcomeUnknown: the request does not fit a frame; nothing was sent.
        """
        if self.gone.done():
            raise VMGone(f"the guest's connection is closed: {self.gone.result()}", vm=self._vm)
        id, self._next_id = self._next_id, self._next_id + 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._send(kind, id, body)
        self._waiting[id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"the guest did not answer within {timeout_s:g} s", vm=self._vm) from None
        finally:
            if self._waiting.pop(id, None) is not None and not answer.done():
                self._given_up.add(id)

    def notify(self, kind: int, body: dict[str, Any]) -> None:
        """Send a notification, which nobody answers."""
        if not self.gone.done():
            self._send(kind, 0, body)

    async def close(self) -> None:
        """Hang up. Requests that wait end with VMGone. Twice is once."""
        self._end(VMGone("the connection was closed", vm=self._vm))
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _send(self, kind: int, id: int, body: dict[str, Any]) -> None:
        try:
            data = encode(kind, id, host_json(body))
        except (FrameError, UnicodeEncodeError) as error:
            raise OutcomeUnknown(f"nothing was sent: {error}", vm=self._vm) from None
        if _log.is_enabled_for(10):
            _log.debug("--> %#010x %d %s", kind, id, _shown(body), vm=self._vm)
        self._writer.write(data)

    async def _negotiate(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pending = bytearray()
        head = messages.response_to(messages.NEGOTIATE).to_bytes(4, "little")
        sent: set[int] = set()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(
                    f"the guest's agent did not answer within {timeout_s:g} s",
                    vm=self._vm,
                    remedy="look at the VM's console: uvm log NAME",
                )
            id, self._next_id = self._next_id, self._next_id + 1
            sent.add(id)
            self._send(messages.NEGOTIATE, id, messages.negotiate_request())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, _NEGOTIATE_AGAIN_S)):
                    while True:
                        data = await self._reader.read(_READ_BYTES)
                        if not data:
                            raise VMGone("the guest hung up before it answered", vm=self._vm)
                        pending += data
                        if frame := self._find_answer(pending, head, sent):
                            self._take_negotiated(frame)
                            self._given_up = sent - {frame.id}
                            self._rest = bytes(pending)
                            return

    def _find_answer(self, pending: bytearray, head: bytes, sent: set[int]) -> Frame | None:
        """The response to one of our negotiates, cut out of `pending` with all that came before it."""
        begin = -1
        while (begin := pending.find(head, begin + 1)) >= 0:
            if len(pending) - begin < HEADER.size:
                return None
            kind, size, id = HEADER.unpack_from(pending, begin)
            if id not in sent or not HEADER.size < size <= MAX_SIZE:
                continue
            if len(pending) - begin < size:
                return None
            frame = Frame(kind, id, bytes(pending[begin + HEADER.size : begin + size]))
            del pending[: begin + size]
            return frame
        if len(pending) > 4 * MAX_SIZE:
            raise ProtocolError("the guest sends what is no answer", message=bytes(pending[:64]), vm=self._vm)
        return None

    def _take_negotiated(self, frame: Frame) -> None:
        body = self._body(frame)
        if body.get("Result", 0):
            raise ProtocolError(
                f"the guest refused to negotiate: {body.get('ErrorMessage')}", message=body, vm=self._vm
            )
        if body.get("Version") != messages.PROTOCOL_VERSION:
            raise ProtocolError(
                f"the guest speaks protocol version {body.get('Version')}, we {messages.PROTOCOL_VERSION}",
                message=body,
                vm=self._vm,
            )
        self.capabilities = body.get("Capabilities") or {}

    def _body(self, frame: Frame) -> dict[str, Any]:
        try:
            return frame.body()
        except FrameError as error:
            raise ProtocolError(str(error), message=frame.payload[:200], vm=self._vm) from None

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            data = self._rest
            while True:
                for frame in decoder.feed(data):
                    self._take(frame)
                data = await self._reader.read(_READ_BYTES)
                if not data:
                    raise VMGone("the guest hung up", vm=self._vm)
        except FrameError as error:
            self._end(ProtocolError(f"the guest broke the bridge's rules: {error}", vm=self._vm))
        except (ProtocolError, VMGone) as error:
            self._end(error)
        except OSError as error:
            self._end(VMGone(f"the guest's connection broke: {error}", vm=self._vm))

    def _take(self, frame: Frame) -> None:
        body = self._body(frame)
        if _log.is_enabled_for(10):
            _log.debug("<-- %#010x %d %s", frame.kind, frame.id, _shown(body), vm=self._vm)
        kind = frame.kind & messages.KIND_MASK
        if kind == messages.RESPONSE:
            answer = self._waiting.get(frame.id)
            if answer is not None and not answer.done():
                answer.set_result(body)
            elif frame.id in self._given_up:
                self._given_up.discard(frame.id)
            else:
                raise ProtocolError(f"the guest answered request {frame.id}, which waits for none", message=body)
        elif kind == messages.NOTIFICATION:
            if self._on_notify:
                self._on_notify(frame.kind, body)
        else:
            raise ProtocolError(f"the guest sent {frame.kind:#010x}, which is no answer", message=body, vm=self._vm)

    def _end(self, reason: Exception) -> None:
        if self.gone.done():
            return
        self.gone.set_result(reason)
        self._writer.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(reason)


def _shown(body: object) -> object:
    """The body for a log: without secrets."""
    if isinstance(body, dict):
        return {name: "..." if name in _SECRETS else _shown(value) for name, value in body.items()}
    return body
