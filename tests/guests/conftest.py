from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path

import pytest
import pytest_asyncio

from guest_end import AgentThread, FakeDisks, FakeSerialPort
from utilityvm.guests.bridge_guest import BridgeGuest

StartAgent = Callable[[], Awaitable[AgentThread]]


@pytest.fixture
def folder() -> Generator[Path]:
    """A folder with a short name: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="uvm-test-") as name:
        yield Path(name)


@pytest.fixture
def disks() -> FakeDisks:
    """Disks at 0:1 to 0:4."""
    disks = FakeDisks()
    disks.attached |= {(0, lun) for lun in range(1, 5)}
    return disks


@pytest_asyncio.fixture
async def port(folder: Path) -> AsyncGenerator[FakeSerialPort]:
    """A port that no guest has opened."""
    async with FakeSerialPort(folder / "agent.sock") as port:
        yield port


@pytest_asyncio.fixture
async def start_agent(port: FakeSerialPort, disks: FakeDisks) -> StartAgent:
    """Start the agent; a second time, and the first is gone."""

    async def start() -> AgentThread:
        return AgentThread(await port.plug(), disks)

    return start


@pytest_asyncio.fixture
async def guest(port: FakeSerialPort, start_agent: StartAgent) -> AsyncGenerator[BridgeGuest]:
    """Our host end, connected to our agent."""
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=20, vm="one")
    yield guest
    await guest.close()
