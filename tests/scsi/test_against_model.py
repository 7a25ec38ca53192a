"""Random scripts of thousands of calls, compared with a model that is a few dictionaries."""

from __future__ import annotations

from pathlib import PurePosixPath

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from explore import Budget, Run
from scsi_bench import Bench
from utilityvm.errors import (
    AlreadyReleased,
    ConfigDiffers,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    Migrating,
    NoFreeSlot,
    NotAttached,
    OutcomeUnknown,
    StoreError,
)
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.manager import AddRequest
from utilityvm.scsi.ports import DiskRequest, Holder
from utilityvm.scsi.reservation import Reservation
from utilityvm.testing import Break, MemoryJournal

DISKS = st.sampled_from("abcde")
PATHS = st.sampled_from(["/1", "/2", "/3", None])


class Model(RuleBasedStateMachine):
    """Every call runs to its end; the model says what must be true then."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        # A small VM, so that it is full now and then.
        self.bench.manager._book.free._free &= 0b1111
        self.held: dict[str, tuple[Reservation, str, str | None]] = {}
        self.gone: list[Reservation] = []
        self.sizes: dict[str, int] = {}  # MiB, of those that were resized
        self.run_steps = Run(Budget(0, 0))
        self.bench.world.gate = self.run_steps.gate

    def finish(self, coro: object) -> object:
        with self.run_steps.loop.running():
            return self.run_steps.finish(coro)  # type: ignore[arg-type]

    def disks_held(self) -> set[str]:
        return {disk for _, disk, _ in self.held.values()}

    def paths_held(self) -> dict[str, str]:
        return {path: disk for _, disk, path in self.held.values() if path}

    @rule(disk=DISKS, path=PATHS)
    def add(self, disk: str, path: str | None) -> None:
        visible = {view.host_path for view in self.bench.manager.slots()}
        taken = self.paths_held().get(path) if path else None
        try:
            held = self.finish(self.bench.add(disk, path, mounted=path is not None, read_only=False))
        except GuestPathInUse:
            assert taken != disk
            return
        except NoFreeSlot:
            assert disk not in visible
            assert len(visible) == 4
            return
        assert isinstance(held, Reservation)
        assert taken in (None, disk)
        self.held[held.id] = (held, disk, path)

    @rule(disk=DISKS)
    def add_with_another_flag(self, disk: str) -> None:
        if disk in self.disks_held():
            try:
                self.finish(self.bench.attach(disk, read_only=True))
            except ConfigDiffers:
                return
            raise AssertionError("an attached disk was given out with another flag")

    @precondition(lambda self: self.held)
    @rule(data=st.data(), step=st.sampled_from(["unmount", "eject", "detach"]), how=st.sampled_from([None, *Break]))
    def release(self, data: st.DataObject, step: str, how: Break | None) -> None:
        id = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[id][0]
        if how:
            self.bench.world.fail_next(step, how)
        try:
            self.finish(self.bench.manager.release(held))
        except (GuestRefused, HostRefused, OutcomeUnknown):
            assert how in (Break.REFUSE, Break.LOSE_REQUEST)
            self.bench.world.breaks.clear()
            self.finish(self.bench.manager.release(held))
        self.bench.world.breaks.clear()
        del self.held[id]
        self.gone.append(held)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.gone))
        try:
            self.finish(self.bench.manager.release(held))
        except AlreadyReleased:
            return
        raise AssertionError("a second release was no error")

    @rule(disk=DISKS, path=PATHS, step=st.sampled_from(["attach", "mount"]), how=st.sampled_from(list(Break)))
    def add_that_fails(self, disk: str, path: str | None, step: str, how: Break) -> None:
        self.bench.world.fail_next(step, how)
        try:
            held = self.finish(self.bench.add(disk, path, mounted=path is not None, read_only=False))
        except (HostRefused, GuestRefused, OutcomeUnknown, GuestPathInUse, NoFreeSlot):
            pass
        else:
            assert isinstance(held, Reservation)
            self.held[held.id] = (held, disk, path)
        self.bench.world.breaks.clear()

    @rule(disk=DISKS)
    def add_with_a_full_journal(self, disk: str) -> None:
        if disk in self.disks_held():
            return
        self.bench.journal.fail_next()
        try:
            held = self.finish(self.bench.attach(disk, read_only=False))
        except (StoreError, NoFreeSlot):
            self.bench.journal.failures = 0
        else:
            raise AssertionError(f"a step was sent without its intent: {held}")

    @precondition(lambda self: self.held)
    @rule(data=st.data(), force=st.booleans(), is_dead=st.booleans())
    def release_what_is_in_use(self, data: st.DataObject, force: bool, is_dead: bool) -> None:
        """By a program in the guest, or because its storage is dead."""
        id = data.draw(st.sampled_from(sorted(self.held)))
        held, disk, path = self.held[id]
        others = [one for one in self.held.values() if one[0].id != id]
        leaves_mount = path is not None and all(other[2] != path for other in others)
        leaves_disk = all(other[1] != disk for other in others)
        if is_dead:
            self.bench.world.dead.add(f"file:{disk}")
        elif path is not None:
            self.bench.world.busy[PurePosixPath(path)] = "sh"
        is_refused = not force and (leaves_mount or (is_dead and leaves_disk))
        try:
            self.finish(self.bench.manager.release(held, force=force))
        except GuestRefused:
            assert is_refused
            assert id in {one.id for one in self.bench.manager.reservations()}
        else:
            assert not is_refused
            del self.held[id]
            self.gone.append(held)
        self.bench.world.dead.clear()
        self.bench.world.busy.clear()

    @rule(disk=DISKS, force=st.booleans())
    def remove(self, disk: str, force: bool) -> None:
        """The newest reference goes."""
        ours = [one for one in self.held.values() if one[1] == disk]
        try:
            self.finish(self.bench.manager.remove(disk, force=force))
        except NotAttached:
            assert not ours
            return
        (gone,) = (one[0] for one in ours if self.bench.manager.references(one[0]) == 0)
        del self.held[gone.id]
        self.gone.append(gone)

    @rule(disk=DISKS, mib=st.integers(1, 8), how=st.sampled_from([None, *Break]))
    def resize(self, disk: str, mib: int, how: Break | None) -> None:
        before = self.sizes.get(disk, 1)
        if how:
            self.bench.world.fail_next("resize", how)
        try:
            self.finish(self.bench.manager.resize(disk, mib << 20))
        except NotAttached:
            assert disk not in self.disks_held()
        except InvalidRequest:
            assert mib < before
        except (HostRefused, OutcomeUnknown):
            assert mib > before
            assert how in (Break.REFUSE, Break.LOSE_REQUEST)
        else:
            assert mib >= before
            self.sizes[disk] = mib
        self.bench.world.breaks.clear()

    @rule(disks=st.lists(DISKS, max_size=3, unique=True), missing=st.booleans())
    def add_a_batch(self, disks: list[str], missing: bool) -> None:
        """All or nothing."""
        names = [*disks, "missing"] if missing else disks
        self.bench.world.missing.add("missing")
        requests = [AddRequest(disk=DiskRequest(host_path=name, read_only=False)) for name in names]
        before = {one.id for one in self.bench.manager.reservations()}
        try:
            given = self.finish(self.bench.manager.add_many(requests, holder=Holder(name="batch")))
        except (InvalidRequest, NoFreeSlot):
            assert {one.id for one in self.bench.manager.reservations()} == before
            return
        assert isinstance(given, list)
        self.held |= {one.id: (one, name, None) for one, name in zip(given, names, strict=True)}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove_a_batch(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, max_size=4))
        assert self.finish(self.bench.manager.remove_many(ids)) == [None] * len(ids)
        for id in ids:
            self.gone.append(self.held.pop(id)[0])

    @rule(disk=DISKS, turns=st.integers(0, 3))
    def cancel_a_batch(self, disk: str, turns: int) -> None:
        """With a disk that is there, if one is."""
        names = [*sorted(self.disks_held())[:1], disk]
        requests = [AddRequest(disk=DiskRequest(host_path=name, read_only=False)) for name in names]
        before = {one.id for one in self.bench.manager.reservations()}
        loop = self.run_steps.loop
        with loop.running():
            adding = loop.create_task(self.bench.manager.add_many(requests, holder=Holder(name="batch")))
            loop.run_ready()
            for _ in range(turns):
                if self.run_steps.waiting:
                    self.run_steps.waiting.pop(0)[1].set_result(None)
                    loop.run_ready()
            if adding.done():
                if adding.exception() is None:
                    for one in adding.result():
                        assert isinstance(one, Reservation)
                        self.held[one.id] = (one, one.host_path, None)
                return
            adding.cancel()
            loop.run_ready()
        self.finish(self.bench.manager.settle())
        assert {one.id for one in self.bench.manager.reservations()} == before

    @rule()
    def hold_still(self) -> None:
        manager = self.bench.manager
        with self.run_steps.loop.running(), manager.held_still("it is being saved"):
            for call in (self.bench.attach("a"), manager.remove("a"), manager.resize("a", 1 << 30), manager.repair()):
                try:
                    self.run_steps.finish(call)
                except Migrating:
                    continue
                raise AssertionError("a change while all was held still")

    @rule()
    def export_and_go_on(self) -> None:
        manager = self.bench.manager
        state = self.finish(manager.export_state())
        assert isinstance(state, ScsiState)
        with self.run_steps.loop.running():
            for call in (self.bench.attach("a"), manager.remove("a"), manager.resize("a", 1 << 30), manager.repair()):
                try:
                    self.run_steps.finish(call)
                except Migrating:
                    continue
                raise AssertionError("a change after the export")
        assert self.finish(manager.resume()) == []

    @rule()
    def move_to_another_manager(self) -> None:
        """Its journal is empty; the reservations keep their names."""
        state = self.finish(self.bench.manager.export_state())
        assert isinstance(state, ScsiState)
        sent = len(self.bench.world.log)
        self.bench.journal = MemoryJournal()
        self.bench.manager = self.bench.new_manager()
        self.bench.manager._book.free._free &= 0b1111
        self.gone.clear()  # the new manager never knew them
        with self.run_steps.loop.running():
            self.bench.manager.import_state(state, holder=Holder(name="moved"))
        assert self.finish(self.bench.manager.resume()) == []
        assert all(step.startswith("probe") for step in self.bench.world.log[sent:]), "it changed what was there"

    @invariant()
    def is_as_the_model_says(self) -> None:
        bench = self.bench
        bench.check_promises()
        assert {view.host_path for view in bench.manager.slots()} == self.disks_held()
        assert {one.identity for one in bench.world.bus.values()} == {f"file:{disk}" for disk in self.disks_held()}
        assert set(bench.world.mounts) == {PurePosixPath(path) for path in self.paths_held()}
        for held, disk, _ in self.held.values():
            assert bench.manager.references(held) == sum(1 for _, other, _ in self.held.values() if other == disk)

    def teardown(self) -> None:
        for held, _, _ in list(self.held.values()):
            self.finish(self.bench.manager.release(held))
        self.bench.journal.failures = 0
        self.finish(self.bench.manager.settle())
        self.bench.check_empty()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
