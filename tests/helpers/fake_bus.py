"""SCSI disks without a kernel: a /sys that the agent's `Bus` reads, and the files that stand for their devices.

A write to a file of /sys does what the kernel does: `delete` takes the disk away, `rescan` shows its new size.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_mounts import FakeMounts
from utilityvm.agent import disks, find_disk, inquiry

ADDRESS = "0000:00:10.0"
IOCTLS = {0x1261: "flush", 0x125F: "read table"}  # linux/fs.h
ENOTTY = 25


class FakeBus:
    """One controller. Use `install`."""

    def __init__(self, folder: Path, kernel: FakeMounts) -> None:
        self.dev, self._kernel = folder / "dev", kernel
        self.dev.mkdir()
        self._host = kernel.sys / "bus/pci/devices" / ADDRESS / "virtio0/host2"
        self._host.mkdir(parents=True)
        self.asked: list[str] = []
        self.grows_to: dict[int, int] = {}  # sizes that the host has given disks, by LUN
        self.dead: set[str] = set()  # nodes that take no data any more
        self.absent: dict[str, int] = {}  # nodes that cannot be opened, and with which errno
        self.flush_says = ENOTTY  # its errno; 0: done

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeBus:
        """Have the agent's modules use this."""
        plain_fsync, plain_open, other_ioctl = os.fsync, os.open, fcntl.ioctl

        def fsync(fd: int) -> None:
            name = str(Path(f"/proc/self/fd/{fd}").readlink())
            if name in self.dead:
                raise OSError(5, "Input/output error")
            self.asked.append(f"fsync {Path(name).name}")
            plain_fsync(fd)

        def opened(path: Any, flags: int, mode: int = 0o777, **how: Any) -> int:
            if path in self.absent:
                raise OSError(self.absent[path], os.strerror(self.absent[path]))
            return plain_open(path, flags, mode, **how)

        def ioctl(fd: int, request: int, argument: Any = 0) -> Any:
            name = Path(f"/proc/self/fd/{fd}").readlink().name
            if name == "control":
                return other_ioctl(fd, request, argument)
            if request not in IOCTLS:
                raise OSError(ENOTTY, "Inappropriate ioctl for device")
            self.asked.append(f"{IOCTLS[request]} {name}")
            if self.flush_says:
                raise OSError(self.flush_says, os.strerror(self.flush_says))
            return 0

        monkeypatch.setattr("os.fsync", fsync)
        monkeypatch.setattr("os.open", opened)
        monkeypatch.setattr("fcntl.ioctl", ioctl)
        monkeypatch.setattr(find_disk, "_opens", lambda device: Path(device.node).exists())
        monkeypatch.setattr(disks, "Bus", lambda controllers: self.bus())
        monkeypatch.setattr(inquiry, "revision", lambda node: None)
        for module in (find_disk, disks):
            monkeypatch.setattr(module, "write", self._write)
        return self

    def bus(self) -> find_disk.Bus:
        """As the agent sees it."""
        return find_disk.Bus([ADDRESS], sysfs=str(self._kernel.sys), dev=str(self.dev))

    def attach(self, lun: int, *, mib: int = 32, partitions: tuple[tuple[int, int], ...] = ()) -> str:
        """A disk comes; `partitions` are their first and their number of MiBs. Gives its node."""
        name, block = f"sd{chr(ord('a') + lun)}", self.folder(lun) / "block"
        self._device(block / name, (8, 16 * lun), 0, mib, self.dev / name)
        for number, (start, length) in enumerate(partitions, 1):
            part = block / name / f"{name}{number}"
            self._device(part, (8, 16 * lun + number), start, length, self.dev / part.name)
            (part / "partition").write_text(f"{number}\n")
        return str(self.dev / name)

    def folder(self, lun: int) -> Path:
        """The SCSI device."""
        return self._host / f"target2:0:0/2:0:0:{lun}"

    def _device(self, folder: Path, number: tuple[int, int], start: int, mib: int, node: Path) -> None:
        folder.mkdir(parents=True)
        texts = {"dev": f"{number[0]}:{number[1]}", "size": mib * 2048, "start": start * 2048, "stat": "0 " * 15}
        for name, text in texts.items():
            (folder / name).write_text(f"{text}\n")
        with node.open("wb") as file:
            file.truncate(mib << 20)
        self._kernel.device(str(node), number)
        (self._kernel.sys / "dev/block" / f"{number[0]}:{number[1]}").symlink_to(folder)

    def _write(self, path: str, text: str) -> None:
        file = Path(path)
        lun = int(file.parent.name.rpartition(":")[2])
        self.asked.append(f"{file.name} {lun}")
        assert text == "1"
        if file.name == "rescan" and lun in self.grows_to:
            (disk,) = (file.parent / "block").iterdir()
            (disk / "size").write_text(f"{self.grows_to[lun] // 512}\n")
        elif file.name == "delete":
            for folder in (file.parent / "block").glob("*/"):
                (self.dev / folder.name).unlink(missing_ok=True)
            shutil.rmtree(file.parent)
