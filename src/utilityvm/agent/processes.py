"""Every process that there is, and ways to end many of them."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Iterator
from typing import Final, NamedTuple

_PF_KTHREAD: Final = 0x00200000  # linux/sched.h
_KILL_ROUNDS: Final = 10  # for programs that fork while they are being killed
_AGENT_FILES: Final = 16384

_program_files: tuple[int, int] | None = None  # the limit that programs get, once the agent has raised its own


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


def prepare_program() -> None:
    """Make the calling process, a child that is about to become a program, an ordinary one. For between fork and exec.

    The agent has threads, one of which may hold any lock at the fork: only system calls are made here. The kernel may
    end a program when memory runs out; the agent it may not, and its children inherit that.
    """
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    except OSError:
        pass  # without /proc
    if _program_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _program_files)


def raise_file_limit() -> None:
    """Let the agent open the files that as many programs need as may run. Programs get the limit from before."""
    global _program_files
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        hard = before[1] if before[1] == resource.RLIM_INFINITY else max(_AGENT_FILES, before[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(_AGENT_FILES, before[0]), hard))
    except (OSError, ValueError):
        return  # we may not
    _program_files = before


def kill_session(leader: int) -> None:
    """Kill every process of a session. `leader` must not have been reaped: its pid could belong to another process."""
    for _ in range(_KILL_ROUNDS):
        members = [process.pid for process in all_processes() if process.session == leader]
        if not members:
            return
        for pid in members:
            send(pid, signal.SIGKILL)


def is_readable(fd: int, seconds: float) -> bool:
    """Is there something to read within so many seconds, or the end? select(2) takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
