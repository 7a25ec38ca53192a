"""A process that has hardly any file descriptors left."""

from __future__ import annotations

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


def open_descriptors() -> set[int]:
    """The numbers of this process's open files."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
