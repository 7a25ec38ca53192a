"""A kernel's mount table without a kernel: what the agent asks of it, and the files that it is read from.

`FakeMounts` keeps the mounts, refuses what the kernel refuses (a busy mount, one with another below it), and shows them
in a file that is written as mountinfo(5) says. A file system lives as long as it has a mount, or something in `pinned`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from utilityvm.agent import freezing, holders, mountinfo, mounting, power

RDONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2
PROPAGATION = 0b1111 << 17  # linux/mount.h, MS_UNBINDABLE to MS_SHARED
ON_DISKS = {"ext4", "xfs", "vfat", "btrfs"}


@dataclass
class Mounted:
    id: int
    number: tuple[int, int]
    path: str
    filesystem: str
    source: str
    root: str = "/"
    read_only: bool = False
    options: str = ""
    flags: int = 0
    propagation: list[int] = field(default_factory=list)


class FakeMounts:
    """Implements libc's mount, umount2, syncfs and swapoff; no other system call. Use `install`."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        for made in (self.proc / "self/ns", self.sys / "block", self.sys / "dev/block"):
            made.mkdir(parents=True)
        (self.proc / "self/ns/mnt").symlink_to("mnt:[1]")
        self.mountinfo = self.proc / "self/mountinfo"
        self.mounts: list[Mounted] = []
        self.numbers: dict[str, tuple[int, int]] = {}  # of block devices, by node
        self.busy: dict[str, int] = {}  # path: how often umount says EBUSY; -1: for ever
        self.pinned: dict[str, str] = {}  # node whose file system lives on: the overlay's path, or "" for nothing seen
        self.written: set[str] = set()  # paths that cannot be made read-only
        self.not_written_out: set[str] = set()  # paths whose disk takes nothing more
        self.refuses: list[int] = []  # errnos of the next mounts
        self.asked: list[str] = []  # what was asked, in order
        self.read_only: set[str] = set()  # nodes whose file system was made read-only
        self._next = 1
        self.add("/", "overlay", "overlay")
        self.add("/proc", "proc", "proc")
        self.add("/run", "tmpfs", "tmpfs")

    def syscall(self, *_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeMounts:
        """Have the agent's modules ask this."""
        for module in (mounting, power):
            monkeypatch.setattr(module, "_libc", self)
        monkeypatch.setattr(mountinfo, "_OWN", str(self.mountinfo))
        monkeypatch.setattr(holders, "PROC", str(self.proc))
        monkeypatch.setattr(holders, "SYS", str(self.sys))
        monkeypatch.setattr(holders, "is_free", self.is_free)
        monkeypatch.setattr(holders, "_number", self.numbers.get)
        monkeypatch.setattr(holders, "_mount_id", self._mount_id)
        monkeypatch.setattr(holders, "_files", lambda path, line: [])
        monkeypatch.setattr(freezing, "types_on_disks", lambda: ON_DISKS)
        return self

    def add(
        self, path: str, filesystem: str, source: str, *, root: str = "/", read_only: bool = False, options: str = ""
    ) -> Mounted:
        """A mount that somebody else made."""
        number = self.numbers.get(source) or next(
            (one.number for one in self.mounts if one.source == source and one.filesystem == filesystem),
            (0, 100 + self._next),
        )
        mounted = Mounted(self._next, number, path, filesystem, source, root, read_only, options)
        self._next += 1
        self.mounts.append(mounted)
        self._write()
        return mounted

    def device(self, node: str, number: tuple[int, int]) -> None:
        """A block device."""
        self.numbers[node] = number

    def at(self, path: str) -> Mounted | None:
        """What one sees at the path."""
        return next((one for one in reversed(self.mounts) if one.path == path), None)

    def is_free(self, node: str) -> bool:
        """Does nothing have the device?"""
        number = self.numbers.get(node)
        on_it = (one.source == node or (number and one.number == number) for one in self.mounts)
        return node not in self.pinned and not any(on_it)

    # libc

    def mount(
        self, source: bytes | None, target: bytes, kind: bytes | None, flags: ctypes.c_ulong, data: bytes | None
    ) -> int:
        path, node = os.fsdecode(target), os.fsdecode(source or b"")
        self.asked.append(f"{'remount' if flags.value & REMOUNT else 'mount'} {path}")
        if self.refuses and (number := self.refuses.pop(0)):
            return self._fail(number)
        if flags.value & REMOUNT:
            there = self.at(path)
            if there is None or path in self.written:
                return self._fail(errno.EBUSY)
            self.read_only.add(there.source)
        elif kind:
            read_only, options = bool(flags.value & RDONLY), (data or b"").decode()
            self.add(path, kind.decode(), node, read_only=read_only, options=options).flags = flags.value
        elif flags.value & BIND:
            self.add(path, "devtmpfs", "devtmpfs", root=f"/{Path(node).name}")
        elif flags.value & PROPAGATION and (there := self.at(path)):
            there.propagation.append(flags.value)
        self._write()
        return 0

    def umount2(self, target: bytes, flags: int) -> int:
        path = os.fsdecode(target)
        self.asked.append(f"umount {path}")
        there = self.at(path)
        if there is None:
            return self._fail(errno.EINVAL)
        if not flags & DETACH:
            left = self.busy.get(path, 0)
            if left:
                self.busy[path] = left - 1
                return self._fail(errno.EBUSY)
            if any(one.path.startswith(f"{path.rstrip('/')}/") for one in self.mounts):
                return self._fail(errno.EBUSY)
        self.mounts.remove(there)
        for node, overlay in [*self.pinned.items()]:
            if overlay == path:
                del self.pinned[node]
        self._write()
        return 0

    def syncfs(self, fd: int) -> int:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        self.asked.append(f"sync {path}")
        return self._fail(errno.EIO) if path in self.not_written_out else 0

    def swapoff(self, path: bytes) -> int:
        self.asked.append(f"swapoff {os.fsdecode(path)}")
        return 0

    def _fail(self, number: int) -> int:
        ctypes.set_errno(number)
        return -1

    def _mount_id(self, path: str) -> int:
        above = [one for one in self.mounts if f"{path}/".startswith(f"{one.path.rstrip('/')}/")]
        return max(reversed(above), key=lambda one: len(one.path)).id

    def _write(self) -> None:
        text = ""
        for one in self.mounts:
            path, source = (name.replace("\\", r"\134").replace(" ", r"\040") for name in (one.path, one.source))
            own = "ro" if one.read_only else "rw"
            of_all = "ro" if one.read_only or one.source in self.read_only else "rw"
            options = f",{one.options}" if one.options else ""
            number = f"{one.number[0]}:{one.number[1]}"
            text += (
                f"{one.id} 1 {number} {one.root} {path} {own} shared:1 - {one.filesystem} {source} {of_all}{options}\n"
            )
        self.mountinfo.write_text(text)
