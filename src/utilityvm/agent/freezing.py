"""Freezes the file systems: what was written is on the disks, whole, and whoever writes waits until they are thawed.

A file system of a disk is frozen with FIFREEZE, the last mounted first, for one in a file of another must come before
it. One that knows no freezing (vfat) is written out; as the VM is stopped and its memory saved with its disks, a clone
finds it as it was in any case. File systems in memory need nothing.

Source: Linux fs/ioctl.c, ioctl_fsfreeze; fs/super.c, freeze_super; proc_pid_mountinfo(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from utilityvm.agent import mountinfo, mounting
from utilityvm.agent.faults import Fault

_FIFREEZE: Final = 0xC0045877  # linux/fs.h
_FITHAW: Final = 0xC0045878
_NOT_KNOWN: Final = (errno.EOPNOTSUPP, errno.ENOTTY)
_IS_FROZEN, _IS_THAWED = b"1", b"0"
MARK: Final = Path("/run/utilityvm/frozen")


class Filesystem(NamedTuple):
    """A file system on a disk that can be written to: its device's number, and where it is mounted."""

    number: tuple[int, int]
    paths: tuple[str, ...]


class Filesystems(Protocol):
    """The kernel's side of it."""

    def written(self) -> Iterable[Filesystem]:
        """Those on disks that can be written to, in the order in which they were mounted."""
        ...

    def open(self, filesystem: Filesystem) -> int:
        """A descriptor of its root.

        Raises:
            Fault: other mounts hide it.
        """
        ...

    def freeze(self, fd: int) -> None:
        """Raises OSError: EBUSY it is frozen, EOPNOTSUPP it cannot be, or it cannot be written out."""
        ...

    def thaw(self, fd: int) -> None:
        """Raises OSError: EINVAL it is not frozen."""
        ...

    def flush(self, path: str) -> None: ...

    def flush_all(self) -> None: ...

    def close(self, fd: int) -> None: ...


class KernelFilesystems:
    """The real ones."""

    def written(self) -> list[Filesystem]:
        """See `Filesystems.written`."""
        on_disks = types_on_disks()
        found: dict[tuple[int, int], list[str]] = {}
        for line in mountinfo.mount_lines():
            if line.filesystem in on_disks and line.is_written:
                found.setdefault(line.number, []).append(line.path)
        return [Filesystem(number, tuple(paths)) for number, paths in found.items()]

    def open(self, filesystem: Filesystem) -> int:
        """See `Filesystems.open`."""
        for path in filesystem.paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue  # it is hidden, and what hides it does not open
            if _number_of(fd) == filesystem.number:
                return fd
            os.close(fd)
        raise Fault(f"the file system at {filesystem.paths[0]} is hidden by another mount: it cannot be frozen")

    def freeze(self, fd: int) -> None:
        """See `Filesystems.freeze`."""
        fcntl.ioctl(fd, _FIFREEZE, 0)

    def thaw(self, fd: int) -> None:
        """See `Filesystems.thaw`."""
        fcntl.ioctl(fd, _FITHAW, 0)

    def flush(self, path: str) -> None:
        """Write out the file system at `path`."""
        mounting.sync_filesystem(path)

    def flush_all(self) -> None:
        """Write out everything, also what is held back for a device that has no file system."""
        os.sync()

    def close(self, fd: int) -> None:
        """Close what `open` gave."""
        os.close(fd)


class Freezer:
    """Freezes all, or nothing. One thread at a time."""

    def __init__(self, filesystems: Filesystems, *, mark: Path = MARK) -> None:
        """An agent that died while they were frozen left its mark: they are thawed."""
        self._filesystems = filesystems
        self._frozen: list[tuple[int, str]] = []  # in the order in which they were frozen
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mark = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.pread(self._mark, 1, 0) == _IS_FROZEN:
            self._thaw_whatever_is_frozen()
            self._write_mark(_IS_THAWED)

    def freeze(self, deadline: float) -> list[str]:
        """Freeze every file system of a disk; give the paths of those that could only be written out.

        Raises:
            Fault: one cannot be written out, or it takes too long. All are thawed again.
        """
        flushed: list[str] = []
        self._write_mark(_IS_FROZEN)
        try:
            self._filesystems.flush_all()
            for filesystem in reversed(list(self._filesystems.written())):
                path = filesystem.paths[0]
                if not self._freeze(filesystem):
                    flushed.append(path)
                if time.monotonic() >= deadline:
                    raise Fault(f"the file systems were not frozen in time: {path} was the last", kind="timeout")
        except BaseException:
            self.thaw()
            raise
        return flushed

    def thaw(self) -> None:
        """Thaw all that was frozen.

        Raises:
            Fault: one stays frozen; names it, after all the others were thawed. The next time it is tried again.
        """
        failures: list[str] = []
        left: list[tuple[int, str]] = []
        for fd, path in reversed(self._frozen):
            try:
                self._filesystems.thaw(fd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # that is: somebody else has thawed it
                    failures.append(f"{path} cannot be thawed: {error.strerror}")
                    left.insert(0, (fd, path))
                    continue
            self._filesystems.close(fd)
        self._frozen = left
        if failures:
            raise Fault("; ".join(failures))
        self._write_mark(_IS_THAWED)

    def _write_mark(self, mark: bytes) -> None:
        os.pwrite(self._mark, mark, 0)

    def _freeze(self, filesystem: Filesystem) -> bool:
        path = filesystem.paths[0]
        fd = self._filesystems.open(filesystem)
        try:
            self._filesystems.freeze(fd)
        except OSError as error:
            self._filesystems.close(fd)
            if error.errno == errno.EBUSY:
                raise Fault(f"{path} is frozen already, by somebody else", kind="busy") from None
            if error.errno not in _NOT_KNOWN:
                raise Fault(f"{path} cannot be frozen: {error.strerror}") from None
            try:
                self._filesystems.flush(path)
            except OSError as failure:
                raise Fault(f"what was written to {path} does not reach the disk: {failure.strerror}") from None
            return False
        self._frozen.append((fd, path))
        return True

    def _thaw_whatever_is_frozen(self) -> None:
        for filesystem in self._filesystems.written():
            try:
                fd = self._filesystems.open(filesystem)
            except Fault:
                continue
            try:
                self._filesystems.thaw(fd)
            except OSError:
                pass  # it was not frozen
            finally:
                self._filesystems.close(fd)


def types_on_disks(known: str = "/proc/filesystems") -> set[str]:
    """The file systems that lie on a device."""
    with open(known) as lines:
        return {line.strip() for line in lines if not line.startswith("nodev")}


def _number_of(fd: int) -> tuple[int, int] | None:
    """The number that mountinfo has for the mount of `fd`; btrfs shows another to stat(2)."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        words = info.read().split()
    mount_id = int(words[words.index("mnt_id:") + 1])
    return next((line.number for line in mountinfo.mount_lines() if line.id == mount_id), None)
