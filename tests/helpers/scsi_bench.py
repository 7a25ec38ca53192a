"""A manager on fakes, for tests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld, MemoryJournal


@dataclass
class Bench:
    """A manager on fakes, and short words for what tests ask of it."""

    controllers: int = 1
    reserved: dict[Slot, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.time
    world: FakeWorld = field(default_factory=FakeWorld)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    host_of: Callable[[FakeWorld], FakeHost] = FakeHost
    guest_of: Callable[[FakeWorld], FakeGuest] = FakeGuest

    def __post_init__(self) -> None:
        self.host, self.guest = self.host_of(self.world), self.guest_of(self.world)
        self._numbers = itertools.count(len(self.world.names_used) * 100)  # no two owners give the same name
        self.manager = self.new_manager()

    def new_manager(self) -> ScsiManager:
        """Another owner of the same VM."""
        return ScsiManager(
            self.host,
            self.guest,
            self.journal,
            controllers=self.controllers,
            reserved=self.reserved,
            new_id=lambda: f"id{next(self._numbers)}",
            clock=self.clock,
        )

    def kill_owner(self) -> None:
        """End this manager as kill -9 does: nothing of it runs on, and the kernel closes what it had open."""
        for worker in self.manager._workers.tasks:
            worker.cancel()
        self.world.gate = None
        self.world.breaks.clear()
        self.world.open_disks.clear()
        self.journal = self.journal.copy()  # what the dead one still writes goes nowhere
        self.manager = self.new_manager()

    async def add(
        self,
        path: str,
        at: str | None = None,
        *,
        read_only: bool = True,
        mounted: bool = True,
        holder: str = "test",
        timeout_s: float = 30.0,
        **config: object,
    ) -> Reservation:
        return await self.manager.add(
            DiskRequest(host_path=path, read_only=read_only),
            mount=MountConfig(read_only=read_only, **config) if mounted else None,  # type: ignore[arg-type]
            guest_path=PurePosixPath(at) if at else None,
            holder=Holder(name=holder),
            timeout_s=timeout_s,
        )

    async def attach(self, path: str, *, read_only: bool = True, holder: str = "test") -> Reservation:
        return await self.add(path, read_only=read_only, mounted=False, holder=holder)

    def check_promises(self) -> None:
        """What must be true whenever nothing is under way."""
        world, manager = self.world, self.manager
        assert not world.harm, world.harm
        assert not world.open_disks, "a disk that was opened was not closed"
        views = {view.slot: view for view in manager.slots()}
        for slot, there in world.bus.items():
            assert views[slot].identity == there.identity, f"{slot} holds another disk than the manager thinks"
        for view in views.values():
            if view.state == "attached":
                assert view.slot in world.bus, f"{view.slot} is attached only in the manager's mind"
        for mount in manager.mounts():
            if mount.state == "mounted":
                assert world.mounts[mount.guest_path][0] == mount.slot
                assert mount.references > 0 or views[mount.slot].references >= 0
        assert len({view.identity for view in views.values()}) == len(views)

    def check_empty(self) -> None:
        """Nothing is attached, mounted, reserved, open, or in the journal."""
        self.check_promises()
        assert not self.world.bus
        assert not self.world.mounts
        assert not self.manager.slots()
        assert not self.manager.mounts()
        assert not self.manager.reservations()
        assert not self.journal.records
