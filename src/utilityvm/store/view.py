"""A journal as people look at it: one row for each slot that is taken. For those who read and do not own the VM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from utilityvm.scsi.ports import DiskRecord, MountRecord, Record, ReservationRecord
from utilityvm.scsi.slot import Slot

HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationInfo:
    """A reservation of a disk, as it was when asked."""

    id: str  # what `uvm detach` takes
    holder: str
    pid: int | None  # of the process that holds it; None: a named holder
    guest_path: PurePosixPath | None  # None: attached only
    since: float  # seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """A disk of a VM, as its journal had it when asked."""

    slot: Slot
    host_path: str  # as the caller who attached it wrote it
    identity: str  # the same text for the same file, however its path is spelled
    format: str
    read_only: bool
    size_bytes: int
    sector_size_bytes: int | None  # as it was asked for
    state: str  # as in docs/concepts: "attached", "attaching", …
    guest_paths: tuple[PurePosixPath, ...]
    notes: tuple[str, ...]  # what the guest said when it mounted the disk: as `SCSIMount.notes`
    reservations: tuple[ReservationInfo, ...]  # the oldest first
    since: float  # seconds since the epoch, when its slot was taken

    @property
    def references(self) -> int:
        """How many reservations hold it."""
        return len(self.reservations)

    @property
    def holders(self) -> tuple[str, ...]:
        """The holder of each reservation."""
        return tuple(reservation.holder for reservation in self.reservations)


def slots(records: Sequence[Record]) -> list[DiskInfo]:
    """The rows of a journal, in the order of slots."""
    mounts = {record.mount: record for record in records if isinstance(record, MountRecord)}
    reservations = [record for record in records if isinstance(record, ReservationRecord) and record.state == HELD]
    rows: list[DiskInfo] = []
    for disk in records:
        if not isinstance(disk, DiskRecord):
            continue
        own = [one for one in reservations if one.attachment == disk.attachment]
        mounted = [mount for mount in mounts.values() if mount.attachment == disk.attachment]
        rows.append(
            DiskInfo(
                slot=disk.slot,
                host_path=disk.host_path,
                identity=disk.identity,
                format=disk.format,
                read_only=disk.read_only,
                size_bytes=disk.size_bytes,
                sector_size_bytes=disk.sector_size_bytes,
                state=disk.state,
                guest_paths=tuple(mount.guest_path for mount in mounted),
                notes=tuple(dict.fromkeys(note for mount in mounted for note in mount.notes)),
                reservations=tuple(_reservation(one, mounts.get(one.mount or "")) for one in own),
                since=disk.since,
            )
        )
    return sorted(rows, key=lambda row: row.slot)


def _reservation(record: ReservationRecord, mount: MountRecord | None) -> ReservationInfo:
    return ReservationInfo(
        id=record.reservation,
        holder=record.holder.name,
        pid=record.holder.pid,
        guest_path=mount.guest_path if mount else None,
        since=record.since,
    )
