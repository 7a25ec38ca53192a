"""A guest that lets go of a disk in no way: the host takes it away, if all who leave by it asked for that."""

from __future__ import annotations

import asyncio
import logging
from pathlib import PurePosixPath

import pytest

from scsi_bench import Bench
from utilityvm.errors import GuestRefused, NotSupported, OutcomeUnknown
from utilityvm.scsi.ports import ReservationRecord
from utilityvm.testing import Break


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def mounted(bench: Bench, at: str | None = "/1") -> str:
    held = await bench.add("a", at, mounted=at is not None)
    bench.world.stubborn.add("file:a")
    bench.world.pulled.add("file:a")
    return held.id


@pytest.mark.parametrize("at", ["/1", None])
async def test_a_guest_that_refuses_is_overruled_and_all_are_told(
    bench: Bench, at: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    held = await mounted(bench, at)
    for force in (False, True):
        with pytest.raises(GuestRefused):
            await bench.manager.release(held, force=force)
        assert [one.id for one in bench.manager.reservations()] == [held]
    events = bench.manager.events()
    with caplog.at_level(logging.WARNING):
        said = await bench.manager.release(held, force="host")
    assert said is not None
    assert "does not let go" in said
    assert "the host takes the disk away" in caplog.text
    bench.manager.close()
    assert "overruled" in [event.what async for event in events]
    bench.check_empty()


@pytest.mark.parametrize("at", ["/1", None])
@pytest.mark.parametrize("how", [Break.LOSE_REQUEST, Break.LOSE_ANSWER])
async def test_a_guest_that_does_not_answer_is_overruled(bench: Bench, at: str | None, how: Break) -> None:
    held = await mounted(bench, at)
    for step in ("unmount", "eject", "probe_mount", "probe_device"):
        bench.world.fail_next(step, how, times=9)
    assert await bench.manager.release(held, force="host") is not None
    bench.check_empty()


async def test_what_was_left_in_doubt_by_an_earlier_release_is_overruled(bench: Bench) -> None:
    held = await mounted(bench)
    for step in ("unmount", "probe_mount"):
        bench.world.fail_next(step, Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown):
        await bench.manager.release(held)
    bench.world.fail_next("probe_mount", Break.LOSE_REQUEST)
    assert await bench.manager.release(held, force="host") is not None
    bench.check_empty()


async def test_a_guest_that_lets_go_is_not_overruled(bench: Bench) -> None:
    held = await bench.add("a", "/1")
    bench.world.busy[PurePosixPath("/1")] = "sh"
    assert await bench.manager.release(held, force="host") is None
    assert "unmount 0:0 /1 by force" in bench.world.log
    bench.check_empty()


async def test_a_guest_that_knows_no_force_is_asked_without_and_overruled(bench: Bench) -> None:
    held = await mounted(bench)
    bench.world.knows_force = False
    with pytest.raises(NotSupported):
        await bench.manager.release(held, force=True)
    assert await bench.manager.release(held, force="host") is not None
    assert "unmount 0:0 /1" in bench.world.log
    bench.check_empty()


@pytest.mark.parametrize("at", ["/1", "/2", None])
async def test_a_disk_that_somebody_else_needs_stays(bench: Bench, at: str | None) -> None:
    held, other = await mounted(bench), await bench.add("a", at, mounted=at is not None)
    if at != "/1":  # the mount is the other's too: nothing has to be done
        with pytest.raises(GuestRefused):
            await bench.manager.release(held, force="host")
    else:
        assert await bench.manager.release(held, force="host") is None
    assert other.slot in bench.world.bus
    bench.check_promises()


@pytest.mark.parametrize("polite", [False, True])
async def test_nobody_loses_a_disk_by_anothers_release(bench: Bench, polite: bool) -> None:
    """Of two that leave at once one did not ask for so much: the disk stays, and is the other's as before."""
    held, other = await mounted(bench), await bench.add("a", "/1")
    results = await asyncio.gather(
        bench.manager.release(held, force="host"),
        bench.manager.release(other, force=not polite),
        return_exceptions=True,
    )
    assert results[0] is None
    assert isinstance(results[1], GuestRefused)
    assert [one.id for one in bench.manager.reservations()] == [other.id]
    assert await bench.manager.release(other, force="host") is not None
    bench.check_empty()


async def test_who_asks_for_it_meanwhile_gets_it_anew(bench: Bench) -> None:
    """Once the guest was overruled it has a mount of which we know nothing: the disk comes again, as another."""
    held = await mounted(bench)
    first = bench.manager.slots()[0].attachment
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def gate(step: str) -> None:
        if step.startswith("eject"):
            reached.set()
            await go_on.wait()

    bench.world.gate = gate
    releasing = asyncio.create_task(bench.manager.release(held, force="host"))
    await reached.wait()
    adding = asyncio.create_task(bench.add("a", "/1"))
    while bench.manager.slots()[0].references == 0:
        await asyncio.sleep(0)
    go_on.set()
    await releasing
    anew = await adding
    assert bench.manager.slots()[0].attachment != first
    assert bench.world.mounts[PurePosixPath("/1")][0] == anew.slot
    await bench.manager.release(anew, force="host")
    bench.check_empty()


async def test_a_disk_without_any_reservation_can_be_taken_out(bench: Bench) -> None:
    """Its owner was killed while the guest refused: nobody holds it, and the guest keeps it."""
    await mounted(bench, None)
    for key, record in list(bench.journal.records.items()):
        if hasattr(record, "reservation"):
            del bench.journal.records[key]
    bench.kill_owner()
    await bench.manager.restore(is_alive=lambda _: True)
    await bench.manager.settle()
    assert not bench.manager.reservations()
    for force in (False, True):
        with pytest.raises(GuestRefused):
            await bench.manager.remove("a", force=force)
        assert not bench.manager.reservations()
    assert await bench.manager.remove("a", force="host") is not None
    bench.check_empty()


@pytest.mark.parametrize("at", ["/1", None])
@pytest.mark.parametrize("step", ["unmount", "eject", "detach"])
async def test_the_next_owner_goes_on_overruling(bench: Bench, at: str | None, step: str) -> None:
    """The owner is killed while the guest is asked, or the host: nobody gets a disk that the guest still uses."""
    if at is None and step == "unmount":
        return
    held = await mounted(bench, at)
    reached = asyncio.Event()

    async def gate(call: str) -> None:
        if call.startswith(step):
            reached.set()
            await asyncio.Event().wait()

    bench.world.gate = gate
    releasing = asyncio.create_task(bench.manager.release(held, force="host"))
    await reached.wait()
    killed_at = dict(bench.journal.records)
    bench.kill_owner()
    releasing.cancel()
    await asyncio.gather(releasing, return_exceptions=True)
    bench.journal.records = killed_at
    findings = await bench.manager.restore(is_alive=lambda holder: True)
    assert "a at 0:0 was being taken away whatever the guest says" in findings
    bench.check_empty()


async def test_that_the_host_may_overrule_is_journalled_before_the_guest_is_asked(bench: Bench) -> None:
    held = await mounted(bench)
    states: list[str] = []

    async def gate(call: str) -> None:
        records = bench.journal.records.values()
        states.extend(record.state for record in records if isinstance(record, ReservationRecord))

    bench.world.gate = gate
    await bench.manager.release(held, force="host")
    assert set(states) == {"overruling"}


async def test_a_release_that_asks_for_more_the_second_time_is_journalled_too(bench: Bench) -> None:
    held = await mounted(bench)
    for step in ("unmount", "probe_mount"):
        bench.world.fail_next(step, Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown):
        await bench.manager.release(held)
    states: list[str] = []

    async def gate(call: str) -> None:
        records = bench.journal.records.values()
        states.extend(record.state for record in records if isinstance(record, ReservationRecord))

    bench.world.gate = gate
    await bench.manager.release(held, force="host")
    assert "overruling" in states
    bench.check_empty()
