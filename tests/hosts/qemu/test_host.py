"""What QemuHost makes of its QEMU's answers and of its end, by a monitor that is none; with QEMU: tests/real/qemu."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from agreement import is_locked
from descriptors import open_files, until_closed
from utilityvm.errors import (
    AlreadyAttached,
    DeadlineExceeded,
    HostRefused,
    InvalidRequest,
    NotAttached,
    OutcomeUnknown,
    UtilityVMError,
    VMGone,
)
from utilityvm.hosts.qemu import host as hosts
from utilityvm.hosts.qemu.host import QemuHost
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.hosts.qemu.qmp import Event, QmpRefused
from utilityvm.scsi.ports import DiskFormat, DiskRequest, OpenDisk
from utilityvm.scsi.slot import Slot

T = 20.0
SLOT = Slot(0, 1)


async def ended() -> tuple[QemuHost, asyncio.Future[UtilityVMError]]:
    """The host of a QEMU whose process has ended, and the end of its connection, which is still to come."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[UtilityVMError] = loop.create_future()

    def close() -> None:
        if not gone.done():
            gone.set_result(VMGone("hung up"))

    qmp: Any = SimpleNamespace(gone=gone, on_event=None, close=close)
    child = subprocess.Popen(["sleep", "1000"])
    watch = Watch.child(child.pid)
    assert watch is not None
    process: Any = SimpleNamespace(name="one", uid=0)
    host = QemuHost(process, qmp, watch, who_uses=None, frozen_by=None, memory=None, vm_group="utilityvm")
    watch.kill()
    assert await watch.wait(timeout_s=20)
    child.returncode = 0  # it was waited for
    return host, gone


async def test_what_qemu_said_last_is_why_it_ended() -> None:
    """Its process is seen to end before the rest of what it said is read."""
    host, gone = await ended()
    await asyncio.sleep(0)
    assert not host.gone.done()
    gone.set_result(VMGone("the guest has reset"))
    assert str(await host.gone) == "the guest has reset"
    await host.close()


async def test_a_connection_that_does_not_end_with_qemu_holds_nobody_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(hosts, "_LAST_WORDS_S", 0.0)
    host, _ = await ended()
    assert str(await host.gone) == "QEMU of VM one ended"
    await host.close()


class Monitor:
    """Takes commands, and answers as it is told to; what it is not told about it does."""

    def __init__(self) -> None:
        self.gone: asyncio.Future[UtilityVMError] = asyncio.get_running_loop().create_future()
        self.on_event: Any = None
        self.asked: list[str] = []
        self.refuses: set[str] = set()
        self.kind = "GenericError"  # of what it refuses
        self.event = "DEVICE_DELETED"  # what it says when it has taken a command to remove a device
        self.dies_at: str | None = None
        self.answers: dict[str, Any] = {"query-fdsets": [], "qom-list": [], "query-status": {"status": "running"}}

    async def execute_all(
        self, commands: Sequence[tuple[str, dict[str, Any]]], *, fd: int | None = None, timeout_s: float
    ) -> list[Any]:
        return [await self._answer(name) for name, _ in commands]

    async def execute(self, command: str, arguments: object = None, *, timeout_s: float) -> Any:
        return await self._answer(command)

    async def _answer(self, command: str) -> Any:
        self.asked.append(command)
        if command == self.dies_at:
            raise VMGone("the test ended it")
        if command in self.refuses:
            return QmpRefused(command, self.kind, "the test says no")
        return self.answers.get(command, {})

    @contextmanager
    def expecting(self, *names: str, **data: object) -> Iterator[asyncio.Future[Event]]:
        event: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        assert self.event in names
        if "device_del" not in self.refuses:
            event.set_result(Event(self.event, dict(data)))
        yield event

    def close(self) -> None:
        if not self.gone.done():
            self.gone.set_result(VMGone("hung up"))


@pytest_asyncio.fixture
async def host() -> AsyncIterator[QemuHost]:
    """The host of a VM that runs, behind a `Monitor`."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        watch = Watch.child(child.pid)
        assert watch is not None
        process: Any = SimpleNamespace(name="one", uid=os.geteuid(), controllers=2)
        monitor: Any = Monitor()
        host = QemuHost(process, monitor, watch, who_uses=None, frozen_by=None, memory=None, vm_group="utilityvm")
        host._running = True
        yield host
        await host.close()
        child.kill()


def monitor_of(host: QemuHost) -> Monitor:
    monitor: Any = host._qmp
    assert isinstance(monitor, Monitor)
    return monitor


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


async def opened(host: QemuHost, image: Path) -> OpenDisk:
    return await host.open(DiskRequest(host_path=str(image), read_only=False, format=DiskFormat.RAW))


async def test_an_attached_disk_is_qemus_alone_and_known_by_its_name(host: QemuHost, image: Path) -> None:
    disk = await opened(host, image)
    before = open_files()
    await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    await until_closed(before)  # its lock would be ours too
    assert monitor_of(host).asked == ["add-fd", "blockdev-add", "device_add"]
    assert await host.allocated(SLOT) is not None
    with pytest.raises(AlreadyAttached, match="attachment a exists"):
        await host.attach(Slot(0, 2), disk, attachment="a", timeout_s=T)
    with pytest.raises(InvalidRequest, match="2 SCSI controllers"):
        await host.attach(Slot(2, 0), disk, attachment="b", timeout_s=T)
    disk.close()


@pytest.mark.parametrize(
    ("refused", "undone"),
    [
        ({"add-fd", "blockdev-add", "device_add"}, []),
        ({"blockdev-add", "device_add"}, ["remove-fd"]),
        ({"device_add"}, ["blockdev-del", "remove-fd"]),
    ],
)
async def test_of_a_refused_disk_nothing_is_left(
    host: QemuHost, image: Path, refused: set[str], undone: list[str]
) -> None:
    disk, monitor = await opened(host, image), monitor_of(host)
    before = open_files()
    monitor.refuses = refused
    with pytest.raises(HostRefused, match="the test says no"):
        await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    assert [name for name in monitor.asked[3:] if not name.startswith(("query", "qom"))] == undone
    await until_closed(before)
    assert not is_locked(image)
    assert await host.allocated(SLOT) is None
    assert not await host.probe(SLOT, attachment="a", timeout_s=T)
    monitor.refuses = set()
    await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    disk.close()


async def test_a_refused_disk_that_is_not_undone_is_unknown_and_probed(host: QemuHost, image: Path) -> None:
    disk, monitor = await opened(host, image), monitor_of(host)
    monitor.refuses = {"device_add", "remove-fd"}
    with pytest.raises(OutcomeUnknown, match="was not undone"):
        await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    monitor.answers["qom-list"] = [{"name": f"d{number}"} for number in host._numbers.values()]
    assert await host.probe(SLOT, attachment="a", timeout_s=T), "it is asked for, and QEMU has it"
    disk.close()


async def test_a_disk_of_a_vm_that_dies_in_the_middle_leaves_no_lock_with_us(host: QemuHost, image: Path) -> None:
    disk = await opened(host, image)
    before = open_files()
    monitor_of(host).dies_at = "device_add"
    with pytest.raises(VMGone):
        await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    await until_closed(before)
    assert not is_locked(image)
    disk.close()


async def test_storage_that_does_not_answer_is_out_of_time_and_nothing_is_sent(
    host: QemuHost, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await opened(host, image)

    async def hangs(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "in_thread", hangs)
        with pytest.raises(DeadlineExceeded, match="storage did not answer"):
            await host.attach(SLOT, disk, attachment="a", timeout_s=0.01)
    assert monitor_of(host).asked == []
    disk.close()


async def test_what_is_not_there_is_detached_and_cannot_grow(host: QemuHost) -> None:
    await host.detach(SLOT, attachment="none", timeout_s=T)
    assert not await host.probe(SLOT, attachment="none", timeout_s=T)
    with pytest.raises(NotAttached, match="attachment none"):
        await host.resize(SLOT, attachment="none", size_bytes=1 << 20, timeout_s=T)
    assert monitor_of(host).asked == []


async def test_a_paused_vm_keeps_its_disks(host: QemuHost, image: Path) -> None:
    disk = await opened(host, image)
    await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    host._running = False
    with pytest.raises(HostRefused, match="paused") as caught:
        await host.detach(SLOT, attachment="a", timeout_s=T)
    assert caught.value.remedy == "resume the VM first"
    disk.close()


async def attached(host: QemuHost, image: Path) -> Monitor:
    disk = await opened(host, image)
    await host.attach(SLOT, disk, attachment="a", timeout_s=T)
    disk.close()
    monitor = monitor_of(host)
    monitor.asked.clear()
    return monitor


async def test_a_detach_takes_apart_what_an_attach_has_made(host: QemuHost, image: Path) -> None:
    monitor = await attached(host, image)
    await host.detach(SLOT, attachment="a", timeout_s=T)
    assert monitor.asked == ["device_del", "blockdev-del", "remove-fd"]
    await host.detach(SLOT, attachment="a", timeout_s=T)
    assert monitor.asked == ["device_del", "blockdev-del", "remove-fd"], "twice is once"


async def test_a_device_that_is_gone_already_is_no_error(host: QemuHost, image: Path) -> None:
    monitor = await attached(host, image)
    monitor.refuses, monitor.kind = {"device_del"}, "DeviceNotFound"
    await host.detach(SLOT, attachment="a", timeout_s=T)
    assert monitor.asked == ["device_del", "blockdev-del", "remove-fd"]
    assert not await host.probe(SLOT, attachment="a", timeout_s=T)


async def test_a_device_that_qemu_does_not_let_go_of_stays_known(host: QemuHost, image: Path) -> None:
    monitor = await attached(host, image)
    monitor.refuses = {"device_del"}
    with pytest.raises(HostRefused, match="the test says no"):
        await host.detach(SLOT, attachment="a", timeout_s=T)
    monitor.refuses, monitor.event = set(), "DEVICE_UNPLUG_GUEST_ERROR"
    with pytest.raises(HostRefused):
        await host.detach(SLOT, attachment="a", timeout_s=T)
    assert monitor.asked == ["device_del", "device_del"]
    monitor.event = "DEVICE_DELETED"
    await host.detach(SLOT, attachment="a", timeout_s=T)
    assert monitor.asked[2:] == ["device_del", "blockdev-del", "remove-fd"]


async def test_a_file_that_qemu_keeps_is_unknown_until_it_lets_go(host: QemuHost, image: Path) -> None:
    """As while the VM is paused."""
    monitor = await attached(host, image)
    (number,) = host._numbers.values()
    monitor.refuses = {"remove-fd"}
    monitor.answers["query-fdsets"] = [{"fdset-id": number, "fds": []}]
    with pytest.raises(OutcomeUnknown, match="keeps its file open"):
        await host.detach(SLOT, attachment="a", timeout_s=T)
    assert host._lingering == {number}
    monitor.refuses = set()
    await host.detach(SLOT, attachment="a", timeout_s=T)
    assert host._lingering == set()
    assert not await host.probe(SLOT, attachment="a", timeout_s=T)


async def test_a_node_that_is_still_freed_is_asked_for_again(host: QemuHost, image: Path) -> None:
    monitor = await attached(host, image)
    (number,) = host._numbers.values()
    monitor.refuses = {"blockdev-del"}
    monitor.answers["query-named-block-nodes"] = [{"node-name": f"n{number}"}]
    detaching = asyncio.create_task(host.detach(SLOT, attachment="a", timeout_s=T))
    while monitor.asked.count("blockdev-del") < 3:
        await asyncio.sleep(0)
    assert not detaching.done()
    monitor.refuses = set()
    await detaching
    assert not await host.probe(SLOT, attachment="a", timeout_s=T)
