"""A VM that runs is not taken for dead, and one that ends is gone, whatever became of its owner, folder or sockets."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from descriptors import descriptors_left, open_files, until_closed
from real_vms import Uvm
from utilityvm import OutcomeUnknown, UtilityVM, UtilityVMError
from utilityvm.hosts.qemu import QemuProcess
from utilityvm.hosts.qemu.launch import QMP_SOCKETS
from utilityvm.machine import paths
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store
from utilityvm.testing.images import read_file

pytestmark = pytest.mark.real

NAME = "recovered"
HANG_S = 30.0

# Owns a VM, has a fork that lives on, and says so.
OWNER = """
import asyncio, os, sys, time
from utilityvm import UtilityVM
async def main():
    vm = await UtilityVM.clone(sys.argv[1], sys.argv[2], keep=True)
    child = os.fork()
    if not child:
        time.sleep(1000)
    print(child, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest_asyncio.fixture
async def name(booted: str) -> AsyncIterator[str]:
    """A VM without an owner, which is gone after the test."""
    await (await UtilityVM.clone(booted, NAME, keep=True)).close()
    yield NAME
    with Store.open() as store:
        is_left = store.find(NAME) is not None
    if is_left:
        await UtilityVM.remove(NAME, force=True)


@contextmanager
def owner(template: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that owns the VM, and has forked."""
    with subprocess.Popen([sys.executable, "-c", OWNER, template, NAME], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def process_of(name: str) -> QemuProcess:
    with Store.open() as store:
        return QemuProcess.from_json(store.get(name).process or {})


async def test_a_vm_whose_folder_was_removed_is_reached_and_writes_out_what_it_has(name: str, disk: Path) -> None:
    async with UtilityVM.open(name) as vm:
        await vm.add_scsi(disk, "/data", holder="named")
        await vm.run(["sh", "-c", "echo written > /data/new"])
    shutil.rmtree(paths.vm_dir(name))
    async with UtilityVM.open(name) as vm:
        assert (await vm.run(["cat", "/data/new"])).stdout == b"written\n"
    shutil.rmtree(paths.vm_dir(name))
    (told,) = await UtilityVM.remove(name)
    assert "was removed while the VM ran" in told
    assert read_file(disk, "/new", image_format=DiskFormat.RAW) == "written\n"


async def test_a_vm_that_takes_no_connection_is_not_called_dead(name: str) -> None:
    """Its QEMU stands still, and others wait there already: the kernel says EAGAIN to one more."""
    process = process_of(name)
    with ExitStack() as waiting:
        os.kill(process.pid, signal.SIGSTOP)
        waiting.callback(os.kill, process.pid, signal.SIGCONT)
        try:
            while True:
                other = waiting.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(process.folder / QMP_SOCKETS[0]))
        except BlockingIOError:
            pass
        with pytest.raises(OutcomeUnknown):
            await UtilityVM.open(name, timeout_s=0.5)
    async with UtilityVM.open(name) as vm:
        assert (await vm.run(["true"])).exit_code == 0


async def test_what_an_owner_has_forked_does_not_own_its_vm(booted: str) -> None:
    with owner(booted) as process:
        process.kill()
        process.wait()
        async with UtilityVM.open(NAME, wait_s=HANG_S) as vm:
            assert (await vm.run(["true"])).exit_code == 0
        assert await UtilityVM.remove(NAME) == []


async def test_a_vm_can_be_ended_by_force_whose_owner_stands_still(booted: str, uvm: Uvm) -> None:
    with owner(booted) as process:
        qemu = process_of(NAME)
        os.kill(process.pid, signal.SIGSTOP)
        done = uvm("stop", NAME, "--force")
        assert done.returncode == 0, done.stderr
        assert not qemu.is_running()
        with Store.open() as store:
            assert store.find(NAME) is None


async def test_vms_that_ended_leave_no_defunct_children(booted: str, uvm: Uvm) -> None:
    """Also if another process ended them: they are children of the one that started them."""
    before = children()
    for _ in range(2):
        async with UtilityVM.clone(booted, NAME):
            pass
    kept = await UtilityVM.clone(booted, NAME, keep=True)
    await kept.close()
    assert uvm("stop", NAME, "--force").returncode == 0
    async with asyncio.timeout(HANG_S):
        while children() - before:
            await asyncio.sleep(0.01)


def children() -> set[int]:
    """The children of this process, defunct ones too."""
    task = Path(f"/proc/self/task/{os.getpid()}")
    return {int(pid) for pid in (task / "children").read_text().split()}


async def test_wherever_descriptors_run_out_the_error_is_typed_and_it_goes_on_later(
    vm_booted: UtilityVM, disk: Path, booted: str, name: str
) -> None:
    async def add() -> None:
        await (await vm_booted.add_scsi(disk, "/data")).release()

    async def open_one() -> None:
        await (await UtilityVM.open(name)).close()

    async def clone() -> None:
        await (await UtilityVM.clone(booted, "short-of-files")).stop(timeout_s=0)

    for work, numbers in ((add, range(8)), (open_one, range(0, 12, 2)), (clone, range(0, 40, 4))):
        await work()
        before = open_files()
        for free in numbers:
            with descriptors_left(free), suppress(UtilityVMError):  # and no other error
                await work()
                break
        await vm_booted._scsi.settle()
        await work()
        await until_closed(before)
    with Store.open() as store:
        assert store.find("short-of-files") is None
