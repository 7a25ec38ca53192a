"""A queue that is full says nothing about the process behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from descriptors import descriptors_left
from utilityvm.errors import DeadlineExceeded
from utilityvm.machine import sockets


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "sock"))
        listening.listen(1)
        yield listening


async def test_a_full_queue_is_no_answer(listener: socket.socket, tmp_path: Path) -> None:
    waiting = [await sockets.connect(tmp_path / "sock", timeout_s=10) for _ in range(2)]
    with pytest.raises(DeadlineExceeded, match="does not answer"):
        await sockets.connect(tmp_path / "sock", timeout_s=0.05)
    for one in waiting:
        one.close()


async def test_who_waits_in_front_of_a_full_queue_gets_in_when_there_is_room(
    listener: socket.socket, tmp_path: Path
) -> None:
    waiting = [await sockets.connect(tmp_path / "sock", timeout_s=10) for _ in range(2)]
    last = asyncio.ensure_future(sockets.connect(tmp_path / "sock", timeout_s=10))
    await asyncio.sleep(0)
    assert not last.done()
    accepted = [listener.accept()[0] for _ in range(2)]
    connection = await last
    accepted.append(listener.accept()[0])
    connection.send(b"x")
    assert accepted[-1].recv(1) == b"x"
    for one in (*waiting, connection, *accepted):
        one.close()


async def test_nobody_listens_is_told_apart_from_we_cannot_connect(listener: socket.socket, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await sockets.connect(tmp_path / "other", timeout_s=10)
    with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
        await sockets.connect(tmp_path / "sock", timeout_s=10)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await sockets.connect(tmp_path / "sock", timeout_s=10)
