"""The VMs that the contract of the backends is tried on: fakes, the HCS stand-in, and a real QEMU with our agent.

Each says what it cannot do and why, and a test of that then says what it does instead. All else must be the same.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from utilityvm import UtilityVM
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskRequest, GuestBackend, HostBackend, Journal, MountConfig
from utilityvm.scsi.slot import Slot
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld
from utilityvm.testing.hcs import HcsWorld
from utilityvm.testing.images import ext4_image

T = 20.0
SOON = 0.2  # too soon for a VM that is silent

_numbers = itertools.count()


class ContractVM(ABC):
    """A VM without disks, and short words for what tests ask of it."""

    knows_force: ClassVar[bool] = True
    falls_back: ClassVar[bool] = False  # does its guest mount read-only, as mount(8) does, what it cannot write to?
    is_asked: ClassVar[bool] = True  # does its guest say what is there, or do we only know what it once answered?
    waits_for_ever: ClassVar[bool] = False  # does its guest hang when it is to mount a disk that is not there?
    grows: ClassVar[bool] = True
    looks_before_it_formats: ClassVar[bool] = True  # or does it format what holds anything else, so that we ask first?

    def __init__(self, host: HostBackend, guest: GuestBackend) -> None:
        self.host = host
        self.guest = guest

    @abstractmethod
    def image(self, name: str = "a", *, blank: bool = False) -> str:
        """The path of a new image, with a file system unless `blank`."""

    def vfat_image(self) -> str:
        """The path of a new image with a vfat. Asked only of VMs whose disks grow."""
        raise NotImplementedError

    def grow_outside(self, path: str, size_bytes: int) -> None:
        """Another program makes the image larger. Asked only of VMs whose disks grow."""
        raise NotImplementedError

    def let_storage_die(self, path: str) -> None:
        """From now on the storage of that image answers with I/O errors.

        Raises:
            NotImplementedError: that cannot be had here.
        """
        raise NotImplementedError

    @abstractmethod
    def missing(self) -> str:
        """The path of an image that is not there."""

    @abstractmethod
    def other_vm(self) -> AbstractAsyncContextManager[HostBackend]:
        """Another VM on the same machine."""

    @abstractmethod
    def in_use(self, guest_path: PurePosixPath) -> AbstractAsyncContextManager[None]:
        """A program in the guest uses the mount."""

    @abstractmethod
    def silence(self) -> AbstractContextManager[None]:
        """Neither the hypervisor nor the guest does or answers anything; at the end they go on where they were."""

    async def can_write(self, guest_path: PurePosixPath) -> bool:
        """May a program of the guest write there? Asked only of guests that fall back."""
        raise NotImplementedError

    @abstractmethod
    async def left(self) -> list[str]:
        """What is attached, mounted, open, or was done wrong."""

    @abstractmethod
    def forgive(self) -> None:
        """The test did on purpose what a right client never does."""

    def manager(self, journal: Journal) -> ScsiManager:
        return ScsiManager(self.host, self.guest, journal, controllers=4, reserved={Slot(0, 0): "the root disk"})

    # The steps, with the arguments that most tests give.

    async def attach(self, path: str, slot: Slot, name: str | None = None, *, read_only: bool = False) -> str:
        """Open and attach; gives the attachment's name."""
        return await attach(self.host, path, slot, name, read_only=read_only)

    async def detach(self, slot: Slot, name: str, *, timeout_s: float = T) -> None:
        await self.host.detach(slot, attachment=name, timeout_s=timeout_s)

    async def probe(self, slot: Slot, name: str) -> bool:
        return await self.host.probe(slot, attachment=name, timeout_s=T)

    async def mount(
        self, slot: Slot, path: PurePosixPath, *, timeout_s: float = T, config: MountConfig | None = None, **how: Any
    ) -> Sequence[str]:
        return await self.guest.mount(slot, config or MountConfig(**how), guest_path=path, timeout_s=timeout_s)

    async def unmount(
        self, slot: Slot, path: PurePosixPath, *, timeout_s: float = T, force: bool = False, **how: Any
    ) -> None:
        await self.guest.unmount(slot, MountConfig(**how), guest_path=path, timeout_s=timeout_s, force=force)

    async def eject(self, slot: Slot, *, timeout_s: float = T, force: bool = False) -> None:
        await self.guest.eject(slot, timeout_s=timeout_s, force=force)

    async def probe_mount(self, slot: Slot, path: PurePosixPath) -> bool:
        return await self.guest.probe_mount(slot, guest_path=path, timeout_s=T)

    async def probe_device(self, slot: Slot) -> bool:
        return await self.guest.probe_device(slot, timeout_s=T)

    async def take_away(self, slot: Slot, name: str) -> None:
        """Eject and detach, as is right."""
        await self.eject(slot)
        await self.detach(slot, name)


async def attach(host: HostBackend, path: str, slot: Slot, name: str | None = None, *, read_only: bool = False) -> str:
    """Open and attach; gives the attachment's name."""
    name = name or f"contract{next(_numbers)}"
    disk = await host.open(DiskRequest(host_path=path, read_only=read_only))
    try:
        await host.attach(slot, disk, attachment=name, timeout_s=T)
    finally:
        disk.close()
    return name


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
