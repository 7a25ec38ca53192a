"""Finds the device of a disk by where it sits: the controller's PCI address, and the LUN. Never by its name.

A disk that was just attached comes in steps: the sysfs entry is there before the device answers (opening it says
ENXIO), and a partition comes later still. Each wait is for the kernel's own events, with a deadline; opening proves
the device. Should an event be lost (the controller's event queue is short), a scan of that one LUN finds what is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from utilityvm.agent import content, inquiry
from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import is_readable

_T = TypeVar("_T")
_NETLINK_KOBJECT_UEVENT: Final = 15  # linux/netlink.h
_LOOK_AGAIN_S: Final = 0.25  # without any event: for one that was lost
_SCAN_AFTER_S: Final = 0.5
_NUMBERED: Final = "u"  # how a revision begins that is each attachment's own (hosts/qemu/blockdev.py)
_WRITES_AT, _DISCARDS_AT = 4, 11  # in a device's `stat`: requests, merged ones, sectors
_BLKRRPART: Final = 0x125F  # linux/fs.h


class Device(NamedTuple):
    """A block device of the guest."""

    name: str  # sda, sda1: the kernel's, and good only while it is held
    node: str
    number: tuple[int, int]  # major and minor
    sysfs: str

    @property
    def size_bytes(self) -> int:
        return int(read(f"{self.sysfs}/size")) * 512

    @property
    def start_bytes(self) -> int:
        """Where a partition begins on its disk."""
        return int(read(f"{self.sysfs}/start")) * 512

    @property
    def was_written(self) -> bool:
        """Was anything written or discarded since the kernel found it? Source: Linux Documentation/block/stat.rst."""
        counts = [int(word) for word in read(f"{self.sysfs}/stat").split()]
        return any(counts[_WRITES_AT : _WRITES_AT + 3]) or any(counts[_DISCARDS_AT : _DISCARDS_AT + 3])


class Events:
    """The kernel's device events, from the moment that this is made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
        self._socket.setblocking(False)
        self._socket.bind((0, 1))

    def wait(self, seconds: float) -> None:
        """Return when anything happened to any device, or after `seconds`."""
        if seconds > 0 and is_readable(self._socket.fileno(), seconds):
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
    """The SCSI controllers, by index, each known by its PCI address.

    Paths are strings and folders are listed, not matched: this is the way of every mount, and Python's path objects
    would be half of its time.
    """

    def __init__(self, controllers: list[str], *, sysfs: str = "/sys", dev: str = "/dev") -> None:
        self._controllers = controllers
        self._sysfs = sysfs
        self._dev = dev
        self._hosts: dict[int, tuple[str, str]] = {}

    def _host(self, controller: int) -> tuple[str, str] | None:
        """The controller's folder in sysfs and the kernel's number of it, which is by chance and then stays."""
        if controller in self._hosts:
            return self._hosts[controller]
        if not 0 <= controller < len(self._controllers):
            raise Fault(
                f"there is no SCSI controller {controller}: the VM has {len(self._controllers)}", kind="invalid"
            )
        device = f"{self._sysfs}/bus/pci/devices/{self._controllers[controller]}"
        for virtio in _entries(device, "virtio"):
            for host in _entries(f"{device}/{virtio}", "host"):
                self._hosts[controller] = f"{device}/{virtio}/{host}", host.removeprefix("host")
                return self._hosts[controller]
        return None

    def scsi_device(self, controller: int, lun: int) -> str | None:
        """The SCSI device at the slot, as its folder in sysfs."""
        if (found := self._host(controller)) is None:
            return None
        folder, number = found
        path = f"{folder}/target{number}:0:0/{number}:0:0:{lun}"
        return path if os.path.exists(path) else None

    def scan(self, controller: int, lun: int) -> None:
        """Have the kernel look at the slot."""
        if found := self._host(controller):
            folder, number = found
            with contextlib.suppress(OSError):
                write(f"{folder}/scsi_host/host{number}/scan", f"0 0 {lun}")

    def delete(self, controller: int, lun: int, deadline: float) -> None:
        """Have the kernel forget the device. True on return; no device is done already.

        Raises:
            Fault: the kernel did not let go of it in time.
        """

        def gone() -> bool | None:
            self.drop(controller, lun)
            return True if self.scsi_device(controller, lun) is None else None

        until(gone, deadline=deadline, what=f"the kernel did not let go of the disk at {controller}:{lun}")

    def drop(self, controller: int, lun: int) -> None:
        """Have the kernel begin to forget the device, if there is one."""
        if path := self.scsi_device(controller, lun):
            try:
                write(f"{path}/delete", "1")
            except OSError as error:
                # A device's folder is there before its files are, and still is when they are gone.
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise

    def _is_of_another(self, controller: int, lun: int, disk: Device) -> bool:
        """Was the device made for another disk than the one that is at the slot now?"""
        told = inquiry.revision(disk.node)
        if told is None or not told.startswith(_NUMBERED):
            return False  # it does not say which one it is
        with contextlib.suppress(OSError):
            return read(f"{self.scsi_device(controller, lun)}/rev") != told
        return True  # it goes just now

    def disk(self, controller: int, lun: int) -> Device | None:
        """The disk at the slot, if it has come so far that it has a name."""
        path = self.scsi_device(controller, lun)
        for name in _entries(f"{path}/block", "") if path else ():
            return self._device(f"{path}/block/{name}")
        return None

    def partition(self, disk: Device, number: int) -> Device | None:
        for device in self.partitions(disk):
            with contextlib.suppress(OSError):
                if int(read(f"{device.sysfs}/partition")) == number:
                    return device
        return None

    def partitions(self, disk: Device) -> list[Device]:
        found = (self._device(f"{disk.sysfs}/{name}") for name in _entries(disk.sysfs, disk.name))
        return [device for device in found if device]

    def _device(self, sysfs: str) -> Device | None:
        try:
            major, minor = read(f"{sysfs}/dev").split(":")
        except OSError:
            return None  # on its way in or out
        name = sysfs.rpartition("/")[2]
        return Device(name, f"{self._dev}/{name}", (int(major), int(minor)), sysfs)

    def wait(self, controller: int, lun: int, partition: int, deadline: float) -> Device:
        """The disk, or one of its partitions, once it can be opened.

        Raises:
            Fault: it did not come in time (kind "timeout"), or has no such partition (kind "not_found").
        """
        where = f"controller {controller} LUN {lun}"

        def look() -> Device | None:
            disk = self.disk(controller, lun)
            if disk is None or not _opens(disk):
                return None
            if self._is_of_another(controller, lun, disk):
                # The last disk's: the kernel has not heard yet that it went, or never will. The news of this disk come
                # after that, so to wait for them is safe, and to scan at once is not.
                self.drop(controller, lun)
                return None
            return disk

        disk = until(look, deadline=deadline, what=f"no disk came at {where}", nudge=lambda: self.scan(controller, lun))
        if not partition:
            return disk

        found = self.partition(disk, partition)
        if found is None:
            # The kernel reads the table when the disk comes; asked to read it again, it first ends what it is at.
            _read_table(disk)
            found = self.partition(disk, partition)
        if found is None:
            there = sorted(int(read(f"{part.sysfs}/partition")) for part in self.partitions(disk))
            has, remedy = f"it has {', '.join(map(str, there))}", "mount one that it has; 0 is the whole disk"
            if not there:
                plain = "it has no partition table that we know", "mount the whole disk: leave the partition out"
                has, remedy = content.instead_of_partitions(disk.node, deadline) or plain
            raise Fault(f"the disk at {where} has no partition {partition}: {has}", kind="not_found", remedy=remedy)
        part = found
        return until(
            lambda: part if _opens(part) else None,
            deadline=deadline,
            what=f"partition {partition} of the disk at {where} does not open",
        )


def _read_table(disk: Device) -> None:
    """Have the kernel read the partition table. One that is in use was read before, and stays."""
    fd = os.open(disk.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _BLKRRPART, 0)
    finally:
        os.close(fd)


def _opens(device: Device) -> bool:
    """Does the device answer, and is the node the device's own?"""
    try:
        fd = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
            return False
        raise
    try:
        number = os.fstat(fd).st_rdev
        return (os.major(number), os.minor(number)) == device.number and os.lseek(fd, 0, os.SEEK_END) > 0
    finally:
        os.close(fd)


def _entries(folder: str, begin: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(begin)]
    except OSError:
        return []


def read(path: str) -> str:
    """A small file of the kernel's."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode().strip()
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    """Write to a file of the kernel's."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
