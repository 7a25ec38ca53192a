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

from utilityvm.errors import InvalidRequest

_LITERAL = re.compile(r"[\\/]{2}[.?][\\/]|\\\?\?\\")  # \\?\ \\.\ \??\
_UNC = re.compile(r"UNC[\\/]", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_GUEST_PATH = re.compile(r"/?(?:([A-Za-z]):)?(/.*)", re.DOTALL)
# Source: Windows "Naming Files, Paths, and Namespaces". `..` ends in a dot; a lone surrogate is no text.
_BAD_NAME = re.compile(r'[\x00-\x1f<>:"|?*\ud800-\udfff]|[. ]$')
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_MAX_NAME = 255


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


def checked_guest_path(path: PurePosixPath | str) -> PurePosixPath:
    """A path in a Windows guest, as its user may write it, in one spelling: `C:\\data` and `/data` are `/C:/data`.

    Raises:
        InvalidRequest: it is relative, a drive's root, another machine's, or has a name that Windows has not.
    """
    text = re.sub(r"^(//\?/|/\?\?/)(?=[A-Za-z]:/)", "", str(path).replace("\\", "/"))
    match = _GUEST_PATH.fullmatch(text)
    if match is None or text.startswith("//"):
        raise _bad_guest_path(path, "it is not absolute on a drive of the guest's")
    names = [name for name in match[2].split("/") if name not in ("", ".")]
    if not names:
        raise _bad_guest_path(path, "a drive's root is taken")
    for name in names:
        if _BAD_NAME.search(name) or _DEVICE.fullmatch(name) or len(name) > _MAX_NAME:
            raise _bad_guest_path(path, f"Windows has no file of the name {name!r}")
    return PurePosixPath(f"/{(match[1] or 'C').upper()}:", *names)


def _bad_guest_path(path: PurePosixPath | str, why: str) -> InvalidRequest:
    return InvalidRequest(f"guest path {str(path)!r}: {why}", remedy="write it as C:\\mounts\\data")


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
