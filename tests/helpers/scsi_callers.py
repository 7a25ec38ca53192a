"""What callers do in the explorer. Each looks, at every moment, whether it has what it was promised."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from explore import Run
from scsi_bench import Bench
from utilityvm.errors import AlreadyReleased, UtilityVMError, VMGone
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.manager import AddRequest
from utilityvm.scsi.mount import Mount
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig
from utilityvm.scsi.reservation import ForceArgument, Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.steps import Steps
from utilityvm.scsi.transitions import ReservationState
from utilityvm.testing import FakeGuest

MIB = 1 << 20


class Stage:
    """One order: the bench, the choices, and what the callers hold and were told."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bench = Bench()
        self.held: dict[str, Reservation] = {}  # by the callers' own account
        self.leaving: set[str] = set()  # given back by a call that was cancelled: it goes on behind it
        self.polite: set[str] = set()  # held by callers who never ask for force
        self.was_busy = False  # a program in the guest kept a disk, so that an undo may have been refused
        self.told_bytes = 0
        self.reformatting: list[str] = []  # disks that a caller, who still waits, asked to be made anew
        self.has_died = False
        self.bench.guest = WatchedGuest(self)
        self.bench.manager = self.bench.new_manager()
        self._watch_overruling(self.bench.manager._steps)

    def _watch_overruling(self, steps: Steps) -> None:
        """The host takes a disk away. Nobody may lose it by that who did not ask for it, or who has it."""
        overrule = steps._overrule

        def watched(disk: Disk, mount: Mount | None, error: Exception) -> None:
            if disk.overruled is None:
                self.check_force(disk, None)
                if disk.claims:
                    self.bench.world.harm.append(f"{disk.identity} was taken away, and somebody has it")
            overrule(disk, mount, error)

        steps._overrule = watched  # type: ignore[method-assign]

    async def pause(self) -> None:
        """Let others go first, or not."""
        await self.run.gate("pause")

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

    def _check_whole_is_held(self, held: Reservation) -> None:
        """A release was refused. If nothing was done, it is held as before."""
        claim = self.bench.manager._book.claims.get(held.id)
        if claim is not None and claim.is_met and not claim.is_awaited:
            assert claim.state is ReservationState.HELD, f"{held.id} is whole, and was given away"

    def check_force(self, disk: Disk | None, at: PurePosixPath | None) -> None:
        """A forced step is sent. Nobody may leave by it who did not ask for force."""
        for claim in disk.leaving.values() if disk else ():
            if claim.id in self.polite and (at is None or (claim.mount and claim.mount.guest_path == at)):
                self.bench.world.harm.append(f"{claim.id}, which asked for no force, was released by force")

    def check_nothing_of_nobody(self, *, is_whole: bool) -> None:
        """All that is held is held by a caller; without faults, all else is gone."""
        claims = self.bench.manager._book.claims.values()
        ours = self.held.keys() | self.leaving
        strangers = [claim.id for claim in claims if claim.id not in ours]
        if not is_whole:
            strangers = [id for id in strangers if self.bench.manager._book.claims[id].state != "releasing"]
        assert not strangers, f"held by nobody: {strangers}"


class WatchedGuest(FakeGuest):
    """A guest that tells of each step that drops data, as it takes it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.bench.world)
        self._stage = stage

    def _disk(self, slot: Slot) -> Disk | None:
        disks = self._stage.bench.manager._book.disks.values()
        return next((disk for disk in disks if disk.slot == slot), None)

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        if config.reformat and self._stage.bench.world.bus[slot].identity[5:] not in self._stage.reformatting:
            self._stage.bench.world.harm.append(f"the disk at {slot} was formatted, and nobody had asked for it")
        return await super().mount(slot, config, guest_path=guest_path, timeout_s=timeout_s)

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        if force:
            self._stage.check_force(self._disk(slot), guest_path)
        await super().unmount(slot, config, guest_path=guest_path, timeout_s=timeout_s, force=force)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        if force:
            self._stage.check_force(self._disk(slot), None)
        await super().eject(slot, timeout_s=timeout_s, force=force)


Caller: TypeAlias = Callable[[Stage, str], Coroutine[Any, Any, None]]


def use(disk: str, at: str | None, *, force: bool = False) -> Caller:
    """Add, look, release. Success means that it is so, at that moment."""

    async def caller(stage: Stage, name: str) -> None:
        await stage.release(await stage.add(name, disk, at, force=force), force=force)

    return caller


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
            await stage.pause()
            assert log[sent:] == [], "something was sent after the export"
            there = {str(slot): one.attachment for slot, one in stage.bench.world.bus.items()}
            assert {disk.slot: disk.attachment for disk in state.disks} == there
        finally:
            if manager._exported:
                await manager.resume()

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
        await stage.release(held, force=True)
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
