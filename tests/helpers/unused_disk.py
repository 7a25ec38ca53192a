"""The steps of attaching a physical disk in one: opened with the right flags, and looked at for uses by the host."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from pathlib import Path

from utilityvm.diskimage import blockdev
from utilityvm.errors import NotSupported


def open_unused(host_path: str, *, read_only: bool, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> int:
    """Open a physical disk that the host does not use, with `blockdev.open_flags`; the caller closes the fd.

    A symbolic link such as /dev/disk/by-id/… is followed once, and what it led to is what is checked and opened.

    Raises:
        DiskInUse: names each use.
        InvalidRequest: the path is no block device, or may not be opened.
        NotSupported: writable was asked for, and the kernel has the device read-only.
        SetupError: sysfs does not know the device, so that its use cannot be told.
    """
    with ExitStack() as opened:
        try:
            node = os.open(host_path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise blockdev._cannot_open(host_path, error) from error
        opened.callback(os.close, node)
        status = os.fstat(node)
        if not stat.S_ISBLK(status.st_mode):
            raise blockdev._no_block_device(host_path)
        try:
            fd = os.open(f"/proc/self/fd/{node}", blockdev.open_flags(read_only=read_only))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise blockdev.in_use(host_path, blockdev.host_users(status.st_rdev, sysfs=sysfs, proc=proc)) from error
            raise blockdev._cannot_open(host_path, error) from error
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            if not read_only and blockdev.is_read_only(fd):
                raise NotSupported(
                    f"{host_path}: the kernel has this device read-only",
                    host_path=host_path,
                    remedy="attach it read-only, or: blockdev --setrw",
                )
            blockdev.check_unused(fd, host_path=host_path, exclusive=not read_only, sysfs=sysfs, proc=proc)
            undo.pop_all()
            return fd
