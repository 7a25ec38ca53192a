"""What files this process has open, and a process that can hardly open more."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_SPARE = 200  # numbers that are filled, so that the limit is met wherever the free numbers lie


@contextmanager
def descriptors_left(free: int) -> Generator[None]:
    """This process can open `free` more files in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + _SPARE, hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(free):
            os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def open_files() -> set[tuple[int, str]]:
    """This process's open files: number, and what it leads to.

    Compare them with `<=`: what was open before may be closed meanwhile, as when something of an earlier test goes.
    """
    found: set[tuple[int, str]] = set()
    for number in open_descriptors():
        with suppress(FileNotFoundError):  # the folder itself, which we read
            found.add((number, str(Path(f"/proc/self/fd/{number}").readlink())))
    return found


async def until_closed(before: set[tuple[int, str]]) -> None:
    """Return when nothing is open that was not open `before`: what nobody waits for is closed in threads."""
    async with asyncio.timeout(20.0):
        while not open_files() <= before:
            await asyncio.sleep(0.01)


def open_descriptors() -> set[int]:
    """The numbers of this process's open files."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
