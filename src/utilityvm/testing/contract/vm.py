"""What the contract asks of a VM on the backends that are tried: images, another VM, silence."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import PurePosixPath
from typing import Any, ClassVar, Final, TypeVar

from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskRequest, GuestBackend, HostBackend, Journal, MountConfig
from utilityvm.scsi.slot import Slot

T: Final = 20.0  # seconds for a step
SOON: Final = 0.2  # too soon for a VM that is silent

_numbers = itertools.count()


class ContractVM(ABC):
    """A VM without disks, and short words for what the rules ask of it. Derive from it for backends of your own.

    The class variables say what the backends cannot do; a rule then says what they do instead.
    """

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


_T = TypeVar("_T")


async def together(calls: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What each gives, all run at once. All have ended when one's error is raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
