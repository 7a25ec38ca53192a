"""Windows paths, by their text alone: which are the same file, and how Go puts them together.

One file has many spellings: upper and lower case, `/` for `\\`, `.` and `..`, the prefixes `\\\\?\\` and `\\\\.\\` that
hand a path to the system as it is. `same_file_key` gives all of these one text. It is what is left when the file
itself cannot be asked: links and mounted folders it does not see.

Source: Windows "Naming Files, Paths, and Namespaces" and "File path formats on Windows systems"; Go path/filepath.
"""

from __future__ import annotations

import ntpath
import re
from pathlib import PurePosixPath

_LITERAL = re.compile(r"[\\/]{2}[.?][\\/]|\\\?\?\\")  # \\?\ \\.\ \??\
_UNC = re.compile(r"UNC[\\/]", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")


def same_file_key(path: str) -> str:
    """The same text for each spelling of one file's path. Two files never have the same."""
    if prefix := _LITERAL.match(path):
        rest = path[prefix.end() :]
        if unc := _UNC.match(rest):
            path = f"\\\\{rest[unc.end() :]}"
        elif _DRIVE.match(rest):
            path = rest
        else:  # a device: \\.\PHYSICALDRIVE2
            return f"\\\\.\\{_folded(rest)}"
    else:
        path = path.rstrip(". ") or path  # as Windows drops them from the last name
    return _folded(ntpath.normpath(path))


def is_absolute(path: str) -> bool:
    """Does it name the same file from every folder and drive?"""
    drive, rest = ntpath.splitdrive(path)
    return bool(_LITERAL.match(path)) or (bool(drive) and (rest[:1] in ("\\", "/") or not _DRIVE.match(drive)))


def is_device(path: str) -> bool:
    """Is it a device, such as `\\\\.\\PHYSICALDRIVE2`, and no file on a drive or share?"""
    prefix = _LITERAL.match(path)
    rest = path[prefix.end() :] if prefix else ""
    return prefix is not None and not _DRIVE.match(rest) and not _UNC.match(rest)


def base(path: str) -> str:
    """Go's `filepath.Base`: the last name in it. `.` for an empty path, `\\` if it has none."""
    if not path:
        return "."
    name = ntpath.splitdrive(path.rstrip("\\/"))[1]
    return re.split(r"[\\/]", name)[-1] or "\\"


def join(folder: str, name: str) -> str:
    """Go's `filepath.Join`: both, cleaned."""
    return _clean(f"{folder}{'' if not folder or folder.endswith(':') else chr(92)}{name}")


def below(folder: str, name: str) -> str:
    """A path below `folder`, as Go's `os.MkdirTemp` writes it: not cleaned."""
    return folder + name if folder[-1:] in ("\\", "/") else f"{folder}\\{name}"


def guest_path(path: PurePosixPath | str) -> str:
    """A guest path as a Windows guest knows it: `/C:/data` and `C:/data` are `C:\\data`, `/data` is on its drive C."""
    text = str(path).replace("/", "\\")
    bare = text.lstrip("\\")
    return bare if _DRIVE.match(bare) else f"C:\\{bare}"


def _clean(path: str) -> str:
    drive, rest = ntpath.splitdrive(path)
    rooted = rest[:1] in ("\\", "/")
    names: list[str] = []
    for name in re.split(r"[\\/]", rest):
        if name == ".." and names and names[-1] != "..":
            names.pop()
        elif name == ".." and rooted:
            continue
        elif name not in ("", "."):
            names.append(name)
    text = ("\\" if rooted else "") + "\\".join(names)
    return drive.replace("/", "\\") + (text or ("" if drive.startswith(("\\\\", "//")) else "."))


def _folded(text: str) -> str:
    """Without the difference of case, where Windows sees none: one character for one, there and back.

    Letters that only other systems fold (the long s, the dotless i, the sharp s) stay as they are: taking two files for
    one would be worse than the other way round.
    """
    return "".join(_folded_character(character) for character in text.replace("/", "\\"))


def _folded_character(character: str) -> str:
    upper = character.upper()
    return upper if len(upper) == 1 and upper.lower() == character else character
