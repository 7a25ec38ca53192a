"""Every order of the steps of up to three callers, two disks and two mounts; answered, refused, lost, or cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import PurePosixPath

import pytest

from explore import Budget, Run, next_order
from points import Tell
from scsi_bench import Bench
from utilityvm.errors import AlreadyReleased, NotAttached, UtilityVMError

Caller = tuple[str, str | None]  # a disk, and where it is mounted (None: attached only)

# What may go wrong in one order (answers that are not "done", callers that are cancelled), and how many orders to try.
SCENARIOS: dict[str, tuple[list[Caller], Budget, int]] = {
    "one caller": ([("a", "/1")], Budget(4, 1), 30_000),
    "one mount shared by two": ([("a", "/1"), ("a", "/1")], Budget(2, 2), 30_000),
    "two mounts of one disk": ([("a", "/1"), ("a", "/2")], Budget(3, 2), 30_000),
    "attached only beside mounted": ([("a", None), ("a", "/1")], Budget(2, 2), 30_000),
    "two disks": ([("a", "/1"), ("b", "/2")], Budget(0, 1), 30_000),
    "two disks, a fault": ([("a", "/1"), ("b", "/2")], Budget(1, 0), 30_000),
    "two disks for one path": ([("a", "/1"), ("b", "/1")], Budget(3, 2), 30_000),
    "three share one mount": ([("a", "/1"), ("a", "/1"), ("a", "/1")], Budget(2, 3), 30_000),
    "two share, one has another path": ([("a", "/1"), ("a", "/1"), ("a", "/2")], Budget(1, 2), 30_000),
    "two share, one has another disk": ([("a", "/1"), ("a", "/1"), ("b", "/2")], Budget(1, 1), 30_000),
}
covered: dict[str, int] = {}


async def caller(bench: Bench, name: str, disk: str, at: str | None) -> None:
    """Add, look, release. Success means that it is so, at that moment."""
    held = await bench.add(disk, at, mounted=at is not None, holder=name)
    assert bench.world.bus[held.slot].identity == f"file:{disk}"
    if at is not None:
        assert bench.world.mounts[PurePosixPath(at)][0] == held.slot
    await bench.manager.release(held)


async def clean_up(bench: Bench) -> None:
    """What a careful caller does in the end: release again what could not be released, and have the rest repaired."""
    await bench.manager.settle()
    for held in bench.manager.reservations():
        await bench.manager.release(held)
    for claim in list(bench.manager._book.claims):
        with contextlib.suppress(AlreadyReleased, NotAttached):
            await bench.manager.release(claim)
    await bench.manager.repair()


def play(callers: list[Caller], run: Run) -> frozenset[str]:
    bench = Bench()
    bench.world.gate = run.gate
    run.breaks = bench.world.breaks
    with run.loop.running():
        tasks: dict[str, asyncio.Task[None]] = {
            str(number): run.loop.create_task(caller(bench, str(number), disk, at))
            for number, (disk, at) in enumerate(callers)
        }
        run.play(tasks)
        for task in tasks.values():
            assert task.done(), "a caller waits for ever"
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, UtilityVMError), error
        assert not bench.world.harm, bench.world.harm
        bench.world.breaks.clear()
        run.finish(clean_up(bench))
    bench.check_empty()
    assert not run.loop.failures, run.loop.failures
    return frozenset(bench.world.log)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_promises_hold_in_every_order(name: str, tell: Tell) -> None:
    callers, budget, at_most = SCENARIOS[name]
    follow: list[int] | None = []
    schedules, outcomes = 0, set[frozenset[str]]()
    while follow is not None and schedules < at_most:
        run = Run(follow, Budget(budget.faults, budget.cancels))
        try:
            outcomes.add(play(callers, run))
        except BaseException:
            print(f"{name}: choices {run.taken}")  # noqa: T201  a failing order is repeated by its choices
            raise
        schedules += 1
        follow = next_order(run)
    covered[name] = schedules
    whole = ", all there are" if follow is None else ""
    tell(f"{schedules} orders, {len(outcomes)} sets of steps{whole}: {name}")
    assert schedules >= 400


def test_enough_orders_were_tried() -> None:
    if len(covered) == len(SCENARIOS):
        assert sum(covered.values()) >= 100_000
