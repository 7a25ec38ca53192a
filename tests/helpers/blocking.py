"""A test fails if code of ours blocks the event loop, also if somebody swallowed the error.

blockbuster wraps the calls that may block; here are more of them, and the rule: a call is refused if the coroutine, or
the loop's callback, that it comes from is ours. A test that calls a blocking function by itself does no harm.
"""

from __future__ import annotations

import asyncio
import builtins
import fcntl
import grp
import inspect
import io
import os
import pwd
import sqlite3
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from blockbuster import BlockBuster, BlockBusterFunction, blockbuster

import utilityvm

_OURS: Final = str(Path(utilityvm.__file__).parent)
# The loop of a command serves that command alone; what it calls of the other rooms is held to the rule.
_NOT_IN_A_LOOP: Final = tuple(f"{_OURS}/{room}/" for room in ("agent", "testing", "cli"))
_LOOP: Final = str(Path(asyncio.__file__).parent / "events.py")
_COROUTINE: Final = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_LOCKS: Final = frozenset(getattr(fcntl, name) for name in dir(fcntl) if name.endswith(("LK", "LKW")))

# Where blocking is right. Each has its reason.
ALLOWED: Final = (
    # The kernel knows where this process stands, and asks no storage.
    ("utilityvm/machine/hostpath.py", "absolute"),
    # Where a log goes is the application's choice.
    ("logging/__init__.py", "emit"),
    # The kernel answers from memory, and the file takes no lock that storage can hold (as /proc/PID/cmdline does).
    ("utilityvm/machine/processes.py", "started_at"),
    # The VM ends with the thread that started it, so it has to be started on the thread that owns it.
    ("utilityvm/machine/programs.py", "spawn"),
    # Files in memory, and pipes.
    *(("utilityvm/hosts/qemu/confinement.py", name) for name in ("_file_of", "_tell", "close")),
    # One write into the page cache, on a connection that waits for nobody: a thread would cost more than it.
    ("utilityvm/store/journal.py", "_write"),
    # Sockets and locks lie in the runtime folder, which is in memory, and none of these waits for a lock.
    ("utilityvm/guests/connection.py", "close"),
    *(("utilityvm/store/ownership.py", name) for name in ("_open", "_set", "_highest", "_is_same_file", "_owned")),
    *(("utilityvm/store/ownership.py", name) for name in ("acquire", "seize", "_introduce", "release")),
)

found: list[str] = []


def _is_file(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _never(*_: Any, **__: Any) -> bool:
    return False


# What blockbuster does not know; with what says that a call does not block after all.
_MORE: Final[dict[tuple[Any, str], Callable[..., bool]]] = {
    **dict.fromkeys(
        [
            (os, name)
            for name in (
                *("open", "fsync", "fdatasync", "ftruncate", "truncate", "pread", "pwrite", "pwritev", "preadv"),
                *("chmod", "fchmod", "chown", "fchown", "utime", "lstat", "makedirs", "removedirs", "copy_file_range"),
                *("getxattr", "setxattr", "removexattr", "listxattr", "posix_fallocate", "mknod", "mkfifo", "sync"),
            )
        ],
        _never,
    ),
    (os, "close"): lambda fd: not _is_file(fd),
    (os, "waitpid"): lambda _, options: bool(options & os.WNOHANG),
    (os, "waitid"): lambda *arguments: bool(arguments[2] & os.WNOHANG),
    (fcntl, "flock"): _never,
    (fcntl, "lockf"): _never,
    (fcntl, "fcntl"): lambda fd, command, *_: command not in _LOCKS,
    (builtins, "open"): _never,
    (io, "open"): _never,
    (grp, "getgrnam"): _never,
    (pwd, "getpwuid"): _never,
    (sqlite3, "connect"): _never,
    (subprocess.Popen, "__init__"): _never,
}


class _Found(blockbuster.BlockingError):
    """Remembered, because a caller may take it for one of the errors that it expects."""

    def __init__(self, func: str) -> None:
        super().__init__(func)
        lines = traceback.format_stack(sys._getframe(2), limit=12)
        found.append(f"{self}\n{''.join(lines)}")


def watch() -> BlockBuster:
    """From here on every blocking call in the loop is in `found`, and fails. Give it to `deactivate` at the end."""
    blockbuster.BlockingError = _Found  # type: ignore[misc]
    watching = BlockBuster()
    for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
        del watching.functions[name]  # held for microseconds, and to wrap them costs more
    del watching.functions["os.getcwd"]  # the kernel answers from memory
    for (owner, name), may in _MORE.items():
        function = BlockBusterFunction(owner, name, can_block_predicate=may)
        watching.functions[f"{owner.__name__}.{name}"] = function
    for function in watching.functions.values():
        function.can_block_predicate = _either(function.can_block_predicate)
        for file, where in ALLOWED:
            function.can_block_in(file, where)
    watching.activate()
    return watching


def _either(may: Callable[..., bool]) -> Callable[..., bool]:
    return lambda *arguments, **named: not _is_ours(sys._getframe(2)) or may(*arguments, **named)


def _is_ours(frame: FrameType | None) -> bool:
    """Does the call come from a coroutine, or a callback, of ours?"""
    below = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _LOOP:
            return _is_file_of_ours(below)
        if code.co_flags & _COROUTINE:
            return _is_file_of_ours(code.co_filename)
        if code.co_filename.startswith("<frozen importlib"):
            return False
        below = code.co_filename
        frame = frame.f_back
    return False


def _is_file_of_ours(filename: str) -> bool:
    return filename.startswith(_OURS) and not filename.startswith(_NOT_IN_A_LOOP)
