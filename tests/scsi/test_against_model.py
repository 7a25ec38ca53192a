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
    NoFreeSlot,
    OutcomeUnknown,
    StoreError,
)
from utilityvm.scsi.reservation import Reservation
from utilityvm.testing import Break

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
        self.run_steps = Run([], Budget(0, 0))
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
            held = self.finish(self.bench.add(disk, path, mounted=path is not None))
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
                self.finish(self.bench.attach(disk, read_only=False))
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
            held = self.finish(self.bench.add(disk, path, mounted=path is not None))
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
            held = self.finish(self.bench.attach(disk))
        except (StoreError, NoFreeSlot):
            self.bench.journal.failures = 0
        else:
            raise AssertionError(f"a step was sent without its intent: {held}")

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
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
