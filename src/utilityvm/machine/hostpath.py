"""Paths of disks on this host: in a form that means the same to every process, and the disk that they lead to now."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeAlias

from utilityvm.errors import InvalidRequest

HostPath: TypeAlias = str | os.PathLike[str]


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
        status = Path(host_path).stat()
    except (OSError, ValueError):
        return None
    if stat.S_ISBLK(status.st_mode):
        return f"block:{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file:{status.st_dev}:{status.st_ino}"
