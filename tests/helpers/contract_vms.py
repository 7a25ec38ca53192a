"""The VMs that the contract of the backends is tried on: fakes, the HCS stand-in, and a real QEMU with our agent.

Each says what it cannot do and why, and a test of that then says what it does instead. All else must be the same.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath

from utilityvm import UtilityVM
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.scsi.ports import HostBackend
from utilityvm.scsi.slot import Slot
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld
from utilityvm.testing.contract import ContractVM
from utilityvm.testing.hcs import HcsWorld
from utilityvm.testing.images import ext4_image


class FakeVM(ContractVM):
    def __init__(self) -> None:
        self.world = FakeWorld()
        super().__init__(FakeHost(self.world), FakeGuest(self.world))

    def image(self, name: str = "a", *, blank: bool = False) -> str:
        if blank:
            self.world.blank.add(f"/{name}")
        return f"/{name}"

    def vfat_image(self) -> str:
        return "/vfat"

    def grow_outside(self, path: str, size_bytes: int) -> None:
        self.world.sizes[f"file:{path}"] = size_bytes

    def let_storage_die(self, path: str) -> None:
        self.world.dead.add(f"file:{path}")

    def missing(self) -> str:
        self.world.missing.add("/missing")
        return "/missing"

    @asynccontextmanager
    async def other_vm(self) -> AsyncIterator[HostBackend]:
        other = FakeWorld(neighbours=[self.world])
        self.world.neighbours.append(other)
        yield FakeHost(other)

    @asynccontextmanager
    async def in_use(self, guest_path: PurePosixPath) -> AsyncIterator[None]:
        self.world.busy[guest_path] = "process 7 (sleep)"
        yield
        del self.world.busy[guest_path]

    @contextmanager
    def silence(self) -> Iterator[None]:
        answers = self.world.hold()
        try:
            yield
        finally:
            answers.set()

    async def left(self) -> list[str]:
        world = self.world
        return [*map(str, world.bus), *map(str, world.mounts), *map(str, world.open_disks), *world.harm]

    def forgive(self) -> None:
        self.world.harm.clear()


class HcsVM(ContractVM):
    """hcsshim's guest on HCS: it is told everything through HCS, and can be asked nothing."""

    knows_force = False
    is_asked = False
    waits_for_ever = True
    grows = False
    looks_before_it_formats = False

    STEPS = ("attach", "detach", "mount", "unmount", "eject")

    def __init__(self) -> None:
        self.world = HcsWorld(os=GuestOS.LINUX)
        host = HcsHost(self.world, disks=self.world.disks, group_access=GroupAccess())
        super().__init__(host, HcsGuest(self.world, GuestOS.LINUX, is_read_only=host.is_read_only))

    def image(self, name: str = "a", *, blank: bool = False) -> str:
        return self.world.add_file(f"C:\\{name}.vhdx", blank=blank).path

    def missing(self) -> str:
        return "C:\\missing.vhdx"

    @asynccontextmanager
    async def other_vm(self) -> AsyncIterator[HostBackend]:
        other = HcsWorld("vm-2")
        other.files = self.world.files
        yield HcsHost(other, disks=other.disks, group_access=GroupAccess())

    @asynccontextmanager
    async def in_use(self, guest_path: PurePosixPath) -> AsyncIterator[None]:
        self.world.busy.add(str(guest_path))
        yield
        self.world.busy.remove(str(guest_path))

    @contextmanager
    def silence(self) -> Iterator[None]:
        answers = [self.world.hold(step) for step in self.STEPS]
        try:
            yield
        finally:
            for event in answers:
                event.set()

    async def left(self) -> list[str]:
        world = self.world
        rights = [f"a right to {file.path}" for file in world.files.values() if file.rights]
        return [*map(str, world.bus), *world.mounts, *rights, *world.harm]

    def forgive(self) -> None:
        self.world.harm.clear()


class QemuVM(ContractVM):
    """A real VM: the backends that its `UtilityVM` has, without its manager."""

    falls_back = True

    def __init__(self, vm: UtilityVM, folder: Path) -> None:
        self._vm = vm
        self._folder = folder
        self._qemu, self._agent = vm._host, vm._guest
        super().__init__(self._qemu, self._agent)

    def image(self, name: str = "a", *, blank: bool = False) -> str:
        path, template = self._folder / f"{name}.raw", self._folder / "template.raw"
        if blank:
            path.touch()
            os.truncate(path, 16 << 20)
        else:
            if not template.exists():
                ext4_image(template, {"greeting": "hello\n"})
            shutil.copyfile(template, path)
        return str(path)

    def vfat_image(self) -> str:
        path = self._folder / "vfat.raw"
        path.touch()
        os.truncate(path, 16 << 20)
        subprocess.run(["mkfs.vfat", str(path)], check=True, capture_output=True)
        return str(path)

    def grow_outside(self, path: str, size_bytes: int) -> None:
        os.truncate(path, size_bytes)

    def missing(self) -> str:
        return str(self._folder / "missing")

    @asynccontextmanager
    async def other_vm(self) -> AsyncIterator[HostBackend]:
        """Without a guest: it starts in no time, and its host is what is asked."""
        folder = self._vm.process.folder.with_name("contract")
        host = await QemuHost.start(QemuConfig(name="contract", memory_mib=64), folder=folder)
        try:
            yield host
        finally:
            await host.stop()

    @asynccontextmanager
    async def in_use(self, guest_path: PurePosixPath) -> AsyncIterator[None]:
        ready = asyncio.Event()
        command = ["sh", "-c", "echo ready; exec sleep 1000"]
        user = asyncio.create_task(
            self._agent.run_streaming(
                command, stdout=lambda _: ready.set(), stderr=lambda _: None, cwd=guest_path, timeout_s=None
            )
        )
        await ready.wait()
        yield
        user.cancel()
        await asyncio.wait({user})
        while b"sleep" in (await self._agent.run(["ps", "-e", "-o", "args="])).stdout:
            pass  # it is being killed

    @contextmanager
    def silence(self) -> Iterator[None]:
        os.kill(self._qemu.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._qemu.process.pid, signal.SIGCONT)

    async def can_write(self, guest_path: PurePosixPath) -> bool:
        return (await self._agent.run(["touch", str(guest_path / "written")])).exit_code == 0

    async def left(self) -> list[str]:
        mounts = await self._agent.mounts()
        attachments = await self._qemu.attachments()
        return [*(str(mount["MountPath"]) for mount in mounts), *(str(one.slot) for one in attachments)]

    def forgive(self) -> None:
        """Nobody takes note of it here."""

    async def clear(self) -> None:
        """Take away what a failed test left, so that the next one can be trusted."""
        for mount in await self._agent.mounts():
            slot = Slot(mount.get("Controller", 0), mount.get("Lun", 0))
            await self.unmount(slot, PurePosixPath(mount["MountPath"]), force=True)
        for one in await self._qemu.attachments():
            await self.eject(one.slot, force=True)
            await self.detach(one.slot, one.attachment)
