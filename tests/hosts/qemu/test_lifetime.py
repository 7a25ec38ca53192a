from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from utilityvm.errors import VMGone
from utilityvm.hosts.qemu import lifetime
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.machine.processes import started_at
from utilityvm.machine.programs import spawn


@pytest.fixture
def child() -> Generator[int]:
    pid = spawn(["/bin/sleep", "1000"], env={})
    yield pid
    try:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def is_reaped(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_the_end_is_seen_and_the_child_reaped(child: int) -> None:
    watch = Watch.child(child)
    assert watch
    watch.kill()
    assert await watch.wait(timeout_s=10)
    assert is_reaped(child)
    watch.kill()
    watch.close()


async def test_a_child_that_ends_while_it_is_looked_at_is_reaped(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_after_a_look(pid: int) -> str | None:
        started = started_at(pid)
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return started

    monkeypatch.setattr(lifetime, "started_at", ends_after_a_look)
    assert Watch.child(child) is None
    assert is_reaped(child)


async def test_who_does_not_end_in_time_is_not_ended(child: int) -> None:
    watch = Watch.child(child)
    assert watch
    assert not await watch.wait(timeout_s=0)
    watch.close()
    assert started_at(child) is not None


async def test_another_start_time_is_another_process(child: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(VMGone):
        Watch(child, "1")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_a_child_that_ended_before_is_reaped() -> None:
    pid = spawn(["/bin/true"], env={})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert started_at(pid) is None
    assert Watch.child(pid) is None
    assert is_reaped(pid)


async def test_a_process_that_is_nobodys_child_of_ours_is_watched_too() -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout
        grandchild = int(shell.stdout.readline())
        started = started_at(grandchild)
        assert started
        watch = Watch(grandchild, started)
        watch.kill()
        assert await watch.wait(timeout_s=10)
