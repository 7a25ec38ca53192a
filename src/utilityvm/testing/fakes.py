"""A host, a guest and a journal in memory, which follow the rules of the real ones: tests/contract tries both."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final

from utilityvm.errors import (
    AlreadyAttached,
    ConfigDiffers,
    DeadlineExceeded,
    DiskInUse,
    DiskNotFound,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    NotAttached,
    NotSupported,
    OutcomeUnknown,
    StoreError,
)
from utilityvm.scsi.mount import checked_guest_path
from utilityvm.scsi.ports import (
    AttachmentType,
    DiskFormat,
    DiskRecord,
    DiskRequest,
    MountConfig,
    MountRecord,
    OpenDisk,
    Record,
)
from utilityvm.scsi.slot import MAX_CONTROLLERS, Slot

SIZE_BYTES: Final = 1 << 20  # of a disk whose size nobody said
GROWING: Final = (DiskFormat.RAW, DiskFormat.QCOW2)


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
    format: DiskFormat
    read_only: bool
    size_bytes: int


@dataclass
class FakeWorld:
    """The bus and the guest of one VM, and what went wrong that must not. Host and guest see the same world."""

    controllers: int = MAX_CONTROLLERS
    links: dict[str, str] = field(default_factory=dict)  # other spellings of a disk's path
    formats: dict[str, DiskFormat] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # by identity
    missing: set[str] = field(default_factory=set)
    physical: set[str] = field(default_factory=set)  # paths of block devices; all others are image files
    blank: set[str] = field(default_factory=set)  # paths of disks without a file system
    reformatted: list[str] = field(default_factory=list)  # paths of disks whose content a `reformat` removed
    in_use_elsewhere: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)  # identities of disks whose storage answers with I/O errors
    knows_force: bool = True
    stubborn: set[str] = field(default_factory=set)  # identities of disks that the guest lets go of in no way
    pulled: set[str] = field(default_factory=set)  # of those that the host may take from under the guest
    neighbours: list[FakeWorld] = field(default_factory=list)  # other VMs on the same machine
    bus: dict[Slot, Attached] = field(default_factory=dict)
    guest_devices: dict[Slot, str] = field(default_factory=dict)  # the attachment that the guest knows
    mounts: dict[PurePosixPath, tuple[Slot, MountConfig]] = field(default_factory=dict)
    busy: dict[PurePosixPath, str] = field(default_factory=dict)  # who uses the mount there
    notes: dict[PurePosixPath, list[str]] = field(default_factory=dict)  # what is said of a mount there
    open_disks: set[FakeDisk] = field(default_factory=set)
    names_used: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)  # every step that was sent
    harm: list[str] = field(default_factory=list)  # data lost, disks mixed up: must stay empty
    breaks: defaultdict[str, list[Break]] = field(default_factory=lambda: defaultdict(list))
    gate: Callable[[str], Awaitable[None]] | None = None  # awaited before and after each step, for schedulers
    held: asyncio.Event | None = None  # see `hold`
    _late: list[asyncio.Task[None]] = field(default_factory=list)  # steps that were held, in their order

    def fail_next(self, step: str, how: Break = Break.REFUSE, *, times: int = 1) -> None:
        """Break the next `times` steps of that kind: attach, detach, probe, mount, unmount, eject, …"""
        self.breaks[step] += [how] * times

    def hold(self) -> asyncio.Event:
        """No step is done, or answered, before the event is set. One whose time is up is done even so, later."""
        self.held = asyncio.Event()
        return self.held

    async def step(
        self, step: str, about: str, act: Callable[[], None], refusal: Callable[[str], Exception], timeout_s: float
    ) -> None:
        """Do one step of a peer: it is logged, may be broken, and may wait at the gate on its way in."""
        self.log.append(f"{step} {about}")
        if self.held is None:
            await self._take(step, about, act, refusal)
            return
        earlier = [task for task in self._late if not task.done()]
        late = asyncio.create_task(self._take_late(self.held, earlier, step, about, act, refusal))
        self._late = [*earlier, late]
        late.add_done_callback(lambda done: done.exception())  # nobody may be there to hear of it
        if not (await asyncio.wait({late}, timeout=timeout_s))[0]:
            raise DeadlineExceeded(f"{step} {about}: no answer within {timeout_s:g} s")
        late.result()

    async def _take_late(
        self,
        held: asyncio.Event,
        earlier: list[asyncio.Task[None]],
        step: str,
        about: str,
        act: Callable[[], None],
        refusal: Callable[[str], Exception],
    ) -> None:
        await held.wait()
        if earlier:
            await asyncio.wait(earlier)
        await self._take(step, about, act, refusal)

    async def _take(self, step: str, about: str, act: Callable[[], None], refusal: Callable[[str], Exception]) -> None:
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
        if not path or "\0" in path:
            raise InvalidRequest(f"{request.host_path!r} is no path")
        if path in world.missing:
            raise DiskNotFound(f"{request.host_path}: there is no such file", host_path=request.host_path)
        if (request.kind is AttachmentType.PASS_THRU) is not (path in world.physical):
            raise InvalidRequest(f"{request.host_path} is no {request.kind}", host_path=request.host_path)
        known = DiskFormat.RAW if path in world.physical else world.formats.get(path)
        if request.format not in (None, known, DiskFormat.RAW) and known is not None:
            raise ConfigDiffers(f"{request.host_path} is {known}, not {request.format}", host_path=request.host_path)
        identity = f"block:{path}" if path in world.physical else f"file:{path}"
        disk = FakeDisk(
            identity=identity,
            format=request.format or known or DiskFormat.RAW,
            size_bytes=world.sizes.get(identity, SIZE_BYTES),
            read_only=request.read_only,
            world=world,
        )
        world.open_disks.add(disk)
        return disk

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        world = self.world
        if not isinstance(disk, FakeDisk):
            raise InvalidRequest(f"{disk!r} was not opened by this host", slot=slot)
        self._check_slot(slot)

        def act() -> None:
            if disk.is_closed:
                world.harm.append(f"{disk.identity} was attached after it was closed")
            if any(other.attachment == attachment for other in world.bus.values()):
                raise AlreadyAttached(f"attachment {attachment} exists", slot=slot)
            if slot in world.bus:
                raise AlreadyAttached(f"slot {slot} is taken by {world.bus[slot].identity}", slot=slot)
            if attachment in world.names_used:
                world.harm.append(f"the name {attachment} was used twice")
            if disk.identity in world.in_use_elsewhere:
                raise DiskInUse(f"{disk.identity} is in use by another VM")
            for user in (world, *world.neighbours):
                for other in user.bus.values():
                    if other.identity == disk.identity and not (other.read_only and disk.read_only):
                        raise DiskInUse(f"{disk.identity} is attached already")
            if any(other.identity == disk.identity for other in world.bus.values()):
                world.harm.append(f"{disk.identity} is attached twice")
            world.names_used.add(attachment)
            world.bus[slot] = Attached(attachment, disk.identity, disk.format, disk.read_only, disk.size_bytes)
            world.guest_devices[slot] = attachment

        await world.step("attach", f"{disk.identity} {slot}", act, HostRefused, timeout_s)

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        world = self.world

        def act() -> None:
            there = world.bus.get(slot)
            if there is None or there.attachment != attachment:
                return
            if there.identity in world.pulled:  # what the guest has of it goes with it
                world.guest_devices.pop(slot, None)
                world.mounts = {path: one for path, one in world.mounts.items() if one[0] != slot}
            if world.guest_devices.get(slot) == attachment:
                world.harm.append(f"{there.identity} was pulled from under the guest")
            for path, (where, _) in world.mounts.items():  # which stay, over nothing
                if where == slot:
                    world.harm.append(f"{there.identity} was pulled while it was mounted at {path}")
            del world.bus[slot]
            world.guest_devices.pop(slot, None)

        await world.step("detach", str(slot), act, HostRefused, timeout_s)

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        await self.world.step("probe", str(slot), lambda: None, HostRefused, timeout_s)
        there = self.world.bus.get(slot)
        return there is not None and there.attachment == attachment

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        def act() -> None:
            there = self._there(slot, attachment)
            if there.read_only:
                raise NotSupported("a read-only disk cannot grow", slot=slot)
            if there.format not in GROWING:
                raise NotSupported(f"a {there.format} disk cannot grow", slot=slot)
            if size_bytes < there.size_bytes:
                # A real host compares, and so does this one; but the manager has no business asking.
                self.world.harm.append(f"{there.identity} was to shrink from {there.size_bytes} to {size_bytes}")
            elif size_bytes < self.world.sizes.get(there.identity, 0):  # somebody made its file larger
                raise HostRefused(f"{there.identity} has {self.world.sizes[there.identity]} bytes", slot=slot)
            elif size_bytes > there.size_bytes:
                there.size_bytes = self.world.sizes[there.identity] = size_bytes

        if size_bytes % 512:
            raise InvalidRequest(f"{size_bytes} bytes are not whole sectors", slot=slot)
        await self.world.step("resize", f"{slot} {size_bytes}", act, HostRefused, timeout_s)
        return self._there(slot, attachment).size_bytes

    async def size(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        await self.world.step("size", str(slot), lambda: None, HostRefused, timeout_s)
        return self._there(slot, attachment).size_bytes

    def _there(self, slot: Slot, attachment: str) -> Attached:
        there = self.world.bus.get(slot)
        if there is None or there.attachment != attachment:
            raise NotAttached(f"there is no {attachment} at {slot}", slot=slot)
        return there

    def _check_slot(self, slot: Slot) -> None:
        Slot.checked(*slot)
        if slot.controller >= self.world.controllers:
            raise InvalidRequest(f"slot {slot}: the VM has {self.world.controllers} SCSI controllers", slot=slot)


class FakeGuest:
    """A guest that keeps devices and mounts."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        if slot is not None:
            Slot.checked(*slot)

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        return checked_guest_path(guest_path)

    def check_force(self, slot: Slot) -> None:
        if not self.world.knows_force:
            raise NotSupported("this guest's agent knows no force", slot=slot)

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        world = self.world
        self.check(slot, config)

        def act() -> None:
            if guest_path in world.mounts:
                raise GuestPathInUse(f"{guest_path} is in use", slot=slot)
            if slot not in world.guest_devices:
                raise DeadlineExceeded(f"no disk came at {slot} within {timeout_s:g} s", slot=slot)
            there = world.bus[slot]
            if not config.read_only and there.read_only:
                raise GuestRefused(f"the disk at {slot} is read-only", slot=slot)
            path = there.identity.partition(":")[2]
            if path in world.blank and not config.ensure_filesystem:
                raise GuestRefused(f"no file system that we know is on the disk at {slot}", slot=slot)
            if config.reformat:
                users = [str(at) for at, (where, _) in world.mounts.items() if where == slot]
                if users:
                    raise GuestBusy(f"the disk at {slot} is in use: it was not formatted", holders=users, slot=slot)
                world.reformatted.append(path)
            world.blank.discard(path)
            world.mounts[guest_path] = (slot, config)

        await world.step("mount", f"{slot} {guest_path}", act, GuestRefused, timeout_s)
        return world.notes.get(guest_path, ())

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        world = self.world

        def act() -> None:
            there = world.mounts.get(guest_path)
            if there is None:
                return
            self._check_lets_go(slot)
            if there[0] != slot:
                raise InvalidRequest(f"{guest_path} holds the disk at {there[0]}, which is another", slot=slot)
            if (user := world.busy.get(guest_path)) and not force:
                raise GuestBusy(f"{guest_path} is in use", holders=[user])
            if self._is_dead(slot) and not force:
                raise GuestRefused(f"what was written to {guest_path} does not reach the disk", slot=slot)
            del world.mounts[guest_path]

        await world.step("unmount", f"{slot} {guest_path}{' by force' if force else ''}", act, GuestRefused, timeout_s)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        world = self.world

        def act() -> None:
            self._check_lets_go(slot)
            users = [str(path) for path, (where, _) in world.mounts.items() if where == slot]
            if users and not force:
                raise GuestBusy(f"the disk at {slot} is mounted", holders=users)
            if self._is_dead(slot) and not force:
                raise GuestRefused(f"what was written to the disk at {slot} does not reach it", slot=slot)
            for path in users:
                del world.mounts[PurePosixPath(path)]
            world.guest_devices.pop(slot, None)

        await world.step("eject", f"{slot}{' by force' if force else ''}", act, GuestRefused, timeout_s)

    def _check_lets_go(self, slot: Slot) -> None:
        there = self.world.bus.get(slot)
        if there is not None and there.identity in self.world.stubborn:
            raise GuestRefused(f"the guest does not let go of the disk at {slot}", slot=slot)

    def _is_dead(self, slot: Slot) -> bool:
        there = self.world.bus.get(slot)
        return there is not None and there.identity in self.world.dead

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        await self.world.step("probe_mount", f"{slot} {guest_path}", lambda: None, GuestRefused, timeout_s)
        there = self.world.mounts.get(guest_path)
        return there is not None and there[0] == slot

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        await self.world.step("probe_device", str(slot), lambda: None, GuestRefused, timeout_s)
        return slot in self.world.guest_devices

    async def check_grow(self, slot: Slot, *, size_bytes: int, timeout_s: float) -> None:
        """See `GuestBackend.check_grow`: a vfat never grows. It is no step: it changes nothing."""
        for path, (where, config) in self.world.mounts.items():
            if where == slot and config.filesystem == "vfat" and not config.read_only and not config.partition:
                raise GuestRefused(f"{path} is a vfat file system, which cannot be grown", slot=slot)

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        await self.world.step("grow", str(slot), lambda: None, GuestRefused, timeout_s)


class MemoryJournal:
    """A journal in memory. `writes` counts them; `fail_next` makes the next ones fail."""

    def __init__(self) -> None:
        self.records: dict[tuple[type, str], Record] = {}
        self.failures = 0
        self.writes = 0
        self.gate: Callable[[str], Awaitable[None]] | None = None  # awaited before each write: a store that is busy
        self.breaks: defaultdict[str, list[Break]] = defaultdict(list)  # of "write"; LOSE_REQUEST is a mistake in it

    def fail_next(self, *, times: int = 1) -> None:
        self.failures += times

    def copy(self) -> MemoryJournal:
        """Another journal with the same records."""
        other = MemoryJournal()
        other.records = dict(self.records)
        return other

    async def write(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        if self.gate:
            await self.gate("write")
        how = self.breaks["write"].pop(0) if self.breaks["write"] else None
        if how is Break.LOSE_REQUEST:
            raise RuntimeError("a mistake of the journal's")
        if how is Break.REFUSE:
            raise StoreError("the disk is full")
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is full")
        self.writes += 1
        for record in drop:
            self.records.pop(_key(record), None)
        for record in put:
            self.records[_key(record)] = record
        if how is Break.LOSE_ANSWER:
            raise RuntimeError("a mistake of the journal's")

    def read(self) -> list[Record]:
        order = {DiskRecord: 0, MountRecord: 1}
        return sorted(self.records.values(), key=lambda record: order.get(type(record), 2))


def _key(record: Record) -> tuple[type, str]:
    if isinstance(record, DiskRecord):
        return DiskRecord, record.attachment
    if isinstance(record, MountRecord):
        return MountRecord, record.mount
    return type(record), record.reservation
