"""What callers do in the explorer. Each looks, at every moment, whether it has what it was promised."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

from explore import Run
from scsi_bench import Bench
from utilityvm.errors import AlreadyReleased, Migrating, NotSupported, UtilityVMError, VMGone
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.manager import AddRequest, ScsiManager
from utilityvm.scsi.mount import Mount, checked_guest_path
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig, OpenDisk, ReservationRecord
from utilityvm.scsi.reservation import ForceArgument, Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.steps import Steps
from utilityvm.scsi.transitions import ReservationState
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld, MemoryJournal

MIB = 1 << 20
_checked_path = functools.cache(checked_guest_path)  # the same few paths in every order


class Stage:
    """One order: the bench, the choices, and what the callers hold and were told."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._faults = run.budget.faults
        self.bench = Bench(
            host_of=lambda world: WatchedHost(self, world), guest_of=lambda world: WatchedGuest(self, world)
        )
        self.held: dict[str, Reservation] = {}  # by the callers' own account
        self.leaving: set[str] = set()  # given back by a call that was cancelled: it goes on behind it
        self.polite: set[str] = set()  # held by callers who never ask for force
        self.was_busy = False  # a program in the guest kept a disk, so that an undo may have been refused
        self.told_bytes = 0
        self.reformatting: list[str] = []  # disks that a caller, who still waits, asked to be made anew
        self.has_died = False
        self.watch_overruling(self.bench.manager._steps)

    def watch_overruling(self, steps: Steps) -> None:
        """The host takes a disk away. Nobody may lose it by that who did not ask for it, or who has it."""
        overrule = steps._overrule

        def watched(disk: Disk, mount: Mount | None, error: Exception) -> None:
            if disk.overruled is None:
                self.check_force(disk, None)
                if disk.claims:
                    self.bench.world.harm.append(f"{disk.identity} was taken away, and somebody has it")
            overrule(disk, mount, error)

        steps._overrule = watched  # type: ignore[method-assign]

    @property
    def is_untouched(self) -> bool:
        """Did every step so far go as it should?"""
        return self.run.budget.faults == self._faults

    def pause(self) -> Awaitable[None]:
        """Let others go first, or not."""
        return self.run.gate("pause")

    async def add(
        self, name: str, disk: str, at: str | None, *, force: bool = False, ensure: bool = False, reformat: bool = False
    ) -> Reservation:
        if reformat:
            self.reformatting.append(disk)
        try:
            held = await self.bench.add(
                disk,
                at,
                read_only=False,
                mounted=at is not None,
                holder=name,
                ensure_filesystem=ensure,
                reformat=reformat,
            )
        finally:
            if reformat:
                self.reformatting.remove(disk)
        self.held[held.id] = held
        if not force:
            self.polite.add(held.id)
        if not self.has_died:
            assert self.bench.world.bus[held.slot].identity == f"file:{disk}"
            assert at is None or self.bench.world.mounts[PurePosixPath(at)][0] == held.slot
        if self.is_untouched and not self.has_died:
            noted = self.bench.journal.records.get((ReservationRecord, held.id))
            assert isinstance(noted, ReservationRecord), "a caller was told before the journal had it"
            assert noted.state == ReservationState.HELD, f"a caller was told, and the journal says {noted.state}"
        return held

    async def release(self, held: Reservation, *, force: ForceArgument = False) -> None:
        try:
            await self.bench.manager.release(held, force=force)
        except UtilityVMError:
            self._check_whole_is_held(held)
            raise
        except BaseException:
            self.leaving.add(held.id)
            raise
        self.held.pop(held.id, None)
        if self.is_untouched and not self.has_died:
            assert (ReservationRecord, held.id) not in self.bench.journal.records, "told before the journal had it"

    def _check_whole_is_held(self, held: Reservation) -> None:
        """A release was refused. If nothing was done, it is held as before."""
        claim = self.bench.manager._book.claims.get(held.id)
        if claim is not None and claim.is_met and not claim.is_awaited:
            assert claim.state is ReservationState.HELD, f"{held.id} is whole, and was given away"

    def disk_at(self, slot: Slot) -> Disk | None:
        """The disk that the manager has there."""
        return next((disk for disk in self.bench.manager._book.disks.values() if disk.slot == slot), None)

    def check_wanted(self, step: str, slot: Slot, at: PurePosixPath | None = None) -> None:
        """A step is sent. It is one that the claims of now ask for, and not those of a while ago."""
        disk = self.disk_at(slot)
        if disk is not None and disk.overruled is not None and step in ("unmount", "eject"):
            return  # the host takes the disk away, whoever wants it now
        is_wanted = disk is not None and disk.is_wanted
        if disk is not None and at is not None:
            is_wanted = any(mount.is_wanted for mount in disk.mounts.values() if mount.guest_path == at)
        if is_wanted is not (step in ("attach", "mount")):
            self.bench.world.harm.append(f"{step} {slot} was sent, and that was wanted no more")

    def check_force(self, disk: Disk | None, at: PurePosixPath | None) -> None:
        """A forced step is sent. Nobody may leave by it who did not ask for force."""
        for claim in disk.leaving.values() if disk else ():
            if claim.id in self.polite and (at is None or (claim.mount and claim.mount.guest_path == at)):
                self.bench.world.harm.append(f"{claim.id}, which asked for no force, was released by force")

    def check_kept(self, state: ScsiState) -> None:
        """The state was imported: reservations that are still held have their names, and their disks are there."""
        held = {one.id: one for one in self.bench.manager.reservations()}
        views = {view.slot: view for view in self.bench.manager.slots()}
        mounted = {mount.guest_path for mount in self.bench.manager.mounts() if mount.state == "mounted"}
        ours = {one.reservation for disk in state.disks for one in disk.reservations}
        assert self.held.keys() & ours <= held.keys() | self.leaving, "a reservation has another name"
        for disk in state.disks:
            paths = {mount.mount: PurePosixPath(mount.guest_path) for mount in disk.mounts}
            for one in disk.reservations:
                if one.reservation not in held:
                    continue
                at = paths.get(one.mount) if one.mount else None
                assert (held[one.reservation].slot, held[one.reservation].guest_path) == (disk.where(), at)
                if views[disk.where()].state == "attached":
                    there = self.bench.world.bus[disk.where()]
                    assert there.attachment == views[disk.where()].attachment, "attached in the document alone"
                if at in mounted:
                    assert self.bench.world.mounts[at][0] == disk.where(), "mounted in the document alone"

    def check_nothing_of_nobody(self, *, is_whole: bool) -> None:
        """All that is held is held by a caller; without faults, all else is gone."""
        claims = self.bench.manager._book.claims.values()
        ours = self.held.keys() | self.leaving
        strangers = [claim.id for claim in claims if claim.id not in ours]
        if not is_whole:
            strangers = [id for id in strangers if self.bench.manager._book.claims[id].state != "releasing"]
        assert not strangers, f"held by nobody: {strangers}"


class WatchedHost(FakeHost):
    """A host that tells of each attach that nobody wants."""

    def __init__(self, stage: Stage, world: FakeWorld) -> None:
        super().__init__(world)
        self._stage = stage

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        self._stage.check_wanted("attach", slot)
        await super().attach(slot, disk, attachment=attachment, timeout_s=timeout_s)


class WatchedGuest(FakeGuest):
    """A guest that tells of each step that drops data, or that nobody wants, as it takes it."""

    def __init__(self, stage: Stage, world: FakeWorld) -> None:
        super().__init__(world)
        self._stage = stage

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        return _checked_path(guest_path)

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        self._stage.check_wanted("mount", slot, guest_path)
        if config.reformat and self._stage.bench.world.bus[slot].identity[5:] not in self._stage.reformatting:
            self._stage.bench.world.harm.append(f"the disk at {slot} was formatted, and nobody had asked for it")
        return await super().mount(slot, config, guest_path=guest_path, timeout_s=timeout_s)

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        self._stage.check_wanted("unmount", slot, guest_path)
        if force:
            self._stage.check_force(self._stage.disk_at(slot), guest_path)
        await super().unmount(slot, config, guest_path=guest_path, timeout_s=timeout_s, force=force)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        self._stage.check_wanted("eject", slot)
        if force:
            self._stage.check_force(self._stage.disk_at(slot), None)
        await super().eject(slot, timeout_s=timeout_s, force=force)


Caller: TypeAlias = Callable[[Stage, str], Coroutine[Any, Any, None]]


def use(disk: str, at: str | None, *, force: bool = False) -> Caller:
    """Add, look, release. Success means that it is so, at that moment."""

    async def caller(stage: Stage, name: str) -> None:
        await stage.release(await stage.add(name, disk, at, force=force), force=force)

    return caller


def late(caller: Caller) -> Caller:
    """The same, at any time: also while what it wants is on its way out."""

    async def late_caller(stage: Stage, name: str) -> None:
        await stage.pause()
        await caller(stage, name)

    return late_caller


def make(disk: str, at: str, *, anew: bool = False) -> Caller:
    """As `use`, of a disk whose file system is made if it has none; `anew`: whatever it has."""

    async def caller(stage: Stage, name: str) -> None:
        if not anew:
            await stage.pause()
        await stage.release(await stage.add(name, disk, at, ensure=True, reformat=anew))

    return caller


def busy(at: str) -> Caller:
    """A program in the guest works in the mount for a while."""

    async def caller(stage: Stage, name: str) -> None:
        stage.was_busy = True
        stage.bench.world.busy[PurePosixPath(at)] = name
        try:
            await stage.pause()
            await stage.pause()
        finally:
            del stage.bench.world.busy[PurePosixPath(at)]

    return caller


def remove(disk: str, *, force: bool = False) -> Caller:
    """Drop one reference of the disk, of which there are enough for all who do so."""

    async def caller(stage: Stage, name: str) -> None:
        try:
            await stage.bench.manager.remove(disk, force=force)
        except AlreadyReleased as error:
            raise AssertionError(f"two removals wanted the same reference: {error}") from error
        finally:
            gone = stage.held.keys() - stage.bench.manager._book.claims.keys()
            for id in gone:
                del stage.held[id]

    return caller


def resize(disk: str, mib: int) -> Caller:
    async def caller(stage: Stage, name: str) -> None:
        await stage.pause()
        await stage.bench.manager.resize(disk, mib * MIB)
        stage.told_bytes = max(stage.told_bytes, mib * MIB)
        for there in stage.bench.world.bus.values():
            assert there.identity != f"file:{disk}" or there.size_bytes >= stage.told_bytes

    return caller


def force_in_vain(disk: str, at: str) -> Caller:
    """Ask for force where the guest knows none. It is refused, and nothing has changed."""

    async def caller(stage: Stage, name: str) -> None:
        stage.bench.world.knows_force = False
        held = await stage.add(name, disk, at)
        try:
            await stage.release(held, force=True)
        except NotSupported:
            claims = stage.bench.manager._book.claims
            assert claims[held.id].state is ReservationState.HELD, "it was refused, and given away"
        else:
            raise AssertionError("a guest that knows no force used it")
        await stage.release(held)

    return caller


async def check_refuses(manager: ScsiManager) -> None:
    """Nothing may change now."""
    for call in (manager.repair(), manager.remove("a"), manager.resize("a", 64 * MIB)):
        try:
            await call
        except Migrating:
            continue
        raise AssertionError("a change between the export and the resume")


def still() -> Caller:
    """What a save does: whatever happens, nothing is sent once all is settled."""

    async def caller(stage: Stage, name: str) -> None:
        manager, log = stage.bench.manager, stage.bench.world.log
        await stage.pause()
        with manager.held_still("it is being saved"):
            await manager.settle()
            sent = len(log)
            await stage.pause()
            await stage.pause()
            assert log[sent:] == [], "something was sent while all was to be still"

    return caller


def move() -> Caller:
    """Export the state, and go on. In between the document stays true."""

    async def caller(stage: Stage, name: str) -> None:
        manager, log = stage.bench.manager, stage.bench.world.log
        await stage.pause()
        try:
            state = await manager.export_state()
            sent = len(log)
            await stage.pause()
            await check_refuses(manager)
            await stage.pause()
            assert log[sent:] == [], "something was sent after the export"
            there = {str(slot): one.attachment for slot, one in stage.bench.world.bus.items()}
            assert {disk.slot: disk.attachment for disk in state.disks} == there
        finally:
            if manager._exported:
                await manager.resume()

    return caller


def take_over(*, lost: Literal["disks", "mounts"] | None = None) -> Caller:
    """Export the state, and go on as another manager that imports it, of a VM that has lost its disks or its mounts.

    If that fails the first one goes on, as the owner of a VM that did not come to move.
    """

    async def caller(stage: Stage, name: str) -> None:
        bench, world = stage.bench, stage.bench.world
        old, old_journal = bench.manager, bench.journal
        await stage.pause()
        state = await old.export_state()
        bench.journal = MemoryJournal()
        bench.journal.gate, bench.journal.breaks = old_journal.gate, old_journal.breaks
        bench.manager = new = bench.new_manager()
        stage.watch_overruling(new._steps)
        try:
            new.import_state(state, holder=Holder(name=name))
            was_there = world.bus, world.guest_devices, world.mounts
            if lost == "disks":
                world.bus, world.guest_devices = {}, {}
            if lost:
                world.mounts = {}
            sent = len(world.log)
            await stage.pause()
            await check_refuses(new)
            await check_refuses(old)
            assert world.log[sent:] == [], "something was sent between the export and the resume"
            try:
                findings = await new.resume()
            except UtilityVMError:  # nothing changed, and it can be called again
                assert all(step.startswith("probe") for step in world.log[sent:])
                findings = await new.resume()
            assert not findings or not stage.is_untouched, findings
        finally:
            if new._imported:
                bench.manager, bench.journal = old, old_journal
                if lost:
                    world.bus, world.guest_devices, world.mounts = was_there
                await old.resume()
        stage.check_kept(state)

    return caller


def batch(*disks: str) -> Caller:
    """Add several at once, and release them at once."""

    async def caller(stage: Stage, name: str) -> None:
        manager = stage.bench.manager
        requests = [
            AddRequest(disk=DiskRequest(host_path=disk, read_only=False), mount=MountConfig()) for disk in disks
        ]
        given = [
            one for one in await manager.add_many(requests, holder=Holder(name=name)) if isinstance(one, Reservation)
        ]
        stage.held |= {one.id: one for one in given}
        try:
            errors = await manager.remove_many(given)
        except BaseException:
            stage.leaving |= {one.id for one in given}
            raise
        for one, error in zip(given, errors, strict=True):
            if error is None:
                del stage.held[one.id]

    return caller


def dead_storage(disk: str, at: str) -> Caller:
    """The storage dies. Without force nothing is taken out, for the data would be lost; with force all of it is."""

    async def caller(stage: Stage, name: str) -> None:
        held = await stage.add(name, disk, at, force=True)
        stage.bench.world.dead.add(f"file:{disk}")
        try:
            await stage.release(held)
        except UtilityVMError:
            pass
        else:
            raise AssertionError("what was not written out was dropped without force")
        try:
            await stage.release(held, force=True)
        except UtilityVMError as error:
            if stage.is_untouched:
                raise AssertionError(f"force did not take it out: {error}") from error
            raise
        assert held.slot not in stage.bench.world.bus

    return caller


def kept_by_the_guest(disk: str, at: str | None) -> Caller:
    """The guest lets go of the disk in no way for a while. The host takes it away, unless another needs it."""

    async def caller(stage: Stage, name: str) -> None:
        held = await stage.add(name, disk, at, force=True)
        stage.was_busy = True
        stage.bench.world.stubborn.add(f"file:{disk}")
        stage.bench.world.pulled.add(f"file:{disk}")
        try:
            await stage.release(held, force="host")
        finally:
            stage.bench.world.stubborn.discard(f"file:{disk}")

    return caller


def die() -> Caller:
    async def caller(stage: Stage, name: str) -> None:
        await stage.pause()
        stage.has_died = True
        stage.bench.manager.mark_gone(VMGone("QEMU was killed"))

    return caller


def listen() -> Caller:
    """Hear everything from the call on, up to the VM's end."""

    async def caller(stage: Stage, name: str) -> None:
        events = stage.bench.manager.events()
        await stage.pause()
        heard = [event.what async for event in events]
        sent = [step for step in stage.bench.world.log if step.startswith("attach ")]
        assert heard.count("attaching") == len(sent), f"heard {heard}"

    return caller


def holder(disk: str, at: str | None, *, force: bool = False) -> Caller:
    """Add, and keep it, for the time before the others come. `force`: somebody may force its release."""

    async def caller(stage: Stage, name: str) -> None:
        await stage.add(name, disk, at, force=force)

    return caller
