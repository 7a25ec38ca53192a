"""Turns of the children that look at disks, or make file systems: a small guest has memory for few of them at once.

A child costs some MiB: what it writes to of the agent's memory, its page tables, and a tool's own. When thirty disks
come at once that is more than a small guest has left, and its kernel kills a child. So a few go at once. A disk whose
storage is slow delays no other for long: who waited a while goes too, if the guest has memory to spare.

A child that was killed for want of memory says nothing about its disk. It is tried once more, alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from utilityvm.agent.faults import Fault

_AT_ONCE: Final = 4
_PATIENCE_S: Final = 1.0  # then more than those go, while there is memory
_CHILD_BYTES: Final = 4 << 20  # 2.5 MiB were measured of a child that asks libblkid; the makers of file systems take 3
_SPARE_BYTES: Final = 64 << 20
_MEMINFO: Final = "/proc/meminfo"

T = TypeVar("T")


class OutOfMemoryError(Exception):
    """The kernel had no memory for a child, and killed it or did not make it."""


class Turns:
    """Who may have a child now. Thread-safe."""

    def __init__(self, *, at_once: int = _AT_ONCE) -> None:
        self._at_once = at_once
        self._running = 0
        self._lonely = 0  # who waits to be alone, or is: nobody else begins meanwhile
        self._changed = threading.Condition()

    def take(self, what: str, child: Callable[[], T], deadline: float) -> T:
        """What `child` gives, called when it is its turn; once more and alone if it found no memory. `what` is it.

        Raises:
            Fault: its turn did not come in time, or there was no memory when it was alone; or `child` raised it.
        """
        try:
            with self._turn(what, deadline):
                return child()
        except OutOfMemoryError:
            pass
        try:
            with self._turn(what, deadline, alone=True):
                return child()
        except OutOfMemoryError:
            text = f"{what} takes more memory than the guest has: {_available() >> 20} MiB are free"
            raise Fault(text, remedy="give the VM more memory (memory_mib, --memory)") from None

    @contextmanager
    def _turn(self, what: str, deadline: float, *, alone: bool = False) -> Iterator[None]:
        began = time.monotonic()
        with self._changed:
            self._lonely += alone
            try:
                while self._running if alone else self._lonely or not self._is_room(began):
                    self._wait(what, deadline)
                self._running += 1
            except BaseException:
                self._leave(alone)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._leave(alone)

    def _leave(self, alone: bool) -> None:
        self._lonely -= alone
        self._changed.notify_all()

    def _is_room(self, began: float) -> bool:
        if self._running < self._at_once:
            return True
        is_long = time.monotonic() - began >= _PATIENCE_S
        return is_long and _available() - self._running * _CHILD_BYTES >= _SPARE_BYTES

    def _wait(self, what: str, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            text = f"{what} did not begin in time: {self._running} others were at it, and the guest has little memory"
            raise Fault(
                text, kind="timeout", remedy="give it more time (timeout_s), or the VM more memory (memory_mib)"
            )
        self._changed.wait(min(left, _PATIENCE_S))


def _available() -> int:
    """What the guest can give programs, in bytes; 0 if it does not say."""
    try:
        with open(_MEMINFO) as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 0


disks: Final = Turns()  # one for all: it is the memory of one guest
