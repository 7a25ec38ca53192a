"""Processes that own VMs and are killed, and what a person does who finds the VMs afterwards."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import crash_owner
from crash_owner import Outcome, Task
from utilityvm import UtilityVM, VMNotFound
from utilityvm.machine import paths as places


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


async def until_no_process_of(name: str) -> None:
    """Neither QEMU nor the log's writer runs any more, of this VM and of those whose names begin like its name.

    The log's writer ends by itself, when it sees that nobody writes any more. A process that is just ending has lost
    its command line, and may still hold its files: it is waited for too. Other programs may say the name as they like.
    """
    folder = str(places.vm_dir(name))
    async with asyncio.timeout(10):
        while any(is_of(name, folder, words) for words in command_lines()):
            await asyncio.sleep(0)
        for process in filter(is_ending, Path("/proc").glob("[0-9]*")):
            while is_ending(process):
                await asyncio.sleep(0)


def is_of(name: str, folder: str, words: list[str]) -> bool:
    named = any(option == "-name" and value.startswith(name) for option, value in pairwise(words))
    return named or any(word.startswith(folder) for word in words)


def is_ending(process: Path) -> bool:
    """Source: proc(5), /proc/PID/stat, fields 3 and 9; linux/sched.h, PF_EXITING."""
    try:
        fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and bool(int(fields[6]) & 0x4)


def command_lines() -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes().decode(errors="replace").split("\0")
