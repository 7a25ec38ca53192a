"""libblkid reads hostile bytes in a child that can do nothing, and whose end is an error of the disk."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from filesystem_images import blank, filesystem_image, gpt_disk
from utilityvm.agent import blkid
from utilityvm.agent.blkid import Look, Superblock, apart, look
from utilityvm.agent.faults import Fault

LIMIT_S = 60.0


@pytest.fixture
def fd(tmp_path: Path) -> int:
    path = blank(tmp_path / "disk.raw", 1)
    return os.open(path, os.O_RDONLY)


def in_child(fd: int, act: Callable[[], object], *, seconds: float = LIMIT_S) -> bytes:
    """What `act` gives in the child, after it gave up all that it can."""

    def examine() -> bytes:
        blkid._allow_few_calls()
        try:
            return repr(act()).encode()
        except OSError as error:
            return type(error).__name__.encode()

    try:
        return apart(examine, keep=fd, deadline=time.monotonic() + seconds)
    finally:
        os.close(fd)


def crash() -> None:
    ctypes.string_at(0)


def grow() -> int:
    return len([bytearray(1 << 20) for _ in range(4096)])


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(("act", "how"), [(crash, "ended with SIGSEGV"), (grow, "failed")])
def test_a_crash_and_a_memory_bomb_are_errors_of_the_disk(fd: int, act: Callable[[], None], how: str) -> None:
    with pytest.raises(Fault, match=how) as caught:
        in_child(fd, act)
    assert caught.value.kind == "refused"
    assert caught.value.remedy


def test_a_hang_ends_with_the_requests_time(fd: int) -> None:
    with pytest.raises(Fault, match="took all of the time"):
        in_child(fd, spin, seconds=0.3)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_hang_ends_at_the_limit(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blkid, "_LIMIT_S", 0.3)
    with pytest.raises(Fault, match="took longer than"):
        in_child(fd, spin)


def test_an_answer_without_end_is_none(fd: int) -> None:
    with pytest.raises(Fault):
        apart(lambda: bytes(1 << 20), keep=fd, deadline=time.monotonic() + LIMIT_S)
    os.close(fd)


@pytest.mark.parametrize(
    "act",
    [
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: os.kill(os.getppid(), signal.SIGTERM),
        os.fork,
        lambda: os.execv("/bin/true", ["true"]),
        lambda: list(Path("/").iterdir()),
    ],
    ids=["open", "socket", "kill", "fork", "exec", "list"],
)
def test_the_child_can_open_send_and_start_nothing(fd: int, act: Callable[[], object]) -> None:
    assert in_child(fd, act) == b"PermissionError"


def test_the_child_reads_the_disk_and_cannot_write_to_it(fd: int) -> None:
    again = os.dup(fd)
    assert in_child(fd, lambda: os.pread(fd, 4, 0)) == repr(bytes(4)).encode()
    assert in_child(again, lambda: os.write(again, b"x")) == b"OSError"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_the_child_is_nobody_and_has_no_other_descriptors(fd: int) -> None:
    kept: list[bytes] = []
    with Path("/etc/hostname").open("rb") as another:

        def examine() -> bytes:
            for number in range(3, 8192):
                try:
                    os.fstat(number)
                    kept.append(str(number).encode())
                except OSError:
                    pass
            return b"%d %d %d" % (os.getuid(), os.getgid(), len(kept))

        assert apart(examine, keep=fd, deadline=time.monotonic() + LIMIT_S) == b"65534 65534 2"
        assert another.read(0) == b""
    os.close(fd)


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"superblocks": [["../x", "filesystem", 0]], "table": null}', b"{}"])
def test_what_a_child_that_was_taken_over_says_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(blkid, "_examine", lambda *_: said)
    with pytest.raises(Fault, match="answered what is no answer"):
        look(str(blank(tmp_path / "disk.raw", 1)), time.monotonic() + LIMIT_S)


def test_what_is_there_is_found(tmp_path: Path) -> None:
    def found(path: Path) -> Look:
        return look(str(path), time.monotonic() + LIMIT_S)

    part = filesystem_image("ext4", tmp_path / "part.raw", {})
    assert found(part) == Look((Superblock("ext4", "filesystem"),))
    assert found(blank(tmp_path / "blank.raw", 4)) == Look()
    table = found(gpt_disk(tmp_path / "disk.raw", [part, part])).table
    assert table
    assert (table.kind, [part.number for part in table.partitions]) == ("gpt", [1, 2])
    assert table.partitions[0].begin_bytes == 1 << 20
    assert table.partitions[0].size_bytes == part.stat().st_size


def test_without_the_library_the_remedy_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blkid, "LIBRARY", "libnone.so.1")
    with pytest.raises(Fault, match="not in the guest image") as caught:
        look(str(blank(tmp_path / "disk.raw", 1)), time.monotonic() + LIMIT_S)
    assert "libblkid1" in str(caught.value.remedy)
