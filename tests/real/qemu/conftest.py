"""A QEMU without a guest: enough for its bus, its files, its locks and its end. It starts in some 60 ms."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path

import pytest
import pytest_asyncio

from utilityvm.errors import SetupError
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat

Start = Callable[..., Awaitable[QemuHost]]
Make = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def qemu_is_installed() -> None:
    try:
        find_program("qemu-system-x86_64", package="qemu-system-x86")
        find_program("qemu-img", package="qemu-utils")
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}: {error.remedy}")


@pytest.fixture
def runtime() -> Generator[Path]:
    """A folder with a short name: a socket's path has 107 bytes at most. Tests leave it empty."""
    with tempfile.TemporaryDirectory(prefix="uvm-test-") as folder:
        yield Path(folder)
        assert not list(Path(folder).iterdir()), "a VM left something behind"


@pytest_asyncio.fixture
async def start(runtime: Path) -> AsyncGenerator[Start]:
    """Start VMs; they are stopped after the test."""
    hosts: list[QemuHost] = []

    async def start_vm(name: str = "one", **changes: object) -> QemuHost:
        options: dict[str, object] = {"memory_mib": 64, **changes}
        host = await QemuHost.start(QemuConfig(name=name, **options), folder=runtime / name)  # type: ignore[arg-type]
        hosts.append(host)
        return host

    yield start_vm
    for host in hosts:
        await host.stop()


@pytest_asyncio.fixture
async def vm(start: Start) -> QemuHost:
    return await start()


@pytest.fixture
def image(tmp_path: Path) -> Make:
    """Make images; `qemu-img` is the judge of what they are."""

    def make(name: str = "disk", image_format: DiskFormat = DiskFormat.RAW, size: str = "16M") -> Path:
        path = tmp_path / f"{name}.{image_format}"
        options = ["-o", "force_size=on"] if image_format is DiskFormat.VHD else []
        qemu_img = find_program("qemu-img", package="qemu-utils")
        run([qemu_img, "create", "-q", "-f", image_format, *options, path, size])
        path.chmod(0o600)
        return path

    return make
