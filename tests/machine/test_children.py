"""No child stays behind as a zombie, whoever was to wait for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from descriptors import descriptors_left
from utilityvm.machine import children
from utilityvm.machine.programs import spawn


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def is_reaped(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_child_is_reaped_when_it_ends_and_nobody_looks() -> None:
    pids = [spawn(["/bin/true"], env={}) for _ in range(5)]
    until(lambda: all(map(is_reaped, pids)))


def test_a_child_is_reaped_after_the_loop_that_started_it_is_closed() -> None:
    async def start() -> int:
        return spawn(["/bin/sleep", "1000"], env={})

    pid = asyncio.run(start())
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_reaped(pid))


def test_a_child_is_reaped_that_was_started_with_the_last_descriptor() -> None:
    process = subprocess.Popen(["/bin/sleep", "1000"])
    with descriptors_left(0):
        children.reap(process.pid)
    process.kill()
    until(lambda: is_reaped(process.pid))
    process.returncode = -signal.SIGKILL


def test_a_child_that_somebody_else_waited_for_does_no_harm() -> None:
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    children.reap(process.pid)
    test_a_child_is_reaped_when_it_ends_and_nobody_looks()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_reaps_children_of_its_own() -> None:
    script = """if True:
        import os, time
        from pathlib import Path
        from utilityvm.machine.programs import spawn
        spawn(["/bin/true"], env={})
        if (fork := os.fork()) == 0:
            pid = spawn(["/bin/true"], env={})
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "7\n"
