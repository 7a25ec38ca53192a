"""Finds the device of a disk by where it sits: the controller's PCI address, and the LUN. Never by its name.

A disk that was just attached comes in steps: the sysfs entry is there before the device answers (opening it says ENXIO),
and a partition comes later still. Each wait is for the kernel's own events, with a deadline; opening proves the device.
Should an event be lost (the controller's event queue is short), a scan of that one LUN finds what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from utilityvm.agent.faults import Fault

_T = TypeVar("_T")
_NETLINK_KOBJECT_UEVENT: Final = 15  # linux/netlink.h
_LOOK_AGAIN_S: Final = 0.25  # without any event: for one that was lost
_SCAN_AFTER_S: Final = 0.5


class Device(NamedTuple):
    """A block device of the guest."""

    name: str  # sda, sda1: the kernel's, and good only while it is held
    node: Path
    number: tuple[int, int]  # major and minor
    sysfs: Path

    @property
    def size_bytes(self) -> int:
        return int((self.sysfs / "size").read_text()) * 512


class Events:
    """The kernel's device events, from the moment that this is made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
        self._socket.setblocking(False)
        self._socket.bind((0, 1))

    def wait(self, seconds: float) -> None:
        """Return when anything happened to any device, or after `seconds`."""
        if seconds > 0 and select.select([self._socket], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError, OSError):  # ENOBUFS: some were lost, so something happened
                while True:
                    self._socket.recv(65536)

    def close(self) -> None:
        self._socket.close()


def until(look: Callable[[], _T | None], *, deadline: float, what: str, nudge: Callable[[], None] | None = None) -> _T:
    """What `look` gives once it gives something; looked at again after each event of the kernel.

    Raises:
        Fault: the deadline passed first (kind "timeout").
    """
    if (found := look()) is not None:
        return found
    events = Events()
    try:
        begun = time.monotonic()
        nudged = False
        while (found := look()) is None:
            now = time.monotonic()
            if now >= deadline:
                raise Fault(f"{what} within the time given", kind="timeout")
            if nudge and not nudged and now - begun >= _SCAN_AFTER_S:
                nudged = True
                nudge()
            events.wait(min(_LOOK_AGAIN_S, deadline - now))
        return found
    finally:
        events.close()


class Bus:
    """The SCSI controllers, by index, each known by its PCI address."""

    def __init__(self, controllers: list[str], *, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._controllers = controllers
        self._sysfs = sysfs
        self._dev = dev

    def _hosts(self, controller: int) -> Iterator[Path]:
        if not 0 <= controller < len(self._controllers):
            raise Fault(
                f"there is no SCSI controller {controller}: the VM has {len(self._controllers)}", kind="invalid"
            )
        return (self._sysfs / "bus/pci/devices" / self._controllers[controller]).glob("virtio*/host*")

    def scsi_device(self, controller: int, lun: int) -> Path | None:
        """The SCSI device at the slot, as its folder in sysfs."""
        for host in self._hosts(controller):
            number = host.name.removeprefix("host")
            path = host / f"target{number}:0:0" / f"{number}:0:0:{lun}"
            if path.exists():
                return path
        return None

    def scan(self, controller: int, lun: int) -> None:
        """Have the kernel look at the slot."""
        for host in self._hosts(controller):
            with contextlib.suppress(OSError):
                (host / "scsi_host" / host.name / "scan").write_text(f"0 0 {lun}")

    def disk(self, controller: int, lun: int) -> Device | None:
        """The disk at the slot, if it has come so far that it has a name."""
        path = self.scsi_device(controller, lun)
        if path is None:
            return None
        for entry in (path / "block").glob("*"):
            return self._device(entry)
        return None

    def partition(self, disk: Device, number: int) -> Device | None:
        for entry in disk.sysfs.glob(f"{disk.name}*/partition"):
            with contextlib.suppress(OSError):
                if int(entry.read_text()) == number:
                    return self._device(entry.parent)
        return None

    def partitions(self, disk: Device) -> list[Device]:
        found = (self._device(entry.parent) for entry in disk.sysfs.glob(f"{disk.name}*/partition"))
        return [device for device in found if device]

    def _device(self, sysfs: Path) -> Device | None:
        try:
            major, minor = (sysfs / "dev").read_text().strip().split(":")
        except OSError:
            return None  # on its way in or out
        return Device(sysfs.name, self._dev / sysfs.name, (int(major), int(minor)), sysfs)

    def wait(self, controller: int, lun: int, partition: int, deadline: float) -> Device:
        """The disk, or one of its partitions, once it can be opened.

        Raises:
            Fault: it did not come in time.
        """
        where = f"controller {controller} LUN {lun}"

        def look() -> Device | None:
            disk = self.disk(controller, lun)
            return disk if disk and _opens(disk) else None

        disk = until(look, deadline=deadline, what=f"no disk came at {where}", nudge=lambda: self.scan(controller, lun))
        if not partition:
            return disk

        def look_inside() -> Device | None:
            part = self.partition(disk, partition)
            return part if part and _opens(part) else None

        # The kernel has read the table by the time that the disk opens; the node follows at once or never.
        deadline = min(deadline, time.monotonic() + 5.0)
        return until(look_inside, deadline=deadline, what=f"the disk at {where} shows no partition {partition}")


def _opens(device: Device) -> bool:
    try:
        os.close(os.open(device.node, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return False
        if error.errno == errno.ENOMEDIUM:
            return False
        raise
    try:
        status = os.stat(device.node)
    except OSError:
        return False
    return (os.major(status.st_rdev), os.minor(status.st_rdev)) == device.number and device.size_bytes > 0
