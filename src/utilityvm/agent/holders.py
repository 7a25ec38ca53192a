"""Who in the guest uses a mount or a device. For the host's error, so that a person can do something about it.

Three things keep the kernel from letting go. What holds a *mount* makes umount(2) fail: open files, working folders,
programs, mapped files, loop devices, swap files, bound sockets, mounts below it. What holds its *file system* goes on
after the mount is gone: a bind mount elsewhere, a copy in another mount namespace, an overlay over it. What holds its
*device* does so beside any mount: whoever opened it, a mapping, a loop device, swap.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from utilityvm.agent import btrfs
from utilityvm.agent.mountinfo import (
    MountLine,
    lines_at,
    mount_lines,
    overlay_folders,
    plain,
    stands_alone,
    taken_along,
)
from utilityvm.bridge.guest_path import is_in

Number = tuple[int, int]

PROC: Final = "/proc"
SYS: Final = "/sys"
_AT_MOST: Final = 20
_LOOP_GET_STATUS64: Final = 0x4C05  # linux/loop.h
_LOOP_INFO: Final = struct.Struct("=Q Q Q 208x")  # struct loop_info64: the file's device, its inode, its own number


def of_mount(path: str) -> list[str]:
    """Who keeps what is mounted at `path` from being unmounted."""
    here = lines_at(path)
    if not here:
        return []
    below = [f"{line.filesystem} mounted at {line.path}" for line in mount_lines() if line.path.startswith(f"{path}/")]
    found = [*below, *_processes(here[-1].id), *_files(path, here[-1]), *_sockets(path)]
    return (found or list(_processes(here[-1].id, by_thread=True)))[:_AT_MOST]


def beside_mount(path: str, node: str) -> list[str]:
    """Who would go on using `node`, which is mounted or published at `path`, if it were unmounted there."""
    number = _number(node)
    if number is None:
        return []
    pids = list(_pids())
    found = _mappings(f"{SYS}/dev/block/{number[0]}:{number[1]}")
    is_alone = stands_alone(path, number)
    numbers = {number} if is_alone else {number, *_fellows(path, node)}
    elsewhere = list(_elsewhere(numbers, pids, path))
    if elsewhere or not is_alone:
        found += _other_mounts(path, node, numbers, elsewhere)
    return [*found, *_loops(number), *_swaps({number}), *_openers({number}, pids)][:_AT_MOST]


def after_unmount(node: str) -> list[str]:
    """Who keeps the file system of `node` alive though it is mounted nowhere that we see: empty if nobody does.

    An overlay can have been given folders by names that lead there no more, such as relative ones, and a mount can be
    detached, or held by a descriptor alone. None of these shows in a list; but the device is still taken.
    """
    if is_free(node):
        return []
    overlays = (line.path for line in mount_lines() if line.filesystem == "overlay" and line.path != "/")
    found = [f"something without a mount, which may be the overlay at {path}" for path in overlays]
    return (found or ["something that has no mount, such as an open file of one that was taken off the tree"])[
        :_AT_MOST
    ]


def of_device(node: str, sysfs: str, numbers: set[Number]) -> list[str]:
    """Who uses a disk: `numbers` are its own and its partitions', `sysfs` is its folder."""
    found = []
    if not is_free(node):
        found += [f"mounted at {line.path}" for line in mounts_of(numbers)]
        found += [text for _, text in _elsewhere(numbers, _pids())]
        disk = Path(sysfs)
        for folder in (disk, *(entry.parent for entry in disk.glob("*/partition"))):
            found += _mappings(str(folder))
        found += _swaps(numbers)
        fellows = {number for other in btrfs.fellows(node) if (number := _number(other))} if not found else set()
        found += (
            [f"a disk of the btrfs that is mounted at {line.path}" for line in mounts_of(fellows)] if fellows else []
        )
        found = found or ["something in the kernel has it"]
    for number in sorted(numbers):
        found += _loops(number)
    found += _openers(numbers, _pids())
    return found[:_AT_MOST]


def mounts_of(numbers: set[Number]) -> list[MountLine]:
    """The mounts of file systems on these devices, the newest last."""
    return [line for line in mount_lines() if _is_of(line, numbers)]


def _is_of(line: MountLine, numbers: set[Number]) -> bool:
    if line.number in numbers:
        return True
    # A btrfs has a number of its own; the device is what it was mounted from.
    return line.number[0] == 0 and line.source.startswith("/") and _number(line.source) in numbers


def _number(node: str) -> Number | None:
    """The number of a block device; None for what is none, or is gone."""
    try:
        status = os.stat(node)
    except OSError:
        return None
    return (os.major(status.st_rdev), os.minor(status.st_rdev)) if stat.S_ISBLK(status.st_mode) else None


def is_free(node: str) -> bool:
    """Does nothing in the kernel (a mount, a mapping, swap) have the disk or a part of it? It has one claim."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _fellows(path: str, node: str) -> set[Number]:
    """The other disks of the btrfs at `path`: any of them is what the kernel says that it was mounted from."""
    if all(line.filesystem != "btrfs" for line in lines_at(path)):
        return set()
    return {number for other in btrfs.fellows(node) if (number := _number(other))}


def _other_mounts(path: str, node: str, numbers: set[Number], elsewhere: list[tuple[MountLine, str]]) -> Iterator[str]:
    """Mounts that would stay, those over ours, and overlays that have the folder."""
    lines = list(mount_lines())
    target = None
    for line in reversed(lines):
        if line.path == path:
            if _is_of(line, numbers) or _is_published(line, node):
                target = line
                break
            yield f"{line.filesystem} mounted at {path}, over it"
    if target is None:
        return
    ending = taken_along(target, [*lines, *(line for line, _ in elsewhere)])
    yield from (f"mounted at {line.path}" for line in lines if _is_of(line, numbers) and line.id not in ending)
    yield from (text for line, text in elsewhere if line.id not in ending)
    for line in lines:
        if line.filesystem == "overlay" and any(_is_of_mount(folder, target) for folder in overlay_folders(line)):
            yield f"overlay mounted at {line.path}"


def _is_published(line: MountLine, node: str) -> bool:
    return line.filesystem == "devtmpfs" and line.root.startswith(f"/{os.path.basename(node)}")


def _is_of_mount(folder: str, target: MountLine) -> bool:
    """Is the folder below the mount, by its name or by where its name leads (a link, a mount over it)?"""
    if is_in(folder, target.path):
        return True
    try:
        return folder.startswith("/") and _mount_id(folder) == target.id
    except OSError:
        return False


def _elsewhere(numbers: set[Number], pids: Iterable[int], path: str = "") -> Iterator[tuple[MountLine, str]]:
    """Mounts of the devices in other mount namespaces than ours, and overlays there that name a folder at `path`."""
    seen = {os.readlink(f"{PROC}/self/ns/mnt")}
    for pid in pids:
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"{PROC}/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                where = f"the mount namespace of process {pid} ({_name(pid)})"
                for line in mount_lines(f"{PROC}/{pid}/mountinfo"):
                    if _is_of(line, numbers):
                        yield line, f"mounted at {line.path} in {where}"
                    elif path and line.filesystem == "overlay" and any(is_in(f, path) for f in overlay_folders(line)):
                        yield line, f"overlay mounted at {line.path} in {where}"


def _mappings(sysfs: str) -> list[str]:
    """The devices (device-mapper's, md's) that are made of this one."""
    found = []
    for holder in Path(sysfs, "holders").glob("*"):
        with contextlib.suppress(OSError):
            name = holder / "dm/name"
            found.append(
                f"{holder.name} ({name.read_text(errors='replace').strip()})" if name.exists() else holder.name
            )
    return found


def _processes(mount_id: int, *, by_thread: bool = False) -> Iterator[str]:
    """Processes that have something of a mount open, stand in it, or have it in their memory."""
    for pid in _pids():
        name = _name(pid)
        for base in _bases(pid, by_thread=by_thread):
            yield from (f"process {pid} ({name}) has {what}" for what in _uses(base, mount_id))


def _uses(base: str, mount_id: int) -> Iterator[str]:
    for what, link in (("its working folder", "cwd"), ("its root", "root"), ("its program", "exe")):
        with contextlib.suppress(OSError):
            if _mount_id(f"{base}/{link}") == mount_id:
                yield f"{what} there: {os.readlink(f'{base}/{link}')}"
    is_open = set[str]()
    for fd in _entries(f"{base}/fd"):
        with contextlib.suppress(OSError):
            if _mount_id_in(f"{base}/fdinfo/{fd}") == mount_id:
                is_open.add(os.readlink(f"{base}/fd/{fd}"))
    yield from (f"{path} open" for path in sorted(is_open))
    mapped = set[str]()
    for area in _entries(f"{base}/map_files"):
        with contextlib.suppress(OSError):
            if _mount_id(f"{base}/map_files/{area}") == mount_id:
                mapped.add(os.readlink(f"{base}/map_files/{area}"))
    mapped -= is_open
    with contextlib.suppress(OSError):
        mapped.discard(os.readlink(f"{base}/exe"))
    yield from (f"{path} in its memory" for path in sorted(mapped))


def _bases(pid: int, *, by_thread: bool = False) -> Iterator[str]:
    """The folders of /proc that show what a process has: its own, which is that of its first thread.

    If that one has ended, the folder shows nothing of what the others have open. And each may have files and a working
    folder of its own, unshare(2), which costs too much to look for each time: `by_thread` does.
    """
    base = f"{PROC}/{pid}"
    yield base
    if by_thread or not _entries(f"{base}/fd"):
        yield from (f"{base}/task/{thread}" for thread in _entries(f"{base}/task") if thread != str(pid))


def _entries(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _mount_id(path: str) -> int:
    """The mount that what a link of /proc leads to was reached by."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _mount_id_in(f"{PROC}/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def _mount_id_in(fdinfo: str) -> int:
    with open(fdinfo, errors="replace") as lines:
        for line in lines:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    return 0


def _files(path: str, line: MountLine) -> Iterator[str]:
    """What the kernel itself has open of a file system's files: backing files of loop devices, swap files."""
    device = os.stat(path).st_dev
    for name, (file_device, _) in _loop_devices():
        if file_device in (device, os.makedev(*line.number)):
            yield f"{name}, a loop device on a file of it"
    for swap in swap_paths():
        with contextlib.suppress(OSError):
            status = os.stat(swap)
            if status.st_dev == device and stat.S_ISREG(status.st_mode):
                yield f"swap in {swap}"


def _sockets(path: str) -> Iterator[str]:
    """Sockets that are bound to a name below `path`."""
    with contextlib.suppress(OSError), open(f"{PROC}/net/unix", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=7)
            if len(fields) == 8 and is_in(fields[7], path):
                yield f"a socket at {fields[7]}"


def _loops(number: Number) -> list[str]:
    """Loop devices on a block device. They claim nothing, so only asking them shows them."""
    device = os.makedev(*number)
    return [f"{name}, a loop device on it" for name, (_, own) in _loop_devices() if own == device]


def _loop_devices() -> Iterator[tuple[str, tuple[int, int]]]:
    for name in loop_names():
        with contextlib.suppress(OSError):
            yield name, _loop_info(f"/dev/{name}")


def loop_names() -> list[str]:
    """The loop devices that have a file or a device behind them."""
    with contextlib.suppress(OSError):
        names = (name for name in os.listdir(f"{SYS}/block") if name.startswith("loop"))
        return sorted(name for name in names if os.path.exists(f"{SYS}/block/{name}/loop"))
    return []


def _loop_info(node: str) -> tuple[int, int]:
    """The file system of the file that is behind a loop device, and the number of the device that it is, or 0."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = bytearray(_LOOP_INFO.size)
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        device, _, own = _LOOP_INFO.unpack(info)
        return device, own
    finally:
        os.close(fd)


def _swaps(numbers: set[Number]) -> list[str]:
    return [f"swap on {path}" for path in swap_paths() if _number(path) in numbers]


def swap_paths() -> list[str]:
    """The devices and files that are swapped to."""
    with contextlib.suppress(OSError), open(f"{PROC}/swaps", errors="surrogateescape", newline="\n") as lines:
        return [plain(re.split("[ \t]", line, maxsplit=1)[0]) for line in lines.readlines()[1:]]
    return []


def _openers(numbers: set[Number], pids: Iterable[int]) -> list[str]:
    """Processes that have one of the block devices itself open."""
    found = []
    for pid in pids:
        for link in (f"{base}/fd/{fd}" for base in _bases(pid) for fd in _entries(f"{base}/fd")):
            if _number(link) in numbers:
                with contextlib.suppress(OSError):
                    found.append(f"process {pid} ({_name(pid)}) has {os.readlink(link)} open")
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
            for task in os.listdir(f"{PROC}/{pid}/task"):
                with open(f"{PROC}/{pid}/task/{task}/children", "rb", buffering=0) as children:
                    pending += map(int, children.read().split())


def _name(pid: int) -> str:
    """What the process is called. The kernel cuts a name after 15 bytes, also in the middle of a character."""
    try:
        return Path(f"{PROC}/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
