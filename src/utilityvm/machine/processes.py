"""Which process a pid means. Alone it names whoever has it now; with its start it names one process, for ever.

A *start* is the text `TICKS@BOOT`: clock ticks since the boot, and the beginning of that boot's id, because after a
reboot another process may have the same pid since the same tick.

A process runs, has ended, or cannot be told: every question here has three answers. The third is an exception, or
`Life.UNKNOWN`; nothing may be concluded from it.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from utilityvm.errors import SetupError
from utilityvm.machine import oserrors


class Life(StrEnum):
    """What is known of a process."""

    RUNS = "runs"
    ENDED = "has ended"
    UNKNOWN = "cannot be told"


def started_at(pid: int) -> str | None:
    """The start of the process; None if it has ended, reaped or not.

    Raises:
        SetupError: it cannot be told: this process has too many files open, or /proc hides that one.

    Source: proc(5), /proc/PID/stat, fields 3 and 22; random(4), /proc/sys/kernel/random/boot_id.
    """
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        if not _is_hidden(pid):
            return None
        raise SetupError(
            f"cannot look at process {pid}: /proc does not show it",
            remedy="mount /proc without hidepid, or run as the user that the process belongs to",
        ) from None
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot look at process {pid}") from error
    return None if fields[0] in "ZX" else f"{fields[19]}@{_boot()}"


def life_of(pid: int, started: str) -> Life:
    """Does that very process run?"""
    try:
        return Life.RUNS if is_running(pid, started) else Life.ENDED
    except SetupError:
        return Life.UNKNOWN


def is_ending(pid: int) -> bool:
    """Is the process on its way out: killed, or returned from its last call? It has no command line any more then.

    Source: proc(5), /proc/PID/stat, field 9; linux/sched.h, PF_EXITING.
    """
    try:
        return bool(int(_stat(pid)[6]) & 0x4)
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets


def _is_hidden(pid: int) -> bool:
    """Is there such a process, and /proc mounted so that it shows no processes of others? Source: proc(5), hidepid."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return error.errno not in (errno.ESRCH, errno.EINVAL)
    os.close(pidfd)
    return not Path(f"/proc/{pid}").exists()


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""  # a sandbox that hides it; no reboot goes unnoticed by the processes in it


def is_running(pid: int, started: str) -> bool:
    """Is that very process alive?

    Raises:
        SetupError: it cannot be told.
    """
    return started_at(pid) == started


def process_with(*words: str) -> tuple[int, str] | None:
    """The process that has `words` on its command line, as pid and start; None if there is none.

    Of a launcher and what it launched, both of which have them, it is the latter.

    Raises:
        SetupError: it cannot be told: this process has too many files open.
    """
    found = [pid for pid, line in _every_command_line() if _follow(words, line)]
    launchers = {_parent_of(pid) for pid in found}
    for pid in found:
        if pid not in launchers and (started := started_at(pid)) is not None:
            return pid, started
    return None


def _parent_of(pid: int) -> int | None:
    try:
        return int(_stat(pid)[1])
    except OSError:
        return None


def values_of(option: str) -> set[str]:
    """What follows the word `option` on the command lines of this machine.

    Raises:
        SetupError: it cannot be told: this process has too many files open.
    """
    return {value for _, line in _every_command_line() for word, value in pairwise(line) if word == option}


def _every_command_line() -> Iterator[tuple[int, list[str]]]:
    """Of every process that we may look at: those of other users are none of ours."""
    try:
        with os.scandir("/proc") as entries:
            pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
        for pid in pids:
            try:
                yield pid, _command_line(pid)
            except PermissionError:
                continue
    except OSError as error:
        raise oserrors.as_ours(error, "cannot look at the processes of this machine") from error


def _command_line(pid: int) -> list[str]:
    """The words of its command line; none if it has ended, or is about to."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _follow(words: Sequence[str], line: Sequence[str]) -> bool:
    count = len(words)
    return any(tuple(line[at : at + count]) == tuple(words) for at in range(len(line) - count + 1))


def own_start() -> str:
    """The start of this process."""
    return started_at(os.getpid()) or ""


_introduced: str | None = None


def introduce(command: str) -> None:
    """Name this process as `command` to others that find a VM in use; otherwise that is the name of its program.

    Other users may read it: put no secret into it.
    """
    global _introduced
    _introduced = command


def own_command() -> str:
    """This process as a person would know it again: which program it is, and none of its arguments.

    Others read it, and it lasts longer than the process: an argument may be a secret.
    """
    if _introduced is not None:
        return _introduced
    interpreter, script = Path(sys.executable or "python").name, (getattr(sys, "argv", None) or [""])[0]
    text = f"{interpreter} {script}".strip()
    return text if len(text) <= 200 else f"{text[:199]}…"
