"""Tries the orders of a scenario: all of them, or as many as it is told to, the same ones each time."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from explore import Budget, Run, Tree
from scsi_callers import Caller, Stage
from utilityvm.errors import (
    AlreadyReleased,
    GuestBusy,
    GuestRefused,
    HostRefused,
    NotAttached,
    OutcomeUnknown,
    StoreError,
    UtilityVMError,
    WrongState,
)

_OF_STEPS = (HostRefused, GuestRefused, OutcomeUnknown, StoreError, WrongState)
_COLLECT_EVERY = 200  # orders; most garbage is exceptions with their frames


@dataclass(frozen=True)
class Scenario:
    """Callers at the same time, what was there before them, and what may go wrong in one order."""

    callers: list[Caller]
    faults: int = 0  # answers that are not "done"
    cancels: int = 0
    before: list[Caller] = field(default_factory=list)
    journal: bool = False  # the journal's writes take their time and fail, too


@dataclass(frozen=True)
class Tried:
    """What came of it: how many orders, each another one; how many different sets of steps they sent."""

    orders: int
    sets_of_steps: int
    are_all: bool

    def __str__(self) -> str:
        return f"{self.orders} orders, {self.sets_of_steps} sets of steps{', all there are' if self.are_all else ''}"


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
            # With a right answer to every step no caller hears of one that failed, or was half-way.
            is_of_step = isinstance(error, _OF_STEPS) and not isinstance(error, GuestBusy)
            if is_of_step and stage.is_untouched and not stage.was_busy:
                raise AssertionError(f"nothing went wrong, and a caller was told {error!r}")
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


class _Mistakes(logging.Handler):
    """What the manager logs of mistakes of its own. Warnings are no mistakes, and not even made."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []
        self._log = logging.getLogger("utilityvm.scsi")

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def __enter__(self) -> Self:
        self._log.addHandler(self)
        self._before = self._log.level
        self._log.setLevel(logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.setLevel(self._before)
        self._log.removeHandler(self)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Collect garbage when told to, and do not look at what is there now again and again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def try_orders(name: str, scenario: Scenario, at_most: int) -> Tried:
    """Try that many orders of the scenario, or all of them."""
    tree = Tree(random.Random(name))
    outcomes = set[frozenset[str]]()
    orders = 0
    with _Mistakes() as mistakes, _without_collections():
        while orders < at_most and not tree.is_whole:
            tree.begin()
            try:
                outcomes.add(play(scenario, Run(Budget(scenario.faults, scenario.cancels), tree)))
                # A journal that fails may do so by a mistake, which is a worker's as well.
                assert scenario.journal or not mistakes.told, mistakes.told
            except BaseException:
                print(f"{name}: order {orders}, choices {tree.taken}")  # noqa: T201  it is repeated by its number
                raise
            tree.end()
            orders += 1
            if orders % _COLLECT_EVERY == 0:
                gc.collect()
    return Tried(orders, len(outcomes), tree.is_whole)
