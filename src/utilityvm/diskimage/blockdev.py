"""Block devices of the host: how large, and what the host uses them for.

A disk that the host uses must not be given to a VM: two kernels that each think they own a filesystem destroy it.
The kernel has a lock for this, an exclusive open (O_EXCL without O_CREAT): it is refused while a filesystem, swap,
device-mapper, md, bcache or another exclusive opener has the device, a partition of it, or the disk it is on. That
lock is the judge, and a writable attachment holds it for as long as it lives. It does not say who, so `host_users`
looks in sysfs and /proc for names; what hides there (a mount in another mount namespace) is seen by the lock alone.
A loop device over a block device takes no such lock, and is seen in sysfs alone.

Source: open(2) on O_EXCL; Linux block/bdev.c, bd_may_claim; Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utilityvm.errors import DiskInUse, InvalidRequest, SetupError

# linux/fs.h
BLKROGET: Final = 0x125E
BLKSSZGET: Final = 0x1268
BLKGETSIZE64: Final = 0x80081272

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_UNSEEN: Final = "something that sysfs does not show: a mount in another namespace, ZFS, or another VM"
_MAX_DEPTH: Final = 16  # of devices on devices; the kernel stacks fewer


def size_bytes(fd: int) -> int:
    """The size of the block device behind `fd`.

    Raises:
        OSError: it is not a block device, or it is gone.

    Source: linux/fs.h, BLKGETSIZE64.
    """
    return int(struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])


def logical_block_size(fd: int) -> int:
    """The smallest unit that the device reads and writes, in bytes: what the guest's disk must have too.

    Raises:
        OSError: it is not a block device, or it is gone.

    Source: linux/fs.h, BLKSSZGET.
    """
    return int(struct.unpack("=i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0])


def is_read_only(fd: int) -> bool:
    """Does the kernel refuse every write to the device? An open for writing can succeed even so.

    Raises:
        OSError: it is not a block device, or it is gone.

    Source: linux/fs.h, BLKROGET.
    """
    return bool(struct.unpack("=i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0])


def open_flags(*, read_only: bool) -> int:
    """The flags to open a physical disk with, for as long as it is attached.

    Writable is exclusive: while the fd (or a duplicate, such as QEMU's) is open, nothing on the host can mount the
    device or a partition of it, and no second VM can have it. Read-only is not, because VMs share such a disk; there
    `check_unused` looks once, at the start.
    """
    return os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR | os.O_EXCL)


def check_unused(
    fd: int, *, host_path: str, exclusive: bool, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")
) -> None:
    """Return if the host does not use the block device behind `fd`; nothing changes either way.

    `exclusive` says that `fd` was opened so; then the answer stays true while it is open. If it was not, the kernel
    is asked whether it would be, now.

    Raises:
        DiskInUse: names each use.
        InvalidRequest: `fd` is no block device.
        SetupError: sysfs does not know the device, so that its use cannot be told.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        raise _no_block_device(host_path)
    users = host_users(status.st_rdev, sysfs=sysfs, proc=proc)
    if not users and not exclusive and not _may_claim(fd):
        users = [_UNSEEN]
    if users:
        raise in_use(host_path, users)


def in_use(host_path: str, users: list[str]) -> DiskInUse:
    """The error for a disk that the host uses, also for an exclusive open that failed with EBUSY."""
    return DiskInUse(
        f"{host_path}: the host uses this disk: {'; '.join(users or [_UNSEEN])}",
        host_path=host_path,
        remedy="unmount it, switch the swap off, or stop the array or mapping on it; or attach another disk",
    )


def main_node(device: int, *, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> Path | None:
    """The node that the kernel itself made for the block device `device` (an `st_rdev`); None if it is not there.

    Source: Documentation/ABI, uevent's DEVNAME; devtmpfs.
    """
    text = _text(sysfs / "dev/block" / f"{os.major(device)}:{os.minor(device)}" / "uevent")
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "DEVNAME" and value and (dev / value).is_block_device():
            return dev / value
    return None


def host_users(device: int, *, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[str]:
    """How the host uses the block device `device` (an `st_rdev`), a line for each use; empty if none is seen.

    A whole disk is used when a partition of it is, and a partition when the whole disk is; what another partition
    of the same disk is used for does not count. Uses of devices on top of it are named behind them.

    Raises:
        SetupError: sysfs does not know the device.
    """
    tree = _Tree(sysfs, proc)
    own = tree.find(device)
    if own is None:
        raise SetupError(
            f"sysfs has no block device {os.major(device)}:{os.minor(device)}, so its use by the host cannot be told",
            remedy=f"mount sysfs at {sysfs}, or give the VM an image file",
        )
    users: list[str] = []
    for relative in tree.relatives(own):
        prefix = "" if relative == own else f"{relative.title} {relative.name}: "
        users.extend(f"{prefix}{use}" for use in tree.uses(relative, depth=0))
    return list(dict.fromkeys(users))


def file_users(fd: int, *, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[str]:
    """How the host uses the image file behind `fd` itself: as swap, or as a loop device; empty if neither."""
    status = os.fstat(fd)
    tree = _Tree(sysfs, proc)
    key = (status.st_dev, status.st_ino)
    users = [f"swap on {path}" for path in tree.swaps() if _inode(path) == key]
    users += [f"backs {loop}" for loop, path in tree.loops() if _inode(path) == key]
    return users


@dataclass(frozen=True, slots=True)
class _Device:
    number: int
    name: str  # the kernel's: sda1, dm-0
    folder: Path  # its real folder in sysfs
    is_partition: bool

    @property
    def title(self) -> str:
        return "partition" if self.is_partition else "disk"


class _Tree:
    """What sysfs and /proc say of block devices at this moment."""

    def __init__(self, sysfs: Path, proc: Path) -> None:
        self._sysfs = sysfs
        self._proc = proc

    def find(self, number: int) -> _Device | None:
        link = self._sysfs / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
        return self._at(link.resolve()) if link.exists() else None

    def relatives(self, device: _Device) -> Iterator[_Device]:
        """The device; of a disk also its partitions, of a partition also its disk."""
        yield device
        if device.is_partition:
            parent = self._at(device.folder.parent)
            if parent is not None:
                yield parent
            return
        for file in sorted(device.folder.glob("*/partition")):
            partition = self._at(file.parent)
            if partition is not None:
                yield partition

    def uses(self, device: _Device, *, depth: int) -> Iterator[str]:
        yield from self._mounts(device)
        for path in self.swaps():
            if self._number(path) == device.number:
                yield f"swap on {path}"
        for loop, path in self.loops():
            if self._number(path) == device.number:
                yield f"backs {loop}"
        for holder in self._entries(device.folder / "holders"):
            above = self._at(holder.resolve())
            on_top = list(self.uses(above, depth=depth + 1)) if above and depth < _MAX_DEPTH else []
            yield f"held by {_describe(holder)}" + (f" ({'; '.join(on_top)})" if on_top else "")

    def swaps(self) -> Iterator[str]:
        for line in self._lines("swaps")[1:]:
            fields = line.split()
            if fields:
                yield os.fsdecode(_unescape(fields[0]))

    def loops(self) -> Iterator[tuple[str, str]]:
        for file in sorted((self._sysfs / "block").glob("loop*/loop/backing_file")):
            path = _text(file)
            if path:
                yield file.parent.parent.name, path

    def _mounts(self, device: _Device) -> Iterator[str]:
        """By the filesystem's device number; btrfs has a made-up one, and lists its devices in sysfs."""
        members: set[int] = set()
        for listed in (self._sysfs / "fs/btrfs").glob(f"*/devices/{device.name}"):
            yield f"a device of the btrfs {listed.parent.parent.name}, which is mounted"
            members.update(member.number for path in self._entries(listed.parent) if (member := self._at(path)))
        for line in self._lines("self/mountinfo"):
            # 36 35 98:0 /root /mount/point options optional... - type source super-options
            fields = line.split(b" ")
            if len(fields) < 10 or b"-" not in fields[6:-2]:
                continue
            major, _, minor = fields[2].partition(b":")
            source = os.fsdecode(_unescape(fields[fields.index(b"-", 6) + 2]))
            number = os.makedev(int(major), int(minor))
            if number == device.number or (members and major == b"0" and self._number(source) in members):
                yield f"mounted at {os.fsdecode(_unescape(fields[4]))}"

    def _number(self, path: str) -> int | None:
        """The device number of a node such as /dev/sda1, if it is one."""
        at = self._at(self._sysfs / "class/block" / Path(path).name) if path.startswith("/dev/") else None
        if at is not None:
            return at.number
        try:
            status = Path(path).stat()
        except OSError:
            return None
        return status.st_rdev if stat.S_ISBLK(status.st_mode) else None

    def _at(self, folder: Path) -> _Device | None:
        major, _, minor = _text(folder / "dev").partition(":")
        if not (major.isdecimal() and minor.isdecimal()):
            return None
        real = folder.resolve()
        return _Device(os.makedev(int(major), int(minor)), real.name, real, (real / "partition").exists())

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except OSError:
            return []

    def _lines(self, name: str) -> list[bytes]:
        try:
            return (self._proc / name).read_bytes().splitlines()
        except OSError:
            return []


def _describe(holder: Path) -> str:
    """The kernel's name, and the name that its users know."""
    name = _text(holder / "dm/name")
    level = _text(holder / "md/level")
    return f"{holder.name} ({name or level})" if name or level else holder.name


def _text(file: Path) -> str:
    try:
        return os.fsdecode(file.read_bytes()).rstrip("\n")
    except OSError:
        return ""


def _unescape(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _no_block_device(host_path: str) -> InvalidRequest:
    return InvalidRequest(f"{host_path} is not a block device", host_path=host_path, remedy="attach it as an image")


def _cannot_open(host_path: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"{host_path} cannot be opened: {error.strerror}",
        host_path=host_path,
        remedy="give the path of a block device that this user may open",
    )


def _may_claim(fd: int) -> bool:
    """Would the kernel give an exclusive open of the device now? What was open before does not matter."""
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    os.close(again)
    return True
