"""What a fork of an owner must not hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from utilityvm.machine import forks


def in_a_fork(check: Callable[[], bool]) -> bool:
    """What `check` says in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        answer = 1
        try:
            answer = 0 if check() else 1
        finally:
            os._exit(answer)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_has_dev_null_where_its_parent_has_something_private(tmp_path: Path) -> None:
    kept, private = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("kept", "private"))
    forks.keep_from(private)
    assert in_a_fork(lambda: Path(f"/proc/self/fd/{private}").readlink() == Path(os.devnull))
    assert in_a_fork(lambda: os.path.samestat(os.fstat(kept), (tmp_path / "kept").stat()))
    assert os.path.samestat(os.fstat(private), (tmp_path / "private").stat()), "the parent keeps it"
    os.close(kept)
    os.close(private)


def test_a_number_that_was_closed_and_used_again_is_left_alone(tmp_path: Path) -> None:
    private = forks.keep_from(os.open(tmp_path / "private", os.O_RDWR | os.O_CREAT))
    os.close(private)
    again = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    assert again == private
    assert in_a_fork(lambda: os.path.samestat(os.fstat(again), (tmp_path / "other").stat()))
    os.close(again)


def test_a_connection_ends_with_its_process_whatever_it_forked() -> None:
    ours, theirs = socket.socketpair()
    forks.keep_from(ours.fileno())
    ready, go_on = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_on)
        theirs.close()
        os.read(ready, 1)  # lives until the test is over
        os._exit(0)
    ours.close()
    theirs.settimeout(10)
    assert theirs.recv(1) == b"", "the fork still held it"
    theirs.close()
    os.close(go_on)
    os.close(ready)
    os.waitpid(pid, 0)
