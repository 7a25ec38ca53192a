"""The one gate to the runtime folder: what is read, locked or connected to in a VM's folder is ours.

A runtime folder holds the sockets by which a VM's disks are given away, and the record that says which process the VM
is. Another user who may make that folder first, or put something into it, would be given the disks instead. So every
use enters by `entered`: each folder on the way is ours or root's, and nobody else can replace what is in it; the last
one is ours, is no link, and is writable to us alone. What lies in it is taken by `record` and `socket_in`, which look
at its owner again.

Source: docs/security.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.machine import hostpath, paths

_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_LONGEST_RECORD: Final = 4 << 20


@contextmanager
def entered(folder: Path) -> Iterator[Path]:
    """The folder, as a path that leads to it and no other for as long as the block lasts.

    Raises:
        SetupError: it is not ours, or others may write to it, or to a folder on the way.
        OSError: there is no such folder, or we may not enter it.
    """
    fd = pin(folder)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def pin(folder: Path) -> int:
    """A descriptor (O_PATH) of the folder; the caller closes it. Errors as `entered`."""
    parent = hostpath.pin_kept(folder.parent)
    try:
        try:
            fd = os.open(folder.name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except NotADirectoryError:
            raise _not_ours(folder, "is not a folder of ours: it is a file or a link") from None
    finally:
        os.close(parent)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise _not_ours(folder, f"is not a folder of ours: it belongs to user {status.st_uid}")
        if status.st_mode & _OTHERS:
            raise _not_ours(folder, f"is a folder that others may write to (mode {stat.S_IMODE(status.st_mode):o})")
    except BaseException:
        os.close(fd)
        raise
    return fd


def make(folder: Path) -> None:
    """The folder is there; one that is new is for us alone. Nothing is made where others could replace it.

    Raises:
        SetupError: as `entered`.
        OSError: it cannot be made.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    os.close(hostpath.pin_kept(there))
    paths.make_folder(folder)


def record(folder: Path, name: str) -> bytes:
    """The content of a file in the folder that we wrote.

    Raises:
        SetupError: as `entered`; or the file is not ours.
        OSError: there is none, or it cannot be read.
    """
    with entered(folder) as here:
        fd = os.open(here / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            check_file(fd, folder / name)
            return file.read(_LONGEST_RECORD)


def check_file(fd: int, path: Path) -> None:
    """Raises:
    SetupError: the open file is not one that we made. (Its mode is our umask's; the folder keeps others out.)
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise _not_ours(path, f"is not a file of ours: it belongs to user {status.st_uid}")


@contextmanager
def socket_in(path: Path) -> Iterator[Path]:
    """A path by which the socket at `path` can be connected to, whatever becomes of the names on the way.

    A link in its place has to be ours: launch.restore_sockets makes such.

    Raises:
        SetupError: as `entered`; or another user made the socket.
        OSError: there is none.
    """
    fd = pin_folder_of(path)
    try:
        yield Path(f"/proc/self/fd/{fd}", path.name)
    finally:
        os.close(fd)


def pin_folder_of(path: Path) -> int:
    """As `pin`, of the folder of the socket at `path`, if that is ours. Errors as `socket_in`."""
    fd = pin(path.parent)
    try:
        status = os.lstat(path.name, dir_fd=fd)
        if status.st_uid != os.geteuid():
            raise _not_ours(path, f"is not a socket of ours: it belongs to user {status.st_uid}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def vm_folders(parent: Path) -> list[Path]:
    """The VMs' folders in `parent`, in the order of their names; none if there is no such folder.

    Raises:
        SetupError: as `entered`.
    """
    try:
        with entered(parent) as here:
            return [parent / name for name in sorted(os.listdir(here))]  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def _not_ours(path: Path, what: str) -> SetupError:
    return SetupError(
        f"{path} {what}, and so is not used",
        remedy="remove it, if it should not be there; or set UTILITYVM_RUNTIME_DIR to a folder under one of your own",
    )
