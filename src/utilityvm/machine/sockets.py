"""Connecting to a Unix socket, with three answers: connected, nobody listens, cannot be told yet."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Final

from utilityvm.errors import DeadlineExceeded
from utilityvm.machine import forks

_LOOK_AGAIN_S: Final = 0.02


async def connect(path: Path, *, timeout_s: float, vm: str | None = None) -> socket.socket:
    """A connection to the socket at `path`, which does not block, and which forks of this process have no part in.

    A full queue of connections is waited for: somebody listens, and is busy or stands still. (asyncio takes the EAGAIN
    that the kernel answers then for a connection under way, and goes on with a socket that is not connected.)

    Raises:
        DeadlineExceeded: the queue was full for `timeout_s` seconds.
        FileNotFoundError, ConnectionRefusedError: there is no such socket, or nobody listens at it.
        OSError: it cannot be told: no descriptor is left, or we may not connect.

    Source: unix(7); connect(2), EAGAIN; linux/net/unix/af_unix.c, unix_stream_connect.
    """
    until = time.monotonic() + timeout_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        forks.keep_from(connection.fileno())
        connection.setblocking(False)
        while True:
            try:
                connection.connect(str(path))
            except BlockingIOError:
                if (left := until - time.monotonic()) <= 0:
                    raise DeadlineExceeded(
                        f"{path} took no connection within {timeout_s:g} s: whoever listens there does not answer",
                        vm=vm,
                        remedy="wait until it answers again; if it never does, end it",
                    ) from None
                await asyncio.sleep(min(left, _LOOK_AGAIN_S))
            else:
                return connection
    except BaseException:
        connection.close()
        raise
