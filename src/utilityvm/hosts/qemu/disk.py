"""A disk on this host: opened once, checked, locked, and handed on as a descriptor.

The path is followed once (machine/hostpath.py). What it leads to is pinned (O_PATH), its kind is checked, and from then
on that very inode is opened again through /proc: whoever swaps the path afterwards swaps nothing here.

Our own lock is an open-file-description lock on the description that QEMU gets. QEMU's copy is the same description,
so the lock lives exactly as long as QEMU has the file: it outlives us, and dies with QEMU. It lies on a byte far from
those that QEMU locks by itself (100 to 299), and unlike those it stays after a template was saved.

Source: fcntl(2), open file description locks; QEMU block/file-posix.c, RAW_LOCK_PERM_BASE.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final, TypeAlias

from utilityvm.diskimage import blockdev, gpt, headers
from utilityvm.diskimage.source import Source
from utilityvm.errors import (
    AccessDenied,
    ConfigDiffers,
    DiskInUse,
    DiskNotFound,
    InvalidRequest,
    NotSupported,
    SetupError,
)
from utilityvm.hosts.qemu.format import FormatMemory, read_header
from utilityvm.log import logger
from utilityvm.machine import fileid, hostpath
from utilityvm.machine.threads import aside
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest

LOCK_BYTE: Final = 0x7574_696C_7669_7274  # "utilvirt"; behind the end of every file
_FLOCK: Final = struct.Struct("hhqqi4x")
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_WRONG_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)

WhoUses: TypeAlias = Callable[[str], str | None]  # a disk's identity -> the VM that has it, if that is known

_log = logger(__name__)


class QemuDisk:
    """An open disk. Closing it does not touch what was attached from it."""

    def __init__(self, fd: int, request: DiskRequest, *, identity: str, header: headers.ImageHeader) -> None:
        self._fd = fd
        self.request = request
        self.identity = identity
        self.header = header
        self.format = header.format
        self.size_bytes = header.virtual_size_bytes
        physical = request.kind is AttachmentType.PASS_THRU
        self.logical_block_bytes = blockdev.logical_block_size(fd) if physical else request.sector_size_bytes

    @property
    def fd(self) -> int:
        assert self._fd >= 0, f"{self.request.host_path} was closed"
        return self._fd

    @property
    def serial(self) -> str:
        """The same for this disk in every VM and each time: the guest finds it under /dev/disk/by-id.

        No more than 20 characters: what QEMU puts into VPD page 0x83. Source: hw/scsi/scsi-disk.c, scsi_realize.
        """
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    def open_locked(self, via: int | None = None, *, who_uses: WhoUses | None = None) -> tuple[int, Locked]:
        """A new descriptor of the disk for one attachment, locked, and how; the caller closes it. Blocks.

        `via` is a descriptor of the disk, for a thread that outlives its caller; None: this object's own. The lock is
        shared for a read-only attachment, else exclusive, on a physical disk also against the host's own use.

        Raises:
            DiskInUse: another attachment, or the host, forbids it; `who_uses` is asked for its name.
            AccessDenied: the right to open it was taken away since.
            NotSupported: its file system cannot lock, and it is to be written.
        """
        path, read_only = self.request.host_path, self.request.read_only
        if self.request.kind is AttachmentType.PASS_THRU:
            flags = blockdev.open_flags(read_only=read_only)
        else:
            flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        via = self.fd if via is None else via
        try:
            fd = os.open(f"/proc/self/fd/{via}", flags)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise self._claimed(via, who_uses) from error
            raise _cannot_open(path, error) from error
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            if self.request.kind is AttachmentType.PASS_THRU:
                try:
                    blockdev.check_unused(fd, host_path=path, exclusive=not read_only)
                except DiskInUse as error:
                    raise self._claimed(via, who_uses) from error
            locked = lock(fd, host_path=path, read_only=read_only)
            if locked is Locked.BY_ANOTHER:
                raise self._in_use(who_uses)
            undo.pop_all()
        return fd, locked

    def _claimed(self, via: int, who_uses: WhoUses | None) -> DiskInUse:
        """The kernel has given the device to somebody, and does not say whom."""
        users = blockdev.host_users(os.fstat(via).st_rdev)
        if not users and who_uses and who_uses(self.identity):
            return self._in_use(who_uses)
        return blockdev.in_use(self.request.host_path, users)

    def _in_use(self, who_uses: WhoUses | None) -> DiskInUse:
        path = self.request.host_path
        user = (who_uses(self.identity) if who_uses else None) or "another VM"
        return DiskInUse(
            f"{path}: {user} {'writes to it' if self.request.read_only else 'has it attached'}",
            host_path=path,
            remedy="detach it there first; a disk has one VM that writes, or any number that only read",
        )

    def close(self) -> None:
        """Waits for nothing: closing a file asks its storage too."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            aside(os.close, fd)


def open_disk(request: DiskRequest, *, memory: FormatMemory | None = None) -> QemuDisk:
    """Open and check the disk that was asked for. Blocks for as long as its storage does.

    Which format an image has was decided when it was first opened, if `memory` knows it: see `read_header`.

    Raises:
        DiskNotFound: there is no such file.
        InvalidRequest: it cannot be a disk of this kind.
        AccessDenied: this user may not open it so; or this is root, and another user decides where the path leads.
        DiskInUse: the host itself uses it.
        NotSupported: an extensible virtual disk, or a writable one on what cannot be written.
        ConfigDiffers, ImageError, StoreError: what `read_header` says of the image.
    """
    path = request.host_path
    physical = request.kind is AttachmentType.PASS_THRU
    if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
        raise NotSupported(
            f"{path}: QEMU has no extensible virtual disks",
            host_path=path,
            remedy="attach an image file or a block device; evd:// is for Windows hosts",
        )
    if physical and request.format not in (None, DiskFormat.RAW):
        raise ConfigDiffers(
            f"{path}: asked for as {request.format}, and a physical disk is raw",
            host_path=path,
            remedy="leave the format out",
        )
    with ExitStack() as undo, ExitStack() as keep:
        pinned = _pin(path)
        undo.callback(os.close, pinned)
        status = os.fstat(pinned)
        _check_kind(path, status.st_mode, physical=physical)
        if physical and (main := _pin_main_node(status, read_only=request.read_only)) is not None:
            undo.callback(os.close, main)
            pinned = main
        # A physical disk is only looked at here: opening it for writing, and closing it, makes udev read it anew.
        fd = _reopen(pinned, path, read_only=request.read_only or physical)
        keep.callback(os.close, fd)
        if physical:
            if not request.read_only and blockdev.is_read_only(fd):
                raise NotSupported(
                    f"{path}: the kernel has this device read-only",
                    host_path=path,
                    remedy="attach it read-only, or: blockdev --setrw",
                )
            users = blockdev.host_users(status.st_rdev)
        else:
            users = blockdev.file_users(fd)
        if users:
            raise blockdev.in_use(path, users)
        header = read_header(
            fd,
            name=path,
            stated=DiskFormat.RAW if physical else request.format,
            read_only=request.read_only,
            memory=None if physical else memory,
        )
        if not physical:
            _check_sectors(fd, request, header)
        disk = QemuDisk(fd, request, identity=fileid.identity(status), header=header)
        keep.pop_all()
    return disk


def _check_sectors(fd: int, request: DiskRequest, header: headers.ImageHeader) -> None:
    """Refuse an image that has no whole sectors of that size, or a partition table that counts in others.

    Raises:
        InvalidRequest: says both sizes.
    """
    path, sector, size = request.host_path, request.sector_size_bytes, header.virtual_size_bytes
    if sector is not None and size % sector:
        raise InvalidRequest(
            f"{path} has {size} bytes, which are not whole sectors of {sector}",
            host_path=path,
            remedy="grow it to a multiple of that, or leave the sector size out",
        )
    if sector is None and (found := gpt.foreign_sectors(Source.of_fd(fd, name=path), header)) is not None:
        raise InvalidRequest(
            f"{path} has a partition table (GPT) that counts in sectors of {found} bytes, as a copy of a disk with such"
            " sectors does; without a sector size the guest would see 512, and no partition",
            host_path=path,
            remedy=f"give the sector size: sector_size_bytes={found} (--sector-size {found}); or 512, if that is meant",
        )


class Locked(Enum):
    """What became of a lock that was asked for."""

    OURS = auto()
    BY_ANOTHER = auto()  # another attachment of the disk, in whatever VM, holds a lock that forbids this one
    NOWHERE = auto()  # the file system has no locks; the disk is only read


def lock(fd: int, *, host_path: str, read_only: bool) -> Locked:
    """Take our lock on the description behind `fd`: shared if `read_only`, else exclusive. Its last close frees it.

    Raises:
        NotSupported: the file system cannot lock, and the disk is to be written.
    """
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, LOCK_BYTE, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return Locked.BY_ANOTHER
        if error.errno not in _NO_LOCKS:
            raise _cannot_open(host_path, error) from error
        if not read_only:
            raise NotSupported(
                f"{host_path}: its file system cannot lock files ({error.strerror}), so nothing would keep a second "
                "VM from writing to it",
                host_path=host_path,
                remedy="attach it read-only, or move it to a local file system",
            ) from error
        _log.warning("no lock on %s: %s", host_path, error.strerror)
        return Locked.NOWHERE
    return Locked.OURS


def is_locked_by_a_program(fd: int, read_only: bool) -> bool:
    """Does a program outside utilityvm hold one of QEMU's own locks that forbids this use of the disk behind `fd`?

    QEMU locks one byte for each right that it uses (from 100) and one for each that it denies to others (from 200):
    0 consistent reads, 1 writing, 3 resizing. No VM of ours lets others write or resize beside it.
    Source: QEMU block/file-posix.c, raw_check_lock_bytes; include/block/block-common.h, BLK_PERM_WRITE.
    """
    forbidding = (101, 103, 200) if read_only else (101, 103, 200, 201, 203)
    try:
        for byte in forbidding:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                return True
    except OSError:
        return False  # no locks are to be had there, so nobody holds one
    return False


def unlock(fd: int) -> None:
    """Give our lock back while somebody else still has the description open."""
    with suppress(OSError):  # no lock was to be had there: see `lock`
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, LOCK_BYTE, 1, 0))


def _pin(path: str) -> int:
    try:
        return hostpath.pin(path)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _pin_main_node(status: os.stat_result, *, read_only: bool) -> int | None:
    """The device's node in /dev, if we may open it: a lock is a node's and not its device's, so all lock that one."""
    node = blockdev.main_node(status.st_rdev)
    if node is None or not os.access(node, os.R_OK if read_only else os.R_OK | os.W_OK):
        return None
    fd = os.open(node, os.O_PATH | os.O_CLOEXEC)
    found = os.fstat(fd)
    if stat.S_ISBLK(found.st_mode) and found.st_rdev == status.st_rdev:
        return fd
    os.close(fd)
    return None


def _reopen(pinned: int, path: str, *, read_only: bool) -> int:
    try:
        return os.open(f"/proc/self/fd/{pinned}", os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR))
    except OSError as error:
        raise _cannot_open(path, error) from error


def _check_kind(path: str, mode: int, *, physical: bool) -> None:
    for is_it, name in _WRONG_KINDS:
        if is_it(mode):
            raise InvalidRequest(f"{path} is {name}, not a disk", host_path=path, remedy="give a disk image's path")
    if physical and not stat.S_ISBLK(mode):
        raise InvalidRequest(f"{path} is a file, not a physical disk", host_path=path, remedy="use add_scsi")
    if not physical and not stat.S_ISREG(mode):
        raise InvalidRequest(
            f"{path} is a block device, not an image",
            host_path=path,
            remedy="use add_scsi_physical_disk",
        )


def _cannot_open(path: str, error: OSError) -> InvalidRequest | AccessDenied | NotSupported | SetupError:
    message = f"{path} cannot be opened: {error.strerror}"
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return AccessDenied(
                message,
                host_path=path,
                remedy="give this user the right to it, or attach it read-only if that is enough",
            )
        case errno.EMFILE | errno.ENFILE:
            return SetupError(message, host_path=path, remedy="raise the limit on open files: ulimit -n")
        case errno.ENOENT | errno.ENOTDIR:
            return DiskNotFound(message, host_path=path, remedy="give the path of a disk image or of a block device")
        case errno.EROFS | errno.ETXTBSY:
            return NotSupported(message, host_path=path, remedy="attach it read-only")
        case _:
            return InvalidRequest(message, host_path=path, remedy="give the path of a disk image or of a block device")


def describe(path: Path) -> str:
    """The identity of a file or block device, without opening it; as `QemuDisk.identity`."""
    return fileid.identity(path.stat())
