"""Which process a pid means. Alone it names whoever has it now; with its start it names one process, for ever.

A *start* is the text `TICKS@BOOT`: clock ticks since the boot, and the beginning of that boot's id, because after a
reboot another process may have the same pid since the same tick.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from utilityvm.errors import SetupError


def started_at(pid: int) -> str | None:
    """The start of the process; None if it has ended, reaped or not.

    Raises:
        SetupError: this process has too many files open.

    Source: proc(5), /proc/PID/stat, fields 3 and 22; random(4), /proc/sys/kernel/random/boot_id.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise SetupError(
            f"cannot look at process {pid}: {error.strerror}", remedy="raise the limit on open files: ulimit -n"
        ) from error
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets
    return None if fields[0] in "ZX" else f"{fields[19]}@{_boot()}"


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""  # a sandbox that hides it; no reboot goes unnoticed by the processes in it


def is_running(pid: int, started: str) -> bool:
    """Is that very process alive?"""
    return started_at(pid) == started


def process_with(*words: str) -> tuple[int, str] | None:
    """The process that has `words` on its command line, as pid and start; None if there is none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and has_words(int(entry.name), *words):
            started = started_at(int(entry.name))
            if started is not None:
                return int(entry.name), started
    return None


def has_words(pid: int, *words: str) -> bool:
    """Has the process `words` on its command line, whole and one after the other?"""
    try:
        line = b"\0" + Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # it ended, or is not ours to look at
    return b"\0%s\0" % b"\0".join(word.encode() for word in words) in line


def own_start() -> str:
    """The start of this process."""
    return started_at(os.getpid()) or ""


def own_command() -> str:
    """This process as a person would know it again: its command line, cut to a sane length."""
    import shlex

    try:
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        text = shlex.join(word.decode(errors="replace") for word in words)
    except OSError:
        text = shlex.join(sys.argv)
    return text if len(text) <= 200 else f"{text[:199]}…"
