"""A pool goes on after errors, says why it is empty, and forgets no clone that it began."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from utilityvm.errors import DeadlineExceeded, OutcomeUnknown, SetupError, UtilityVMError, VMExists, VMNotRunning
from utilityvm.templates import catalog
from utilityvm.vm import pool as pools
from utilityvm.vm import rest as resting
from utilityvm.vm.pool import ClonePool
from utilityvm.vm.utility_vm import UtilityVM

LONG_S = 30.0


class FakeClone:
    """A clone that runs, until its `stop` succeeds."""

    def __init__(self, host: FakeHost, name: str) -> None:
        self.name = name
        self._vm = self
        self._host = host
        host.running.append(name)

    async def stop(self, *, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self._host.take("stop")
        if self.name in self._host.running:
            self._host.running.remove(self.name)


class FakeHost:
    """Makes clones; what `failures` says fails as often as it is there."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.failures: dict[str, list[BaseException]] = {}

    def take(self, step: str) -> None:
        if failures := self.failures.get(step):
            raise failures.pop(0)

    async def clone(self, template: str, name: str, **_: Any) -> FakeClone:
        await asyncio.sleep(0)
        self.take("clone")
        return FakeClone(self, name)

    async def rest(self, vm: FakeClone, *, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.take("rest")

    async def wake(self, vm: FakeClone, *, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.take("wake")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    host = FakeHost()
    monkeypatch.setattr(UtilityVM, "clone", host.clone)
    monkeypatch.setattr(resting, "rest", host.rest)
    monkeypatch.setattr(resting, "wake", host.wake)
    monkeypatch.setattr(catalog, "load", lambda name: name)
    monkeypatch.setattr(pools, "_SHORTEST_PAUSE_S", 0.001)
    return host


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():
            await asyncio.sleep(0)


async def test_closing_ends_all_that_it_can_and_closing_again_the_rest(host: FakeHost) -> None:
    pool = await ClonePool("warm", 3).__aenter__()
    await until(lambda: pool.ready == 3)
    host.failures["stop"] = [OutcomeUnknown("the kernel does not let QEMU go")]
    with pytest.raises(OutcomeUnknown):
        await pool.close()
    assert len(host.running) == 1
    await pool.close()
    assert host.running == []


async def test_a_close_that_is_cancelled_ends_them_all_the_same(host: FakeHost) -> None:
    pool = await ClonePool("warm", 3).__aenter__()
    await until(lambda: pool.ready == 3)
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    while not closing.done():
        closing.cancel()
        await asyncio.sleep(0)
    assert host.running == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError(), SetupError("no")])
async def test_filling_goes_on_after_an_error(host: FakeHost, error: Exception) -> None:
    host.failures["clone"] = [error, error]
    async with ClonePool("warm", 2) as pool:
        await until(lambda: pool.ready == 2)
    assert host.running == []


async def test_who_asks_is_told_why_there_is_none(host: FakeHost) -> None:
    host.failures["clone"] = [OSError(28, "No space left on device")] * 1000
    async with ClonePool("warm", 1) as pool:
        with pytest.raises(SetupError, match="No space left"):
            await pool.acquire(timeout_s=LONG_S)
        host.failures.clear()
        vm = await pool.acquire(timeout_s=LONG_S)
        await vm.stop(timeout_s=0)


async def test_who_asks_in_vain_is_told_how_the_last_attempt_failed(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: Any, **__: Any) -> None:
        host.take("clone")
        await asyncio.Event().wait()

    monkeypatch.setattr(UtilityVM, "clone", hang)
    host.failures["clone"] = [SetupError("no memory", remedy="buy some")]
    async with ClonePool("warm", 1) as pool:
        await until(lambda: not host.failures["clone"])
        with pytest.raises(DeadlineExceeded, match="no memory") as error:
            await pool.acquire(timeout_s=0.05)
    assert error.value.remedy == "buy some"


async def test_a_name_that_is_taken_is_no_error(host: FakeHost) -> None:
    host.failures["clone"] = [VMExists("taken")]
    async with ClonePool("warm", 1) as pool:
        vm = await pool.acquire(timeout_s=LONG_S)
        await vm.stop(timeout_s=0)


@pytest.mark.parametrize("step", ["rest", "wake"])
async def test_a_clone_of_no_use_is_ended_and_another_is_made(host: FakeHost, step: str) -> None:
    host.failures[step] = [UtilityVMError("it does not answer")]
    async with ClonePool("warm", 1) as pool:
        try:
            vm = await pool.acquire(timeout_s=LONG_S)
        except UtilityVMError:
            vm = await pool.acquire(timeout_s=LONG_S)
        await vm.stop(timeout_s=0)
    assert host.running == []


async def test_one_of_no_use_that_cannot_be_ended_is_ended_at_the_close(host: FakeHost) -> None:
    host.failures["rest"] = [ZeroDivisionError()]
    host.failures["stop"] = [OutcomeUnknown("not yet")]
    async with ClonePool("warm", 1) as pool:
        await until(lambda: pool.ready == 1 and not host.failures["stop"])
        assert len(host.running) == 2
    assert host.running == []


async def test_who_waits_when_it_is_closed_is_told(host: FakeHost) -> None:
    host.failures["clone"] = [VMExists("taken")] * 10_000_000

    async with ClonePool("warm", 1) as pool:
        asking = asyncio.create_task(pool.acquire(timeout_s=LONG_S))
        await asyncio.sleep(0)
    with pytest.raises(VMNotRunning):
        await asking
