"""What gives something to give back can be awaited, entered, and made a task of."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AsyncExitStack
from typing import Self

import pytest

from utilityvm import ClonePool, UtilityVM
from utilityvm.errors import SetupError
from utilityvm.vm.acquiring import acquires, is_acquiring


class Thing:
    """Something that must be given back."""

    def __init__(self) -> None:
        self.held = 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)
        self.held -= 1


class Shop:
    """Things are got here. One that was cancelled half-way is taken back, as the calls of ours do."""

    def __init__(self) -> None:
        self.begun = 0
        self.given: list[Thing] = []
        self.go = asyncio.Event()
        self.go.set()

    @acquires
    async def get(self, *, failure: BaseException | None = None) -> Thing:
        self.begun += 1
        thing = Thing()
        try:
            await self.go.wait()
            if failure:
                raise failure
        except BaseException:
            thing.held = 0
            raise
        finally:
            self.given.append(thing)
        return thing


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def test_it_is_awaited_and_is_the_callers_then(shop: Shop) -> None:
    assert (await shop.get()).held == 1


async def test_it_is_entered_and_given_back_at_the_end_of_the_block(shop: Shop) -> None:
    async with shop.get() as thing:
        assert thing.held == 1
    assert thing.held == 0


async def test_the_older_way_of_entering_it_goes_on_working(shop: Shop) -> None:
    async with await shop.get() as thing:
        assert thing.held == 1
    assert thing.held == 0


async def test_it_is_a_coroutine_for_all_that_takes_coroutines(shop: Shop) -> None:
    assert (await asyncio.create_task(shop.get())).held == 1
    assert [thing.held for thing in await asyncio.gather(shop.get(), shop.get())] == [1, 1]
    assert (await asyncio.wait_for(shop.get(), 60)).held == 1
    async with asyncio.TaskGroup() as group:
        task = group.create_task(shop.get())
    assert task.result().held == 1
    async with AsyncExitStack() as stack:
        thing = await stack.enter_async_context(shop.get())
        assert thing.held == 1
    assert thing.held == 0


def test_a_loop_runs_it() -> None:
    async def main() -> Shop:
        return Shop()

    with asyncio.Runner() as runner:
        assert runner.run(runner.run(main()).get()).held == 1


async def test_a_block_that_fails_gives_it_back(shop: Shop) -> None:
    with pytest.raises(ValueError, match="own"):
        async with shop.get() as thing:
            raise ValueError("the job's own")
    assert thing.held == 0


async def test_what_fails_is_not_entered(shop: Shop) -> None:
    with pytest.raises(ValueError, match="refused"):
        async with shop.get(failure=ValueError("refused")):
            pytest.fail("entered")


@pytest.mark.parametrize("rounds", range(6))
async def test_whoever_is_cancelled_at_whatever_moment_holds_nothing(shop: Shop, rounds: int) -> None:
    """Also in the moment when the thing has just come, and in the block."""
    shop.go.clear()

    async def job() -> None:
        async with shop.get():
            await asyncio.Event().wait()

    task = asyncio.create_task(job())
    for turn in range(rounds):
        if turn == 2:
            shop.go.set()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [thing.held for thing in shop.given] == [0] * shop.begun


async def test_nothing_begins_before_it_is_entered(shop: Shop) -> None:
    shop.get().close()
    assert shop.begun == 0


async def test_it_is_used_once(shop: Shop) -> None:
    call = shop.get()
    await call
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await call


async def test_errors_of_the_system_are_typed_in_it(shop: Shop) -> None:
    with pytest.raises(SetupError):
        await shop.get(failure=OSError(24, "Too many open files"))


@pytest.mark.parametrize("kind", [UtilityVM, ClonePool])
def test_every_public_call_that_gives_something_to_give_back_can_be_entered(kind: type) -> None:
    for name, member in inspect.getmembers(kind, inspect.isroutine):
        result = str(inspect.signature(member).return_annotation) if name[0] != "_" else ""
        if inspect.iscoroutinefunction(member):
            assert result not in ("UtilityVM", "SCSIMount", "Self"), f"{kind.__name__}.{name}"
    entered = {
        name for name, member in inspect.getmembers(kind, inspect.isroutine) if name[0] != "_" and is_acquiring(member)
    }
    assert entered == (
        {"start", "clone", "open", "add_scsi", "add_scsi_physical_disk", "add_scratch", "add"}
        if kind is UtilityVM
        else {"acquire"}
    )
