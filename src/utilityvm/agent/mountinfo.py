"""What is mounted, as the kernel lists it. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from utilityvm.bridge.guest_path import is_in

_OWN = "/proc/self/mountinfo"
_OVERLAY = b" - overlay "
_CODES = (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012"))  # of paths
_CODED = re.compile(r"\\([0-7]{3})")  # sources and options have more of them, such as \\043 for # and \\054 for ,
_OVERLAY_FOLDERS = ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir")
_UNTIL_COLON = re.compile(r"(?:\\.|[^:\\])+", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class MountLine(NamedTuple):
    """A line of mountinfo: one mount."""

    number: tuple[int, int]
    root: str
    path: str
    filesystem: str
    source: str
    read_only: bool
    is_written: bool  # the file system itself is not read-only, whatever this mount of it is
    id: int = 0
    parent: int = 0
    peers: int = 0  # the group of mounts that it tells what happens below it; 0: none
    master: int = 0  # the group that it is told by
    super_options: str = ""  # as the kernel writes them: a comma within one is \\054


def mount_lines(mountinfo: str | Path | None = None) -> Iterator[MountLine]:
    """Every mount of a mount namespace, in the order in which they came."""
    # Only a blank and a line feed part: the kernel escapes no other blanks, and names may have them.
    with open(mountinfo or _OWN, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, rest = before.split(" "), after.split(" ")
            major, minor = fields[2].split(":")
            groups = dict(word.split(":") for word in fields[6:] if ":" in word)
            yield MountLine(
                (int(major), int(minor)),
                fields[3],
                plain(fields[4]),
                rest[0],
                plain(rest[1]),
                read_only="ro" in fields[5].split(","),
                is_written="rw" in rest[-1].split(","),
                id=int(fields[0]),
                parent=int(fields[1]),
                peers=int(groups.get("shared", 0)),
                master=int(groups.get("master", 0)),
                super_options=rest[-1],
            )


def lines_at(path: str, mountinfo: str | Path | None = None) -> list[MountLine]:
    """What is mounted at `path`, what one sees there last."""
    return [line for line in mount_lines(mountinfo) if line.path == path]


def is_mounted(path: str, mountinfo: str | Path | None = None) -> bool:
    """Is anything mounted at `path`? Looks for the word and parses only the lines that have it."""
    needle = b" %s " % os.fsencode(_written(path))
    with open(mountinfo or _OWN, "rb", buffering=0) as file:
        data = file.readall()
    found = data.find(needle)
    while found >= 0:
        begin = data.rfind(b"\n", 0, found) + 1
        if data.count(b" ", begin, found) == 3:  # it is the mount point, and not the folder that is shown there
            return True
        found = data.find(needle, found + 1)
    return False


def stands_alone(path: str, number: tuple[int, int], mountinfo: str | Path | None = None) -> bool:
    """Is there one mount at `path`, one of the device, none below, and no overlay but the system's own?

    Looks for words and parses nothing, as every unmount asks. False may also mean that it cannot tell so simply.
    """
    name = os.fsencode(_written(path))
    with open(mountinfo or _OWN, "rb", buffering=0) as file:
        data = file.readall()
    at_path, of_device = b" %s " % name, b" %d:%d " % number
    if data.count(at_path) != 1 or data.count(of_device) != 1:
        return False
    begin, end = data.find(of_device), data.find(at_path)
    is_one_line = begin < end and b"\n" not in data[begin:end]
    return is_one_line and b" %s/" % name not in data and not _has_overlays(data)


def _has_overlays(data: bytes) -> bool:
    """Is there an overlay that is not the root? Its folders may be called in many ways, and so are not looked at."""
    root, others = b"", set[bytes]()
    found = data.find(_OVERLAY)
    while found >= 0:
        fields = data[data.rfind(b"\n", 0, found) + 1 : found].split(b" ", 5)
        if fields[4] == b"/":
            root = fields[2]
        others.add(fields[2])
        found = data.find(_OVERLAY, found + 1)
    return bool(others - {root})


def overlay_folders(line: MountLine) -> Iterator[str]:
    """The folders that an overlay is made of, as they were called when it was mounted.

    A colon or backslash in a name is escaped for overlayfs, and then all of it once more for mountinfo. Both readings
    of a backslash are given: newer kernels take some names as they are.
    """
    for word in line.super_options.split(","):
        name, _, value = word.partition("=")
        if name in _OVERLAY_FOLDERS:
            value = plain(value)
            if "\\" in value or name.endswith("+"):
                yield value
            for part in _UNTIL_COLON.findall(value):
                yield _ESCAPED.sub(r"\1", part)


def taken_along(target: MountLine, lines: Iterable[MountLine]) -> set[int]:
    """The ids of the mounts that end with `target`, since what happens where it is is passed on to where they are.

    `lines` are those of its namespace and of any others.
    """
    by_id = {line.id: line for line in lines}
    parent = by_id.get(target.parent)
    if parent is None:
        return {target.id}
    told = {parent.peers} - {0}
    grown = -1
    while grown != len(told):
        grown = len(told)
        told |= {line.peers for line in by_id.values() if line.peers and line.master in told}
    place, found = _place(target, parent), {target.id}
    for line in by_id.values():
        above = by_id.get(line.parent)
        if (
            above
            and (above.peers in told or above.master in told)
            and (line.number, line.root) == (target.number, target.root)
            and _place(line, above) == place
        ):
            found.add(line.id)
    return found


def shows(path: str, folders: Sequence[str], mountinfo: str | Path | None = None) -> str | None:
    """Which of `folders` would a mount at `path` also appear in, above or below, as a bind mount shows it at `path`?"""
    lines = list(mount_lines(mountinfo))
    if (here := _file_at(path, lines)) is None:
        return None
    number, name = here
    for folder in folders:
        there = _file_at(folder, lines)
        if there and there[0] == number and (is_in(name, there[1]) or is_in(there[1], name)):
            return folder
    return None


def _file_at(path: str, lines: Sequence[MountLine]) -> tuple[tuple[int, int], str] | None:
    """The file system that `path` is on, and its name there."""
    above = [line for line in lines if line.path == "/" or is_in(path, line.path)]
    if not above:
        return None
    line = max(reversed(above), key=lambda one: len(one.path.rstrip("/")))
    return line.number, os.path.normpath(os.path.join(line.root, os.path.relpath(path, line.path)))


def _place(line: MountLine, parent: MountLine) -> tuple[tuple[int, int], str]:
    """Where a mount is: the file system that it is on, and the folder in that."""
    return parent.number, os.path.normpath(os.path.join(parent.root, os.path.relpath(line.path, parent.path)))


def _written(path: str) -> str:
    for sign, code in _CODES:
        path = path.replace(sign, code)
    return path


def plain(text: str) -> str:
    """What the kernel wrote with some signs as backslash and three octal digits."""
    return _CODED.sub(lambda code: chr(int(code[1], 8)), text)
