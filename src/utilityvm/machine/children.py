"""Every child process that we start is waited for, so that none stays behind as a zombie.

One thread does it for all of them, and nobody else has to: the event loop that started a child may be closed, and the
object that watched it may be gone, when the child ends. Whoever wants to know the end of a process uses its pidfd (see
hosts/qemu/lifetime.py), which stays valid when the child has been reaped.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

_lock = threading.Lock()
_ends: select.epoll | None = None  # pidfds of the children; made with the first of them


def reap(pid: int) -> None:
    """Wait for the child `pid` in the background; nobody has waited for it yet."""
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        _queue().register(pidfd, select.EPOLLIN)
    except ProcessLookupError:
        return  # somebody else was faster
    except OSError:  # no descriptor left: a thread of its own needs none
        if pidfd >= 0:
            os.close(pidfd)
        threading.Thread(target=_wait, args=(pid,), name=f"reap {pid}", daemon=True).start()


def _queue() -> select.epoll:
    global _ends
    with _lock:
        if _ends is None:
            ends = select.epoll()
            threading.Thread(target=_reap_all, args=(ends,), name="reap children", daemon=True).start()
            _ends = ends
        return _ends


def _reap_all(ends: select.epoll) -> None:
    while True:
        for pidfd, _ in ends.poll():
            with suppress(ChildProcessError):  # somebody else waited for it
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            with suppress(OSError):
                ends.unregister(pidfd)
            os.close(pidfd)


def _wait(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _forget() -> None:
    """In a fork: the children are its parent's, and so is the thread. Its copies of the descriptors stay unused."""
    global _ends, _lock
    _ends, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
