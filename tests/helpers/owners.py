"""Processes that own VMs and are killed, and what a person does who finds the VMs afterwards."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import crash_owner
from crash_owner import Outcome, Task
from utilityvm import UtilityVM, VMNotFound


class Owners:
    """Has processes own the VM, one after the other; each is gone when its outcome is known."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, crash_owner.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, task: Task) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(task)) + "\n")
        self._process.stdin.flush()
        outcome = Outcome(**self._read())
        killed = self._read()["killed"]
        assert killed is (outcome.point is not None), outcome.error
        return outcome

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        document: dict[str, Any] = json.loads(self._process.stdout.readline())
        return document

    def close(self) -> None:
        self._process.communicate()


async def remove(name: str, *, force: bool = True) -> None:
    """End what there is of it. It may have had no record yet, or no more."""
    with suppress(VMNotFound):
        await UtilityVM.remove(name, force=force)


async def until_no_process_has(word: str) -> None:
    """The log's writer ends by itself, when it sees that nobody writes any more.

    A process that is just ending has lost its command line, and may still hold its files: it is waited for too.
    """
    async with asyncio.timeout(10):
        while any(word in words for words in command_lines()) or any(map(is_ending, Path("/proc").glob("[0-9]*"))):
            await asyncio.sleep(0)


def is_ending(process: Path) -> bool:
    """Source: proc(5), /proc/PID/stat, fields 3 and 9; linux/sched.h, PF_EXITING."""
    try:
        fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and bool(int(fields[6]) & 0x4)


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
