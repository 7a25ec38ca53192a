"""What callers see of the manager: values, as things were when they asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from utilityvm.scsi.disk import Disk
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.ports import MountConfig
from utilityvm.scsi.reservation import Claim
from utilityvm.scsi.slot import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """A slot that is taken, as it was when asked."""

    slot: Slot
    attachment: str
    host_path: str
    identity: str
    format: str
    read_only: bool
    size_bytes: int
    state: str
    guest_paths: tuple[PurePosixPath, ...]
    references: int
    holders: tuple[str, ...]
    since: float
    phases: Mapping[str, float]  # seconds that the last step of each kind took


@dataclass(frozen=True, slots=True, kw_only=True)
class MountView:
    """A mount, as it was when asked."""

    slot: Slot
    host_path: str
    guest_path: PurePosixPath
    config: MountConfig
    state: str
    references: int
    holders: tuple[str, ...]
    since: float


def _holders(claims: Iterable[Claim]) -> tuple[str, ...]:
    return tuple(claim.holder.name for claim in sorted(claims, key=lambda claim: (claim.since, claim.id)))


def slot_view(disk: Disk) -> SlotView:
    return SlotView(
        slot=disk.slot,
        attachment=disk.id,
        host_path=disk.request.host_path,
        identity=disk.identity,
        format=disk.format,
        read_only=disk.request.read_only,
        size_bytes=disk.size_bytes,
        state=disk.state,
        guest_paths=tuple(mount.guest_path for mount in disk.mounts.values()),
        references=len(disk.claims),
        holders=_holders(disk.claims.values()),
        since=disk.since,
        phases=dict(disk.phases),
    )


def mount_view(mount: Mount) -> MountView:
    return MountView(
        slot=mount.disk.slot,
        host_path=mount.disk.request.host_path,
        guest_path=mount.guest_path,
        config=mount.config,
        state=mount.state,
        references=len(mount.claims),
        holders=_holders(mount.claims.values()),
        since=mount.since,
    )
