"""Is a file opened that nobody should open? Asked of the kernel."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final, Self

_IN_OPEN: Final = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class Watched:
    """Whether a file was opened since it is watched, by whatever process and name. Source: inotify(7)."""

    def __init__(self, path: Path) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or _libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def was_opened(self) -> bool:
        """Since it was asked for the last time."""
        try:
            return bool(os.read(self._fd, 1 << 20))
        except BlockingIOError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
