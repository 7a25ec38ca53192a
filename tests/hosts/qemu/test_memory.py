"""Which file is a VM's RAM is not believed but proven, and copying it stops when nobody waits for it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.errors import HostRefused
from utilityvm.hosts.qemu import memory, ram
from utilityvm.hosts.qemu.ram import Ram

MIB = 1 << 20


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


def mapped(closing: ExitStack, fd: int, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    size_bytes = os.fstat(fd).st_size
    mapping = mmap.mmap(fd, size_bytes, flags)
    closing.callback(mapping.close)
    return mapping


def replace(fd: int, another: int) -> None:
    """In every descriptor of that file; Python's mapping has one of its own."""
    file = os.fstat(fd)
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if os.path.samestat(entry.stat(), file):
                os.dup2(another, int(entry.name))


def process(known: Ram | None) -> Any:
    """This process has the RAM."""
    return SimpleNamespace(pid=os.getpid(), name="v", ram=known)


def found(size_bytes: int = MIB) -> Ram:
    return ram.find(os.getpid(), size_bytes, vm="v")


def copied(tmp_path: Path, known: Ram | None, stop: Event | None = None) -> bytes:
    with (tmp_path / "memory").open("w+b") as target:
        memory.copy(target.fileno(), process(known), MIB, stop or Event())
        target.seek(0)
        return target.read()


def test_the_ram_is_copied_whole(closing: ExitStack, tmp_path: Path) -> None:
    mapped(closing, memfd(closing, MIB, b"ram"))
    assert copied(tmp_path, found()) == b"ram".ljust(MIB, b"\0")


def test_the_ram_of_a_clone_is_its_own_mapping(closing: ExitStack, tmp_path: Path) -> None:
    mapping = mapped(closing, memfd(closing, MIB, b"shared"), mmap.MAP_PRIVATE)
    mapping[:3] = b"own"
    assert found().is_private
    assert copied(tmp_path, found()).startswith(b"ownred")


def test_what_is_open_and_not_mapped_is_not_the_ram(closing: ExitStack, tmp_path: Path) -> None:
    memfd(closing, MIB, b"another")
    mapped(closing, memfd(closing, MIB, b"ram"))
    memfd(closing, MIB, b"another")
    assert copied(tmp_path, found()).startswith(b"ram")


def test_what_comes_later_is_not_the_ram(closing: ExitStack, tmp_path: Path) -> None:
    mapped(closing, memfd(closing, MIB, b"ram"))
    known = found()
    with ExitStack() as later:
        for size in (MIB, MIB // 2):
            mapped(later, memfd(later, size, b"another"))
        assert copied(tmp_path, known).startswith(b"ram")
        with pytest.raises(HostRefused, match="2 mappings"):
            found()


def test_a_memory_file_that_was_put_in_the_place_of_the_ram_is_refused(closing: ExitStack, tmp_path: Path) -> None:
    fd = memfd(closing, MIB, b"ram")
    mapped(closing, fd)
    known = found()
    replace(fd, memfd(closing, MIB, b"another"))
    with pytest.raises(HostRefused, match="not the memory file of 1 MiB that it began with"):
        copied(tmp_path, known)


def test_a_memory_file_of_another_size_than_at_first_is_refused(closing: ExitStack, tmp_path: Path) -> None:
    fd = memfd(closing, MIB, b"ram")
    mapped(closing, fd)
    known = found()
    os.ftruncate(fd, MIB // 2)
    with pytest.raises(HostRefused, match="not the memory file of 1 MiB"):
        copied(tmp_path, known)


def test_a_clone_without_its_mapping_is_refused(closing: ExitStack, tmp_path: Path) -> None:
    mapping = mapped(closing, memfd(closing, MIB, b"shared"), mmap.MAP_PRIVATE)
    known = found()
    mapping.close()
    mapped(closing, memfd(closing, MIB, b"another"), mmap.MAP_PRIVATE)
    with pytest.raises(HostRefused, match="has not the memory"):
        copied(tmp_path, known)


@pytest.mark.parametrize("size_bytes", [None, MIB // 2])
def test_ram_that_was_not_told_at_the_start_is_refused(
    closing: ExitStack, tmp_path: Path, size_bytes: int | None
) -> None:
    mapped(closing, memfd(closing, MIB // 2, b"ram"))
    with pytest.raises(HostRefused, match="was not seen"):
        copied(tmp_path, found(size_bytes) if size_bytes else None)


def test_copying_stops_when_nobody_waits_for_it(closing: ExitStack, tmp_path: Path) -> None:
    mapped(closing, memfd(closing, MIB, b"ram"))
    stop = Event()
    stop.set()
    assert copied(tmp_path, found(), stop) == bytes(MIB)


def test_on_tmpfs_no_page_is_left_to_be_found_later(closing: ExitStack) -> None:
    mapped(closing, memfd(closing, MIB, b"ram"))
    path = Path("/dev/shm")
    if not path.is_dir():
        pytest.skip("no tmpfs")
    with ExitStack() as files:
        fd = os.open(path, os.O_TMPFILE | os.O_RDWR, 0o600)
        files.callback(os.close, fd)
        if not memory.is_tmpfs(fd):
            pytest.skip("/dev/shm is no tmpfs")
        memory.copy(fd, process(found()), MIB, Event())
        assert os.fstat(fd).st_blocks * 512 == MIB
