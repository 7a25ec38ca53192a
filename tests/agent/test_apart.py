"""Hostile bytes are read in a child that can do nothing, and whose end is an error of the disk, or of the guest."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from filesystem_images import blank
from utilityvm.agent import apart as room
from utilityvm.agent import turns
from utilityvm.agent.apart import allow_few_calls, apart
from utilityvm.agent.faults import Fault
from utilityvm.agent.turns import OutOfMemoryError

LIMIT_S = 60.0


@pytest.fixture
def fd(tmp_path: Path) -> int:
    path = blank(tmp_path / "disk.raw", 1)
    return os.open(path, os.O_RDONLY)


def in_child(fd: int, act: Callable[[], object], *, seconds: float = LIMIT_S) -> bytes:
    """What `act` gives in the child, after it gave up all that it can."""

    def examine() -> bytes:
        allow_few_calls()
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


def children() -> set[str]:
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_a_hang_ends_with_the_requests_time(fd: int) -> None:
    before = children()
    with pytest.raises(Fault, match="took all of the time"):
        in_child(fd, spin, seconds=0.3)
    assert children() <= before


def test_a_hang_ends_at_the_limit(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_LIMIT_S", 0.3)
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


def test_more_time_on_the_processor_than_allowed_is_told_as_that(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CPU_S", 1)
    with pytest.raises(Fault, match="took 1 s of the processor: it is damaged, or made to do harm"):
        in_child(fd, spin)


@pytest.mark.parametrize(
    ("code", "cpu_s", "why"),
    [
        (-signal.SIGXCPU, 10.0, "took 10 s of the processor"),
        (-signal.SIGKILL, 11.0, "took 10 s of the processor"),  # it let the first signal not end it
        (-signal.SIGBUS, 0.1, "ended with SIGBUS: it is damaged"),
        (1, 0.1, "failed: it is damaged"),
        (0, 0.1, "failed: it is damaged"),
        (None, 9.9, "took longer than 20 s, 9.9 s of it on the processor: its storage is slow"),
        (-signal.SIGKILL, 9.9, None),
    ],
)
def test_the_reason_is_told_by_the_end(code: int | None, cpu_s: float, why: str | None) -> None:
    reason = room._why(code, cpu_s, has_time=True)
    if why is None:
        assert isinstance(reason, OutOfMemoryError)
    else:
        assert isinstance(reason, Fault)
        assert why in reason.message
        assert reason.remedy


def test_a_hang_without_work_is_not_told_as_a_damaged_disk(fd: int) -> None:
    with pytest.raises(Fault, match="its storage is slow, or it is made to do harm") as caught:
        apart(lambda: os.read(os.pipe()[0], 1), keep=fd, deadline=time.monotonic() + 0.3)
    assert "damaged" not in str(caught.value)
    os.close(fd)


def killed() -> bytes:
    """The child's end when the kernel has no memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return b"unreachable"


def test_a_child_that_the_kernel_killed_is_tried_again_alone(fd: int, tmp_path: Path) -> None:
    # The first child leaves a byte in the pipe before its end, which the second one finds.
    reading, writing = os.pipe2(os.O_NONBLOCK)

    def examine() -> bytes:
        try:
            os.read(kept[0], 1)
        except BlockingIOError:
            os.write(kept[1], b"x")
            killed()
        return b"found"

    kept = [reading, writing]
    give_up = room._give_up_rights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_give_up_rights", lambda *keep, memory_bytes: give_up(*keep, *kept, memory_bytes=1 << 40))
        assert apart(examine, keep=fd, deadline=time.monotonic() + LIMIT_S) == b"found"
    for one in (fd, reading, writing):
        os.close(one)


def test_a_guest_without_memory_for_a_child_is_told_and_not_a_damaged_disk(fd: int) -> None:
    with pytest.raises(Fault, match=r"takes more memory than the guest has: \d+ MiB are free") as caught:
        apart(killed, keep=fd, deadline=time.monotonic() + LIMIT_S)
    assert "--memory" in str(caught.value.remedy)
    assert "damaged" not in str(caught.value)
    os.close(fd)


def test_a_guest_without_memory_to_fork_is_told_as_that(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("os.fork", no_memory)
    with pytest.raises(Fault, match="takes more memory than the guest has"):
        apart(lambda: b"", keep=fd, deadline=time.monotonic() + LIMIT_S)
    os.close(fd)


def test_an_answer_of_a_child_that_does_not_end_well_is_none(fd: int) -> None:
    def examine() -> bytes:
        for number in range(3, 64):
            try:
                os.write(number, b"{}")
            except OSError:
                continue
        os._exit(3)

    with pytest.raises(Fault, match="failed"):
        apart(examine, keep=fd, deadline=time.monotonic() + LIMIT_S)
    os.close(fd)


def test_few_children_are_there_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PATIENCE_S", LIMIT_S)
    running, most, lock = [0], [0], threading.Lock()
    in_one = room._in_child

    def counted(examine: Callable[[], bytes], keep: int, deadline: float) -> bytes:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return in_one(examine, keep, deadline)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(room, "_in_child", counted)
    answers: list[bytes] = []

    def ask() -> None:
        answers.append(apart(lambda: b"found", keep=fd, deadline=time.monotonic() + LIMIT_S))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"found"] * 24
    assert most[0] <= 4
    os.close(fd)
