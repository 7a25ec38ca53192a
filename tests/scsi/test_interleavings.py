"""Every order of the steps of up to three callers and their disks; answered, refused, lost, or cancelled.

A scenario whose orders are too many is tried in part: orders taken by chance, the same ones each time.
"""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import dataclass, field

import pytest

from explore import Budget, Run, next_order
from points import Tell
from scsi_callers import (
    Caller,
    Stage,
    batch,
    busy,
    dead_storage,
    die,
    holder,
    listen,
    move,
    remove,
    resize,
    still,
    use,
)
from utilityvm.errors import AlreadyReleased, NotAttached, UtilityVMError


@dataclass(frozen=True)
class Scenario:
    """Callers at the same time, what was there before them, and what may go wrong in one order."""

    callers: list[Caller]
    faults: int = 0  # answers that are not "done"
    cancels: int = 0
    before: list[Caller] = field(default_factory=list)
    journal: bool = False  # the journal's writes take their time and fail, too
    orders: int = 9_000  # at the most


SCENARIOS: dict[str, Scenario] = {
    "one caller": Scenario([use("a", "/1")], faults=4, cancels=1),
    "one mount shared by two": Scenario([use("a", "/1"), use("a", "/1")], faults=2, cancels=2),
    "two mounts of one disk": Scenario([use("a", "/1"), use("a", "/2")], faults=3, cancels=2),
    "attached only beside mounted": Scenario([use("a", None), use("a", "/1")], faults=2, cancels=2),
    "two disks": Scenario([use("a", "/1"), use("b", "/2")], cancels=1),
    "two disks, a fault": Scenario([use("a", "/1"), use("b", "/2")], faults=1),
    "two disks for one path": Scenario([use("a", "/1"), use("b", "/1")], faults=3, cancels=2),
    "three share one mount": Scenario([use("a", "/1")] * 3, faults=2, cancels=3),
    "two share, one has another path": Scenario([use("a", "/1"), use("a", "/1"), use("a", "/2")], faults=1, cancels=2),
    "two share, one has another disk": Scenario([use("a", "/1"), use("a", "/1"), use("b", "/2")], faults=1, cancels=1),
    "in use": Scenario([use("a", "/1"), busy("/1")], faults=2, cancels=1),
    "in use beside another mount": Scenario([use("a", "/1"), use("a", "/2"), busy("/1")], faults=1, cancels=1),
    "by force beside one without": Scenario([use("a", "/1", force=True), use("a", "/1")], faults=2, cancels=2),
    "by force beside another mount": Scenario([use("a", "/1", force=True), use("a", "/2")], faults=2, cancels=1),
    "by force beside attached only": Scenario([use("a", "/1", force=True), use("a", None)], faults=2, cancels=1),
    "by force beside one without, in use": Scenario(
        [use("a", "/1", force=True), use("a", "/1"), busy("/1")], faults=1, cancels=1
    ),
    "two by force": Scenario([use("a", "/1", force=True), use("a", "/1", force=True), busy("/1")], faults=1, cancels=1),
    "dead storage": Scenario([dead_storage("a", "/1")], faults=2, cancels=1),
    "two removals": Scenario(
        [remove("a"), remove("a")], faults=2, cancels=2, before=[holder("a", "/1"), holder("a", "/2")]
    ),
    "two removals of one mount, in use": Scenario(
        [remove("a"), remove("a", force=True), busy("/1")],
        faults=1,
        cancels=1,
        before=[holder("a", "/1", force=True), holder("a", "/1", force=True)],
    ),
    "a removal beside an add": Scenario([remove("a"), use("a", "/1")], faults=2, cancels=2, before=[holder("a", "/1")]),
    "two resizes, the larger first": Scenario(
        [resize("a", 8), resize("a", 4)], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "two resizes, the smaller first": Scenario(
        [resize("a", 4), resize("a", 8)], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "a resize beside a removal": Scenario(
        [resize("a", 4), remove("a")], faults=2, cancels=2, before=[holder("a", "/1")]
    ),
    "a resize beside an add": Scenario(
        [resize("a", 4), use("a", "/2")], faults=2, cancels=2, before=[holder("a", "/1")]
    ),
    "held still beside an add": Scenario([still(), use("a", "/1")], faults=1, cancels=2),
    "held still beside a resize and a removal": Scenario(
        [resize("a", 4), remove("a"), still()], faults=1, cancels=1, before=[holder("a", "/1"), holder("a", "/2")]
    ),
    "exported beside an add": Scenario([move(), use("a", "/1")], faults=1, cancels=2, before=[holder("b", "/2")]),
    "exported beside a resize": Scenario([resize("a", 4), move()], faults=1, cancels=2, before=[holder("a", "/1")]),
    "a batch": Scenario([batch("a", "b")], faults=1, cancels=1),
    "a batch of which one is there": Scenario([batch("a", "b")], faults=1, cancels=1, before=[holder("a", None)]),
    "a batch beside one of its disks": Scenario([batch("a", "b"), use("a", None)], cancels=1),
    "a journal that fails": Scenario([use("a", "/1")], faults=2, cancels=1, journal=True),
    "a journal that fails under two": Scenario([use("a", "/1"), use("a", "/1")], faults=1, cancels=1, journal=True),
    "the VM dies": Scenario([die(), use("a", "/1"), use("a", "/2")], faults=1, cancels=1),
    "the VM dies in a resize": Scenario([resize("a", 4), remove("a"), die()], faults=1, before=[holder("a", "/1")]),
    "events until the VM dies": Scenario([listen(), use("a", "/1"), use("b", None), die()], faults=1),
}
covered: dict[str, int] = {}


async def clean_up(stage: Stage) -> None:
    """What a careful caller does in the end: release again what could not be released, and have the rest repaired."""
    manager = stage.bench.manager
    await manager.settle()
    for held in manager.reservations():
        await manager.release(held)
    for claim in list(manager._book.claims):
        with contextlib.suppress(AlreadyReleased, NotAttached):
            await manager.release(claim)
    await manager.repair()


def play(scenario: Scenario, run: Run) -> frozenset[str]:
    stage = Stage(run)
    bench, world = stage.bench, stage.bench.world
    with run.loop.running():
        for number, caller in enumerate(scenario.before):
            run.drive(caller(stage, f"before {number}"))
        world.gate, run.breaks = run.gate, world.breaks
        if scenario.journal:
            bench.journal.gate, bench.journal.breaks = run.gate, world.breaks
        tasks = [run.loop.create_task(caller(stage, str(number))) for number, caller in enumerate(scenario.callers)]
        run.play(tasks)
        for task in tasks:
            assert task.done(), "a caller waits for ever"
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, UtilityVMError):
                raise error
        assert not world.harm, world.harm
        stage.check_nothing_of_nobody(is_whole=run.budget.faults == scenario.faults and not stage.was_busy)
        world.breaks.clear()
        world.dead.clear()
        run.finish(clean_up(stage))
    if stage.has_died:
        world.bus.clear()
        world.mounts.clear()
    bench.check_empty()
    assert not run.loop.failures, run.loop.failures
    return frozenset(world.log)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_promises_hold_in_every_order(name: str, tell: Tell) -> None:
    scenario = SCENARIOS[name]
    chance = random.Random(name)
    tried, outcomes, whole = set[tuple[int, ...]](), set[frozenset[str]](), False
    follow: list[int] | None = []
    by_chance = False
    gc.collect()
    gc.disable()  # nothing here needs it but exceptions with their frames, and they are many
    try:
        for number in range(2 * scenario.orders):
            if len(tried) >= scenario.orders or whole:
                break
            by_chance = by_chance or len(tried) >= scenario.orders // 2
            run = Run(follow or [], Budget(scenario.faults, scenario.cancels), chance=chance if by_chance else None)
            if by_chance:
                run.follow = []
            try:
                outcomes.add(play(scenario, run))
            except BaseException:
                print(f"{name}: choices {run.taken}")  # noqa: T201  a failing order is repeated by its choices
                raise
            tried.add(tuple(run.taken))
            if not by_chance:
                follow = next_order(run)
                whole = follow is None
            if number % 500 == 0:
                gc.collect()
    finally:
        gc.enable()
    covered[name] = len(tried)
    tell(f"{len(tried)} orders, {len(outcomes)} sets of steps{', all there are' if whole else ''}: {name}")
    assert whole or len(tried) >= scenario.orders // 2


def test_enough_orders_were_tried(tell: Tell) -> None:
    if len(covered) == len(SCENARIOS):
        tell(f"{sum(covered.values())} orders in all")
        assert sum(covered.values()) >= 250_000
