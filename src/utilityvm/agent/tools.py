"""Runs the programs that make, check and grow file systems: in their turn, and as what the kernel may end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from utilityvm.agent import turns
from utilityvm.agent.faults import Fault
from utilityvm.agent.turns import OutOfMemoryError

_OOM_SCORE: Final = "500"  # a program of a user's goes after them; the agent's own score would have them never go

_NO_MEMORY: Final = (os.strerror(errno.ENOMEM), "Memory allocation failed")  # the second is e2fsprogs'


class Done(NamedTuple):
    """How a tool ended."""

    exit_code: int
    said: str


def run(command: Sequence[str], deadline: float) -> None:
    """Run a tool, which must end well.

    Raises:
        Fault: as `ask` raises; or it failed, and what it said.
    """
    done = ask(command, deadline)
    if done.exit_code:
        raise failure(command[0], done)


def failure(tool: str, done: Done) -> Fault:
    """The fault of a tool that ended with an exit code, or by itself with a signal."""
    how = "failed" if done.exit_code > 0 else f"ended with {signal.Signals(-done.exit_code).name}"
    return Fault(f"{tool} {how}: {done.said}" if done.said else f"{tool} {how}")


def ask(command: Sequence[str], deadline: float) -> Done:
    """Run a tool to its end, whatever that is. It must be one that can be run again if it was killed.

    Raises:
        Fault: it is not there, its time was over, or the guest had no memory for it.
    """
    return turns.disks.take(command[0], lambda: _run(command, deadline), deadline)


def _run(command: Sequence[str], deadline: float) -> Done:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
        )
    except FileNotFoundError:
        raise Fault(f"{command[0]} is not in the guest image") from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfMemoryError from None
        raise
    with process:
        with suppress(OSError), open(f"/proc/{process.pid}/oom_score_adj", "w") as file:
            file.write(_OOM_SCORE)
        try:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Fault(f"{command[0]} was not done within the time given", kind="timeout") from None
            raise
    text = said.decode(errors="replace").partition("\nUsage:")[0].strip()
    if process.returncode == -signal.SIGKILL or (process.returncode and any(word in text for word in _NO_MEMORY)):
        raise OutOfMemoryError
    return Done(process.returncode, text)
