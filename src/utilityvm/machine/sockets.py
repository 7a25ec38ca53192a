"""Connecting to a Unix socket, with three answers: connected, nobody listens, cannot be told yet."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utilityvm.errors import DeadlineExceeded, SetupError
from utilityvm.machine import forks, runtime
from utilityvm.machine.threads import in_thread

_LOOK_AGAIN_S: Final = 0.02
_PEER: Final = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class Listener:
    """A Unix socket, and who may listen at it besides this user."""

    path: Path
    uid: int | None = None
    pid: int | None = None  # of that user; None: any process

    def __str__(self) -> str:
        return str(self.path)


async def connect(listener: Listener | Path, *, timeout_s: float, vm: str | None = None) -> socket.socket:
    """A connection to a socket, which does not block, and which forks of this process have no part in.

    A full queue of connections is waited for: somebody listens, and is busy or stands still. (asyncio takes the EAGAIN
    that the kernel answers then for a connection under way, and goes on with a socket that is not connected.)

    Raises:
        DeadlineExceeded: the queue was full for `timeout_s` seconds.
        FileNotFoundError, ConnectionRefusedError: there is no such socket, or nobody listens at it.
        SetupError: the socket, its folder or the process behind it is another user's.
        OSError: it cannot be told: no descriptor is left, or we may not connect.

    Source: unix(7); connect(2), EAGAIN; linux/net/unix/af_unix.c, unix_stream_connect.
    """
    until = time.monotonic() + timeout_s
    listener = Listener(listener) if isinstance(listener, Path) else listener
    path = listener.path
    folder = await in_thread(runtime.pin_folder_of, path, late=os.close)
    here = f"/proc/self/fd/{folder}/{path.name}"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        forks.keep_from(connection.fileno())
        connection.setblocking(False)
        while True:
            try:
                connection.connect(here)
            except BlockingIOError:
                if (left := until - time.monotonic()) <= 0:
                    raise DeadlineExceeded(
                        f"{path} took no connection within {timeout_s:g} s: whoever listens there does not answer",
                        vm=vm,
                        remedy="wait until it answers again; if it never does, end it",
                    ) from None
                await asyncio.sleep(min(left, _LOOK_AGAIN_S))
            else:
                _check_peer(connection, listener, vm=vm)
                return connection
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)


def _check_peer(connection: socket.socket, listener: Listener, *, vm: str | None) -> None:
    """Source: unix(7), SO_PEERCRED: of a socket that was connected to, the process that last called listen(2)."""
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    is_expected = uid == listener.uid and listener.pid in (None, pid)
    if not is_expected and uid != os.geteuid():
        raise SetupError(
            f"process {pid} of user {uid} listens at {listener}, and so it is not used",
            vm=vm,
            remedy="end that process, and remove the socket",
        )
