"""Which process a VM belongs to: a kernel lock on a file in the VM's runtime folder, which a dead owner drops.

A VM has one owner at a time, and who wants it after him stands in a queue. Both are open-file-description locks on
bytes of `owner.lock`; nobody has to clean up after a process that died:

* byte 0 is the *door*: held for the few microseconds in which a ticket is drawn;
* byte 1 is the *ownership*;
* byte 1000 + n is the *ticket* n. Who waits holds one, and takes the ownership when it is free and no lower ticket is
  held. So the queue is first come, first served, and a newcomer cannot slip in between two owners.

Waiting looks every 10 ms instead of blocking in the kernel: a blocked thread could not be called back when its caller's
time is up. The file's text says who the owner is; it is for people, and only the lock decides.

Source: fcntl(2), open file description locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

from utilityvm.errors import SetupError, VMOwned
from utilityvm.machine import paths
from utilityvm.machine.processes import own_command, own_start

_FLOCK: Final = struct.Struct("hhqqi4x")
_DOOR, _OWNER, _FIRST_TICKET = 0, 1, 1000
_LOOK_AGAIN_S: Final = 0.01
_LONGEST_TEXT: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that owns a VM, as it introduced itself."""

    pid: int
    started: str
    command: str
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"

    def to_json(self) -> dict[str, object]:
        return {"pid": self.pid, "started": self.started, "command": self.command, "since": self.since}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            pid=int(document["pid"]),
            started=str(document["started"]),
            command=str(document["command"]),
            since=float(document["since"]),
        )


class Ownership:
    """The right to be a VM's owner, until `release` or the end of this process."""

    def __init__(self, fd: int, path: Path) -> None:
        """Use `acquire`."""
        self._fd = fd
        self.path = path

    @classmethod
    async def acquire(cls, folder: Path, *, vm: str, wait_s: float = 0.0) -> Self:
        """Own the VM whose runtime folder this is; the folder is made if it is missing.

        Waits its turn for up to `wait_s` seconds. Cancelled or refused, it leaves the queue and nothing else changed.

        Raises:
            VMOwned: another process owns it, or others wait for it; `owner` is that process.
            SetupError: the folder cannot be used.
        """
        until = time.monotonic() + wait_s
        path = folder / paths.LOCK_FILE
        while True:
            fd = _open(path, vm=vm)
            try:
                if not await _queue(fd, until=until):
                    raise _owned(path, vm, wait_s=wait_s)
                if _is_same_file(fd, path):
                    _introduce(fd)
                    return cls(fd, path)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the VM ended while we waited, and its folder went with it

    def release(self, *, remove: bool = False) -> None:
        """Let the next in the queue have it. `remove`: the VM is gone, and so are its lock and its (empty) folder.

        Twice is once.
        """
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
            try:
                self.path.parent.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
                    raise
        else:
            os.ftruncate(fd, 0)
        os.close(fd)


def owner_of(folder: Path) -> Owner | None:
    """Who owns the VM right now; None: nobody."""
    try:
        fd = os.open(folder / paths.LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _read(fd) if _highest(fd, _OWNER, before=_OWNER + 1) is not None else None
    finally:
        os.close(fd)


def _read(fd: int) -> Owner:
    try:
        document = json.loads(os.pread(fd, _LONGEST_TEXT, 0))
        return Owner.from_json(cast(dict[str, Any], document))
    except (ValueError, KeyError, TypeError):
        return Owner(pid=0, started="", command="has not said its name yet", since=0.0)


def _introduce(fd: int) -> None:
    owner = Owner(pid=os.getpid(), started=own_start(), command=own_command(), since=time.time())
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(owner.to_json(), ensure_ascii=True).encode(), 0)


def _open(path: Path, *, vm: str) -> int:
    try:
        paths.make_folder(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return _open(path, vm=vm)  # the VM's last owner removed the folder in between
    except OSError as error:
        raise SetupError(
            f"cannot lock the VM in {path.parent}: {error.strerror}",
            vm=vm,
            remedy="set UTILITYVM_RUNTIME_DIR to a folder that you may write to",
        ) from error


async def _queue(fd: int, *, until: float) -> bool:
    """Stand in the queue until it is our turn, or the time is up."""
    import asyncio  # late: who only asks for the owner (`uvm ps`) does without it

    with _ticket(fd) as number:
        while True:
            if _highest(fd, _FIRST_TICKET, before=number) is None and _set(fd, fcntl.F_WRLCK, _OWNER):
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, _LOOK_AGAIN_S))


@contextmanager
def _ticket(fd: int) -> Iterator[int]:
    """Hold the ticket behind the last one that is held; gives its byte."""
    while not _set(fd, fcntl.F_WRLCK, _DOOR):
        time.sleep(0.0001)  # who holds it is a few system calls from letting go, or dead and lets go by that
    last = _highest(fd, _FIRST_TICKET)
    number = _FIRST_TICKET if last is None else last + 1
    taken = _set(fd, fcntl.F_WRLCK, number)
    assert taken, "a ticket was drawn behind the door"
    _set(fd, fcntl.F_UNLCK, _DOOR)
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


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino)


def _owned(path: Path, vm: str, *, wait_s: float) -> VMOwned:
    owner = owner_of(path.parent)
    who = str(owner) if owner else "another process, which waited for it before us"
    waited = f", still after {wait_s:g} s" if wait_s else ""
    return VMOwned(
        f"VM {vm} belongs to {who}{waited}",
        owner=str(owner) if owner else "",
        vm=vm,
        remedy="wait until it is done, give more time to wait, or end that process",
    )
