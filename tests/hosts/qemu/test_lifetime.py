from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Generator
from contextlib import suppress

import pytest

from descriptors import descriptors_left, open_files
from utilityvm.errors import SetupError, VMGone
from utilityvm.hosts.qemu import lifetime
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.machine.processes import started_at
from utilityvm.machine.programs import spawn


@pytest.fixture
def child() -> Generator[int]:
    pid = spawn(["/bin/sleep", "1000"], env={})
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, 9)


async def test_the_end_is_seen(child: int) -> None:
    watch = Watch.child(child)
    assert watch
    watch.kill()
    assert await watch.wait(timeout_s=10)
    watch.kill()
    watch.close()


async def test_a_child_that_ends_while_it_is_looked_at_has_ended(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str | None] = []

    def ends_after_a_look(pid: int) -> str | None:
        looks.append(started_at(pid))
        if len(looks) == 1:
            os.kill(pid, 9)
            while started_at(pid) is not None:
                pass
        return looks[-1]

    monkeypatch.setattr(lifetime, "started_at", ends_after_a_look)
    assert Watch.child(child) is None


async def test_who_does_not_end_in_time_is_not_ended(child: int) -> None:
    watch = Watch.child(child)
    assert watch
    assert not await watch.wait(timeout_s=0)
    watch.close()
    assert started_at(child) is not None


async def test_another_start_time_is_another_process(child: int) -> None:
    before = open_files()
    with pytest.raises(VMGone):
        Watch(child, "1")
    assert open_files() <= before


async def test_a_child_that_ended_before_is_told_as_such() -> None:
    pid = spawn(["/bin/true"], env={})
    while started_at(pid) is not None:
        await asyncio.sleep(0)
    assert Watch.child(pid) is None


async def test_without_a_free_descriptor_it_cannot_be_told_whether_a_process_runs(child: int) -> None:
    started = started_at(child)
    assert started
    for free in range(2):
        with descriptors_left(free), pytest.raises(SetupError, match="Too many open files"):
            Watch(child, started)
    Watch(child, started).close()


async def test_a_process_that_is_nobodys_child_of_ours_is_watched_too() -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout
        grandchild = int(shell.stdout.readline())
        started = started_at(grandchild)
        assert started
        watch = Watch(grandchild, started)
        watch.kill()
        assert await watch.wait(timeout_s=10)
