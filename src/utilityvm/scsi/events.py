"""What happened, for whoever listens: states that were entered, steps that failed, and how long they took."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Self
from weakref import WeakSet

from utilityvm.log import BoundLogger
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.reservation import Claim
from utilityvm.scsi.slot import Slot

_WAITING: Final = 1024  # events that a listener may leave unread


@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiEvent:
    """Something happened: `what` is a state that was entered, `lost` (with `count`), or `failed` (with `error`)."""

    what: str
    at: float
    slot: Slot | None = None
    host_path: str | None = None
    guest_path: PurePosixPath | None = None
    seconds: float | None = None  # how long the step took that led here
    error: str | None = None
    count: int = 0


class ScsiEvents(AsyncIterator[ScsiEvent]):
    """What happens to disks and mounts, from the call that made it on. The iteration ends with the VM, or `aclose`.

    A listener that leaves too much unread loses what is new, and is told how much that was.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Use `UtilityVM.scsi_events`."""
        self._clock = clock
        self._unread: deque[ScsiEvent] = deque()
        self._lost = 0
        self._has_ended = False
        self._waiting: set[asyncio.Future[None]] = set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ScsiEvent:
        while not self._unread:
            if self._lost:
                lost, self._lost = self._lost, 0
                return ScsiEvent(what="lost", at=self._clock(), count=lost)
            if self._has_ended:
                raise StopAsyncIteration
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return self._unread.popleft()

    async def aclose(self) -> None:
        """Hear no more; an iteration that waits ends."""
        self._unread.clear()
        self._lost = 0
        self._end()

    def _hear(self, event: ScsiEvent) -> None:
        if self._has_ended:
            return
        if self._lost or len(self._unread) >= _WAITING:
            self._lost += 1  # none out of the middle: what was lost comes after what is unread
        else:
            self._unread.append(event)
        self._wake()

    def _end(self) -> None:
        self._has_ended = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


class Events:
    """Tells listeners and the log. A listener that is slow loses events and is told how many; it holds up nobody."""

    def __init__(self, log: BoundLogger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._listeners: WeakSet[ScsiEvents] = WeakSet()  # one that nobody has any more hears nothing
        self._has_ended = False

    def listen(self) -> ScsiEvents:
        """What happens from this call on, until `end`."""
        listener = ScsiEvents(self._clock)
        if self._has_ended:
            listener._end()
        else:
            self._listeners.add(listener)
        return listener

    def end(self) -> None:
        """Nothing more will happen."""
        self._has_ended = True
        for listener in list(self._listeners):
            listener._end()
        self._listeners.clear()

    def emit(
        self, disk: Disk, mount: Mount | None, what: str, *, seconds: float | None = None, error: str | None = None
    ) -> None:
        path = mount.guest_path if mount else None
        if self._log.is_enabled_for(logging.DEBUG):
            self._log.debug(
                "%s",
                what,
                slot=disk.slot,
                host_path=disk.request.host_path,
                guest_path=path,
                references=len(disk.claims),
            )
        if not self._listeners:
            return
        event = ScsiEvent(
            what=what,
            at=self._clock(),
            slot=disk.slot,
            host_path=disk.request.host_path,
            guest_path=path,
            seconds=seconds,
            error=error,
        )
        for listener in list(self._listeners):
            listener._hear(event)

    def tell_claim(self, what: str, claim: Claim) -> None:
        if self._log.is_enabled_for(logging.DEBUG):
            self._log.debug(
                "%s",
                what,
                slot=claim.disk.slot,
                host_path=claim.disk.request.host_path,
                guest_path=claim.mount.guest_path if claim.mount else None,
                references=len(claim.disk.claims),
                reservation=claim.id,
                holder=claim.holder.name,
            )
