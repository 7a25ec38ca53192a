"""Real VMs as fixtures, by how far they have got: `guest_image`, then `vm_booted`, then `vm_with_disk`.

A plugin of all tests (tests/conftest.py), so that all who want a real VM share one; who wants none pays nothing.

One booted VM is shared by the whole session, for a boot costs seconds where there is no KVM; each test has to leave it
without disks, and is told if it does not. A test that ends it makes the next one get a new one. Stores and runtime
folders are of the session's own, and after it every VM in them is ended, whatever the tests did.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import evidence
from utilityvm import SCSIMount, UtilityVM, VMConfig
from utilityvm.errors import SetupError
from utilityvm.guestimage import build
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths
from utilityvm.testing.images import ext4_image

Uvm = Callable[..., "subprocess.CompletedProcess[str]"]

_CONSOLE_CHARACTERS = 8000
_NAME_CHARACTERS = 100
_transcripts = evidence.Transcripts()


# Ends every VM of the session, whoever owns it, and the server, and removes the folder, once its standard input is
# closed: so also when pytest was killed.
GUARD = """
import asyncio, os, shutil, signal, sys
from pathlib import Path
from utilityvm.hosts.qemu import QemuProcess, launch
from utilityvm.store import Store
from utilityvm.store.ownership import owner_of

async def end_all(store):
    for vm in store.vms():
        if vm.process:
            await launch.destroy(QemuProcess.from_json(vm.process))

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they go to the whole group
    signal.signal(number, signal.SIG_IGN)
sys.stdin.read()
folder = Path(sys.argv[1])
for path in folder.rglob("servers/*"):
    if (server := owner_of(path)) is not None and server.pid:
        os.kill(server.pid, signal.SIGKILL)
for path in folder.rglob("state.db"):
    with Store.open(path) as store:
        asyncio.run(end_all(store))
shutil.rmtree(folder)
"""


@pytest.fixture(scope="session")
def own_folders() -> Iterator[Path]:
    """Folders of the session's own for the store and the sockets; short names, as a socket's path has 107 bytes."""
    folder = tempfile.mkdtemp(prefix="uvm-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UTILITYVM_STATE_DIR", f"{folder}/state")
        patch.setenv("UTILITYVM_RUNTIME_DIR", f"{folder}/run")
        with subprocess.Popen([sys.executable, "-c", GUARD, folder], stdin=subprocess.PIPE) as guard:
            with _transcripts:
                yield Path(folder)
            assert guard.stdin is not None
            guard.stdin.close()
            assert guard.wait() == 0


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The guest image; override it to boot another one."""
    try:
        return build.ensure()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}: {error.remedy}")


@pytest_asyncio.fixture(scope="session")
async def booted(own_folders: Path, guest_image: GuestImage) -> str:
    """The template of a VM that has booted and has no disks: the session boots once, and clones the rest."""
    vm = await UtilityVM.start(VMConfig(name="booted"), image=guest_image)
    try:
        return (await vm.save_as_template("booted")).name
    finally:
        await vm.stop()


class SharedVM:
    """The session's VM; cloned when it is first wanted, and again when a test has ended it."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._started = 0
        self.vm: UtilityVM | None = None

    async def get(self) -> UtilityVM:
        if self.vm is None or not self.vm.is_running:
            await self.stop()
            self._started += 1
            self.vm = await UtilityVM.clone(self._template, f"shared{self._started}")
        return self.vm

    async def stop(self) -> None:
        if self.vm is not None:
            await self.vm.stop()


@pytest_asyncio.fixture(scope="session")
async def shared_vm(booted: str) -> AsyncIterator[SharedVM]:
    shared = SharedVM(booted)
    yield shared
    await shared.stop()


@pytest_asyncio.fixture
async def vm_booted(shared_vm: SharedVM) -> AsyncIterator[UtilityVM]:
    """A VM whose agent answers, without disks."""
    vm = await shared_vm.get()
    yield vm
    if vm.is_running:
        await vm._scsi.settle()
        left = vm.scsi_slots()
        for mount in vm.scsi_reservations():
            await mount.release(force=True)
        assert not left, "the test left disks in the VM"


Start = Callable[..., Awaitable[UtilityVM]]


@pytest_asyncio.fixture
async def start(booted: str, guest_image: GuestImage) -> AsyncIterator[Start]:
    """Start VMs of the test's own, which are stopped after it: clones, unless they are to be of another size."""
    started: list[UtilityVM] = []

    async def start_vm(name: str, **settings: Any) -> UtilityVM:
        if settings.keys() <= {"keep"}:
            vm = await UtilityVM.clone(booted, name, **settings)
        else:
            vm = await UtilityVM.start(VMConfig(name=name, **settings), image=guest_image)
        started.append(vm)
        return vm

    yield start_vm
    for vm in started:
        await vm.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw ext4 image with the file `greeting`."""
    return ext4_image(tmp_path / "disk.raw", {"greeting": "hello\n"})


@pytest_asyncio.fixture
async def vm_with_disk(vm_booted: UtilityVM, disk: Path) -> AsyncIterator[SCSIMount]:
    """The reservation of `disk`, mounted writable at /data."""
    mount = await vm_booted.add_scsi(disk, "/data")
    yield mount
    if vm_booted.is_running and mount.ref_count:
        await mount.release(force=True)


@pytest.fixture
def uvm() -> Uvm:
    """Run the command `uvm` as a process; gives what it printed and its exit code."""

    def run(*words: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from utilityvm.cli import main; main()", *map(str, words)]
        stdin = subprocess.DEVNULL if input is None else None
        return subprocess.run(command, input=input, stdin=stdin, capture_output=True, text=True, check=False)

    return run


def pytest_runtest_setup() -> None:
    _transcripts.heard.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None]:
    """Keep what there is of the VMs with a failure: in files, and the end of the console in the report."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    if not report.failed:
        return
    for name, thing in getattr(item, "funcargs", {}).items():
        if isinstance(thing, UtilityVM):
            report.sections.append((f"console of {name}", thing.console()[-_CONSOLE_CHARACTERS:]))
    store, cache = _own_store(), getattr(item.config, "cache", None)
    has_vms = _transcripts.heard or item.nodeid.startswith("tests/real/")
    if store is not None and cache is not None and has_vms:
        test = re.sub(r"[^\w.-]", "_", item.nodeid)[-_NAME_CHARACTERS:]
        kept = evidence.keep(Path(cache.mkdir("vms-of-failures")) / test, store, _transcripts)
        report.sections.append(("kept of its VMs", "\n".join(map(str, kept))))


def _own_store() -> Path | None:
    """The session's store; None: no VM was started, so that there is none but the user's."""
    state = os.environ.get("UTILITYVM_STATE_DIR")
    path = Path(state) / paths.STORE_FILE if state else None
    return path if path is not None and path.exists() else None
