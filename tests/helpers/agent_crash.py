"""Runs inside the VM: the agent's table of disks is killed at each point of a mount and of an unmount.

The disk is at 0:1, and nobody else uses it. The words after it are the first point, and the step to the next. For each
way of mounting it prints how many tables were killed.
"""

from __future__ import annotations

import base64
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utilityvm.agent import disks, dm, folders, mountinfo, mounting

STATE = Path("/run/agent-crash/mounts.json")
TARGET = "/made/for/it"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"BlockDev": True},
    "encrypted": {"Utilityvm": {"Key": base64.b64encode(bytes(64)).decode()}},
}


class Points:
    def __init__(self, kill_at: int) -> None:
        self.left = kill_at

    def at(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.at()
            result = plain(*args, **kwargs)
            self.at()
            return result

        setattr(owner, name, wrapped)


def table() -> disks.DiskTable:
    words = Path("/proc/cmdline").read_text().split()
    (controllers,) = (word.partition("=")[2] for word in words if word.startswith("utilityvm.scsi="))
    return disks.DiskTable(controllers.split(","), state=STATE)


def killed_in(act: Callable[[disks.DiskTable], None], kill_at: int) -> bool:
    child = os.fork()
    if child == 0:
        points = Points(kill_at)
        for owner, names in (
            (dm, ("open_crypt", "close")),
            (mounting, ("mount", "bind", "unmount")),
            (folders, ("_remove_made", "_make")),
            (disks.DiskTable, ("_save",)),
            (os, ("mkdir", "rmdir", "rename")),
            (Path, ("unlink", "touch")),
        ):
            for name in names:
                points.around(owner, name)
        act(table())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def check_clean(what: str) -> None:
    assert not mountinfo.is_mounted(TARGET), what
    assert not os.path.lexists("/made"), what
    assert not list(Path("/sys/block").glob("dm-*")), what
    assert sorted(path.name for path in STATE.parent.iterdir()) in ([], [STATE.name]), what


class Way:
    """One way of mounting, and what is done with it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = {"MountPath": TARGET, "Lun": 1, **settings}

    def add(self, one: disks.DiskTable) -> None:
        one.add(self._settings, time.monotonic() + 60)

    def remove(self, one: disks.DiskTable) -> None:
        one.remove(self._settings, time.monotonic() + 60)

    def make_file_system(self) -> None:
        extension = {**self._settings["Utilityvm"], "Reformat": True}
        made = Way({**self._settings, "EnsureFilesystem": True, "Filesystem": "ext4", "Utilityvm": extension})
        made.add(table())
        made.remove(table())


def kill_everywhere(name: str, way: Way, numbers: range) -> int:
    """At each of the points that there are; gives how many tables were killed."""
    killed = 0
    for act in (way.add, way.remove):
        for number in numbers:
            if act == way.remove:
                way.add(table())
            was_killed = killed_in(act, number)
            what = f"{name}: killed in {act.__name__} at {number}"
            next_one = table()
            is_there = bool(next_one.mounts())
            assert is_there == mountinfo.is_mounted(TARGET), what
            if not is_there:
                check_clean(what)
                way.add(next_one)
            way.remove(next_one)
            check_clean(what)
            if not was_killed:
                break
            killed += 1
    return killed


def main() -> None:
    first, every = map(int, sys.argv[1:])
    for name, settings in WAYS.items():
        way = Way(settings)
        if name == "encrypted":
            way.make_file_system()
        sys.stdout.write(f"{name} {kill_everywhere(name, way, range(first, sys.maxsize, every))}\n")


main()
