"""A connection whose waits block the thread: a command that does one call needs no event loop, nor the time to load it.

The client's coroutines await nothing but a `Transport`. With this one they never wait in a way that a loop would have
to know of, so `drive` runs them to their end.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias, TypeVar

from utilityvm.client.wire import PIECE_BYTES

T = TypeVar("T")

QUIET_S: Final = 1.0

OnQuiet: TypeAlias = Callable[[], object]
"""Called about once a second while nothing comes."""


class Blocking:
    """A connected socket. Implements `wire.Transport`."""

    def __init__(self, connection: socket.socket, on_quiet: OnQuiet) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._on_quiet = on_quiet

    async def send(self, data: bytes, *, timeout_s: float | None) -> None:
        rest = memoryview(data)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while rest:
            self._until(select.POLLOUT, until)
            rest = rest[self._connection.send(rest) :]

    async def receive(self, *, timeout_s: float | None) -> bytes:
        self._until(select.POLLIN, None if timeout_s is None else time.monotonic() + timeout_s)
        return self._connection.recv(PIECE_BYTES)

    def _until(self, event: int, until: float | None) -> None:
        poll = select.poll()
        poll.register(self._connection, event)
        while True:
            left = QUIET_S if until is None else min(until - time.monotonic(), QUIET_S)
            if left <= 0:
                raise TimeoutError
            if poll.poll(left * 1000):
                return
            self._on_quiet()

    def close(self) -> None:
        self._connection.close()


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing but blocking connections."""
    try:
        work.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    work.close()
    raise AssertionError("it waits for something that needs an event loop")
