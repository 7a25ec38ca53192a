"""What all clones of a template read, none of them can write to."""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.hosts.qemu import memory, sealed

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "memory"
    path.write_bytes(b"ram")
    os.truncate(path, MIB)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_copy_is_whole_and_as_sparse(source: int) -> None:
    copy = sealed.copy_of(source)
    assert os.pread(copy.fd, 2 * MIB, 0) == b"ram".ljust(MIB, b"\0")
    assert os.fstat(copy.fd).st_blocks * 512 < MIB


def test_nobody_can_write_to_it_who_opens_it_again(source: int) -> None:
    copy = sealed.copy_of(source)
    again = os.open(f"/proc/self/fd/{copy.fd}", os.O_RDWR)  # as QEMU before 8.2 does
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"poison", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        with pytest.raises(PermissionError):
            mmap.mmap(again, MIB, mmap.MAP_SHARED)
        with mmap.mmap(again, MIB, mmap.MAP_PRIVATE) as own:
            own[:3] = b"own"
    finally:
        os.close(again)
    assert os.pread(copy.fd, 3, 0) == b"ram"


def test_it_is_there_once_and_gone_with_the_last_who_has_it(source: int) -> None:
    first = sealed.copy_of(source)
    assert sealed.copy_of(source) is first
    fd = first.fd
    del first
    gc.collect()
    give_up = time.monotonic() + 20
    while is_open(fd):  # it is closed in a thread
        assert time.monotonic() < give_up, "the copy stays"


def is_open(fd: int) -> bool:
    try:
        return "memfd:" in str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:
        return False


def test_another_file_has_another_copy(source: int, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with other.open("rb") as file:
        first, second = sealed.copy_of(source), sealed.copy_of(file.fileno())
    assert os.pread(first.fd, 3, 0) == b"ram"
    assert os.pread(second.fd, 9, 0) == b"other"


def test_a_page_that_the_kernel_has_a_hold_of_is_waited_for(source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[mmap.mmap] = []

    def copy_and_hold(source: int, target: int) -> None:
        memory.copy_data(source, target)
        held.append(mmap.mmap(target, MIB, mmap.MAP_SHARED))  # the kernel gives the same answer to this

    def let_go(seconds: float) -> None:
        held.pop().close()

    monkeypatch.setattr(sealed, "copy_data", copy_and_hold)
    monkeypatch.setattr(time, "sleep", let_go)
    assert os.pread(sealed.copy_of(source).fd, 3, 0) == b"ram"
    assert not held


def test_one_that_is_held_for_ever_is_an_error(source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_SEAL_S", 0.0)
    held: list[mmap.mmap] = []
    monkeypatch.setattr(sealed, "copy_data", lambda source, target: held.append(mmap.mmap(target, MIB)))
    with pytest.raises(OSError, match="busy"):
        sealed.copy_of(source)
    held.pop().close()
