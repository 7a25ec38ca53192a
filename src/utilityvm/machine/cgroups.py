"""A control group (cgroup v2) for each QEMU, where a part of their tree is ours: a bound on memory and threads.

The tree belongs to its manager, on most machines systemd. So a VM gets a cgroup only where the manager allows it: in
the parent of our own cgroup, or in our own, if that is marked as delegated (`user.delegate`, as systemd marks it); or
in the one that UTILITYVM_CGROUP names. Only QEMU is moved. The kernel cannot bound what is below a cgroup that has
processes itself, so there the layer is off.

A cgroup is named after the process that is put into it. Who makes the next one removes those whose process has ended.

Source: Linux Documentation/admin-guide/cgroup-v2.rst; systemd docs/CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

VARIABLE: Final = "UTILITYVM_CGROUP"
_CONTROLLERS: Final = ("memory", "pids")
_DELEGATED: Final = ("user.delegate", "trusted.delegate")
_NAME: Final = "utilityvm-"


class Unavailable(Exception):
    """VMs get no cgroup here; says why."""


def place() -> Path:
    """The folder of the cgroup in which VMs get theirs.

    Raises:
        Unavailable: there is none.
    """
    root = _mounted()
    if named := os.environ.get(VARIABLE):
        candidates = [root / named.removeprefix(str(root)).lstrip("/")]
    else:
        own = root / _own().lstrip("/")
        candidates = [folder for folder in dict.fromkeys((own.parent, own)) if folder.is_relative_to(root)]
        candidates = [folder for folder in candidates if _is_delegated(folder)]
    if not candidates:
        raise Unavailable(f"no cgroup is delegated to this process; name one with {VARIABLE}")
    why: Unavailable | None = None
    for folder in candidates:
        try:
            _enable(folder)
        except Unavailable as error:
            why = error
        else:
            return folder
    assert why is not None
    raise why


def put(pid: int, *, memory_bytes: int, threads: int) -> Path:
    """Bound a process that was just started, and all that it starts; gives the folder of its cgroup.

    Blocks for about ten milliseconds: the kernel waits until each processor has seen it.

    Raises:
        Unavailable: as `place`; or the kernel refused. It is where it was.
    """
    parent = place()
    sweep(parent)
    folder = parent / f"{_NAME}{pid}"
    try:
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(str(memory_bytes))
        (folder / "pids.max").write_text(str(threads))
        (folder / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        remove(folder)
        raise Unavailable(f"cannot put process {pid} into {folder}: {error.strerror}") from error
    return folder


def remove(folder: Path) -> None:
    """Remove a cgroup that `put` made. One with a process in it stays; no error if it is gone."""
    if folder.name.startswith(_NAME):
        with contextlib.suppress(OSError):
            folder.rmdir()


def sweep(parent: Path) -> None:
    """Remove those whose process has ended, and nobody removed them."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            pid = entry.name.removeprefix(_NAME)
            if entry.name.startswith(_NAME) and pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                remove(Path(entry.path))


def _enable(folder: Path) -> None:
    control = folder / "cgroup.subtree_control"
    try:
        missing = set(_CONTROLLERS) - set(control.read_text().split())
        if missing:
            control.write_text(" ".join(f"+{name}" for name in sorted(missing)))
    except OSError as error:
        text = "processes are in it; they have to be in one below it" if error.errno == errno.EBUSY else error.strerror
        raise Unavailable(f"cannot bound what is in the cgroup {folder}: {text}") from error
    if not os.access(folder, os.W_OK):
        raise Unavailable(f"the cgroup {folder} cannot be written")


def _mounted() -> Path:
    """Where the tree is."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    raise Unavailable("there is no cgroup v2 here")


def _own() -> str:
    """Our cgroup. Source: cgroups(7): the line of v2 begins with 0."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise Unavailable("this process is in no cgroup v2")


def _is_delegated(folder: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False
