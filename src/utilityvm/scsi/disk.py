"""A disk: one attachment at one slot, the mounts on it, and who wants it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from utilityvm.errors import ConfigDiffers, UtilityVMError
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.ports import DiskRecord, DiskRequest, OpenDisk
from utilityvm.scsi.reservation import Claim, Force, force_of
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import ON_BUS, DiskState, Event, next_disk_state


@dataclass(eq=False, slots=True)
class Resize:
    """A size that a caller wants the disk to have, and waits for."""

    size_bytes: int
    waiter: asyncio.Future[None]


@dataclass(eq=False, slots=True)
class Disk:
    """One disk of the VM. Its claims are the reservations that want it; `leaving` those that are being given back."""

    id: str  # of this attachment; another attachment of the same disk has another
    slot: Slot
    request: DiskRequest
    identity: str
    format: str
    size_bytes: int
    since: float
    state: DiskState = DiskState.RESERVED
    opened: OpenDisk | None = None  # until it is attached
    mounts: dict[str, Mount] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    leaving: dict[str, Claim] = field(default_factory=dict)
    resizes: deque[Resize] = field(default_factory=deque)  # those whose turn has not come
    resizing: Resize | None = None  # the one whose turn it is
    worker: asyncio.Task[None] | None = None
    is_kicked: bool = False  # something changed since the worker looked
    stuck: set[str] = field(default_factory=set)  # mounts whose last step failed; tried again when somebody asks
    halted: bool = False  # so for the disk itself
    doubt: UtilityVMError | None = None  # why the last step's outcome is unknown
    overruled: str | None = None  # what the guest said when the host began to take it away; it leaves the bus for that
    phases: dict[str, float] = field(default_factory=dict)  # seconds of the last step of each kind

    @property
    def is_wanted(self) -> bool:
        return bool(self.claims)

    @property
    def is_on_bus(self) -> bool:
        """Is it there for who asks for it?"""
        return self.state in ON_BUS and self.overruled is None

    @property
    def force(self) -> Force:
        """How far may its eject go?"""
        return Force.HOST if self.overruled is not None else force_of(self.leaving.values())

    @property
    def is_overruling(self) -> bool:
        """Does it leave the bus whatever the guest says?"""
        return self.overruled is not None or (not self.is_wanted and self.force is Force.HOST)

    @property
    def wanted_bytes(self) -> int:
        """The size that it is to have when all that was asked for is done."""
        sizes = [self.size_bytes, *(resize.size_bytes for resize in self.resizes)]
        return max(sizes if self.resizing is None else [*sizes, self.resizing.size_bytes])

    def take_resizes(self) -> list[asyncio.Future[None]]:
        """Forget every size that was asked for; gives those who wait for them."""
        asked = [*self.resizes] if self.resizing is None else [self.resizing, *self.resizes]
        self.resizing = None
        self.resizes.clear()
        return [resize.waiter for resize in asked]

    def after(self, event: Event) -> DiskState:
        return next_disk_state(self.state, event)

    def close_opened(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    def check_same(self, request: DiskRequest, opened: OpenDisk) -> None:
        """Refuse a request for this disk that contradicts how it is attached.

        Raises:
            ConfigDiffers: names both sides.
        """
        have = self.request
        for name, ours, asked in (
            ("read_only", have.read_only, request.read_only),
            ("type", have.kind, request.kind),
            ("format", self.format, request.format or opened.format),
            ("sector_size_bytes", have.sector_size_bytes or 512, request.sector_size_bytes or 512),
        ):
            if ours != asked:
                raise ConfigDiffers(
                    f"{request.host_path} is attached at {self.slot} with {name}={ours}, not with {name}={asked}",
                    slot=self.slot,
                    host_path=request.host_path,
                    remedy="release it first, or ask for the same",
                )

    def record(self, state: DiskState | None = None) -> DiskRecord:
        return DiskRecord(
            attachment=self.id,
            slot=self.slot,
            host_path=self.request.host_path,
            identity=self.identity,
            kind=self.request.kind,
            format=self.format,  # type: ignore[arg-type]
            access=self.request.access,
            read_only=self.request.read_only,
            size_bytes=self.size_bytes,
            state=state or self.state,
            since=self.since,
            sector_size_bytes=self.request.sector_size_bytes,
        )
