from __future__ import annotations

import socket
from collections.abc import Generator

import pytest

from guest_end import AgentThread, FakeDisks
from raw_host import RawHost


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
