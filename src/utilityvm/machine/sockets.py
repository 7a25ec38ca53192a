"""Connecting to a Unix socket, with three answers: connected, nobody listens, cannot be told yet."""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utilityvm.errors import DeadlineExceeded, SetupError
from utilityvm.machine import forks, runtime

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
    import asyncio  # late: commands that block do without it

    from utilityvm.machine.threads import in_thread

    listener = Listener(listener) if isinstance(listener, Path) else listener
    folder = await in_thread(runtime.pin_folder_of, listener.path, late=os.close)
    connecting = _Connecting(listener, folder, timeout_s=timeout_s, vm=vm)
    try:
        while (connection := connecting.attempt()) is None:  # noqa: ASYNC110 the kernel tells nobody
            await asyncio.sleep(_LOOK_AGAIN_S)
        return connection
    finally:
        connecting.close()


def connect_now(path: Path, *, timeout_s: float) -> socket.socket:
    """As `connect`, for a thread that may block."""
    listener = Listener(path)
    connecting = _Connecting(listener, runtime.pin_folder_of(path), timeout_s=timeout_s, vm=None)
    try:
        while (connection := connecting.attempt()) is None:
            time.sleep(_LOOK_AGAIN_S)
        return connection
    finally:
        connecting.close()


class _Connecting:
    """A connection on its way, by the folder that was pinned."""

    def __init__(self, listener: Listener, folder: int, *, timeout_s: float, vm: str | None) -> None:
        self._listener = listener
        self._folder = folder
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._vm = vm
        self._connection: socket.socket | None = None

    def attempt(self) -> socket.socket | None:
        """Try once; None: the queue is full. Errors as `connect`."""
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            forks.keep_from(self._connection.fileno())
            self._connection.setblocking(False)
        path = self._listener.path
        try:
            self._connection.connect(f"/proc/self/fd/{self._folder}/{path.name}")
        except BlockingIOError:
            if time.monotonic() < self._until:
                return None
            raise DeadlineExceeded(
                f"{path} took no connection within {self._timeout_s:g} s: its listener does not answer",
                vm=self._vm,
                remedy="wait until it answers again; if it never does, end it",
            ) from None
        _check_peer(self._connection, self._listener, vm=self._vm)
        connection, self._connection = self._connection, None
        return connection

    def close(self) -> None:
        """The connection goes, unless it was given away; and the folder's descriptor."""
        os.close(self._folder)
        if self._connection is not None:
            self._connection.close()


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
