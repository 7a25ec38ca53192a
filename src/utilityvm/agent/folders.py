"""The folders that mounts need: made when they are missing, and removed when the last mount below them is gone.

Mounts come and go in many threads, and share what is above them: who made a folder may go first, and it stays for the
others. What somebody put into a folder of ours makes it theirs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from utilityvm.agent.faults import Fault


class Folders:
    """Those that we made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # from the look at what is missing until it is made
        self._used: set[str] = set()  # the paths of the mounts that are there, or are just being made
        self._shared: set[str] = set()  # of mounts that are gone, and others are below

    def make(self, path: PurePosixPath, *, as_file: bool, note: Callable[[list[str]], None]) -> list[str]:
        """Have a folder at `path`, or an empty file; give what was made for it, the outermost first.

        `note` is told what is going to be made. If this fails nothing is left.

        Raises:
            Fault: the path leads through a link, or is of the other kind.
            OSError: it cannot be made.
        """
        with self._lock:
            missing = _missing(path, as_file=as_file)
            note(missing)
            self._used.add(str(path))
            try:
                for one in missing:
                    _make(one, as_file=as_file and one == missing[-1])
            except BaseException:
                self._give_back(str(path), missing)
                raise
            return missing

    def use(self, path: str) -> None:
        """A mount is there that was not made through us: by the agent before this one."""
        with self._lock:
            self._used.add(path)

    def give_back(self, path: str, made: Sequence[str]) -> None:
        """Remove what was made for the mount at `path`, but what others are below of. Not there is done already."""
        with self._lock:
            self._give_back(path, made)

    def _give_back(self, path: str, made: Sequence[str]) -> None:
        self._used.discard(path)
        shared = {one for one in self._shared if path.startswith(f"{one}/")}
        for one in sorted({*made, *shared}, key=len, reverse=True):
            _remove_made(one)
            if os.path.lexists(one) and any(other.startswith(f"{one}/") for other in self._used):
                self._shared.add(one)
            else:
                self._shared.discard(one)


def _missing(path: PurePosixPath, *, as_file: bool) -> list[str]:
    """What has to be made to mount there, the outermost first. A path through a link is refused."""
    whole = [str(one) for one in (*reversed(path.parents[:-1]), path)]
    for one in whole:
        if os.path.islink(one):
            raise Fault(f"the guest path leads through the symbolic link {one}", kind="invalid")
    missing = [one for one in whole if not os.path.lexists(one)]
    if not missing and os.path.isdir(path) == as_file:
        raise Fault(f"{path} is {'a folder, where a device' if as_file else 'no folder, where a disk'} would go")
    return missing


def _make(path: str, *, as_file: bool) -> None:
    if as_file:
        Path(path).touch(0o600, exist_ok=False)
    else:
        os.mkdir(path, 0o755)


def _remove_made(path: str) -> None:
    """Remove what we made, if nobody put anything there."""
    try:
        if os.path.isdir(path):
            os.rmdir(path)
        elif os.stat(path).st_size == 0:
            os.unlink(path)
    except OSError:
        pass  # somebody uses it, or it is gone
