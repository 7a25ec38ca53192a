"""Sees to it that every request is answered in time, also one whose thread is stuck in the kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Timed(Protocol):
    """Something that has a deadline (of `time.monotonic`)."""

    deadline: float


_T = TypeVar("_T", bound=Timed)


class Watch(Generic[_T]):
    """Calls `expire` for each that was added and not removed before its deadline. One thread, which mostly sleeps."""

    def __init__(self, expire: Callable[[_T], object]) -> None:
        self._expire = expire
        self._watched: set[_T] = set()
        self._changed = threading.Condition()
        self._wakes_at = float("inf")
        self._has_thread = False

    def add(self, item: _T) -> None:
        """Watch over `item`.

        Raises:
            RuntimeError: the system gives no thread; it is watched once another was added that got one.
        """
        with self._changed:
            self._watched.add(item)
            if not self._has_thread:
                threading.Thread(target=self._run, daemon=True).start()
                self._has_thread = True
            elif item.deadline < self._wakes_at:
                self._changed.notify()

    def remove(self, item: _T) -> None:
        # Its thread may wake for nothing once, at a deadline that is gone. That is cheaper than waking it now.
        with self._changed:
            self._watched.discard(item)

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = sorted((item for item in self._watched if item.deadline <= now), key=_deadline)
                self._watched.difference_update(late)
                if not late:
                    self._wakes_at = min((item.deadline for item in self._watched), default=float("inf"))
                    self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))
            for item in late:
                self._expire(item)


def _deadline(item: Timed) -> float:
    return item.deadline
