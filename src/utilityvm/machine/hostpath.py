"""Paths on this host: in a form that means the same to every process, and the file that they lead to now.

`pin` is the one way from a caller's path to a file. It goes a component at a time, each opened from the one before, and
never lets the kernel follow a link. So what root opens is what the path's owners put there: whoever may write to a part
of a path chooses where it leads, and root's rights with it. Root therefore goes through no folder and follows no link
of another user, goes through no folder in which anybody may rename the entries, and takes no hard link to root's file
that another user may have put in place. (The kernel's own protected_symlinks and protected_hardlinks say less, and may
be turned off.) Other users have their own rights alone, and go where these let them.

What `pin` gives is the file itself, and no name: whoever replaces a part of the path afterwards replaces nothing here.

Source: linux/magic.h; path_resolution(7); symlink(7); open(2), O_PATH; proc(5), /proc/sys/fs/protected_hardlinks.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from utilityvm.errors import AccessDenied, InvalidRequest, SetupError, UtilityVMError
from utilityvm.machine import fileid

if TYPE_CHECKING:
    from ctypes import CDLL

HostPath: TypeAlias = str | os.PathLike[str]

_LOOK_S: Final = 1.0
_MOST_LINKS: Final = 40  # as the kernel's; path_resolution(7)
_ON_THE_WAY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_STATFS_BYTES: Final = 512  # more than any kernel's structure
# File systems that show the kernel's own state, and keep nobody's data. (tmpfs and devtmpfs are none: images may lie
# in the one, and block devices have their nodes in the other.)
_PSEUDO: Final[Mapping[int | None, str]] = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0x62656570: "configfs",
    0x6165676C: "pstore",
    0xDE5E81E4: "efivarfs",
    0xCAFE4A11: "bpf",
    0x1CD1: "devpts",
    0x19800202: "mqueue",
    0xF97CFF8C: "selinuxfs",
    0x43415D53: "smackfs",
    0x42494E4D: "binfmt_misc",
    0x65735543: "fusectl",
    0x6E736673: "nsfs",
    0x50495045: "pipefs",
    0x534F434B: "sockfs",
    0x67596969: "rpc_pipefs",
    0x6E667364: "nfsd",
    0x7655821: "resctrl",
}


def absolute(host_path: HostPath) -> str:
    """The path from the root on. `..` and links stay as they are: only the kernel may say where they lead.

    Raises:
        InvalidRequest: it cannot be a path, or could not be written down.
    """
    text = os.fspath(host_path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidRequest(f"{host_path!r} is no path", remedy="give the path of a disk image or of a block device")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{text!r} is not UTF-8 text", remedy="rename the file, or make a link to it with a plain name"
        ) from error
    return str(Path(text).absolute())


def identity_of(host_path: HostPath) -> str | None:
    """The identity of the disk that the path leads to, as a host backend tells it; None if it leads nowhere."""
    try:
        fd = pin(os.fspath(host_path))
    except (OSError, ValueError, UtilityVMError):
        return None
    try:
        return fileid.identity(os.fstat(fd))
    finally:
        os.close(fd)


async def identity_within(host_path: HostPath, timeout_s: float | None) -> str | None:
    """As `identity_of`, without blocking. None as well if its storage does not answer within half of the time, or 1 s.

    So a disk whose storage is dead can still be taken out by the name under which it was attached.
    """
    import asyncio  # late: commands that only read the store do without it

    from utilityvm.machine.threads import in_thread

    within = _LOOK_S if timeout_s is None else min(timeout_s / 2, _LOOK_S)
    try:
        async with asyncio.timeout(within):
            return await in_thread(identity_of, host_path)
    except TimeoutError:
        return None


def pin(path: str) -> int:
    """A descriptor (O_PATH) of the file that `path` leads to; the caller closes it.

    Raises:
        AccessDenied: this process is root's, and another user may decide where the path leads.
        InvalidRequest: it leads into a file system of the kernel's own, such as /proc.
        OSError: it leads nowhere, or this user may not go there.
    """
    if not path or "\0" in path:
        raise InvalidRequest(f"{path!r} is no path", remedy="give the path of a disk image or of a block device")
    walk = _Walk(path, check=_refuse_strangers if os.geteuid() == 0 else None)
    try:
        return walk.to_the_end()
    finally:
        walk.close()


def open_file(path: HostPath, flags: int) -> int:
    """As os.open, without O_CREAT, by the way that `pin` goes. The caller closes the descriptor."""
    pinned = pin(os.fspath(path))
    try:
        return os.open(f"/proc/self/fd/{pinned}", (flags & ~os.O_NOFOLLOW) | os.O_CLOEXEC)
    except OSError as error:
        error.filename = str(path)  # the caller knows no /proc/self/fd
        raise
    finally:
        os.close(pinned)


def pin_kept(folder: Path) -> int:
    """As `pin`, of a folder that nobody but us and root can put another in the place of, or a file into.

    Raises:
        SetupError: others can.
        OSError: there is no such folder, or we may not go there.
    """
    walk = _Walk(str(folder), check=_refuse_replaceable)
    try:
        return walk.to_the_end()
    except AccessDenied as error:
        raise SetupError(str(error), remedy=error.remedy) from None
    finally:
        walk.close()


_Check: TypeAlias = Callable[["_Walk", os.stat_result], None]


class _Walk:
    """The way from the root, or the current folder, to a file."""

    def __init__(self, path: str, *, check: _Check | None) -> None:
        self.path = path
        self.here = "/" if path.startswith("/") else str(Path.cwd())  # for messages: where we are, without links
        self.is_writable = False  # may others put entries into the folder where we are?
        self._check = check
        self._ahead = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        self._wants_folder = path.endswith(("/", "/."))
        self._links = 0
        self._fd = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def to_the_end(self) -> int:
        self._enter()
        while self._ahead:
            name = self._ahead.pop()
            entered = self._open(name)
            status = os.fstat(entered)
            if stat.S_ISLNK(status.st_mode):
                self._follow(entered, name, status)
                continue
            os.close(self._fd)
            self._fd = entered
            above = self.here.rpartition("/")[0]
            self.here = (above or "/") if name == ".." else f"{self.here.rstrip('/')}/{name}"
            if stat.S_ISDIR(status.st_mode):
                self._enter()
            elif self._ahead or self._wants_folder:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.here)
            elif self._check:
                self._check(self, status)
        _refuse_pseudo(self._fd, self.path)
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self, name: str) -> int:
        try:
            # As a folder first, which mounts what is to be mounted there (autofs).
            return os.open(name, _ON_THE_WAY | os.O_DIRECTORY, dir_fd=self._fd)
        except NotADirectoryError:
            return os.open(name, _ON_THE_WAY, dir_fd=self._fd)

    def _enter(self) -> None:
        """We are in another folder."""
        status = os.fstat(self._fd)
        self.is_writable = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if self._check:
            self._check(self, status)

    def _follow(self, link: int, name: str, status: os.stat_result) -> None:
        """Go on with what the link says, in place of its name."""
        try:
            target = os.readlink("", dir_fd=link)
            _refuse_pseudo(link, self.path)  # the links of /proc are none: they lead to where no path does
            if self._check and status.st_uid not in (0, os.geteuid()):
                raise _strangers(
                    self, f"{Path(self.here, name)}, a link of {_user(status.st_uid)}, leads to {_shown(target)}"
                )
        finally:
            os.close(link)
        self._links += 1
        if self._links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
        if not self._ahead and target.endswith("/"):
            self._wants_folder = True
        self._ahead += [part for part in reversed(target.split("/")) if part not in ("", ".")]
        if target.startswith("/"):
            self.here = "/"
            os.close(self._fd)
            self._fd = -1
            self._fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._enter()

    def end(self) -> str:
        """Where the path would lead from here on."""
        return os.path.realpath(Path(self.here, *reversed(self._ahead)))


def _refuse_strangers(walk: _Walk, status: os.stat_result) -> None:
    """Refuse to go on, for root, where another user decides what is there. Who made `/` decides all.

    What others put in a folder that they may write to is theirs, and refused as such: a folder or a link of their own,
    or another name of root's file.
    """
    owner, mode = status.st_uid, status.st_mode
    if stat.S_ISDIR(mode):
        if walk.here != "/" and owner not in (0, os.geteuid()):
            raise _strangers(walk, f"{walk.here} belongs to {_user(owner)}, who may replace all that is in it")
    elif walk.is_writable and status.st_nlink > 1 and owner in (0, os.geteuid()):
        raise _strangers(
            walk, f"it has {status.st_nlink} names (hard links), and others may make some in {Path(walk.here).parent}"
        )


def _refuse_replaceable(walk: _Walk, status: os.stat_result) -> None:
    """Refuse to go through a folder in which others may rename what is there. In a sticky one they cannot."""
    owner, mode = status.st_uid, status.st_mode
    is_shared = bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX
    if walk.here != "/" and owner not in (0, os.geteuid()):
        what = f"{walk.here} belongs to {_user(owner)}"
    elif is_shared:
        what = f"others may write to {walk.here}"
    else:
        return
    raise SetupError(
        f"{what}, and so could take the place of the VM's sockets in {walk.path}",
        remedy=f"chmod go-w {walk.here}, or set UTILITYVM_RUNTIME_DIR to a folder under one of your own",
    )


def _strangers(walk: _Walk, why: str) -> AccessDenied:
    end = walk.end()
    leads = "" if end == walk.path else f" (it leads to {_shown(end)} now)"
    return AccessDenied(
        f"{walk.path} is not opened{leads}: {why}, and root would open whatever that is then",
        host_path=walk.path,
        remedy="give a path whose folders and links are all root's, such as of a copy; or run as that user",
    )


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _shown(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _refuse_pseudo(fd: int, path: str) -> None:
    """Raises:
    InvalidRequest: the file lies in a file system that shows the kernel's own state.
    """
    if (kind := _PSEUDO.get(_magic_of(fd))) is not None:
        raise InvalidRequest(
            f"{path} leads into a file system of the kernel's ({kind}), which holds no disks",
            host_path=path,
            remedy="give the path of a disk image or of a block device",
        )


def _magic_of(fd: int) -> int | None:
    """The number that names the type of the file's file system; None if it cannot be told.

    Source: statfs(2), where `f_type` is the first field of the structure, a machine word.
    """
    import ctypes  # late, as above

    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc().fstatfs(fd, answer):
        return None
    return int.from_bytes(answer.raw[: struct.calcsize("@l")], sys.byteorder) & 0xFFFF_FFFF


@cache
def _libc() -> CDLL:
    """Loaded once: that takes longer than what is asked of it."""
    import ctypes

    return ctypes.CDLL(None)
