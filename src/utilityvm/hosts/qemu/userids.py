"""A user id for each VM that root starts: one that no process and no account has, and that had time to rest.

Each id has a file in a folder of root's, which is locked while a QEMU is being started under it: a process that stands
still there keeps one id to itself, and holds up nobody. The file's time says when the id was used last. An id rests
before it is given again, because what its last holder left in a shared folder would be the next one's own.

Source: systemd docs/UIDS-GIDS.md, for the ranges that nobody else hands out.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import stat
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.hosts.qemu.privileges import Identity, user_ids_of
from utilityvm.machine.threads import in_thread

REST_S: Final = 600.0
_FOLDER: Final = Path("/run/utilityvm-uids")
# Neither Debian's policy nor systemd hands these out, and useradd's subordinate ids start at 100000. The second range
# is for containers that map 65536 ids only.
_RANGES: Final = (range(70000, 80000), range(60600, 61184))
_RANGE_TEXT: Final = re.compile(r"([0-9]+)-([0-9]+)")
_KVM: Final = Path("/dev/kvm")


@asynccontextmanager
async def identity(*, kvm: bool) -> AsyncGenerator[Identity]:
    """An identity to start one QEMU under: ours for a plain user, else a free one.

    It is kept from others only until the block ends: by then the program must run under it.

    Raises:
        SetupError: every id of the range is taken, or this system has no such ids.
    """
    if os.geteuid() != 0:
        yield Identity(os.geteuid(), drops=False)
        return
    uid, lock = await in_thread(_claim, late=lambda claimed: os.close(claimed[1]))
    try:
        yield Identity(uid, await in_thread(_kvm_group) if kvm else ())
    finally:
        await in_thread(os.close, lock, always=True)


def rest(uid: int) -> None:
    """The QEMU of this id has ended: the id rests from now on. No error if it is none of ours."""
    with suppress(OSError):
        os.utime(_FOLDER / str(uid))


def _claim() -> tuple[int, int]:
    """A free id, and the lock on it. Blocks for as long as /proc and /run do."""
    taken = _uids_in_use()
    try:
        _FOLDER.mkdir(mode=0o700, exist_ok=True)
        for uid, last_use in _in_order(_usable(taken)):
            if not _has_account(uid) and (lock := _try_lock(uid, last_use)) is not None:
                return uid, lock
    except OSError as error:
        raise SetupError(f"cannot choose a user id for the VM: {error}", remedy=f"look at {_FOLDER}") from error
    shown = ", ".join(f"{one.start}-{one.stop - 1}" for one in _ranges())
    raise SetupError(
        f"no free user id for the VM in {shown}",
        remedy="set UTILITYVM_UIDS to a range of ids that nothing else uses, such as 300000-309999",
    )


def _try_lock(uid: int, last_use: float | None) -> int | None:
    """Lock the id; None if another process has it, or had it since we looked."""
    lock = os.open(_FOLDER / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if last_use is None or os.fstat(lock).st_mtime == last_use:
            os.utime(lock)
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _in_order(uids: Iterable[int]) -> Iterator[tuple[int, float | None]]:
    """The ids and when each was used last: those that have rested, the lowest first; then the others, longest first."""
    last_uses = {int(entry.name): entry.stat().st_mtime for entry in os.scandir(_FOLDER) if entry.name.isdecimal()}
    now, tired = time.time(), list[tuple[float, int]]()
    for uid in uids:
        last_use = last_uses.get(uid)
        if last_use is None or not 0 <= now - last_use < REST_S:
            yield uid, last_use
        else:
            tired.append((last_use, uid))
    yield from ((uid, last_use) for last_use, uid in sorted(tired))


def _usable(taken: set[int]) -> Iterator[int]:
    of_this_system = _mapped_uids()
    for candidates in _ranges():
        for uid in candidates:
            if uid not in taken and any(uid in one for one in of_this_system):
                yield uid


def _ranges() -> tuple[range, ...]:
    text = os.environ.get("UTILITYVM_UIDS")
    if not text:
        return _RANGES
    match = _RANGE_TEXT.fullmatch(text)
    if not match or not 0 < int(match[1]) <= int(match[2]):
        raise SetupError(f"UTILITYVM_UIDS is {text!r}", remedy="write it as LOWEST-HIGHEST, such as 300000-309999")
    return (range(int(match[1]), int(match[2]) + 1),)


def _uids_in_use() -> set[int]:
    with os.scandir("/proc") as entries:
        return {uid for entry in entries if entry.name.isdecimal() for uid in user_ids_of(entry.path)}


def _mapped_uids() -> list[range]:
    """The ids that exist in our user namespace."""
    ranges: list[range] = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        ranges.append(range(first, first + count))
    return ranges


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _kvm_group() -> tuple[int, ...]:
    """The group that may open /dev/kvm, unless it is root's own."""
    try:
        status = _KVM.stat()
    except OSError:
        return ()
    return (status.st_gid,) if status.st_gid and status.st_mode & stat.S_IRGRP else ()
