"""Every process that there is, and ways to end many of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Final, NamedTuple

_PF_KTHREAD: Final = 0x00200000  # linux/sched.h
_KILL_ROUNDS: Final = 10  # for programs that fork while they are being killed


class Process(NamedTuple):
    """A process that runs a program: neither a thread of the kernel nor one that has ended."""

    pid: int
    session: int


def all_processes() -> Iterator[Process]:
    """Every one, as proc(5) shows them: some may have ended by the time that the caller looks."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # pid (comm) state ppid pgrp session tty tpgid flags ...; comm may hold anything
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] not in (b"Z", b"X") and not int(fields[6]) & _PF_KTHREAD:
            yield Process(int(entry), int(fields[3]))


def send(pid: int, number: int) -> None:
    """Send a signal. No such process is no error."""
    try:
        os.kill(pid, number)
    except OSError:
        pass


def let_be_killed(pid: int) -> None:
    """Let the kernel end the program when memory runs out. The agent may not be, and its children inherit that.

    Nothing can be run in the child before it becomes the program, for the agent has threads.
    """
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write("0")
    except OSError:
        pass  # it has ended already


def kill_session(leader: int) -> None:
    """Kill every process of the session whose leader is `leader`, which was not reaped, so that its number is its."""
    for _ in range(_KILL_ROUNDS):
        members = [process.pid for process in all_processes() if process.session == leader]
        if not members:
            return
        for pid in members:
            send(pid, signal.SIGKILL)
