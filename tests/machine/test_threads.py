"""Blocking work leaves the event loop: what hangs delays nobody, and what comes late is closed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from utilityvm.errors import SetupError
from utilityvm.machine import threads
from utilityvm.machine.threads import Lane, aside, in_thread, lent, to_the_end

HANG_S = 20.0  # what would have hung fails a test after that time


class Hanging:
    """Work that ends when it is told to."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.has_begun = threading.Event()
        self.has_ended = threading.Event()

    def __call__(self, result: str = "done") -> str:
        self.has_begun.set()
        self.goes_on.wait(HANG_S)
        self.has_ended.set()
        return result


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    work = Hanging()
    yield work
    work.goes_on.set()


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "LIMIT", 3)
    monkeypatch.setattr(threads, "_threads", threads._Threads())
    return 3


async def until(done: threading.Event) -> None:
    async with asyncio.timeout(HANG_S):
        while not done.is_set():
            await asyncio.sleep(0.001)


async def test_it_gives_what_the_work_returned_or_raises_what_it_raised() -> None:
    assert await in_thread(max, 2, 3) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


async def test_hundreds_that_hang_delay_nobody(hanging: Hanging) -> None:
    tasks = [asyncio.create_task(in_thread(hanging)) for _ in range(300)]
    await until(hanging.has_begun)
    async with asyncio.timeout(HANG_S):
        assert await in_thread(max, 2, 3) == 3
    hanging.goes_on.set()
    assert await asyncio.gather(*tasks) == ["done"] * 300


async def test_a_cancelled_caller_is_back_at_once_and_what_comes_late_is_cleaned_up(hanging: Hanging) -> None:
    late: list[tuple[str, bool]] = []
    is_cleaned = threading.Event()

    def clean(result: str) -> None:
        late.append((result, threading.current_thread() is threading.main_thread()))
        is_cleaned.set()

    task = asyncio.create_task(in_thread(hanging, "opened", late=clean))
    await until(hanging.has_begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not hanging.has_ended.is_set()
    hanging.goes_on.set()
    await until(is_cleaned)
    assert late == [("opened", False)]


async def test_a_caller_that_is_cancelled_just_as_the_result_comes_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    is_told, is_cleaned = threading.Event(), threading.Event()
    tell, late = loop.call_soon_threadsafe, list[int]()

    def told(*arguments: Any, **named: Any) -> asyncio.Handle:
        try:
            return tell(*arguments, **named)
        finally:
            is_told.set()

    def clean(result: int) -> None:
        late.append(result)
        is_cleaned.set()

    monkeypatch.setattr(loop, "call_soon_threadsafe", told)
    task = asyncio.create_task(in_thread(lambda: 1, late=clean))
    await asyncio.sleep(0)
    assert is_told.wait(HANG_S)  # the result is on its way to the loop, which we keep from taking it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_cleaned.wait(HANG_S)
    assert late == [1]


def test_what_comes_after_the_loop_has_ended_is_cleaned_up(hanging: Hanging) -> None:
    is_cleaned = threading.Event()

    async def main() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await in_thread(hanging, late=lambda _: is_cleaned.set())

    asyncio.run(main())
    hanging.goes_on.set()
    assert is_cleaned.wait(HANG_S)


async def test_to_the_end_tells_a_cancelled_caller_when_the_work_has_ended(hanging: Hanging) -> None:
    late: list[str] = []
    task = asyncio.create_task(to_the_end(hanging, "made", late=late.append))
    await until(hanging.has_begun)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    hanging.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hanging.has_ended.is_set()
    assert late == ["made"]


async def test_a_lent_descriptor_stays_the_same_file_whatever_becomes_of_the_number(
    hanging: Hanging, tmp_path: Path
) -> None:
    (tmp_path / "ours").write_text("ours")
    (tmp_path / "other").write_text("other")
    fd = os.open(tmp_path / "ours", os.O_RDONLY)
    seen: list[int] = []

    def read(mine: int) -> bytes:
        seen.append(mine)
        hanging()
        return os.pread(mine, 10, 0)

    task = asyncio.create_task(in_thread(lent(fd, read)))
    await until(hanging.has_begun)
    other = os.open(tmp_path / "other", os.O_RDONLY)
    os.dup2(other, fd)
    hanging.goes_on.set()
    assert await task == b"ours"
    os.close(other)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


async def test_a_lent_descriptor_of_work_that_is_left_out_is_closed(few_threads: int, hanging: Hanging) -> None:
    hung = [asyncio.create_task(in_thread(hanging)) for _ in range(few_threads)]
    await until(hanging.has_begun)
    reader, writer = os.pipe()
    task = asyncio.create_task(in_thread(lent(writer, os.fstat)))
    await asyncio.sleep(0)
    os.close(writer)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    hanging.goes_on.set()
    await asyncio.gather(*hung)
    del task
    assert await in_thread(os.read, reader, 1) == b""  # the end of the pipe: nobody has its other side
    os.close(reader)


async def test_when_all_threads_hang_the_next_call_is_refused_with_the_reason(
    few_threads: int, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "BEGIN_S", 0.05)
    hung = [asyncio.create_task(in_thread(hanging)) for _ in range(few_threads)]
    await until(hanging.has_begun)
    ran = threading.Event()
    with pytest.raises(SetupError, match=r"3 calls to this host's storage have not returned") as caught:
        await in_thread(ran.set)
    assert caught.value.remedy
    hanging.goes_on.set()
    await asyncio.gather(*hung)
    assert await in_thread(max, 2, 3) == 3
    assert not ran.is_set()


async def test_work_that_waits_for_a_thread_gets_the_next_one(few_threads: int) -> None:
    async with asyncio.timeout(HANG_S):
        assert await asyncio.gather(*(in_thread(max, n, 0) for n in range(200))) == list(range(200))
    assert threads._threads._count <= few_threads


async def test_aside_is_done_and_its_error_reaches_nobody() -> None:
    done = threading.Event()
    aside(divmod, 1, 0)
    aside(done.set)
    await until(done)


async def test_a_lane_keeps_the_order_also_when_callers_go_away(hanging: Hanging) -> None:
    lane, order = Lane(), list[int]()
    first = asyncio.create_task(lane.run(hanging))
    await until(hanging.has_begun)
    tasks = [asyncio.create_task(lane.run(order.append, n)) for n in range(10)]
    await asyncio.sleep(0)
    first.cancel()
    tasks[3].cancel()
    await asyncio.gather(first, tasks[3], return_exceptions=True)
    hanging.goes_on.set()
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_a_lane_that_hangs_delays_no_other(hanging: Hanging) -> None:
    task = asyncio.create_task(Lane().run(hanging))
    await until(hanging.has_begun)
    async with asyncio.timeout(HANG_S):
        assert await Lane().run(max, 2, 3) == 3
    hanging.goes_on.set()
    await task


def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os, threading
from utilityvm.machine.threads import aside

done = threading.Event()
aside(done.set)  # now a thread waits for work here, and not in the child
assert done.wait(20)
if os.fork() == 0:
    done.clear()
    aside(done.set)
    os._exit(0 if done.wait(20) else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"


def test_work_that_hangs_does_not_keep_the_program_from_ending() -> None:
    program = """
import asyncio, time
from utilityvm.machine.threads import in_thread

async def main():
    try:
        async with asyncio.timeout(0.1):
            await in_thread(time.sleep, 600)
    except TimeoutError:
        print("out of time")

asyncio.run(main())
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "out of time\n"
    assert time.monotonic() - begun < 60
