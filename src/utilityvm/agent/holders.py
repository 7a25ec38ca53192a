"""Who in the guest uses a mount or a device. For the host's error, so that a person can do something about it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_AT_MOST: Final = 20


class MountLine(NamedTuple):
    """A line of /proc/self/mountinfo."""

    number: tuple[int, int]
    root: str
    path: str
    filesystem: str
    source: str
    read_only: bool
    is_written: bool  # the file system itself is not read-only, whatever this mount of it is


def mount_lines(mountinfo: Path = Path("/proc/self/mountinfo")) -> Iterator[MountLine]:
    """What is mounted. Source: proc_pid_mountinfo(5)."""
    with mountinfo.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fields, rest = before.split(), after.split()
            major, minor = fields[2].split(":")
            yield MountLine(
                (int(major), int(minor)),
                fields[3],
                _plain(fields[4]),
                rest[0],
                _plain(rest[1]),
                read_only="ro" in fields[5].split(","),
                is_written="rw" in rest[-1].split(","),
            )


def _plain(text: str) -> str:
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, sign)
    return text


def is_mounted(path: str, mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Is anything mounted at `path`? Looks for the words and parses nothing."""
    for sign, code in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        path = path.replace(sign, code)
    with open(mountinfo, "rb", buffering=0) as lines:
        data = lines.readall()
    return b" %s " % os.fsencode(path) in data


def of_mount(path: str, number: tuple[int, int]) -> list[str]:
    """Who uses the file system with device `number` that is mounted at `path`."""
    return [*_other_mounts(path, number), *_processes(os.makedev(*number))][:_AT_MOST]


def of_device(node: str, sysfs: str, numbers: set[tuple[int, int]]) -> list[str]:
    """Who uses a disk: `numbers` are its own and its partitions', `sysfs` is its folder."""
    found = []
    if not _is_free(node):
        found += [f"mounted at {line.path}" for line in mount_lines() if line.number in numbers]
        disk = Path(sysfs)
        for folder in (disk, *(entry.parent for entry in disk.glob("*/partition"))):
            for holder in (folder / "holders").glob("*"):
                with contextlib.suppress(OSError):
                    name = holder / "dm/name"
                    found.append(f"{holder.name} ({name.read_text().strip()})" if name.exists() else holder.name)
        with contextlib.suppress(OSError):
            for line in Path("/proc/swaps").read_text().splitlines()[1:]:
                with contextlib.suppress(OSError):
                    status = os.stat(line.split()[0])
                    if (os.major(status.st_rdev), os.minor(status.st_rdev)) in numbers:
                        found.append(f"swap on {line.split()[0]}")
        found = found or ["something in the kernel has it"]
    found += _openers({os.makedev(*number) for number in numbers})
    return found[:_AT_MOST]


def _is_free(node: str) -> bool:
    """Does nothing in the kernel (a mount, a mapping, swap) have the disk or a part of it? It has one claim."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _other_mounts(path: str, number: tuple[int, int]) -> list[str]:
    return [
        f"{line.filesystem} mounted at {line.path}"
        for line in mount_lines()
        if line.path.startswith(f"{path}/")  # below it, whatever it is
    ]


def _processes(device: int) -> Iterator[str]:
    """Processes that have something of the file system `device` open, or stand in it."""
    for pid in _pids():
        name = _name(pid)
        base = f"/proc/{pid}"
        for what, link in (("its working folder", "cwd"), ("its root", "root"), ("its program", "exe")):
            with contextlib.suppress(OSError):
                if os.stat(f"{base}/{link}").st_dev == device:
                    yield f"process {pid} ({name}) has {what} there: {os.readlink(f'{base}/{link}')}"
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"{base}/fd"):
                with contextlib.suppress(OSError):
                    if os.stat(f"{base}/fd/{fd}").st_dev == device:
                        yield f"process {pid} ({name}) has {os.readlink(f'{base}/fd/{fd}')} open"


def _openers(devices: set[int]) -> list[str]:
    """Processes that have one of the block devices itself open."""
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(f"/proc/{pid}/fd/{fd}")
                    if status.st_rdev in devices and (status.st_mode & 0o170000) == 0o060000:
                        found.append(f"process {pid} ({_name(pid)}) has {os.readlink(f'/proc/{pid}/fd/{fd}')} open")
    return found


def _pids() -> Iterator[int]:
    """Every process but us and the kernel's own threads, which are some fifty and hold no files."""
    ours = os.getpid()
    pending = [1]
    while pending:
        pid = pending.pop()
        if pid != ours:
            yield pid
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb", buffering=0) as children:
                    pending += map(int, children.read().split())


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
