from __future__ import annotations

import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from fake_guest import World, seen
from guest_end import AgentThread, FakeDisks
from raw_host import RawHost
from utilityvm.agent import disks as disk_table
from utilityvm.agent import holders, mounting


@pytest.fixture
def disks() -> FakeDisks:
    """Disks at 0:1 to 0:4."""
    disks = FakeDisks()
    disks.attached |= {(0, lun) for lun in range(1, 5)}
    return disks


@pytest.fixture
def ends(disks: FakeDisks) -> Generator[tuple[RawHost, AgentThread]]:
    """A host that has not negotiated, and its agent."""
    ours, theirs = socket.socketpair()
    agent = AgentThread(theirs, disks)
    with ours:
        yield RawHost(ours), agent
    agent.join()


@pytest.fixture
def stranger(ends: tuple[RawHost, AgentThread]) -> RawHost:
    """A host that has not negotiated."""
    return ends[0]


@pytest.fixture
def host(stranger: RawHost) -> RawHost:
    """A host that has."""
    assert stranger.negotiate()["Result"] == 0
    return stranger


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A guest whose disks are imitated, and the agent's table of them."""
    monkeypatch.setattr(mounting, "_KERNEL_LOG", str(tmp_path / "none"))
    monkeypatch.setattr(disk_table, "_PASSING_S", 0.05)
    monkeypatch.setattr(holders, "of_mount", lambda path: [])
    world = World(tmp_path, monkeypatch)
    monkeypatch.setattr(mounting, "is_read_only", lambda path: seen(world, path).read_only)
    return world
