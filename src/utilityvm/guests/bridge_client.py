"""The host's end of the bridge: one connection, many requests under way at once.

Right after connecting, the stream may begin with the rest of what the guest had meant for the host before us. So
nothing is believed until the answer to a negotiate is found in it, and, since that may have been the other host's,
until our own agent has repeated a number that nobody else knows; from there on every byte counts. A negotiate that is
sent before the guest has opened its port may be lost: it is sent again until it is answered.

A guest's agent that is started again is not seen as an end of the connection, for QEMU holds that. It shows as a
request that is refused because nobody negotiated; while something is waited for and nothing is heard, one is sent to
find out. Our own agent says so in a word of its own, and the connection is made anew. hcsshim's gcs says that it knows
no such request; it is negotiated with again on the connection that there is, for what it answered before still holds.

gcs answers each request in a thread of its own, so that of two negotiates the second may be answered first, by a
refusal. The answer to the first is taken whenever it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.bridge.frame import HEADER, MAX_SIZE, Decoder, Frame, FrameError, encode, host_json
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    InvalidRequest,
    OutcomeUnknown,
    ProtocolError,
    UtilityVMError,
    VMGone,
)
from utilityvm.guests import answers
from utilityvm.guests.connection import Streams
from utilityvm.log import logger
from utilityvm.text import clean

_log = logger(__name__)

_READ_BYTES: Final = 65536
_NEGOTIATE_AGAIN_S: Final = (0.05, 0.1, 0.2, 0.4, 0.5)  # then the last of them each time
_FIRST_AGAIN_S: Final = (2.0,)  # a negotiate begins a new session, to which the first request's answer is not sent
_DOUBT_S: Final = 2.0
_MAX_UNSENT_BYTES: Final = 8 << 20
_FLUSH_S: Final = 1.0
_SHOWN_BYTES: Final = 200
_NEGOTIATED: Final = messages.response_to(messages.NEGOTIATE)
_SECRETS: Final = frozenset(("Key", "Argv", "Env", "Data", "Seed"))  # Data is what programs read and write
_NOT_IMPLEMENTED: Final = messages.signed(messages.E_NOT_IMPLEMENTED)

Notified = Callable[[int, dict[str, Any]], None]


class NotNegotiated(OutcomeUnknown):
    """The guest's agent was started again and does not know us. It did not look at the request that met this."""


class BridgeClient:
    """A connection to the guest that was negotiated. Use `over`."""

    def __init__(self, streams: Streams, *, vm: str | None, on_notify: Notified | None) -> None:
        self._reader, self._writer = streams
        self._vm = vm
        self._on_notify = on_notify
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._given_up: set[int] = set()  # their answers may come late
        self._negotiates: set[int] = set()  # and of these, those of a host before us too
        self._renegotiates: set[int] = set()  # sent on a connection that was negotiated before
        self._decoder = Decoder()
        self._early: list[Frame] = []  # came with the answer to the negotiate
        self._heard_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._first: tuple[int, dict[str, Any]] | None = None
        self._proof = (-1, "")  # number and activity of the request whose answer shows that we are in step
        self.first_answer: dict[str, Any] | None = None
        self.about: answers.About | None = None  # what our agent said of itself; another guest says nothing
        self.capabilities: dict[str, Any] = {}  # as the guest told them; `about` is what we read of them
        self.was_negotiated_before = False  # by somebody, with a guest that takes only one negotiate
        self.is_watched = False  # something is waited for that is no request: look whether the agent is still there
        # Resolves with the reason when the connection is over; every request that waits ends with it.
        self.gone: asyncio.Future[UtilityVMError] = asyncio.get_running_loop().create_future()

    @classmethod
    async def over(
        cls,
        streams: Streams,
        *,
        timeout_s: float,
        vm: str | None = None,
        on_notify: Notified | None = None,
        first: tuple[int, dict[str, Any]] | None = None,
    ) -> BridgeClient:
        """Negotiate over `streams`, which are closed if that fails.

        `on_notify` gets the type and the body of each notification. It may raise ProtocolError, which ends the
        connection; without it every notification does.

        `first` is a request for our agent that goes out with the negotiate, and again with each one that has to be
        repeated; its answer is then in `first_answer`.

        Raises:
            VMGone: the guest hung up.
            DeadlineExceeded: it did not answer within `timeout_s` seconds.
            ProtocolError: it answered what is no answer, or speaks another version.
        """
        client = cls(streams, vm=vm, on_notify=on_notify)
        client._first = first
        try:
            await client._negotiate(timeout_s)
        except FrameError as error:
            streams[1].close()
            raise ProtocolError(f"the guest broke the bridge's rules: {error}", vm=vm) from None
        except BaseException:
            streams[1].close()
            raise
        client._tasks = [asyncio.create_task(client._read()), asyncio.create_task(client._doubt())]
        return client

    @property
    def is_ours(self) -> bool:
        """Does our own agent answer, and not another guest of the same protocol?"""
        return self.about is not None

    async def request(self, kind: int, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and give the body of its response, whatever its Result.

        Raises:
            InvalidRequest: it does not fit a frame, or is no text; nothing was sent.
            GuestRefused: the guest has stopped taking what we send; nothing was sent.
            DeadlineExceeded: no answer came in time. The connection lives on; the answer is dropped when it comes.
            ProtocolError: the answer is no answer; the connection ended with it.
            VMGone, ProtocolError, OutcomeUnknown: the connection ended first; `gone` has the reason.
            NotNegotiated: the agent is a new one, and did not look at this request; negotiate and send it again.
        """
        if self.gone.done():
            raise again(self.gone.result())
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        id = self._send(kind, body)
        self._waiting[id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                either: list[asyncio.Future[Any]] = [answer, self.gone]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise DeadlineExceeded(f"the guest did not answer within {timeout_s:g} s", vm=self._vm) from None
        finally:
            del self._waiting[id]
            if not answer.done():
                self._given_up.add(id)
        if not answer.done():
            raise again(self.gone.result())
        body = answer.result()
        if self.is_ours and self._kind_of(body) == messages.NOT_NEGOTIATED:
            raise NotNegotiated("the guest's agent was started again", vm=self._vm)
        return body

    async def negotiate_again(self, *, timeout_s: float) -> None:
        """Negotiate once more on this connection, with a guest that is not ours and was started again.

        Raises:
            as `request`, and ProtocolError: it refuses, or speaks another version.
        """
        self._renegotiates.add(self._next_id)
        answer = await self.request(messages.NEGOTIATE, messages.negotiate_request(), timeout_s=timeout_s)
        self._take_negotiated_without_proof(answer)

    def must_negotiate(self, kind: int, answer: dict[str, Any]) -> bool:
        """Did a guest that is not ours refuse the request, unseen, because nobody negotiated with it?

        It is gcs's word for a request that it does not know; and this one it knows, but before a negotiate.
        """
        return not self.is_ours and kind == messages.MODIFY and answer.get("Result") == _NOT_IMPLEMENTED

    def notify(self, kind: int, body: dict[str, Any]) -> None:
        """Send a notification, which nobody answers. To a connection that is over nothing is sent."""
        if not self.gone.done():
            self._write(kind, 0, body)

    def end(self, reason: UtilityVMError) -> None:
        """End the connection: everyone who waits gets `reason`. Twice is once."""
        if not self.gone.done():
            _log.debug("the connection is over: %s", reason, vm=self._vm)
            self.gone.set_result(reason)
            # Not close(), which waits until the peer has taken what was written: it may never do so.
            _abort(self._writer)

    async def close(self) -> None:
        """Send what was not sent yet, for a second at the most, and hang up. Requests that wait end with VMGone."""
        closing = asyncio.ensure_future(self._writer.wait_closed())
        try:
            if not self.gone.done():
                self.gone.set_result(VMGone("the connection was closed", vm=self._vm))
                self._writer.close()
                await asyncio.wait([closing], timeout=_FLUSH_S)
        finally:
            _abort(self._writer)
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(closing, *self._tasks, return_exceptions=True)

    def _send(self, kind: int, body: dict[str, Any]) -> int:
        """Send a request, and give its id."""
        id, self._next_id = self._next_id, self._next_id + 1
        self._write(kind, id, body)
        return id

    def _write(self, kind: int, id: int, body: dict[str, Any]) -> None:
        try:
            data = encode(kind, id, host_json(body))
        except FrameError as error:
            raise InvalidRequest(str(error), vm=self._vm) from None
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            raise GuestRefused("the guest has stopped taking what is sent to it", vm=self._vm)
        if _log.is_enabled_for(logging.DEBUG):
            _log.debug("--> %#010x %d %s", kind, id, _shown(body), vm=self._vm)
        # The guest may have hung up, and what it said before is still being read: asyncio would log each write.
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    # The beginning.

    async def _negotiate(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pending = bytearray()
        strange = b""
        again_s = _FIRST_AGAIN_S if self._first else _NEGOTIATE_AGAIN_S
        pauses = itertools.chain(again_s, itertools.repeat(again_s[-1]))
        restarts = itertools.chain(_NEGOTIATE_AGAIN_S, itertools.repeat(_NEGOTIATE_AGAIN_S[-1]))
        while (left := deadline - time.monotonic()) > 0:
            frame = None
            self._negotiates.add(self._send(messages.NEGOTIATE, messages.negotiate_request()))
            if self._first:
                self._send_proof(*self._first)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, next(pauses))):
                    while not (frame := self._find_answer(pending)):
                        strange = strange or bytes(pending[:_SHOWN_BYTES])
                        # No answer begins before here: it would have been found, or it would be longer than a frame.
                        del pending[: max(len(pending) - MAX_SIZE, 0)]
                        pending += await self._receive()
            if frame:
                self._take_negotiated(self._body(frame))
                if not self.is_ours:
                    self._early = list(self._decoder.feed(bytes(pending)))
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(deadline - time.monotonic()):
                        if await self._is_in_step(bytes(pending)):
                            return
                pending.clear()
                # A new agent, which was just started. One that says so again and again is not asked as fast as it can.
                await asyncio.sleep(min(next(restarts), max(deadline - time.monotonic(), 0.0)))
        if strange:
            raise ProtocolError(
                f"what the guest sent in {timeout_s:g} s holds no answer to a negotiate", message=strange, vm=self._vm
            )
        raise DeadlineExceeded(
            f"the guest's agent did not answer within {timeout_s:g} s",
            vm=self._vm,
            remedy="look at the VM's console: uvm log NAME",
        )

    def _send_proof(self, kind: int, body: dict[str, Any]) -> None:
        activity = os.urandom(16).hex()
        self._proof = self._send(kind, {**body, "ActivityId": activity}), activity

    async def _is_in_step(self, data: bytes) -> bool:
        """Drop what comes before the answer to a ping of ours. False: the agent is a new one, and not negotiated with.

        The agent answers a ping at once and in turn, and sends nothing of the host before us once it has our negotiate.
        The first request, if there is one, was sent already and does as well.
        """
        if not self._first:
            self._send_proof(messages.PING, messages.request())
        id, activity = self._proof
        self._decoder = Decoder()
        while True:
            frames = self._decoder.feed(data)
            for frame in frames:
                body = self._body(frame)
                if frame.id == id and body.get("ActivityId") == activity:
                    self._early = list(frames)
                    if self._first:
                        self.first_answer = body
                        return True
                    return not body.get("Result")
                if frame.id == id and self._kind_of(body) == messages.NOT_NEGOTIATED:
                    return False
            data = await self._receive()

    async def _receive(self) -> bytes:
        try:
            data = await self._reader.read(_READ_BYTES)
        except OSError as error:
            raise VMGone(f"the guest's connection broke: {error}", vm=self._vm) from error
        if not data:
            raise VMGone("the guest hung up", vm=self._vm)
        self._heard_at = time.monotonic()
        return data

    def _find_answer(self, pending: bytearray) -> Frame | None:
        """The response to one of our negotiates, cut out of `pending` with all that came before it."""
        head = _NEGOTIATED.to_bytes(4, "little")
        begin = -1
        while (begin := pending.find(head, begin + 1)) >= 0 and len(pending) - begin >= HEADER.size:
            kind, size, id = HEADER.unpack_from(pending, begin)
            if id in self._negotiates and HEADER.size < size <= MAX_SIZE and len(pending) - begin >= size:
                frame = Frame(kind, id, bytes(pending[begin + HEADER.size : begin + size]))
                del pending[: begin + size]
                return frame
        return None

    def _take_negotiated(self, body: dict[str, Any]) -> None:
        if body.get("Result") == _NOT_IMPLEMENTED:
            # What hcsshim's gcs says to a second negotiate. Behind a virtio-serial port, which stays open when its host
            # goes, the first one may have been that of a host before us; there is only the one version.
            self.was_negotiated_before = True
            return
        answer = answers.read(answers.Negotiated, body, what="answer to a negotiate", vm=self._vm)
        if answer.result:
            text = f"the guest refused to negotiate: {answer.error_message}"
            raise ProtocolError(text, message=body, vm=self._vm)
        if answer.version != messages.PROTOCOL_VERSION:
            text = f"the guest speaks protocol version {answer.version}, we {messages.PROTOCOL_VERSION}"
            raise ProtocolError(text, message=body, vm=self._vm)
        self.capabilities = dict(body.get("Capabilities") or {})
        self.about = answer.capabilities.utilityvm if answer.capabilities else None
        self.was_negotiated_before = False

    # What comes in.

    async def _read(self) -> None:
        try:
            frames: Iterable[Frame] = self._early
            while True:
                for frame in frames:
                    self._take(frame)
                    if self.gone.done():
                        return
                frames = self._decoder.feed(await self._receive())
        except FrameError as error:
            self.end(ProtocolError(f"the guest broke the bridge's rules: {error}", vm=self._vm))
        except VMGone as error:
            text = str(error) if self._decoder.is_between_frames else f"{error} in the middle of a message"
            self.end(VMGone(text, vm=self._vm))
        except UtilityVMError as error:
            self.end(error)
        except Exception as error:  # a message that our own code did not foresee
            text = f"the guest sent what cannot be dealt with: {type(error).__name__}: {clean(str(error))}"
            self.end(ProtocolError(text, vm=self._vm))

    async def _doubt(self) -> None:
        """While something is waited for and nothing is heard: is the agent still the one that we spoke to?"""
        while self.is_ours and not self.gone.done():
            await asyncio.sleep(_DOUBT_S)
            if (self._waiting or self.is_watched) and time.monotonic() - self._heard_at >= _DOUBT_S:
                with contextlib.suppress(UtilityVMError):
                    await self.request(messages.PING, messages.request(), timeout_s=_DOUBT_S)

    def _body(self, frame: Frame) -> dict[str, Any]:
        try:
            return frame.body()
        except FrameError as error:
            raise ProtocolError(str(error), message=frame.payload[:_SHOWN_BYTES], vm=self._vm) from None

    def _take(self, frame: Frame) -> None:
        body = self._body(frame)
        if _log.is_enabled_for(logging.DEBUG):
            _log.debug("<-- %#010x %d %s", frame.kind, frame.id, _shown(body), vm=self._vm)
        kind = frame.kind & messages.KIND_MASK
        if kind == messages.RESPONSE:
            self._take_response(frame, body)
        elif kind == messages.NOTIFICATION and self._on_notify:
            self._on_notify(frame.kind, body)
        else:
            raise ProtocolError(f"the guest sent {frame.kind:#010x}, which nobody waits for", message=body, vm=self._vm)

    def _take_response(self, frame: Frame, body: dict[str, Any]) -> None:
        if self.is_ours and self._kind_of(body) == messages.NOT_NEGOTIATED:
            # What the others had asked may have been done by the agent before: only this one knows that it was not.
            self.end(OutcomeUnknown("the guest's agent was started again before it answered", vm=self._vm))
        if frame.kind == _NEGOTIATED and frame.id in self._negotiates:
            self._take_late_negotiated(body)
            return
        answers.read(answers.Response, body, vm=self._vm)
        is_expected = frame.kind != _NEGOTIATED or frame.id in self._renegotiates
        answer = self._waiting.get(frame.id) if is_expected else None
        if answer is not None and not answer.done():
            answer.set_result(body)
        elif frame.id in self._given_up:
            self._given_up.discard(frame.id)
        else:
            text = f"the guest answered request {frame.id}, which waits for no answer"
            raise ProtocolError(text, message=body, vm=self._vm)

    def _take_late_negotiated(self, body: dict[str, Any]) -> None:
        """The answer to a negotiate that was sent again before it came: it counts, if that of the other was a no."""
        if self.was_negotiated_before and not body.get("Result"):
            self._take_negotiated_without_proof(body)

    def _take_negotiated_without_proof(self, body: dict[str, Any]) -> None:
        self._take_negotiated(body)
        if self.is_ours:  # it is another agent than before, and we are not in step with it
            self.end(OutcomeUnknown("the guest's agent was started again", vm=self._vm))

    def _kind_of(self, body: dict[str, Any]) -> str | None:
        return answers.read(answers.Response, body, vm=self._vm).kind


def _abort(writer: asyncio.StreamWriter) -> None:
    """Hang up at once, also if that has just been done.

    A transport that sent the rest after `close` and ended has no loop any more, and asyncio's abort() wants one
    (CPython 3.11, selector_events.py: _write_ready calls _call_connection_lost without a count in _conn_lost).
    """
    with contextlib.suppress(AttributeError):
        writer.transport.abort()


def again(reason: UtilityVMError) -> UtilityVMError:
    """The same error for one more who waits: each raises one of his own, with his own traceback."""
    kind = type(reason)
    error = kind.__new__(kind, *reason.args)
    error.__dict__.update(reason.__dict__)
    error.__cause__ = reason.__cause__
    return error


def _shown(body: object) -> object:
    """The body for a log: without secrets."""
    if isinstance(body, dict):
        return {name: "..." if name in _SECRETS else _shown(value) for name, value in body.items()}
    return body
