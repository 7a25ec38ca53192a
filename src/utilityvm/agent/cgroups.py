"""A control group (cgroup v2) for each program, so that all that it started can be ended with it.

A child is born in its parent's cgroup. Whatever a program starts is therefore in the program's, also after it left its
session and lost its parent, as every daemon does. Only root can leave it, and on purpose.

They are below our own cgroup: `utilityvm/1`, `utilityvm/2`, ... One is removed when nothing is in it any more. When a
program ended and left children that go on, its cgroup is marked: whoever finds one without the mark, as an agent that
was started again may, finds what nobody waits for, and kills it. A kernel without cgroup v2 has no such thing; then a
program and what it started are told by their session.

Source: Linux Documentation/admin-guide/cgroup-v2.rst, "Core Interface Files"; cgroup.kill is of Linux 5.14.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from utilityvm.agent import mountinfo
from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import kill_session, send

_NAME: Final = "utilityvm"
_PROCS, _KILL, _FREEZE, _EVENTS = "cgroup.procs", "cgroup.kill", "cgroup.freeze", "cgroup.events"
_LEFT: Final = "trusted.utilityvm.left"  # the mark
_DELEGATED: Final = "cgroup.subtree_control"
_CPU_PERIOD_US: Final = 100_000
_KILL_ROUNDS: Final = 10
_NONE_HERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP})


class Limits(NamedTuple):
    """What a program and all that it starts may use together. None: as much as there is."""

    memory_bytes: int | None = None
    pids: int | None = None
    milli_cpus: int | None = None  # thousandths of a processor

    def files(self) -> dict[str, tuple[str, str]]:
        """Each file of a cgroup that says one of them: the controller that it is of, and what it holds."""
        files = {}
        if self.memory_bytes is not None:
            files["memory.max"] = "memory", str(self.memory_bytes)
            files["memory.oom.group"] = "memory", "1"  # it ends whole, and not with a part of it missing
        if self.pids is not None:
            files["pids.max"] = "pids", str(self.pids)
        if self.milli_cpus is not None:
            files["cpu.max"] = "cpu", f"{self.milli_cpus * _CPU_PERIOD_US // 1000} {_CPU_PERIOD_US}"
        return files


class Family:
    """A program and all that it started. Use `Cgroups.make`, and `leave` in the end."""

    def __init__(self, cgroups: Cgroups, path: str | None) -> None:
        self._cgroups = cgroups
        self.path = path
        self._procs = -1 if path is None else os.open(f"{path}/{_PROCS}", os.O_WRONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Put the calling process into it. Called between fork and exec: it makes one system call and takes no lock.

        Raises:
            OSError: the kernel refused.
        """
        if self._procs >= 0:
            os.write(self._procs, b"0")

    def kill(self, leader: int | None) -> None:
        """Kill all of it. `leader`, the program, must not have been reaped: its pid could be another process's.

        Without a leader, what it left behind is killed, which only a cgroup knows.
        """
        if self.path is not None:
            _kill(self.path)
        elif leader is not None:
            kill_session(leader)

    def was_out_of_memory(self) -> bool:
        """Did the kernel kill some of it because it had used all of the memory that it may?"""
        if self.path is None:
            return False
        try:
            with open(f"{self.path}/memory.events") as file:
                return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in file)
        except OSError:
            return False

    def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until all of it has ended, for so long at the most."""
        if self.path is not None:
            _wait_until_empty(self.path, timeout_s)

    def leave(self) -> None:
        """Nobody waits for it any more. What still runs goes on; its cgroup is removed some time after it has ended."""
        if self._procs >= 0:
            os.close(self._procs)
            self._procs = -1
        if self.path is not None:
            self._cgroups.leave(self.path)


class Cgroups:
    """Those of our programs. Thread-safe."""

    def __init__(self, parent: str | None) -> None:
        """`parent` is a cgroup's folder, in which ours are made; None: this kernel has none."""
        self._folder = None if parent is None else f"{parent.rstrip('/')}/{_NAME}"
        self._numbers = itertools.count(1)
        self._left: set[str] = set()  # those that had something in them when they were left
        self._lock = threading.Lock()

    def end_strays(self) -> None:
        """Kill what an agent before us ran and did not see end. What its programs left behind on purpose goes on."""
        if self._folder is None:
            return
        for path in _below(self._folder, deep=False):
            if not _is_marked(path):
                _kill(path)
            with self._lock:
                self._left.add(path)
        self._sweep()

    def make(self, limits: Limits = Limits()) -> Family:  # noqa: B008 (a tuple)
        """A cgroup for a program that is about to be started, with its limits.

        Raises:
            OSError: the kernel gives none, for lack of memory, say. A kernel that has no cgroups is no error.
            Fault: there are limits, and the kernel keeps none of that kind.
        """
        family = self._make()
        try:
            self._limit(family, limits.files())
        except BaseException:
            family.leave()
            raise
        return family

    def _limit(self, family: Family, files: dict[str, tuple[str, str]]) -> None:
        if files and (self._folder is None or family.path is None):
            raise Fault("a limit on memory, processes or processors needs cgroup v2, which this guest does not have")
        for name, (controller, text) in files.items():
            try:
                _delegate(controller, (os.path.dirname(str(self._folder)), str(self._folder)))
                _write(f"{family.path}/{name}", text.encode())
            except OSError as error:
                raise Fault(f"this guest's kernel keeps no {name} for a program: {error.strerror}") from None

    def _make(self) -> Family:
        if self._folder is None:
            return Family(self, None)
        self._sweep()
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._folder, 0o755)
            path = self._new()
        except OSError as error:
            if error.errno in _NONE_HERE:
                return Family(self, None)
            raise
        try:
            return Family(self, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            if error.errno in _NONE_HERE:  # it is a folder like any other
                return Family(self, None)
            raise

    def leave(self, path: str) -> None:
        """For `Family.leave`."""
        if _remove(path):
            return
        with contextlib.suppress(OSError):  # without the mark it ends with the agent
            os.setxattr(path, _LEFT, b"1")
        with self._lock:
            self._left.add(path)

    def _new(self) -> str:
        while True:
            path = f"{self._folder}/{next(self._numbers)}"
            with contextlib.suppress(FileExistsError):  # of an agent before us
                os.mkdir(path, 0o755)
                return path

    def _sweep(self) -> None:
        with self._lock:
            self._left = {path for path in self._left if not _remove(path)}


@functools.cache
def here() -> Cgroups:
    """The agent's."""
    return Cgroups(_own())


def _own() -> str | None:
    """The folder of the cgroup that we are in."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            paths = [line.rstrip("\n").removeprefix("0::") for line in file if line.startswith("0::")]
        mounts = [line.path for line in mountinfo.mount_lines() if line.filesystem == "cgroup2"]
    except OSError:
        return None
    return mounts[0] + paths[0].rstrip("/") if mounts and paths else None


def _delegate(controller: str, folders: tuple[str, ...]) -> None:
    """Have the cgroups in each of these folders keep limits of that kind.

    Only where it is asked for: what counts the memory of a program costs it time.
    """
    for folder in folders:
        with open(f"{folder}/{_DELEGATED}") as file:
            is_there = controller in file.read().split()
        if not is_there:
            _write(f"{folder}/{_DELEGATED}", f"+{controller}".encode())


def _kill(path: str) -> None:
    """Kill all that is in a cgroup and below. Not there any more is done already."""
    try:
        _write(f"{path}/{_KILL}", b"1")
    except OSError:
        _kill_one_by_one(path)


def _kill_one_by_one(path: str) -> None:
    """For a kernel before Linux 5.14. Frozen, nothing can fork while it is killed; a frozen process can be killed."""
    with contextlib.suppress(OSError):
        _write(f"{path}/{_FREEZE}", b"1")
    for _ in range(_KILL_ROUNDS):
        pids = [pid for one in (path, *_below(path)) for pid in _pids(one)]
        if not pids:
            break
        for pid in pids:
            send(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        _write(f"{path}/{_FREEZE}", b"0")


def _wait_until_empty(path: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        with open(f"{path}/{_EVENTS}", "rb", buffering=0) as file:
            changes = select.poll()
            changes.register(file, select.POLLPRI)
            while b"populated 1" in os.pread(file.fileno(), 4096, 0):
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                changes.poll(left * 1000)
    except OSError:
        pass  # it was removed


def _remove(path: str) -> bool:
    """Remove a cgroup, and what a program made below it. False: something runs in it."""
    try:
        for one in (*_below(path), path):
            os.rmdir(one)
    except FileNotFoundError:
        pass  # somebody else did
    except OSError:
        return False
    return True


def _below(path: str, *, deep: bool = True) -> Iterator[str]:
    """The cgroups in a cgroup, the innermost first."""
    try:
        with os.scandir(path) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for folder in folders:
        if deep:
            yield from _below(folder)
        yield folder


def _pids(path: str) -> list[int]:
    try:
        with open(f"{path}/{_PROCS}") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _is_marked(path: str) -> bool:
    try:
        return bool(os.getxattr(path, _LEFT))
    except OSError:
        return False


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
