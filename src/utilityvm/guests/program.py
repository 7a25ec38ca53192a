"""A program that runs in the guest, as seen from the host: bytes in, bytes out, and how it ended."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

from utilityvm.bridge import messages
from utilityvm.errors import ProtocolError

OutputSink: TypeAlias = Callable[[bytes], object]
"""Takes output. What it gives is awaited if it can be: until then the program is held back."""

Notify: TypeAlias = Callable[[int, dict[str, Any]], None]


class GuestProgram:
    """One program. Holds no more than a window of its output, whatever the guest sends."""

    def __init__(self, number: int, notify: Notify, *, stdout: OutputSink, stderr: OutputSink) -> None:
        self.number = number
        self._notify = notify
        self._sinks = {"out": stdout, "err": stderr}
        self._output: deque[tuple[str, bytes]] = deque()
        self._output_size = 0
        self._input_credit = messages.INPUT_WINDOW_BYTES
        self._exit_code: int | None = None
        self._changed = asyncio.Event()  # there is output, or the end
        self._may_feed = asyncio.Event()
        self._may_feed.set()

    def take(self, kind: int, body: dict[str, Any]) -> None:
        """What the guest says about it.

        Raises:
            ProtocolError: it makes no sense, or is more output than was allowed.
        """
        try:
            match kind:
                case messages.RUN_OUTPUT:
                    self._take_output(str(body["Stream"]), base64.b64decode(body["Data"], validate=True))
                case messages.RUN_CREDIT:
                    self._input_credit = min(self._input_credit + int(body["Bytes"]), messages.INPUT_WINDOW_BYTES)
                    self._may_feed.set()
                case messages.RUN_EXIT:
                    self._exit_code = int(body["ExitCode"])
                    self._changed.set()
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise ProtocolError(f"the guest sent {kind:#010x} that makes no sense: {error}", message=body) from None

    def _take_output(self, stream: str, data: bytes) -> None:
        if stream not in self._sinks:
            raise ValueError(f"stream {stream!r}")
        self._output_size += len(data)
        if self._output_size > messages.OUTPUT_WINDOW_BYTES:
            raise ProtocolError(f"the guest sent more than the {messages.OUTPUT_WINDOW_BYTES} bytes it was allowed")
        self._output.append((stream, data))
        self._changed.set()

    @property
    def has_ended(self) -> bool:
        """Has the guest said how it ended?"""
        return self._exit_code is not None

    async def deliver(self) -> int:
        """Hand on its output until it has ended; gives its exit code, negative for the signal that killed it."""
        while True:
            while self._output:
                stream, data = self._output.popleft()
                taken = self._sinks[stream](data)
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
