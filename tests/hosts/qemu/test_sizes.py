"""A disk never gets smaller than its file is, whoever made the file larger. With a real QEMU: tests/contract."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.errors import DeadlineExceeded, HostRefused, InvalidRequest, NotAttached, NotSupported
from utilityvm.hosts.qemu import sizes
from utilityvm.hosts.qemu.qmp import QmpRefused
from utilityvm.hosts.qemu.sizes import Sizes
from utilityvm.scsi.slot import Slot

MIB = 1 << 20
SLOT = Slot(0, 1)
NUMBER = 7
T = 20.0


class Monitor:
    """Of a QEMU which is this process, and remembers that the disk has a size of 8 MiB."""

    def __init__(self, fd: int, driver: str) -> None:
        self.fds = [fd]
        self.node: dict[str, Any] = {
            "node-name": f"n{NUMBER}",
            "drv": driver,
            "ro": False,
            "image": {"virtual-size": 8 * MIB},
        }
        self.sent: list[int] = []
        self.refuses = False

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
        match command:
            case "query-named-block-nodes":
                return [{"node-name": "n1"}, self.node]
            case "query-fdsets":
                other = {"fdset-id": 0, "fds": [{"fd": 0}]}
                return [other, {"fdset-id": NUMBER, "fds": [{"fd": fd} for fd in self.fds]}]
            case "qom-get":
                return 4096
            case "block_resize":
                assert arguments is not None
                assert arguments["node-name"] == f"n{NUMBER}"
                if self.refuses:
                    raise QmpRefused(command, "GenericError", "the test says no")
                self.sent.append(arguments["size"])
                return {}
        raise AssertionError(command)

    async def execute_all(self, commands: Sequence[tuple[str, object]], *, timeout_s: float) -> list[Any]:
        return [QmpRefused(name, "GenericError", "the test says no") for name, _ in commands]


@pytest.fixture(params=["file", "qcow2"])
def monitor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Monitor]:
    path = tmp_path / "disk"
    image_format = "raw" if request.param == "file" else "qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, "8M"], check=True)
    fd = os.open(path, os.O_RDWR)
    yield Monitor(fd, request.param)
    os.close(fd)


def of(monitor: Any) -> Sizes:
    process: Any = SimpleNamespace(name="one", pid=os.getpid())
    return Sizes(monitor, process, {"a": NUMBER})


async def grow(monitor: Monitor, size_bytes: int) -> int:
    return await of(monitor).grow(SLOT, attachment="a", size_bytes=size_bytes, timeout_s=T)


def make_larger(monitor: Monitor, size: str) -> None:
    """As another program does it that asks for no lock."""
    path = Path(f"/proc/self/fd/{monitor.fds[0]}").readlink()
    image_format = "raw" if monitor.node["drv"] == "file" else "qcow2"
    subprocess.run(["qemu-img", "resize", "-q", "-f", image_format, path, size], check=True)


async def test_it_grows_to_what_was_asked_for_and_not_again(monitor: Monitor) -> None:
    assert await grow(monitor, 16 * MIB) == 16 * MIB
    assert await grow(monitor, 8 * MIB) == 8 * MIB
    assert await grow(monitor, 4 * MIB) == 8 * MIB
    assert monitor.sent == [16 * MIB]


async def test_a_file_that_was_made_larger_is_not_cut(monitor: Monitor) -> None:
    make_larger(monitor, "32M")
    with pytest.raises(HostRefused, match=rf"{32 * MIB} bytes, the VM sees {8 * MIB}, and {16 * MIB}") as caught:
        await grow(monitor, 16 * MIB)
    assert str(32 * MIB) in str(caught.value.remedy)
    assert monitor.sent == []
    assert await grow(monitor, 32 * MIB) == 32 * MIB
    assert await grow(monitor, 64 * MIB) == 64 * MIB


async def test_a_file_that_has_another_name_by_now_is_not_cut(monitor: Monitor) -> None:
    make_larger(monitor, "32M")
    path = Path(f"/proc/self/fd/{monitor.fds[0]}").readlink()
    path.rename(path.with_name("moved"))
    path.touch()
    with pytest.raises(HostRefused, match="would cut it"):
        await grow(monitor, 16 * MIB)
    path.with_name("moved").unlink()
    with pytest.raises(HostRefused, match="would cut it"):
        await grow(monitor, 16 * MIB)


async def test_what_cannot_be_looked_at_is_not_grown(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, before = os.pipe(), monitor.fds
    for fds in ([], [99_999], [pipe[0]]):
        monitor.fds = fds
        with pytest.raises(HostRefused, match="could cut it"):
            await grow(monitor, 16 * MIB)
    monitor.fds = before
    for fd in pipe:
        os.close(fd)
    if monitor.node["drv"] == "qcow2":  # somebody wrote over its header
        os.pwrite(monitor.fds[0], bytes(512), 0)
        with pytest.raises(HostRefused, match="could cut it"):
            await grow(monitor, 16 * MIB)
    assert monitor.sent == []

    def hangs(*_: object) -> int:
        raise TimeoutError

    monkeypatch.setattr(sizes, "_file_size", hangs)
    with pytest.raises(DeadlineExceeded):
        await grow(monitor, 16 * MIB)
    assert monitor.sent == []


async def test_what_cannot_grow_is_refused_before_anything_is_sent(monitor: Monitor) -> None:
    with pytest.raises(InvalidRequest, match="whole sectors"):
        await grow(monitor, 16 * MIB + 512)
    with pytest.raises(NotAttached):
        await of(monitor).grow(SLOT, attachment="b", size_bytes=16 * MIB, timeout_s=T)
    monitor.node["ro"] = True
    with pytest.raises(NotSupported, match="read-only"):
        await grow(monitor, 16 * MIB)
    monitor.node["node-name"] = "n8"
    with pytest.raises(NotAttached):
        await of(monitor).of(SLOT, attachment="a", timeout_s=T)
    assert monitor.sent == []


@pytest.mark.parametrize(("driver", "kind"), [("host_device", "host_device"), ("raw", "fixed vpc"), ("vmdk", "vmdk")])
async def test_only_raw_and_qcow2_grow(driver: str, kind: str) -> None:
    with pytest.raises(NotSupported, match=f"cannot grow a {kind}"):
        await grow(Monitor(0, driver), 16 * MIB)


async def test_what_qemu_refuses_is_told(monitor: Monitor) -> None:
    monitor.refuses = True
    with pytest.raises(HostRefused, match="block_resize at 0:1: the test says no"):
        await grow(monitor, 16 * MIB)
