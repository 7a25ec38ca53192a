"""Where in a Linux guest a disk can be mounted: one rule for both sides.

The host refuses by it before anything is sent, and the agent again, as it is the one that a path's links and bind
mounts lead past the words of.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

# What the guest's system runs from. Nothing is mounted at one of these, below one, or above one: a mount would hide
# programs, libraries, settings or devices from the system, or could not be found by the agent again.
SYSTEM_FOLDERS: Final = (
    "/bin",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/run/utilityvm",
    "/sbin",
    "/sys",
    "/usr",
)
# What a terminal obeys, and signs that change the direction of what follows: the path is in errors, logs and tables.
_OBEYED: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_MAX_PATH_BYTES: Final = 4095  # linux/limits.h, PATH_MAX with its NUL
_MAX_NAME_BYTES: Final = 255  # linux/limits.h, NAME_MAX


def spelled(text: str) -> PurePosixPath:
    """The path in its one spelling: no doubled slashes, none at the end.

    Raises:
        ValueError: no absolute path; the error is a clause that says why.
    """
    path = PurePosixPath("/" + text.lstrip("/"))
    if not text.startswith("/"):
        raise ValueError("is not absolute")
    if ".." in path.parts:
        raise ValueError("has .. in it")
    try:
        names = [part.encode() for part in path.parts]
    except UnicodeEncodeError:
        raise ValueError("is not valid text") from None
    if "\0" in text or "\n" in text:
        raise ValueError("has a line break or a NUL in it")
    if _OBEYED.search(text):
        raise ValueError("has a control character in it")
    if len(str(path).encode()) > _MAX_PATH_BYTES or any(len(name) > _MAX_NAME_BYTES for name in names):
        raise ValueError(f"is too long: {_MAX_PATH_BYTES} bytes, and {_MAX_NAME_BYTES} for each name, are possible")
    return path


def mountable(text: str) -> PurePosixPath:
    """The path as `spelled`, if a disk can be mounted there.

    Raises:
        ValueError: no absolute path, or the system's; the error is a clause that says why.
    """
    path = spelled(text)
    if hidden := system_folder(str(path)):
        raise ValueError(f"belongs to the guest's system ({hidden})")
    return path


def system_folder(path: str) -> str | None:
    """The folder of the system that a mount at `path` would change: it is above, below, or the same."""
    if path == "/":
        return "/"
    return next((one for one in SYSTEM_FOLDERS if is_in(path, one) or is_in(one, path)), None)


def is_in(path: str, folder: str) -> bool:
    """Is `path` the folder, or below it?"""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
