"""Real block devices for tests: loop devices over files."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


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
        self.run("addpart", disk, str(number), str(start_sector), "8192")
        self.callback(self.run, "delpart", disk, str(number))
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
