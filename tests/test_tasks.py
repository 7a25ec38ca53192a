"""What is begun is finished, whoever is cancelled and how often; and nobody waits for it beyond his time."""

from __future__ import annotations

import ast
import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utilityvm.errors import DeadlineExceeded, HostRefused
from utilityvm.tasks import GRACE_S, Deadline, Undo, finish

SOURCE = Path(__file__).parent.parent / "src/utilityvm"
LONG_S = 60.0
INTERRUPTED = """
import asyncio, sys
from utilityvm.tasks import Undo

async def step(name):
    for _ in range(5):
        await asyncio.sleep(0.02)
    print(name, flush=True)

async def main():
    async with Undo() as undo:
        undo.add(step, "first")
        undo.add(step, "second")
        print("begun", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


class Steps:
    """Steps that write down that they were done to the end."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def take(self, name: str, pauses: int = 3) -> None:
        for _ in range(pauses):
            await asyncio.sleep(0)
        self.done.append(name)

    def fail(self) -> None:
        raise HostRefused("no")


async def hang() -> None:
    await asyncio.Event().wait()


async def cancelled_often(task: asyncio.Task[None]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_is_taken_back_of_a_block_that_succeeds() -> None:
    steps = Steps()
    async with Undo() as undo:
        undo.add(steps.take, "one")
    assert steps.done == []


async def test_the_last_is_taken_back_first_and_the_error_is_raised() -> None:
    steps = Steps()

    async def failing() -> None:
        async with Undo() as undo:
            undo.add(steps.take, "one")
            undo.add(steps.take, "two")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert steps.done == ["two", "one"]


async def test_a_step_that_fails_stops_no_other() -> None:
    steps = Steps()

    async def failing() -> None:
        async with Undo() as undo:
            undo.add(steps.take, "one")
            undo.add(steps.fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert steps.done == ["one"]


async def test_a_step_has_its_own_end() -> None:
    steps = Steps()

    async def failing() -> None:
        async with Undo() as undo:
            undo.add(steps.take, "one")
            undo.add(hang, within_s=0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(failing(), LONG_S)
    assert steps.done == ["one"]


async def test_all_of_it_is_taken_back_however_often_the_caller_is_cancelled() -> None:
    steps = Steps()

    async def working() -> None:
        async with Undo() as undo:
            undo.add(steps.take, "one")
            undo.add(steps.take, "two")
            await hang()

    task = asyncio.create_task(working())
    await asyncio.sleep(0)
    await cancelled_often(task)
    assert steps.done == ["two", "one"]


async def test_a_caller_who_is_cancelled_while_a_failure_is_taken_back_is_cancelled_then() -> None:
    steps, begun = Steps(), asyncio.Event()

    async def slow() -> None:
        begun.set()
        await steps.take("slow")

    async def failing() -> None:
        async with Undo() as undo:
            undo.add(slow)
            raise ZeroDivisionError

    task = asyncio.create_task(failing())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.done == ["slow"]


async def test_the_caller_does_not_wait_beyond_his_time_and_the_rest_is_taken_back_later() -> None:
    steps, may_go_on = Steps(), asyncio.Event()

    async def slow() -> None:
        await may_go_on.wait()
        steps.done.append("slow")

    async def failing() -> None:
        deadline = Deadline(0.05)
        async with deadline.limit("it was not done"), Undo(deadline) as undo:
            undo.add(steps.take, "last")
            undo.add(slow)
            await hang()

    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"it was not done within 0.05 s"):
        await failing()
    assert time.monotonic() - begun < 0.05 + GRACE_S + LONG_S
    assert steps.done == []
    may_go_on.set()
    while steps.done != ["slow", "last"]:
        await asyncio.sleep(0)


@pytest.mark.parametrize("times", [1, 2])
def test_it_is_taken_back_when_a_program_is_interrupted(times: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    assert process.stdout.read() == b"second\nfirst\n"
    process.wait()
    process.stdout.close()


async def test_work_that_is_to_be_finished_is_however_often_the_caller_is_cancelled() -> None:
    steps = Steps()
    task = asyncio.create_task(finish(steps.take("it", pauses=10)))
    await asyncio.sleep(0)
    await cancelled_often(task)
    assert steps.done == ["it"]


async def test_who_waits_for_work_to_be_finished_gets_its_result_or_error() -> None:
    async def give(value: int) -> int:
        return 7 // value

    assert await finish(give(1)) == 7
    with pytest.raises(ZeroDivisionError):
        await finish(give(0))


async def test_who_waits_for_work_to_be_finished_waits_no_longer_than_his_time() -> None:
    steps, may_go_on = Steps(), asyncio.Event()

    async def slow() -> None:
        await may_go_on.wait()
        steps.done.append("slow")

    with pytest.raises(DeadlineExceeded):
        await finish(slow(), deadline=Deadline(0.01))
    may_go_on.set()
    while not steps.done:
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_runs_side_by_side_is_waited_for_to_the_end(path: Path) -> None:
    """A bare `gather` leaves at the first error, and what the others come to own is nobody's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "gather":
            assert "return_exceptions" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
