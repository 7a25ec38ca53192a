"""A host, a guest and a journal in memory, which follow the rules of the real ones."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

from utilityvm.errors import (
    DiskInUse,
    GuestBusy,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    OutcomeUnknown,
    StoreError,
)
from utilityvm.scsi.ports import (
    DiskFormat,
    DiskRecord,
    DiskRequest,
    MountConfig,
    MountRecord,
    OpenDisk,
    Record,
)
from utilityvm.scsi.slot import Slot


class Break(StrEnum):
    """How a step goes wrong."""

    REFUSE = "refuse"  # it says no, and nothing happened
    LOSE_REQUEST = "lose request"  # no answer, and nothing happened
    LOSE_ANSWER = "lose answer"  # no answer, and it happened


@dataclass(eq=False)
class FakeDisk:
    """A disk that was opened. Counts how often it was closed."""

    identity: str
    format: DiskFormat
    size_bytes: int
    read_only: bool
    world: FakeWorld
    is_closed: bool = False

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.world.open_disks.discard(self)


@dataclass(eq=False)
class Attached:
    """What is on the bus at a slot."""

    attachment: str
    identity: str
    read_only: bool
    size_bytes: int


@dataclass
class FakeWorld:
    """The bus and the guest of one VM, and what went wrong that must not. Host and guest see the same world."""

    links: dict[str, str] = field(default_factory=dict)  # other spellings of a disk's path
    formats: dict[str, DiskFormat] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    in_use_elsewhere: set[str] = field(default_factory=set)
    bus: dict[Slot, Attached] = field(default_factory=dict)
    guest_devices: dict[Slot, str] = field(default_factory=dict)  # the attachment that the guest knows
    mounts: dict[PurePosixPath, tuple[Slot, MountConfig]] = field(default_factory=dict)
    busy: dict[PurePosixPath, str] = field(default_factory=dict)  # who uses the mount there
    open_disks: set[FakeDisk] = field(default_factory=set)
    names_used: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)  # every step that was sent
    harm: list[str] = field(default_factory=list)  # data lost, disks mixed up: must stay empty
    breaks: dict[str, list[Break]] = field(default_factory=lambda: defaultdict(list))
    gate: Callable[[str], Awaitable[None]] | None = None  # awaited before and after each step, for schedulers

    def fail_next(self, step: str, how: Break = Break.REFUSE, *, times: int = 1) -> None:
        """Break the next `times` steps of that kind: attach, detach, probe, mount, unmount, eject, …"""
        self.breaks[step] += [how] * times

    async def step(self, step: str, about: str, act: Callable[[], None], refusal: Callable[[str], Exception]) -> None:
        """Do one step of a peer: it is logged, may be broken, and may wait at the gate on its way in and out."""
        self.log.append(f"{step} {about}")
        if self.gate:
            await self.gate(f"{step} {about}")
        else:
            await asyncio.sleep(0)
        how = self.breaks[step].pop(0) if self.breaks[step] else None
        if how is Break.REFUSE:
            raise refusal(f"{step} {about}: no")
        if how is Break.LOSE_REQUEST:
            raise OutcomeUnknown(f"{step} {about}: no answer")
        act()
        if how is Break.LOSE_ANSWER:
            raise OutcomeUnknown(f"{step} {about}: no answer")


class FakeHost:
    """A hypervisor that keeps a bus."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world

    async def open(self, request: DiskRequest) -> OpenDisk:
        world = self.world
        path = world.links.get(request.host_path, request.host_path)
        if path in world.missing:
            raise InvalidRequest(f"{request.host_path}: there is no such file", host_path=request.host_path)
        disk = FakeDisk(
            identity=f"file:{path}",
            format=request.format or world.formats.get(path, DiskFormat.RAW),
            size_bytes=1 << 20,
            read_only=request.read_only,
            world=world,
        )
        world.open_disks.add(disk)
        return disk

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        assert isinstance(disk, FakeDisk)
        world = self.world

        def act() -> None:
            if disk.is_closed:
                world.harm.append(f"{disk.identity} was attached after it was closed")
            if slot in world.bus:
                raise HostRefused(f"slot {slot} is taken by {world.bus[slot].identity}")
            if attachment in world.names_used:
                world.harm.append(f"the name {attachment} was used twice")
            if any(other.identity == disk.identity for other in world.bus.values()):
                world.harm.append(f"{disk.identity} is attached twice")
            if disk.identity in world.in_use_elsewhere:
                raise DiskInUse(f"{disk.identity} is in use by another VM")
            world.names_used.add(attachment)
            world.bus[slot] = Attached(attachment, disk.identity, disk.read_only, disk.size_bytes)
            world.guest_devices[slot] = attachment

        await world.step("attach", f"{disk.identity} {slot}", act, HostRefused)

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        world = self.world

        def act() -> None:
            there = world.bus.get(slot)
            if there is None or there.attachment != attachment:
                return
            if world.guest_devices.get(slot) == attachment:
                world.harm.append(f"{there.identity} was pulled from under the guest")
            for path, (where, _) in list(world.mounts.items()):
                if where == slot:
                    world.harm.append(f"{there.identity} was pulled while it was mounted at {path}")
            del world.bus[slot]
            world.guest_devices.pop(slot, None)

        await world.step("detach", str(slot), act, HostRefused)

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        await self.world.step("probe", str(slot), lambda: None, HostRefused)
        there = self.world.bus.get(slot)
        return there is not None and there.attachment == attachment

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> None:
        def act() -> None:
            there = self.world.bus.get(slot)
            if there is None or there.attachment != attachment:
                raise HostRefused(f"there is no {attachment} at {slot}")
            there.size_bytes = size_bytes

        await self.world.step("resize", str(slot), act, HostRefused)


class FakeGuest:
    """A guest that keeps devices and mounts."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        pass

    async def mount(self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float) -> None:
        world = self.world

        def act() -> None:
            if slot not in world.guest_devices:
                raise GuestRefused(f"no disk came at {slot}")
            if guest_path in world.mounts:
                raise GuestBusy(f"{guest_path} is in use")
            if not config.read_only and world.bus[slot].read_only:
                raise GuestRefused(f"the disk at {slot} is read-only")
            world.mounts[guest_path] = (slot, config)

        await world.step("mount", f"{slot} {guest_path}", act, GuestRefused)

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        world = self.world

        def act() -> None:
            there = world.mounts.get(guest_path)
            if there is None:
                return
            if there[0] != slot:
                raise GuestRefused(f"{guest_path} holds the disk at {there[0]}")
            if (user := world.busy.get(guest_path)) and not force:
                raise GuestBusy(f"{guest_path} is in use", holders=[user])
            del world.mounts[guest_path]

        await world.step("unmount", f"{slot} {guest_path}", act, GuestRefused)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        world = self.world

        def act() -> None:
            users = [str(path) for path, (where, _) in world.mounts.items() if where == slot]
            if users and not force:
                raise GuestBusy(f"the disk at {slot} is mounted", holders=users)
            for path in users:
                del world.mounts[PurePosixPath(path)]
            world.guest_devices.pop(slot, None)

        await world.step("eject", str(slot), act, GuestRefused)

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        await self.world.step("probe_mount", f"{slot} {guest_path}", lambda: None, GuestRefused)
        there = self.world.mounts.get(guest_path)
        return there is not None and there[0] == slot

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        await self.world.step("probe_device", str(slot), lambda: None, GuestRefused)
        return slot in self.world.guest_devices

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        await self.world.step("grow", str(slot), lambda: None, GuestRefused)


class MemoryJournal:
    """A journal in memory. `history` has every write; `fail_next` makes the next writes fail."""

    def __init__(self) -> None:
        self.records: dict[tuple[type, str], Record] = {}
        self.failures = 0
        self.writes = 0

    def fail_next(self, *, times: int = 1) -> None:
        self.failures += times

    def copy(self) -> MemoryJournal:
        """Another journal with the same records."""
        other = MemoryJournal()
        other.records = dict(self.records)
        return other

    def write(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is full")
        self.writes += 1
        for record in drop:
            self.records.pop(_key(record), None)
        for record in put:
            self.records[_key(record)] = record

    def read(self) -> list[Record]:
        order = {DiskRecord: 0, MountRecord: 1}
        return sorted(self.records.values(), key=lambda record: order.get(type(record), 2))


def _key(record: Record) -> tuple[type, str]:
    if isinstance(record, DiskRecord):
        return DiskRecord, record.attachment
    if isinstance(record, MountRecord):
        return MountRecord, record.mount
    return type(record), record.reservation
