"""Tries the orders of a scenario: all of them, or as many as it may, the same ones each time.

A scenario whose orders are too many is tried in part: half of it depth first, which differ in their last choices, and
half by chance.
"""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import dataclass, field

from explore import Budget, Run, next_order
from points import Tell
from scsi_callers import Caller, Stage
from utilityvm.errors import AlreadyReleased, NotAttached, UtilityVMError


@dataclass(frozen=True)
class Scenario:
    """Callers at the same time, what was there before them, and what may go wrong in one order."""

    callers: list[Caller]
    faults: int = 0  # answers that are not "done"
    cancels: int = 0
    before: list[Caller] = field(default_factory=list)
    journal: bool = False  # the journal's writes take their time and fail, too
    orders: int = 8_000  # at the most


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


def try_orders(name: str, scenario: Scenario, tell: Tell) -> int:
    """Try the scenario's orders; gives how many they were, each another one."""
    chance = random.Random(name)
    tried, outcomes, whole, repeated = set[tuple[int, ...]](), set[frozenset[str]](), False, 0
    follow: list[int] | None = []
    gc.collect()
    gc.disable()  # nothing here needs it but exceptions with their frames, and they are many
    try:
        while len(tried) < scenario.orders and not whole and repeated < scenario.orders // 4:
            by_chance = len(tried) >= scenario.orders // 2
            budget = Budget(scenario.faults, scenario.cancels)
            run = Run([], budget, chance=chance) if by_chance else Run(follow or [], budget)
            try:
                outcomes.add(play(scenario, run))
            except BaseException:
                print(f"{name}: choices {run.taken}")  # noqa: T201  a failing order is repeated by its choices
                raise
            before = len(tried)
            tried.add(tuple(run.taken))
            repeated += len(tried) == before
            if not by_chance:
                follow = next_order(run)
                whole = follow is None
            if len(tried) % 2_000 == 0:
                gc.collect()
    finally:
        gc.enable()
    tell(f"{len(tried)} orders, {len(outcomes)} sets of steps{', all there are' if whole else ''}: {name}")
    return len(tried)
