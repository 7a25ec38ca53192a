"""Under whose rights QEMU runs, and how it gets rid of ours.

Started by a plain user, QEMU runs as that user: it can do less only by its own seccomp filter. Started by root, each VM
gets a user id that no other process and no account has, so that a QEMU which a guest has taken over can neither
signal nor trace another one. `setpriv` (util-linux) drops the rights between fork and exec: QEMU's own `-runas`
dies under its own filter, and Python may not run code there in a process with threads.

A VM that must not outlive its owner is killed by the kernel when the owner's thread ends (PR_SET_PDEATHSIG). The order
matters: a change of user clears the signal, so `setpriv` sets it last; and an owner that died before that would
never be noticed, so a shell compares its parent with the owner once the signal is set, and only then becomes QEMU.

Source: prctl(2), PR_SET_PDEATHSIG; systemd docs/UIDS-GIDS.md for the ranges that nobody else hands out.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pwd
import re
import stat
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.machine.processes import started_at
from utilityvm.machine.threads import in_thread, lent

_LOCK: Final = Path("/run/utilityvm-uids.lock")
# Neither Debian's policy nor systemd hands these out, and useradd's subordinate ids start at 100000. The second range
# is for containers that map 65536 ids only.
_RANGES: Final = (range(70000, 80000), range(60600, 61184))
_RANGE_TEXT: Final = re.compile(r"([0-9]+)-([0-9]+)")
_KVM: Final = Path("/dev/kvm")
_LOOK_AGAIN_S: Final = 0.005
_SETPRIV_S: Final = 0.0005
# argv[0] of the script is the owner's pid.
_UNLESS_ORPHANED: Final = 'ulimit -c 0; [ "$PPID" = "$0" ] && exec "$@"'
_ALWAYS: Final = 'ulimit -c 0; exec "$@"'


@dataclass(frozen=True, slots=True)
class Identity:
    """A user id that is its group id as well, and the groups beside it. `drops`: it is not ours."""

    uid: int
    groups: tuple[int, ...] = ()
    drops: bool = True


@asynccontextmanager
async def identity(*, kvm: bool, timeout_s: float) -> AsyncGenerator[Identity]:
    """An identity to start one QEMU under: ours for a plain user, else a free one.

    It stays free of others only until the block ends: by then the program must run under it.

    Raises:
        SetupError: every id of the range is taken, this system has no such ids, or others choose for `timeout_s`
            seconds on end.
    """
    if os.geteuid() != 0:
        yield Identity(os.geteuid(), drops=False)
        return
    lock = await in_thread(_open_lock, late=os.close)
    try:
        yield await _claim(lock, kvm=kvm, timeout_s=timeout_s)
    finally:
        await in_thread(os.close, lock, always=True)


def is_used_by(pid: int, who: Identity) -> bool:
    """Does the process run under the identity yet? False as well when it has ended."""
    return who.uid in _uids_of(f"/proc/{pid}")


def await_use(pid: int, who: Identity) -> None:
    """Return when the process runs under the identity, or has ended. Blocks for about a millisecond."""
    while started_at(pid) is not None and not is_used_by(pid, who):
        time.sleep(_SETPRIV_S)  # nobody tells when setpriv has run


def launcher(setpriv: Path, who: Identity, *, dies_with_us: bool) -> list[str]:
    """The words to put before a command so that it runs as `who`, can gain no right and leaves no core file."""
    words = [str(setpriv), "--no-new-privs", "--inh-caps=-all"]
    if who.drops:
        words += [f"--reuid={who.uid}", f"--regid={who.uid}", "--bounding-set=-all"]
        words += [f"--groups={','.join(map(str, who.groups))}"] if who.groups else ["--clear-groups"]
    if dies_with_us:
        words += ["--pdeathsig=KILL"]
    return [*words, "/bin/sh", "-c", _UNLESS_ORPHANED if dies_with_us else _ALWAYS, str(os.getpid())]


def _free_uid() -> int:
    used = _uids_in_use()
    ids_of_this_system = _mapped_uids()
    for candidates in _ranges():
        for uid in candidates:
            if uid not in used and _is_in(uid, ids_of_this_system) and not _has_account(uid):
                return uid
    shown = ", ".join(f"{one.start}-{one.stop - 1}" for one in _ranges())
    raise SetupError(
        f"no free user id for the VM in {shown}",
        remedy="set UTILITYVM_UIDS to a range of ids that nothing else uses, such as 300000-309999",
    )


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
        return {uid for entry in entries if entry.name.isdecimal() for uid in _uids_of(entry.path)}


def _uids_of(process: str) -> set[int]:
    """The real, effective, saved and file system user ids of a process; none if it has ended."""
    try:
        text = Path(process, "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {int(uid) for line in text.splitlines() if line.startswith("Uid:") for uid in line.split()[1:]}


def _mapped_uids() -> list[range]:
    """The ids that exist in our user namespace."""
    ranges: list[range] = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        ranges.append(range(first, first + count))
    return ranges


def _is_in(uid: int, ranges: list[range]) -> bool:
    return any(uid in one for one in ranges)


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


def _open_lock() -> int:
    return os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


async def _claim(lock: int, *, kvm: bool, timeout_s: float) -> Identity:
    try:
        async with asyncio.timeout(timeout_s):
            while (found := await in_thread(lent(lock, _try_claim), kvm)) is None:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_AGAIN_S)  # the holder starts a VM, which takes milliseconds
            return found
    except TimeoutError as error:
        raise SetupError(
            f"{_LOCK} was locked for {timeout_s:g} s", remedy=f"see who holds it: fuser -v {_LOCK}"
        ) from error


def _try_claim(lock: int, kvm: bool) -> Identity | None:
    """A free identity; None while another process has the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return Identity(_free_uid(), _kvm_group() if kvm else ())
