from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from utilityvm.agent.port import Port, find_port


@pytest.fixture
def ends() -> Generator[tuple[socket.socket, Port]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        yield ours, Port(theirs.fileno())


def add_port(folder: Path, device: str, name: str) -> None:
    (folder / "ports" / device).mkdir(parents=True)
    (folder / "ports" / device / "name").write_text(f"{name}\n")
    (folder / "dev").mkdir(exist_ok=True)
    (folder / "dev" / device).touch()


def test_the_port_is_found_by_its_name(tmp_path: Path) -> None:
    add_port(tmp_path, "vport0p1", "other")
    add_port(tmp_path, "vport0p2", "org.utilityvm.bridge")
    (tmp_path / "ports/vport1p0").mkdir()  # one without a name, as a console is
    found = find_port(timeout_s=0, ports=f"{tmp_path}/ports", dev=f"{tmp_path}/dev")
    assert found == f"{tmp_path}/dev/vport0p2"


def test_a_port_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    found: list[str] = []
    looking = threading.Thread(
        target=lambda: found.append(find_port(timeout_s=20, ports=f"{tmp_path}/ports", dev=f"{tmp_path}/dev"))
    )
    looking.start()
    add_port(tmp_path, "vport0p1", "org.utilityvm.bridge")
    looking.join()
    assert found == [f"{tmp_path}/dev/vport0p1"]


def test_no_port_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"org\.utilityvm\.bridge"):
        find_port(timeout_s=0, ports=f"{tmp_path}/ports", dev=f"{tmp_path}/dev")


def test_bytes_go_both_ways(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    peer.sendall(b"ab")
    assert port.read() == b"ab"
    assert port.write(b"cd", session=0)
    assert peer.recv(9) == b"cd"


def test_a_read_waits_for_bytes(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    got: list[bytes] = []
    reading = threading.Thread(target=lambda: got.append(port.read()))
    reading.start()
    peer.sendall(b"late")
    reading.join()
    assert got == [b"late"]


def test_a_host_that_hangs_up_ends_its_session(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    peer.shutdown(socket.SHUT_WR)
    assert port.read() == b""
    assert not port.write(b"for nobody", session=0)
    peer.settimeout(0)
    with pytest.raises(BlockingIOError):
        peer.recv(9)


def test_what_is_meant_for_the_host_before_is_not_written(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    before = port.session
    now = port.begin_session()
    assert not port.write(b"old", session=before)
    assert port.write(b"new", session=now)
    assert peer.recv(9) == b"new"


def fill(port: Port) -> threading.Thread:
    """Write more than the connection holds, in a thread; returns when it waits."""
    writing = threading.Thread(target=lambda: port.write(bytes(4 << 20), session=0), daemon=True)
    writing.start()
    return writing


def test_a_writer_waits_for_a_slow_host_and_writes_all(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    writing = fill(port)
    got = 0
    while got < 4 << 20:
        got += len(peer.recv(65536))
    writing.join()
    assert got == 4 << 20


def test_a_frame_that_was_begun_is_finished_for_a_host_that_negotiates_again(
    ends: tuple[socket.socket, Port],
) -> None:
    """Half a frame would harm the host if it is the same one."""
    peer, port = ends
    writing = fill(port)
    got = len(peer.recv(65536))
    port.begin_session()
    while got < 4 << 20:
        got += len(peer.recv(65536))
    writing.join()
    assert got == 4 << 20


def test_a_writer_does_not_wait_for_a_host_that_hung_up(ends: tuple[socket.socket, Port]) -> None:
    peer, port = ends
    writing = fill(port)
    peer.recv(1)
    peer.close()
    writing.join()
    assert not writing.is_alive()


def test_an_end_is_seen_once_and_not_again_and_again() -> None:
    """The level stays for as long as no host is there; only a change wakes the reader."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        port = Port(theirs.fileno())
        ours.shutdown(socket.SHUT_WR)
        assert port.read() == b""
        ends: list[bytes] = []
        reading = threading.Thread(target=lambda: ends.append(port.read()), daemon=True)
        reading.start()
        for _ in range(50):
            os.sched_yield()
        assert len(ends) <= 1  # one more, for the edge that was there already
        ours.close()
        reading.join()


def test_after_an_end_the_next_read_waits_for_a_change(
    ends: tuple[socket.socket, Port], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port without a host can be read at once, again and again, of nothing."""
    peer, port = ends
    waits: list[object] = []

    class Edges:
        def poll(self) -> None:
            waits.append("a change")

    peer.shutdown(socket.SHUT_WR)
    monkeypatch.setattr(port, "_edges", Edges())
    assert port.read() == b""
    assert waits == []
    assert port.read() == b""
    assert waits == ["a change"]
