"""Storage that hangs delays its own disk alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from utilityvm.errors import AccessDenied, DiskInUse
from utilityvm.hosts.qemu.access import Access, Taken, _check_own_right
from utilityvm.hosts.qemu.disk import QemuDisk
from utilityvm.machine.threads import in_thread, lent
from utilityvm.scsi.ports import DiskFormat, DiskRequest

HANG_S = 20.0  # the kernel breaks a lease after 45 s
ACCESS = Access(vm="worker", uid=os.geteuid(), vm_group="utilityvm", who_uses=None, frozen_by=None)
# A file server takes such leases: whoever opens the file then waits until it is given back.
LEASES = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
for path in sys.argv[1:]:
    fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.pause()
"""


def image(folder: Path, name: str) -> DiskRequest:
    path = folder / name
    path.write_bytes(bytes(1 << 20))
    return DiskRequest(host_path=str(path), read_only=False, format=DiskFormat.RAW)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[list[DiskRequest]]:
    requests = [image(tmp_path, f"slow{n}.raw") for n in range(3 * (os.cpu_count() or 1) + 10)]
    paths = [request.host_path for request in requests]
    with subprocess.Popen([sys.executable, "-c", LEASES, *paths], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield requests
        holder.kill()


async def test_images_whose_open_hangs_delay_neither_a_healthy_one_nor_the_loop(
    slow: list[DiskRequest], tmp_path: Path
) -> None:
    hanging = [asyncio.create_task(in_thread(ACCESS.open, one, late=QemuDisk.close)) for one in slow]
    async with asyncio.timeout(HANG_S):
        healthy = await in_thread(ACCESS.open, image(tmp_path, "healthy.raw"), late=QemuDisk.close)
        taken = await in_thread(lent(healthy.fd, ACCESS.take), healthy, late=Taken.give_back)
    assert not any(task.done() for task in hanging)
    for task in hanging:
        task.cancel()
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*hanging, return_exceptions=True)
    taken.give_back()
    healthy.close()


async def test_a_disk_that_was_taken_for_a_caller_who_has_gone_is_free(tmp_path: Path) -> None:
    disk = await in_thread(ACCESS.open, image(tmp_path, "disk.raw"), late=QemuDisk.close)
    task = asyncio.create_task(in_thread(lent(disk.fd, ACCESS.take), disk, late=Taken.give_back))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(HANG_S):
        while True:
            try:
                taken = await in_thread(lent(disk.fd, ACCESS.take), disk, late=Taken.give_back)
                break
            except DiskInUse:
                await asyncio.sleep(0.01)
    taken.give_back()
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(
    ("mode", "read_only", "is_allowed"),
    [(0o600, True, False), (0o644, True, True), (0o644, False, False), (0o646, False, True), (0o602, False, False)],
)
def test_a_vm_that_is_to_open_a_disk_by_its_own_right_must_have_it(
    tmp_path: Path, mode: int, read_only: bool, is_allowed: bool
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    disk = tmp_path / "disk"
    disk.touch()
    disk.chmod(mode)
    request = DiskRequest(host_path=str(disk), read_only=read_only, format=DiskFormat.RAW)
    with nullcontext() if is_allowed else pytest.raises(AccessDenied, match="user 65432"):
        _check_own_right(request, 65432)
