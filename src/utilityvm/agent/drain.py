"""Takes and drops what is written to the output of a program that has ended.

A child that the program left behind may hold that output. If nobody read it any more, the child would be ended by
SIGPIPE, or wait for ever once the pipe is full.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Final

_AT_MOST: Final = 128  # pipes; the oldest is closed for one more
_READ_BYTES: Final = 65536


class Drain:
    """Reads pipes until they end. One thread, from the first pipe on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fds: dict[int, None] = {}  # in the order in which they came
        self._poll: select.epoll | None = None

    def take(self, fd: int) -> None:
        """Own `fd`, and read it to its end. Without a thread or memory for that it is closed."""
        with self._lock:
            os.set_blocking(fd, False)
            try:
                if self._poll is None:
                    poll = select.epoll()
                    threading.Thread(target=self._run, args=(poll,), daemon=True).start()
                    self._poll = poll
                self._poll.register(fd, select.EPOLLIN)
            except (OSError, RuntimeError):
                os.close(fd)
                return
            self._fds[fd] = None
            if len(self._fds) > _AT_MOST:
                self._close(next(iter(self._fds)))

    def _run(self, poll: select.epoll) -> None:
        while True:
            for fd, _ in poll.poll():
                with self._lock:
                    if fd in self._fds and not _read(fd):
                        self._close(fd)

    def _close(self, fd: int) -> None:
        del self._fds[fd]
        os.close(fd)  # which takes it out of the epoll


def _read(fd: int) -> bool:
    """False: it is at its end."""
    try:
        return bool(os.read(fd, _READ_BYTES))
    except BlockingIOError:
        return True
    except OSError:
        return False


ALL: Final = Drain()
