"""A reservation: what a caller holds, and gives back once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from utilityvm.scsi.ports import Holder, ReservationRecord
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import MountState, ReservationState

if TYPE_CHECKING:
    import asyncio

    from utilityvm.scsi.disk import Disk
    from utilityvm.scsi.mount import Mount


ForceArgument: TypeAlias = bool | Literal["host"]  # as callers say it


class Force(IntEnum):
    """How far a release goes against the guest."""

    NO = 0
    GUEST = 1  # the guest is told to let go of what it still uses
    HOST = 2  # and if it does not, the host takes the disk away

    @classmethod
    def of(cls, asked: ForceArgument) -> Force:
        return cls.HOST if asked == "host" else cls(bool(asked))


NOBODY: Final = Holder(name="nobody")  # of a disk that was left behind: whoever takes it out


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A caller's claim on a disk, and on a mount of it; give it back with `ScsiManager.release`."""

    id: str
    slot: Slot
    host_path: str
    guest_path: PurePosixPath | None  # None: attached only
    read_only: bool
    holder: Holder
    notes: tuple[str, ...] = ()  # what the guest said when it was mounted


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
    reformat: bool = False  # its add asked for a new file system, whatever the disk holds
    force: Force = Force.NO  # what its release asked for
    overruled: str | None = None  # what the guest said when the host took the disk away all the same
    waiter: asyncio.Future[None] | None = None  # of the call that waits for it to be held, or to be gone

    @property
    def is_awaited(self) -> bool:
        return self.waiter is not None and not self.waiter.done()

    @property
    def is_met(self) -> bool:
        """Is there what it asks for: its disk on the bus, its mount mounted?"""
        return self.disk.is_on_bus and (self.mount is None or self.mount.state is MountState.MOUNTED)

    def record(self) -> ReservationRecord:
        return ReservationRecord(
            reservation=self.id,
            attachment=self.disk.id,
            mount=self.mount.id if self.mount else None,
            holder=self.holder,
            state=ReservationState.OVERRULING if self.is_overruling else self.state,
            since=self.since,
        )

    @property
    def is_overruling(self) -> bool:
        """Is its disk to leave whatever the guest says? The next owner must know: half of it may have been done."""
        return self.state is ReservationState.RELEASING and self.force is Force.HOST

    def reservation(self) -> Reservation:
        return Reservation(
            id=self.id,
            slot=self.disk.slot,
            host_path=self.disk.request.host_path,
            guest_path=self.mount.guest_path if self.mount else None,
            read_only=self.mount.config.read_only if self.mount else self.disk.request.read_only,
            holder=self.holder,
            notes=self.mount.notes if self.mount else (),
        )


def force_of(leaving: Iterable[Claim]) -> Force:
    """How far may the step go by which these claims leave? As far as each of their releases asked for.

    The undoing of an add that failed has no say: nobody ever had what it undoes.
    """
    return min((claim.force for claim in leaving if claim.was_held), default=Force.NO)
