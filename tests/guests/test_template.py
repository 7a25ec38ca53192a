"""Our host end freezes our agent's guest, and makes a clone of it unique, through a port as QEMU's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath

import pytest
import pytest_asyncio

from guest_end import AgentThread, FakeDisks, FakeSerialPort, FakeSystem
from utilityvm.agent import serve
from utilityvm.errors import DeadlineExceeded, GuestBusy, GuestRefused, InvalidRequest, NotSupported
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.scsi.ports import MountConfig
from utilityvm.scsi.slot import Slot

BOTH = ["/data", "/data/inner"]
SEED = bytes(range(64))
MACHINE_ID = "0123456789abcdef" * 2


@pytest_asyncio.fixture
async def agent(port: FakeSerialPort, disks: FakeDisks) -> AgentThread:
    return AgentThread(await port.plug(), disks)


@pytest.fixture
def system(agent: AgentThread) -> FakeSystem:
    return agent.system


@pytest_asyncio.fixture
async def guest(agent: AgentThread, port: FakeSerialPort) -> AsyncGenerator[BridgeGuest]:
    guest = await BridgeGuest.connect(port.path, timeout_s=20, vm="one")
    yield guest
    await guest.close()


async def make_unique(guest: BridgeGuest, *, hostname: str = "clone-1", clock_ns: int | None = None) -> None:
    await guest.make_unique(seed=SEED, hostname=hostname, machine_id=MACHINE_ID, clock_ns=clock_ns, timeout_s=20)


async def test_a_guest_is_frozen_until_it_is_thawed(guest: BridgeGuest, system: FakeSystem) -> None:
    await guest.quiesce(timeout_s=20)
    assert sorted(system.filesystems.frozen) == BOTH
    with pytest.raises(GuestRefused, match="frozen to become a template"):
        await guest.mount(Slot(0, 1), MountConfig(), guest_path=PurePosixPath("/mnt/a"), timeout_s=20)
    with pytest.raises(GuestRefused, match="frozen to become a template"):
        await guest.run(["true"])
    await guest.thaw(timeout_s=20)
    assert not system.filesystems.frozen
    assert (await guest.run(["true"])).exit_code == 0


async def test_a_program_that_is_run_keeps_the_guest_from_being_frozen(guest: BridgeGuest, system: FakeSystem) -> None:
    begun = asyncio.Event()
    running = asyncio.create_task(
        guest.run_streaming(["sh", "-c", "echo; exec sleep 1000"], stdout=lambda _: begun.set(), stderr=print)
    )
    await begun.wait()
    with pytest.raises(GuestBusy) as caught:
        await guest.quiesce(timeout_s=20)
    assert caught.value.holders == ("process 1: sh",)
    assert not system.filesystems.frozen
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_hook_that_fails_is_named(guest: BridgeGuest, system: FakeSystem) -> None:
    system.hook("10-bad", "echo not now; exit 1")
    with pytest.raises(GuestRefused, match="10-bad save ended with 1: not now"):
        await guest.quiesce(timeout_s=20)
    with pytest.raises(GuestRefused, match="10-bad clone ended with 1: not now"):
        await make_unique(guest)


async def test_a_hook_that_does_not_end_is_a_timeout(guest: BridgeGuest, system: FakeSystem) -> None:
    system.hook("10-slow", "sleep 1000")
    with pytest.raises(DeadlineExceeded, match="10-slow clone did not end in time"):
        await guest.make_unique(seed=SEED, hostname="c", machine_id=MACHINE_ID, timeout_s=0.3)


async def test_a_clone_gets_what_the_host_gives_it(guest: BridgeGuest, system: FakeSystem) -> None:
    await guest.quiesce(timeout_s=20)
    before = guest.boot_id
    begun = time.time_ns()
    await make_unique(guest)
    assert begun <= system.kernel.clock_ns <= time.time_ns()
    assert system.kernel.seeds == [SEED]
    assert system.kernel.hostname == "clone-1"
    assert system.kernel.read("/etc/machine-id") == f"{MACHINE_ID}\n"
    assert guest.boot_id == (await guest.info())["BootId"] != before
    await make_unique(guest, clock_ns=5)
    assert system.kernel.clock_ns == 5


@pytest.mark.parametrize(
    ("seed", "hostname", "machine_id", "clock_ns"),
    [
        (bytes(31), "a", MACHINE_ID, None),
        (bytes(513), "a", MACHINE_ID, None),
        (SEED, "", MACHINE_ID, None),
        (SEED, "-a", MACHINE_ID, None),
        (SEED, "a/b", MACHINE_ID, None),
        (SEED, "a" * 64, MACHINE_ID, None),
        (SEED, "a", "0" * 32, None),
        (SEED, "a", MACHINE_ID.upper(), None),
        (SEED, "a", MACHINE_ID[1:], None),
        (SEED, "a", MACHINE_ID, 0),
    ],
)
async def test_what_makes_no_sense_is_not_sent(
    guest: BridgeGuest, system: FakeSystem, seed: bytes, hostname: str, machine_id: str, clock_ns: int | None
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await guest.make_unique(seed=seed, hostname=hostname, machine_id=machine_id, clock_ns=clock_ns, timeout_s=20)
    assert caught.value.vm == "one"
    assert not system.kernel.seeds


async def test_the_seed_is_in_no_log(guest: BridgeGuest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        await make_unique(guest)
    assert "clone-1" in caplog.text
    assert SEED.hex() not in caplog.text


async def test_a_file_system_that_cannot_be_frozen_is_told_of(
    guest: BridgeGuest, system: FakeSystem, caplog: pytest.LogCaptureFixture
) -> None:
    system.filesystems.cannot_freeze["/data"] = 95
    await guest.quiesce(timeout_s=20)
    assert "/data cannot be frozen, and was only written out" in caplog.text


async def test_an_agent_from_before_there_were_templates_is_not_asked(
    port: FakeSerialPort, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "VERSION", 1)
    agent = AgentThread(await port.plug(), disks)
    guest = await BridgeGuest.connect(port.path, timeout_s=20)
    with pytest.raises(NotSupported, match="too old"):
        await guest.quiesce(timeout_s=20)
    with pytest.raises(NotSupported, match="too old"):
        await guest.thaw(timeout_s=20)
    with pytest.raises(NotSupported, match="too old"):
        await make_unique(guest)
    assert not agent.system.filesystems.flushed
    await guest.close()


async def test_a_clones_host_comes_after_the_templates_and_hears_only_what_it_asked_for(
    guest: BridgeGuest, port: FakeSerialPort, disks: FakeDisks, system: FakeSystem
) -> None:
    """The template's host has a request under way when it freezes and hangs up; it ends in the clone."""
    release = disks.hang(0, 2)
    asked = asyncio.create_task(guest.probe_device(Slot(0, 2), timeout_s=20))
    await guest.ping()  # the agent has it
    await guest.quiesce(timeout_s=20)
    await guest.close()
    await asyncio.gather(asked, return_exceptions=True)
    clone = await BridgeGuest.connect(port.path, timeout_s=20, vm="clone")
    await make_unique(clone, hostname="clone")
    release()
    assert await asyncio.gather(*(clone.probe_device(Slot(0, 1), timeout_s=20) for _ in range(20))) == [True] * 20
    assert system.kernel.hostname == "clone"
    assert not system.filesystems.frozen
    await clone.close()


async def test_a_guest_that_was_frozen_by_a_host_that_died_can_be_thawed_by_the_next(
    guest: BridgeGuest, port: FakeSerialPort, system: FakeSystem
) -> None:
    await guest.quiesce(timeout_s=20)
    port.drop_host()
    second = await BridgeGuest.connect(port.path, timeout_s=20)
    await second.thaw(timeout_s=20)
    assert not system.filesystems.frozen
    await second.close()
