"""Threads that wait for work. One more is made when all are busy, so that a stuck request holds up nobody else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

_KEEP: Final = 8  # so many stay when there is nothing to do
_IDLE_S: Final = 5.0


class Workers:
    """Runs jobs, each in a thread. A job may not raise."""

    def __init__(self, *, at_most: int) -> None:
        self._at_most = at_most
        self._idle = 0
        self._count = 0
        self._jobs: deque[Callable[[], None]] = deque()
        self._ready = threading.Condition()

    def do(self, job: Callable[[], None]) -> bool:
        """Have a thread run `job`. False: all are busy, there can be no more of them, and it was not taken."""
        with self._ready:
            if self._idle <= len(self._jobs):
                if self._count >= self._at_most:
                    return False
                try:
                    threading.Thread(target=self._work, daemon=True).start()
                except RuntimeError:  # the system gives no more
                    return False
                self._count += 1
            self._jobs.append(job)
            self._ready.notify()
            return True

    def _work(self) -> None:
        while True:
            with self._ready:
                self._idle += 1
                while not self._jobs:
                    if not self._ready.wait(_IDLE_S) and not self._jobs and self._count > _KEEP:
                        self._idle -= 1
                        self._count -= 1
                        return
                self._idle -= 1
                job = self._jobs.popleft()
            job()
