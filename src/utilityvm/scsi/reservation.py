"""A reservation: what a caller holds, and gives back once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from utilityvm.scsi.ports import Holder, ReservationRecord
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import ReservationState

if TYPE_CHECKING:
    import asyncio

    from utilityvm.scsi.disk import Disk
    from utilityvm.scsi.mount import Mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A caller's claim on a disk, and on a mount of it; give it back with `ScsiManager.release`."""

    id: str
    slot: Slot
    host_path: str
    guest_path: PurePosixPath | None  # None: attached only
    read_only: bool
    holder: Holder


@dataclass(eq=False, slots=True)
class Claim:
    """The manager's side of a reservation."""

    id: str
    disk: Disk
    mount: Mount | None
    holder: Holder
    since: float
    state: ReservationState = ReservationState.PENDING
    was_held: bool = False  # before it was given back; not so if its caller gave up waiting for it
    waiter: asyncio.Future[None] | None = None  # who waits for it to be held, or to be gone

    def record(self) -> ReservationRecord:
        return ReservationRecord(
            reservation=self.id,
            attachment=self.disk.id,
            mount=self.mount.id if self.mount else None,
            holder=self.holder,
            state=self.state,
            since=self.since,
        )

    def reservation(self) -> Reservation:
        return Reservation(
            id=self.id,
            slot=self.disk.slot,
            host_path=self.disk.request.host_path,
            guest_path=self.mount.guest_path if self.mount else None,
            read_only=self.mount.config.read_only if self.mount else self.disk.request.read_only,
            holder=self.holder,
        )
