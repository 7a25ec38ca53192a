"""Folders that are made whole or not at all, by one builder at a time.

A folder gets its name when it is complete and on the disk, and not before. A build that is cut short leaves a folder
with another name, which nobody believes and the next build removes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.machine import paths

_UNFINISHED: Final = ".new-"
_FULL_BYTES: Final = 4 << 20  # a step that failed with less than this left failed for want of space


@contextmanager
def one_builder(lock: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the builders' lock; `waiting` is called if another has it. The kernel drops it if we die.

    Raises:
        SetupError: the cache cannot be written.
    """
    try:
        paths.make_folder(lock.parent)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SetupError(
            f"cannot write to the cache {lock.parent}: {error.strerror}",
            remedy="set XDG_CACHE_HOME to a folder that you may write to",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def no_builder(lock: Path) -> Iterator[bool]:
    """Keep builders off for the block. False: one is at work, or the lock cannot be had, and nobody is kept off.

    Where nothing was ever built there is nobody to keep off.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(parent: Path, name: str, *, space_bytes: int) -> Iterator[Path]:
    """A folder that gets its name when the block is done, and is gone if the block fails. Needs the builders' lock.

    Removes what builds that were cut short have left, as far as nothing is still writing there.

    Raises:
        SetupError: there is not the space, before anything is written or once it is used up.
    """
    for stale in parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if free < space_bytes:
        raise _no_space(parent, free=free, needed=space_bytes)
    # A name of its own each time: a program that a killed build had started may still be writing to the last one.
    folder = parent / f"{_UNFINISHED}{name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
        _flush(folder)
        if (parent / name).exists():  # there, but not whole
            shutil.rmtree(parent / name)
        folder.rename(parent / name)
    except BaseException as error:
        left = shutil.disk_usage(parent).free
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (OSError, SetupError)) and left < _FULL_BYTES:
            raise _no_space(parent, free=free, needed=space_bytes) from error
        if isinstance(error, OSError):
            raise SetupError(
                f"the guest image could not be written to {parent}: {error.strerror or error}",
                remedy="set XDG_CACHE_HOME to a folder that you may write to",
            ) from error
        raise


def whole_folders(parent: Path) -> list[Path]:
    """The folders that were finished."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def unfinished(*parents: Path) -> list[Path]:
    """The folders of builds that are under way, or that were cut short if nobody builds."""
    return sorted(path for parent in parents for path in parent.glob(f"{_UNFINISHED}*"))


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _no_space(parent: Path, *, free: int, needed: int) -> SetupError:
    return SetupError(
        f"{parent} has {free // 1_000_000} MB free, and the guest image needs {needed // 1_000_000} MB to build",
        remedy="make room, or set XDG_CACHE_HOME to a folder on a larger disk",
    )
