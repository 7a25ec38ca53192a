"""What is left of a program's output is read, so that whoever writes to it goes on."""

from __future__ import annotations

import os
import threading

import pytest

from utilityvm.agent import drain
from utilityvm.agent.drain import Drain


def fill(fd: int, size: int) -> None:
    """Write so much; hangs if nobody reads."""
    while size > 0:
        size -= os.write(fd, bytes(min(size, 65536)))


def test_more_than_a_pipe_holds_can_be_written_to_each() -> None:
    ours = Drain()
    writers = []
    for _ in range(3):
        reader, writer = os.pipe()
        ours.take(reader)
        writers.append(writer)
    for writer in writers:
        fill(writer, 1 << 20)
        os.close(writer)


def test_a_pipe_is_closed_at_its_end() -> None:
    reader, writer = os.pipe()
    watched = os.dup(reader)
    ours = Drain()
    ours.take(reader)
    os.close(writer)
    while reader in ours._fds:
        pass
    with pytest.raises(OSError):
        os.fstat(reader)
    os.close(watched)


def test_of_too_many_the_oldest_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_AT_MOST", 2)
    ours = Drain()
    pipes = [os.pipe() for _ in range(3)]
    for reader, _ in pipes:
        ours.take(reader)
    with pytest.raises(BrokenPipeError):
        os.write(pipes[0][1], b"a")
    for _, writer in pipes[1:]:
        fill(writer, 1 << 18)
    for _, writer in pipes:
        os.close(writer)


def test_without_a_thread_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "Thread", refuse)
    reader, writer = os.pipe()
    Drain().take(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"a")
    os.close(writer)
