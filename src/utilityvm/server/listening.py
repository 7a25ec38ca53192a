"""Serves the application by uvicorn, and says who may speak to it, how long, and how much.

The socket lies in the runtime folder with mode 0600; besides, the kernel says of each connection who made it, and
another user's is closed before a byte of it is read.
"""

# pyright: reportMissingImports=false
# uvicorn and h11 are the extra [server].

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from utilityvm.errors import SetupError
from utilityvm.log import logger
from utilityvm.server.app import App

HEAD_S: Final = 10.0  # for the head of a request to come
IDLE_S: Final = 300  # that a connection may stay without one
MOST_HEAD_BYTES: Final = 32 * 1024
MOST_CONNECTIONS: Final = 4096
FILES: Final = 16384  # that the server may have open
BACKLOG: Final = 1024
GOODBYE_S: Final = 3
_PEER: Final = struct.Struct("3i")

_log = logger(__name__)


def check_installed() -> None:
    """Raises:
    SetupError: the extra is missing.
    """
    try:
        import h11  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise SetupError(
            f"the server needs {error.name}, which is not installed", remedy="pip install 'utilityvm[server]'"
        ) from error


async def serve(app: App, listener: socket.socket, *, until: Callable[[], Awaitable[None]]) -> None:
    """Answer what comes in at `listener` until `until` returns, or SIGTERM or SIGINT comes; closes the listener."""
    import uvicorn

    _allow_files()
    listener.setblocking(False)
    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=GOODBYE_S,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
    )
    server = uvicorn.Server(config)

    async def end() -> None:
        await until()
        server.should_exit = True

    ending = asyncio.create_task(end(), name="end of the server")
    try:
        await server.serve(sockets=[listener])
    finally:
        ending.cancel()
        await asyncio.wait([ending])


def _allow_files() -> None:
    """Each connection is an open file; the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _protocol() -> type[Any]:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """A connection, of this user, that says what it wants in time."""

        _impatient: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if not _is_ours(transport.get_extra_info("socket")):
                transport.abort()
                return
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._impatient is not None:
                self._impatient.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._is_answering() and not self.transport.is_closing():
                self._expect_head()
            elif self._impatient is not None:
                self._impatient.cancel()
                self._impatient = None

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _expect_head(self) -> None:
            if self._impatient is None:
                self._impatient = self.loop.call_later(HEAD_S, self._lose_patience)

        def _lose_patience(self) -> None:
            self._impatient = None
            if not self._is_answering():
                self.transport.abort()

    return Protocol


def _is_ours(connection: Any) -> bool:
    """Did this user, or root, make the connection? Source: unix(7), SO_PEERCRED."""
    try:
        pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    except OSError:
        return False
    if uid in (os.geteuid(), 0):
        return True
    _log.warning("process %d of user %d connected, and was turned away", pid, uid)
    return False
