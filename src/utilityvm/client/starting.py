"""Finds the server of this user and store, or starts one.

A server that was killed leaves its socket behind: nobody answers there, and another server is started, which takes the
socket's place. Several clients may start one at the same time: a lock decides which of them is the server.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from utilityvm.client.blocking import Blocking, OnQuiet
from utilityvm.client.wire import Transport
from utilityvm.errors import SetupError
from utilityvm.log import logger
from utilityvm.machine import oserrors, paths, runtime, sockets

START_S: Final = 30.0
CONNECT_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.05
_LONGEST_LOG: Final = 1 << 20
LOG_FILE: Final = "server.log"
TURN_FILE: Final = "start.lock"

_log = logger(__name__)
_NOBODY: Final = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, ConnectionResetError)


class Starting:
    """Dials the server, and starts it if there is none and `start` is true."""

    def __init__(self, *, start: bool = True) -> None:
        self._start = start

    async def dial(self) -> Transport:
        """A connection to the server.

        Raises:
            SetupError: there is none, and it is not to be started, cannot be started or does not come up; says why.
                Or its socket, or the folder of it, is another user's.
            DeadlineExceeded: it takes no connection: it stands still.
        """
        import asyncio  # late: see client/blocking.py

        from utilityvm.client.waiting import Waiting
        from utilityvm.machine.threads import in_thread

        until = time.monotonic() + START_S
        while True:
            with suppress(*_NOBODY):
                return Waiting(await sockets.connect(paths.server_dir() / paths.SERVER_SOCKET, timeout_s=CONNECT_S))
            self._check(until)
            await in_thread(_spawn_in_turn, until)
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _check(self, until: float) -> None:
        """There is no server: may one be started?"""
        if not self._start:
            raise SetupError("no server runs", remedy="start one: uvm serve")
        if time.monotonic() > until:
            raise SetupError(
                f"the server did not come up within {START_S:g} s", remedy=f"see {paths.server_dir() / LOG_FILE}"
            )


class StartingNow(Starting):
    """As `Starting`, for a thread that may block."""

    def __init__(self, *, start: bool = True, on_quiet: OnQuiet = lambda: None) -> None:
        super().__init__(start=start)
        self._on_quiet = on_quiet
        self._ready: Transport | None = None

    def answers(self) -> bool:
        """Does a server take connections? The first call uses this one.

        Raises:
            SetupError, DeadlineExceeded: as `dial`.
        """
        with suppress(*_NOBODY):
            self._ready = self._connect()
        return self._ready is not None

    async def dial(self) -> Transport:
        ready, self._ready = self._ready, None
        if ready is not None:
            return ready
        until = time.monotonic() + START_S
        while True:
            with suppress(*_NOBODY):
                return self._connect()
            self._check(until)
            _spawn_in_turn(until)
            time.sleep(_LOOK_AGAIN_S)  # noqa: ASYNC251 there is no loop

    def _connect(self) -> Transport:
        path = paths.server_dir() / paths.SERVER_SOCKET
        return Blocking(sockets.connect_now(path, timeout_s=CONNECT_S), self._on_quiet)


def _spawn_in_turn(until: float) -> None:
    with _turn() as is_ours:
        if is_ours:
            _spawn(until)


@contextmanager
def _turn() -> Iterator[bool]:
    """Is it ours to start the server? Of any number of clients one does, and the others look again."""
    folder = paths.server_dir()
    try:
        runtime.make(folder)
        with runtime.entered(folder) as here:
            fd = os.open(here / TURN_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot use the server's folder {folder}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _spawn(until: float) -> None:
    """Start a server, unless one runs by now; it is detached from us, and says when it answers, or why it cannot."""
    import select
    import subprocess

    _log.debug("starting the server")
    log = _open_log(paths.server_dir())
    ours, its = os.pipe2(os.O_CLOEXEC)
    try:
        folders = {
            "UTILITYVM_STATE_DIR": paths.state_dir(),
            "UTILITYVM_RUNTIME_DIR": paths.runtime_dir(),
            "UTILITYVM_CACHE_DIR": paths.cache_dir(),
        }
        try:
            subprocess.run(
                [sys.executable, "-P", "-m", "utilityvm.server", str(its)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[its],
                env={**os.environ, **{name: os.fspath(folder) for name, folder in folders.items()}},
                check=False,
            )
        except OSError as error:
            raise oserrors.as_ours(error, "cannot start the server") from error
        os.close(its)
        its = -1
        told = b""
        poll = select.poll()  # select(2) takes no descriptor above 1023
        poll.register(ours, select.POLLIN)
        while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000):
            if not (piece := os.read(ours, 65536)):
                break
            told += piece
    finally:
        os.close(ours)
        os.close(log)
        if its >= 0:
            os.close(its)
    if told.startswith(b"ready"):
        return
    if told:
        import msgspec

        from utilityvm.server.problems import error_of
        from utilityvm.server.types import Problem

        raise error_of(msgspec.json.decode(told, type=Problem))
    what = "ended at once" if time.monotonic() < until else f"did not come up within {START_S:g} s"
    raise SetupError(f"the server {what}", remedy=f"see {paths.server_dir() / LOG_FILE}")


def _open_log(folder: Path) -> int:
    """The server's log; a long one is begun anew, and the last one kept."""
    try:
        runtime.make(folder)
        with runtime.entered(folder) as here:
            path = here / LOG_FILE
            with suppress(FileNotFoundError):
                if path.stat(follow_symlinks=False).st_size > _LONGEST_LOG:
                    path.replace(here / f"{LOG_FILE}.old")
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot write the server's log in {folder}") from error
