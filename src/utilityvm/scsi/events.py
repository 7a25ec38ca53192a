"""What happened, for whoever listens: states that were entered, steps that failed, and how long they took."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

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


class Events:
    """Tells listeners and the log. A listener that is slow loses events and is told how many; it holds up nobody."""

    def __init__(self, log: BoundLogger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._listeners: set[_Listener] = set()

    async def listen(self) -> AsyncIterator[ScsiEvent]:
        """What happens from now on. A listener that is slower than that is told how many it lost."""
        listener = _Listener(asyncio.Queue(_WAITING))
        self._listeners.add(listener)
        try:
            while True:
                event = await listener.queue.get()
                if listener.lost and listener.queue.empty():
                    yield ScsiEvent(what="lost", at=self._clock(), count=listener.lost)
                    listener.lost = 0
                yield event
        finally:
            self._listeners.discard(listener)

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
        for listener in self._listeners:
            try:
                listener.queue.put_nowait(event)
            except asyncio.QueueFull:
                listener.lost += 1

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


@dataclass(eq=False, slots=True)
class _Listener:
    queue: asyncio.Queue[ScsiEvent]
    lost: int = 0
