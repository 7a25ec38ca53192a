"""Real block devices for tests: loop devices over files."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_BLKPG, _ADD_PARTITION, _DEL_PARTITION = 0x1269, 1, 2  # linux/fs.h, linux/blkpg.h


class _Partition(ctypes.Structure):
    """Source: linux/blkpg.h, struct blkpg_partition."""

    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("pno", ctypes.c_int),
        ("devname", ctypes.c_char * 64),
        ("volname", ctypes.c_char * 64),
    )


class _Argument(ctypes.Structure):
    """Source: linux/blkpg.h, struct blkpg_ioctl_arg."""

    _fields_ = (
        ("op", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("datalen", ctypes.c_int),
        ("data", ctypes.POINTER(_Partition)),
    )


def _blkpg(disk: str, op: int, number: int, start: int = 0) -> None:
    """As addpart and delpart do, which not every machine has."""
    partition = _Partition(start=start, length=4 << 20, pno=number)
    argument = _Argument(op=op, datalen=ctypes.sizeof(_Partition), data=ctypes.pointer(partition))
    with Path(disk).open("rb") as device:
        fcntl.ioctl(device, _BLKPG, argument)


class Loops:
    """Loop devices over files of a folder; all are gone at the end."""

    def __init__(self, folder: Path, undo: contextlib.ExitStack) -> None:
        self.folder = folder
        self._undo = undo

    def callback(self, act: Callable[..., object], *arguments: object) -> None:
        """Call `act` at the end, before what is there already goes."""
        self._undo.callback(act, *arguments)

    def run(self, *words: str | Path) -> str:
        return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout

    def file(self, name: str = "disk.img", size: int = 16 << 20) -> Path:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def attach(self, path: Path | str, *options: str) -> str:
        device = self.run("losetup", "--find", "--show", *options, path).strip()
        self.callback(self.run, "losetup", "--detach", device)
        return device

    def partition(self, disk: str, number: int, start_sector: int) -> str:
        """A partition of 4 MiB that is only in the kernel, which may know no partition table."""
        _blkpg(disk, _ADD_PARTITION, number, start_sector * 512)
        self.callback(_blkpg, disk, _DEL_PARTITION, number)
        return f"{disk}p{number}"

    def node(self, device: str) -> Path:
        """Another node of the same device."""
        node = self.folder / f"node of {Path(device).name}"
        os.mknod(node, stat.S_IFBLK | 0o600, Path(device).stat().st_rdev)
        return node

    def mount(self, device: str, *options: str) -> Path:
        point = self.folder / "mount point"
        point.mkdir(exist_ok=True)
        self.run("mount", *options, device, point)
        self.callback(self.run, "umount", point)
        return point

    def swap(self, device: str) -> None:
        self.run("mkswap", device)
        self.run("swapon", device)
        self.callback(self.run, "swapoff", device)


@contextlib.contextmanager
def loop_devices(folder: Path) -> Iterator[Loops]:
    """Loop devices over files of `folder`, gone at the end; the test is skipped where there can be none."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists() or shutil.which("losetup") is None:
        pytest.skip("loop devices need root, losetup and /dev/loop-control")
    with contextlib.ExitStack() as undo:
        yield Loops(folder, undo)
