"""A disk is formatted only for a caller that asked for it and still waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
from msgspec import structs

from scsi_bench import Bench
from utilityvm.errors import ConfigDiffers, GuestRefused, OutcomeUnknown
from utilityvm.scsi.ports import MountConfig, MountRecord
from utilityvm.scsi.reservation import Reservation
from utilityvm.testing import Break

PATH = PurePosixPath("/mnt/a")


async def reformat(bench: Bench) -> Reservation:
    return await bench.add("a", str(PATH), read_only=False, ensure_filesystem=True, reformat=True)


async def ensure(bench: Bench) -> Reservation:
    return await bench.add("a", str(PATH), read_only=False, ensure_filesystem=True)


def hold(bench: Bench, step: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold the next step of that kind: the first event says that it was sent, and the second lets it go on."""
    is_sent, go_on = asyncio.Event(), asyncio.Event()

    async def gate(sent: str) -> None:
        if sent.startswith(f"{step} "):
            is_sent.set()
            await go_on.wait()

    bench.world.gate = gate
    return is_sent, go_on


async def test_a_disk_is_formatted_once_for_the_caller_that_asked(bench: Bench) -> None:
    await bench.manager.release(await reformat(bench))
    assert bench.world.reformatted == ["a"]


async def test_what_is_mounted_again_while_it_is_unmounted_is_not_formatted_again(bench: Bench) -> None:
    held = await reformat(bench)
    is_sent, go_on = hold(bench, "unmount")
    releasing = asyncio.create_task(bench.manager.release(held))
    await is_sent.wait()

    adding = asyncio.create_task(ensure(bench))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(releasing, adding)

    assert bench.world.log.count("mount 0:0 /mnt/a") == 2
    assert bench.world.reformatted == ["a"]


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_a_caller_that_was_cancelled_does_not_have_the_disk_formatted_for_another(
    bench: Bench, step: str
) -> None:
    """Not once more, if the mount was on its way."""
    bench.world.fail_next("mount", Break.LOSE_REQUEST, times=step == "mount")
    is_sent, go_on = hold(bench, step)
    first = asyncio.create_task(reformat(bench))
    await is_sent.wait()
    other = asyncio.create_task(ensure(bench))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    go_on.set()

    if step == "mount":
        with pytest.raises(OutcomeUnknown):
            await other
        await ensure(bench)
    else:
        await other
    assert bench.world.reformatted == []


async def test_a_reformat_whose_request_was_lost_is_not_made_up_for_by_the_next_caller(bench: Bench) -> None:
    attached = await bench.attach("a", read_only=False)
    bench.world.fail_next("mount", Break.LOSE_REQUEST)
    bench.world.fail_next("probe_mount", Break.REFUSE)
    with pytest.raises(OutcomeUnknown, match="mount unknown"):
        await reformat(bench)

    await ensure(bench)

    assert bench.world.reformatted == []
    await bench.manager.release(attached)


async def test_nothing_that_is_kept_says_reformat(bench: Bench) -> None:
    """Not the views, not the journal, not the state that is exported."""
    await reformat(bench)
    kept = [record.config for record in bench.journal.read() if isinstance(record, MountRecord)]
    (view,) = bench.manager.mounts()
    assert kept == [view.config] == [MountConfig(ensure_filesystem=True)]


async def test_a_new_owner_formats_nothing_whatever_the_journal_says(bench: Bench) -> None:
    """An earlier version wrote it down."""
    await reformat(bench)
    for key, record in bench.journal.records.items():
        if isinstance(record, MountRecord):
            config = structs.replace(record.config, reformat=True)
            bench.journal.records[key] = replace(record, config=config, state="reserved")
    bench.world.mounts.clear()
    bench.kill_owner()

    await bench.manager.restore(is_alive=lambda holder: True)

    assert bench.world.mounts[PATH][1] == MountConfig(ensure_filesystem=True)
    assert bench.world.reformatted == ["a"]


async def test_a_request_to_reformat_shares_with_nobody(bench: Bench) -> None:
    await reformat(bench)
    with pytest.raises(ConfigDiffers):
        await bench.add("a", read_only=False, ensure_filesystem=True, reformat=True)
    assert bench.world.reformatted == ["a"]


async def test_a_disk_that_is_mounted_is_not_formatted(bench: Bench) -> None:
    await bench.add("a", "/mnt/b", read_only=False, partition=1)
    with pytest.raises(GuestRefused, match="in use"):
        await reformat(bench)
    assert bench.world.reformatted == []
