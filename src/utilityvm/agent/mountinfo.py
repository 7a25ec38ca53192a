"""What is mounted, as the kernel lists it. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_OWN = "/proc/self/mountinfo"
_CODES = (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012"))


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
    super_options: str = ""


def mount_lines(mountinfo: str | Path = _OWN) -> Iterator[MountLine]:
    """Every mount of a mount namespace, in the order in which they came."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fields, rest = before.split(), after.split()
            major, minor = fields[2].split(":")
            groups = dict(word.split(":") for word in fields[6:] if ":" in word)
            yield MountLine(
                (int(major), int(minor)),
                fields[3],
                _plain(fields[4]),
                rest[0],
                _plain(rest[1]),
                read_only="ro" in fields[5].split(","),
                is_written="rw" in rest[-1].split(","),
                id=int(fields[0]),
                parent=int(fields[1]),
                peers=int(groups.get("shared", 0)),
                master=int(groups.get("master", 0)),
                super_options=_plain(rest[-1]),
            )


def lines_at(path: str, mountinfo: str | Path = _OWN) -> list[MountLine]:
    """What is mounted at `path`, what one sees there last."""
    return [line for line in mount_lines(mountinfo) if line.path == path]


def is_mounted(path: str, mountinfo: str | Path = _OWN) -> bool:
    """Is anything mounted at `path`? Looks for the word and parses only the lines that have it."""
    needle = b" %s " % os.fsencode(_written(path))
    with open(mountinfo, "rb", buffering=0) as file:
        data = file.readall()
    found = data.find(needle)
    while found >= 0:
        begin = data.rfind(b"\n", 0, found) + 1
        if data.count(b" ", begin, found) == 3:  # it is the mount point, and not the folder that is shown there
            return True
        found = data.find(needle, found + 1)
    return False


def stands_alone(path: str, number: tuple[int, int], mountinfo: str | Path = _OWN) -> bool:
    """Is there one mount at `path`, one of the device, none below, and no overlay that names the path?

    Looks for words and parses nothing, as every unmount asks. False may also mean that it cannot tell so simply.
    """
    name = os.fsencode(_written(path))
    with open(mountinfo, "rb", buffering=0) as file:
        data = file.readall()
    once = data.count(b" %s " % name) == data.count(b" %d:%d " % number) == 1
    return once and not any(sign + name in data for sign in (b"=", b":")) and b" %s/" % name not in data


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


def _place(line: MountLine, parent: MountLine) -> tuple[tuple[int, int], str]:
    """Where a mount is: the file system that it is on, and the folder in that."""
    return parent.number, os.path.normpath(os.path.join(parent.root, os.path.relpath(line.path, parent.path)))


def _written(path: str) -> str:
    for sign, code in _CODES:
        path = path.replace(sign, code)
    return path


def _plain(text: str) -> str:
    for sign, code in reversed(_CODES):
        text = text.replace(code, sign)
    return text
