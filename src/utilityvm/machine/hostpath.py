"""Paths of disks on this host: in a form that means the same to every process, and the disk that they lead to now."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, TypeAlias

from utilityvm.errors import InvalidRequest

HostPath: TypeAlias = str | os.PathLike[str]

_LOOK_S: Final = 1.0


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


async def identity_within(host_path: HostPath, timeout_s: float | None) -> str | None:
    """As `identity_of`, without blocking. None as well if its storage does not answer within half of the time, or 1 s.

    So a disk whose storage is dead can still be taken out by the name under which it was attached.
    """
    import asyncio  # late: commands that only read the store do without it

    from utilityvm.machine.threads import in_thread

    within = _LOOK_S if timeout_s is None else min(timeout_s / 2, _LOOK_S)
    try:
        async with asyncio.timeout(within):
            return await in_thread(identity_of, host_path)
    except TimeoutError:
        return None
