"""Which process a VM belongs to: a kernel lock on a file in the VM's runtime folder, which a dead owner drops.

A VM has one owner at a time, and other processes that want it wait in a queue. Both are open-file-description locks on
bytes of `owner.lock`; nobody has to clean up after a process that died:

* byte 1 is the *ownership*;
* byte 1000 + n is the *ticket* n. A waiting process holds one, drawn behind the last one that is held, and takes the
  ownership when it is free and no lower ticket is held. So the queue is first come, first served, and a newcomer cannot
  slip in between two owners.

Waiting looks every 10 ms instead of blocking in the kernel: a blocked thread could not be called back when its caller's
time is up. No lock is ever waited for without a deadline: its holder may stand still.

An owner may share: it says in the file that it lets go as soon as another process waits, unless it is in use just then.
The server does. Whoever wants such a VM is in the queue for a moment, whatever it was told to wait.

A name is not the thing: the file may be removed or replaced while its owner lives (cleaners of /tmp do that). So the
store remembers the owner as well, and which file it locked. With the same file the lock decides; with another one, or
none, the VM belongs to that process until it lets go or ends. Forks of an owner hold nothing (machine/forks.py).

Source: fcntl(2), open file description locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from utilityvm.errors import SetupError, VMOwned
from utilityvm.machine import forks, oserrors, paths, runtime
from utilityvm.machine.processes import Life, life_of, own_command, own_start

_FLOCK: Final = struct.Struct("hhqqi4x")
_OWNER, _FIRST_TICKET = 1, 1000
_LOOK_AGAIN_S: Final = 0.01
_TEXT_BYTES: Final = 4096
_SHARED_S: Final = 5.0  # for an owner that shares to see that it is waited for, and to let go
_SEIZE_S: Final = 1.0  # for those in the queue to see that the VM has ended
_FOLDER_GOES: Final = 100  # times that an ending VM may take its folder away under us
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that owns a VM, as it introduced itself."""

    pid: int
    started: str  # the kernel's start time of that pid, so that a reused pid is not the owner
    command: str  # the program, without its arguments
    since: float  # seconds since the epoch
    lock: str = ""  # device and inode of the file that it locked
    shares: bool = False  # it lets go as soon as another process waits

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"

    def to_json(self) -> dict[str, object]:
        return {
            "pid": self.pid,
            "started": self.started,
            "command": self.command,
            "since": self.since,
            "lock": self.lock,
            **({"shares": True} if self.shares else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            pid=int(document["pid"]),
            started=str(document["started"]),
            command=str(document["command"]),
            since=float(document["since"]),
            lock=str(document.get("lock", "")),
            shares=document.get("shares") is True,
        )


def _has_ended(owner: Owner) -> bool:
    """Has that very process ended for certain?"""
    return life_of(owner.pid, owner.started) is Life.ENDED


class Ownership:
    """The right to be a VM's owner, until `release` or the end of this process."""

    def __init__(self, fd: int, path: Path, *, is_new: bool) -> None:
        """Use `acquire`."""
        self._fd = fd
        self.path = path
        self.is_new = is_new  # the lock's file was not there before
        self.on_release: Callable[[], object] | None = None  # called before the lock is dropped
        self.owner = Owner(
            pid=os.getpid(), started=own_start(), command=own_command(), since=time.time(), lock=_identity(fd)
        )
        _introduce(fd, self.owner)

    @classmethod
    async def acquire(cls, folder: Path, *, vm: str, wait_s: float = 0.0) -> Self:
        """Own the VM whose runtime folder this is; the folder is made if it is missing.

        Waits its turn for up to `wait_s` seconds. Cancelled or refused, it leaves the queue and nothing else changed.

        Raises:
            VMOwned: another process owns it, or others wait for it; `owner` is that process.
            SetupError: the folder cannot be used, or its file system cannot lock files.
        """
        begun = time.monotonic()
        path = folder / paths.LOCK_FILE
        while True:
            fd, is_new = _open(path, vm=vm)
            until = begun + (max(wait_s, _SHARED_S) if _read(fd).shares else wait_s)
            try:
                if not await _queue(fd, until=until):
                    raise _owned(path, vm, wait_s=wait_s)
                if _is_same_file(fd, path):
                    return cls(fd, path, is_new=is_new)
            except OSError as error:
                os.close(fd)
                raise _unlockable(path, error, vm=vm) from error
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the VM ended while we waited, and its folder went with it

    @classmethod
    def acquire_at_once(cls, folder: Path, *, vm: str) -> Self | None:
        """As `acquire` without waiting, for threads. None: another process owns it, or waits for it."""
        path = folder / paths.LOCK_FILE
        while True:
            fd, is_new = _open(path, vm=vm)
            try:
                with _ticket(fd) as number:
                    if not _is_our_turn(fd, number):
                        os.close(fd)
                        return None
                if _is_same_file(fd, path):
                    return cls(fd, path, is_new=is_new)
            except OSError as error:
                os.close(fd)
                raise _unlockable(path, error, vm=vm) from error
            os.close(fd)

    @classmethod
    async def seize(cls, folder: Path, *, vm: str) -> Self:
        """Own a VM that has ended, whoever owned it: that process may stand still for ever.

        When it goes on it finds its VM gone, and removes nothing of a later VM of that name.
        """
        (folder / paths.LOCK_FILE).unlink(missing_ok=True)
        return await cls.acquire(folder, vm=vm, wait_s=_SEIZE_S)

    def share(self) -> None:
        """Say that we let go as soon as another process waits: see `is_wanted`."""
        _introduce(self._fd, replace(self.owner, shares=True))

    def is_wanted(self) -> bool:
        """Does another process wait for the VM?"""
        return self._fd >= 0 and _highest(self._fd, _FIRST_TICKET) is not None

    def belongs_to_other(self, recorded: Owner | None) -> bool:
        """Has the VM an owner that locked another file than ours: `recorded`, as the store has it?"""
        if recorded is None or recorded.lock == self.owner.lock:
            return False  # of the same file the lock decides, and we have it
        return not _has_ended(recorded)

    def release(self, *, remove: bool = False) -> None:
        """Let the next in the queue have it. `remove`: the VM is gone, and so are its lock and its (empty) folder.

        Nothing is removed of a folder that another VM or owner has by now. Twice is once.
        """
        if self._fd < 0:
            return
        if self.on_release is not None:
            self.on_release()
        try:
            if remove:
                self._remove()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _remove(self) -> None:
        try:
            if _is_same_file(self._fd, self.path) or self._is_left_over():
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
                raise

    def _is_left_over(self) -> bool:
        """Our file was removed. Is what is in its place, if anything, nobody's: somebody only waited for us there?"""
        try:
            fd = forks.keep_from(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        except FileNotFoundError:
            return True
        try:
            is_free = _set(fd, fcntl.F_WRLCK, _OWNER) and _is_same_file(fd, self.path)
            return is_free and [each.name for each in self.path.parent.iterdir()] == [self.path.name]
        finally:
            os.close(fd)


def owner_of(folder: Path, recorded: Mapping[str, Any] | None = None) -> Owner | None:
    """Who owns the VM right now; None: nobody. `recorded`: the owner as the store has it."""
    named = read_owner(recorded)
    try:
        with runtime.entered(folder) as here:
            fd = os.open(here / paths.LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError, SetupError):  # without a folder of ours nobody locked anything in it
        return named if named and not _has_ended(named) else None
    try:
        if _highest(fd, _OWNER, before=_OWNER + 1) is not None:
            told = _read(fd)
            return replace(named, shares=told.shares) if named and named.lock == _identity(fd) else told
        if named and named.lock != _identity(fd) and not _has_ended(named):
            return named
        return None
    finally:
        os.close(fd)


def read_owner(document: Mapping[str, Any] | None) -> Owner | None:
    """The owner that `to_json` wrote; None for another document."""
    try:
        return Owner.from_json(document) if document else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(fd: int) -> Owner:
    try:
        document = json.loads(os.pread(fd, _TEXT_BYTES, 0))
    except ValueError:
        document = None
    return read_owner(document) or Owner(pid=0, started="", command="has not said its name yet", since=0.0)


def _introduce(fd: int, owner: Owner) -> None:
    """For people; only the lock decides. In place of what the last one wrote, which takes no new space."""
    text = json.dumps(owner.to_json(), ensure_ascii=True).encode().ljust(_TEXT_BYTES)
    with suppress(OSError):
        os.pwrite(fd, text[:_TEXT_BYTES], 0)


def _open(path: Path, *, vm: str) -> tuple[int, bool]:
    """A descriptor of the lock's file, and whether it was made just now."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        for _ in range(_FOLDER_GOES):
            with suppress(FileNotFoundError):  # the VM's last owner removed the folder in between
                runtime.make(path.parent)
                with runtime.entered(path.parent) as here:
                    with suppress(FileExistsError):
                        fd = os.open(here / path.name, flags | os.O_CREAT | os.O_EXCL, 0o600)
                        return forks.keep_from(fd), True
                    fd = forks.keep_from(os.open(here / path.name, flags))
                    try:
                        runtime.check_file(fd, path)
                    except BaseException:
                        os.close(fd)
                        raise
                    return fd, False
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except OSError as error:
        raise _unlockable(path, error, vm=vm) from error


def _unlockable(path: Path, error: OSError, *, vm: str) -> SetupError:
    if error.errno in _NO_LOCKS:
        return SetupError(
            f"the file system of {path.parent} cannot lock files ({error.strerror}), so nothing would keep two "
            "processes from owning the VM",
            vm=vm,
            remedy="set UTILITYVM_RUNTIME_DIR to a folder on a local file system, such as a tmpfs",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
        return oserrors.as_ours(error, f"cannot lock the VM in {path.parent}", vm=vm)
    return SetupError(
        f"cannot lock the VM in {path.parent}: {error.strerror}",
        vm=vm,
        remedy="set UTILITYVM_RUNTIME_DIR to a folder that you may write to",
    )


async def _queue(fd: int, *, until: float) -> bool:
    """Stand in the queue until it is our turn, or the time is up."""
    import asyncio  # late: who only asks for the owner (`uvm ps`) does without it

    with _ticket(fd) as number:
        while True:
            if _is_our_turn(fd, number):
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, _LOOK_AGAIN_S))


def _is_our_turn(fd: int, number: int) -> bool:
    """Take the ownership, if it is free and nobody waits before the holder of ticket `number`."""
    return _highest(fd, _FIRST_TICKET, before=number) is None and _set(fd, fcntl.F_WRLCK, _OWNER)


@contextmanager
def _ticket(fd: int) -> Iterator[int]:
    """Hold the ticket behind the last one that is held; gives its byte."""
    while True:
        last = _highest(fd, _FIRST_TICKET)
        number = _FIRST_TICKET if last is None else last + 1
        if _set(fd, fcntl.F_WRLCK, number):
            break  # else another process has just drawn it: look again, and draw the one behind
    try:
        yield number
    finally:
        _set(fd, fcntl.F_UNLCK, number)


def _set(fd: int, kind: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _highest(fd: int, first: int, *, before: int | None = None) -> int | None:
    """The highest byte from `first` on, and below `before`, that another holder has locked."""
    found: int | None = None
    while before is None or first < before:
        length = 0 if before is None else before - first  # to the kernel 0 means all that follow
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
        kind, _, start, size, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            break
        first = int(start) + int(size)
        found = first - 1
    return found


def _identity(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _owned(path: Path, vm: str, *, wait_s: float) -> VMOwned:
    owner = owner_of(path.parent)
    return owned_by(owner, path, vm, wait_s=wait_s)


def owned_by(owner: Owner | None, path: Path, vm: str, *, wait_s: float) -> VMOwned:
    """The error for a VM that has another owner; None: one that waited for it before us."""
    who = str(owner) if owner else "another process, which waited for it before us"
    waited = f", still after {wait_s:.2g} s" if wait_s else ""
    return VMOwned(
        f"VM {vm} belongs to {who}{waited}",
        owner=str(owner) if owner else "",
        vm=vm,
        remedy=f"wait until it is done, give more time to wait, or end that process (fuser -v {path} shows it); "
        f"to end the VM whoever has it: uvm stop --force {vm}",
    )
