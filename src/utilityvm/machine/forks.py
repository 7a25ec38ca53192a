"""What a fork of this process must not share with it: locks, and connections that have one client.

A lock lives for as long as anybody has its open file, and a fork (`os.fork`, and `multiprocessing` with it) gets a copy
of every descriptor, close-on-exec or not. Without this a VM would belong to a dead owner until its last fork ends.

In the fork such a descriptor leads to /dev/null. Its number stays taken, so that whatever still closes it there closes
nothing else. A fork made by C code that calls fork(2) itself is not covered.
"""

from __future__ import annotations

import os

_private: dict[int, tuple[int, int]] = {}  # descriptor -> device and inode of its file, lest it was closed and reused


def keep_from(fd: int) -> int:
    """Forks of this process get no copy of the open file behind `fd`; gives `fd`. There is nothing to undo."""
    status = os.fstat(fd)
    _private[fd] = (status.st_dev, status.st_ino)
    return fd


def _drop() -> None:
    null = -1
    for fd, file in _private.items():
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != file:
                continue  # ours was closed before
            if null < 0:
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, fd, inheritable=False)
        except OSError:  # no descriptor left for /dev/null, or `fd` is closed
            try:
                os.close(fd)
            except OSError:
                continue
    _private.clear()
    if null >= 0:
        os.close(null)


os.register_at_fork(after_in_child=_drop)
