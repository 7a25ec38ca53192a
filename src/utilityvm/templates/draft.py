"""A template that is being written: a folder, until it is there under its name, whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from utilityvm.errors import SetupError
from utilityvm.machine import forks, paths
from utilityvm.machine.threads import aside, in_thread, to_the_end
from utilityvm.tasks import Deadline, Undo
from utilityvm.templates.catalog import NEW, refuse_taken, taken


class Draft:
    """A template that is being written: a folder, until it is there under its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_there = False  # it has its name, and stays, whatever is raised or cancelled after that

    @asynccontextmanager
    async def begun(self, deadline: Deadline | None = None) -> AsyncIterator[Path]:
        """A folder that is the template when the block ends, and gone if it fails.

        Everything in it is on the storage before it has its name.

        Raises:
            TemplateExists: the name is taken, now or at the end.
            SetupError: no space or no right.
        """
        async with Undo(deadline) as undo:
            folder, held = await to_the_end(_begin, self.name, late=_discard_new)
            undo.add(aside, os.close, held)
            undo.add(to_the_end, shutil.rmtree, folder, True)
            yield folder
            with no_space(folder.parent):
                await in_thread(_flush_all, folder)
                await to_the_end(self._publish, folder)
                await in_thread(_flush, folder.parent)
        aside(os.close, held)

    def _publish(self, folder: Path) -> None:
        try:
            folder.rename(folder.parent / self.name)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken(self.name) from error
            raise
        self.is_there = True


def _begin(name: str) -> tuple[Path, int]:
    """A new folder, and the lock that says that somebody works in it."""
    refuse_taken(name)
    parent = paths.templates_dir()
    try:
        paths.make_folder(parent)
        folder = Path(tempfile.mkdtemp(prefix=NEW, dir=parent))
    except OSError as error:
        raise SetupError(
            f"cannot write to {parent}: {error.strerror}", remedy="set UTILITYVM_STATE_DIR to a folder of your own"
        ) from error
    fd = forks.keep_from(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    fcntl.flock(fd, fcntl.LOCK_SH)
    return folder, fd


def _discard_new(begun: tuple[Path, int]) -> None:
    folder, fd = begun
    shutil.rmtree(folder, ignore_errors=True)
    os.close(fd)


@contextmanager
def no_space(folder: Path) -> Iterator[None]:
    """What the storage refuses, as an error that says what to do.

    Raises:
        SetupError: no space, no right, or the storage fails.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        roomier = "make room there, or set UTILITYVM_STATE_DIR to a roomier folder"
        raise SetupError(
            f"cannot write the template to {folder}: {error.strerror}",
            remedy=roomier if is_full else "see what the storage lacks: `dmesg`",
        ) from error


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until it is on the storage: a template must be whole also after a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
