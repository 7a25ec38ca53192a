"""Which process a pid means. Alone it names whoever has it now; with the kernel's start time it names one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def started_at(pid: int) -> str | None:
    """The start time of the process in clock ticks since the boot; None if it has ended, reaped or not.

    Source: proc(5), /proc/PID/stat, fields 3 and 22.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets
    return None if fields[0] in "ZX" else fields[19]


def is_running(pid: int, started: str) -> bool:
    """Is that very process alive?"""
    return started_at(pid) == started


def process_with_word(word: str) -> tuple[int, str] | None:
    """The process that has `word` on its command line, as pid and start time; None if there is none."""
    wanted = word.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended, or is not ours to look at
        if wanted in words and (started := started_at(int(entry.name))) is not None:
            return int(entry.name), started
    return None


def own_start() -> str:
    """The start time of this process."""
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
