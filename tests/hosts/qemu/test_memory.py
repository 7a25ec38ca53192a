"""Which file is a VM's RAM is not believed but proven, and copying it stops when nobody waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.errors import HostRefused
from utilityvm.hosts.qemu import memory

MIB = 1 << 20
PROCESS: Any = SimpleNamespace(pid=os.getpid(), name="v")  # this process has the RAM


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def memfd(closing: ExitStack, size_bytes: int, content: bytes = b"") -> int:
    fd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    closing.callback(os.close, fd)
    os.ftruncate(fd, size_bytes)
    os.pwrite(fd, content, 0)
    return fd


def copied(tmp_path: Path, stop: Event | None = None) -> bytes:
    with (tmp_path / "memory").open("w+b") as target:
        memory.copy(target.fileno(), PROCESS, MIB, stop or Event())
        target.seek(0)
        return target.read()


def test_the_ram_is_copied_whole(closing: ExitStack, tmp_path: Path) -> None:
    memfd(closing, MIB, b"ram")
    assert copied(tmp_path) == b"ram".ljust(MIB, b"\0")


def test_a_memory_file_of_another_size_is_not_the_ram(closing: ExitStack, tmp_path: Path) -> None:
    memfd(closing, MIB // 2, b"another")
    os.close(os.dup(memfd(closing, MIB, b"ram")))
    assert copied(tmp_path).startswith(b"ram")


@pytest.mark.parametrize("sizes", [[MIB, MIB], [MIB // 2], [MIB * 2, MIB // 2]])
def test_if_it_cannot_be_told_which_is_the_ram_it_is_refused(
    closing: ExitStack, tmp_path: Path, sizes: list[int]
) -> None:
    for size in sizes:
        memfd(closing, size)
    with pytest.raises(HostRefused, match="memory files"):
        copied(tmp_path)


def test_copying_stops_when_nobody_waits_for_it(closing: ExitStack, tmp_path: Path) -> None:
    memfd(closing, MIB, b"ram")
    stop = Event()
    stop.set()
    assert copied(tmp_path, stop) == bytes(MIB)


def test_on_tmpfs_no_page_is_left_to_be_found_later(closing: ExitStack) -> None:
    memfd(closing, MIB, b"ram")
    path = Path("/dev/shm")
    if not path.is_dir():
        pytest.skip("no tmpfs")
    with ExitStack() as files:
        fd = os.open(path, os.O_TMPFILE | os.O_RDWR, 0o600)
        files.callback(os.close, fd)
        if not memory.is_tmpfs(fd):
            pytest.skip("/dev/shm is no tmpfs")
        memory.copy(fd, PROCESS, MIB, Event())
        assert os.fstat(fd).st_blocks * 512 == MIB
