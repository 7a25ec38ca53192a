"""The end of the VM: programs end, disks are unmounted, and the power goes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Final

from utilityvm.agent import dm, freezing, holders, mountinfo
from utilityvm.agent.faults import Fault
from utilityvm.agent.mountinfo import MountLine
from utilityvm.agent.processes import all_processes, send

_RB_POWER_OFF: Final = 0x4321FEDC  # linux/reboot.h, LINUX_REBOOT_CMD_POWER_OFF
_RB_DISABLE_CAD: Final = 0x00000000
_MS_RDONLY, _MS_REMOUNT = 1, 32  # linux/mount.h
_UMOUNT_NOFOLLOW: Final = 8
_LOOP_CLR_FD: Final = 0x4C01  # linux/loop.h
_TERM_S: Final = 1.0
_KILL_S: Final = 1.0
_UNMOUNT_S: Final = 4.0
_PASSING_S: Final = 1.0  # for what lets go a moment after its program has ended
_LOOK_AGAIN_S: Final = 0.01

# The system's own; see `init`. All else is unmounted: whatever it is, it may hold a disk.
_SYSTEM: Final = {
    ("/", "overlay"),
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/sys/fs/cgroup", "cgroup2"),
    ("/dev", "devtmpfs"),
    ("/dev/pts", "devpts"),
    ("/dev/shm", "tmpfs"),
    ("/run", "tmpfs"),
    ("/tmp", "tmpfs"),
}

_libc = ctypes.CDLL(None, use_errno=True)


def off() -> None:
    """End every program, unmount every disk, and turn the VM off. Does not return."""
    try:
        prepare(time.monotonic() + _UNMOUNT_S)
    finally:
        now()


def prepare(deadline: float) -> list[str]:
    """End every program and unmount every disk; give the file systems that are not clean, each with the reason."""
    end_programs()
    unclean = unmount_disks(deadline)
    os.sync()
    return unclean


def now() -> None:
    """Turn the VM off. Does not return."""
    _libc.reboot(ctypes.c_uint(_RB_POWER_OFF))


def disable_reboot_key() -> None:
    """Ctrl-Alt-Del becomes a SIGINT to process 1, in place of a reboot without a word to anyone."""
    _libc.reboot(ctypes.c_uint(_RB_DISABLE_CAD))


def end_programs() -> None:
    """Ask every process but the first and ourselves to end, and kill what has not ended within a second."""
    for number, seconds in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
        deadline = time.monotonic() + seconds
        for pid in _others():
            send(pid, number)
        while _others() and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_S)


def unmount_disks(deadline: float) -> list[str]:
    """Unmount everything, the last mounted first, with the swap, loops and mappings that hold it; what stays is made
    read-only, which leaves it clean. Give those that are not clean, each with the reason.

    One may let another go, so this goes round until nothing moves.
    """
    lines = _written()
    paths = {line.number: line.path for line in reversed(lines)}
    nodes = {line.source: line.path for line in reversed(lines) if line.source.startswith("/dev/")}
    give_up = time.monotonic() + _PASSING_S
    for path in holders.swap_paths():
        _libc.swapoff(os.fsencode(path))
    while True:
        has_moved = _unmount_once()
        _let_go_of_devices()
        if not _written() and all(holders.is_free(node) for node in nodes):
            return []
        time_is_up = time.monotonic() >= (deadline if has_moved else min(give_up, deadline))
        if time_is_up:
            break
        time.sleep(_LOOK_AGAIN_S)
    for line in reversed(_written()):
        _make_read_only(line.path)
    return _unclean(paths, nodes)


def _unclean(paths: dict[tuple[int, int], str], nodes: dict[str, str]) -> list[str]:
    unclean = {}
    for line in _written():
        users = holders.of_mount(line.path)
        unclean[paths.get(line.number, line.path)] = users[0] if users else "the kernel does not let go of it"
    mounted = {line.source for line in mountinfo.mount_lines()}
    for node, path in nodes.items():
        if node not in mounted and (users := holders.after_unmount(node)):
            unclean.setdefault(path, f"it is held by {users[0]}")
    return [f"the file system that was mounted at {path} is not clean: {why}" for path, why in unclean.items()]


def _written() -> list[MountLine]:
    """The mounts of file systems on disks that can be written to."""
    on_disks = freezing.types_on_disks()
    return [line for line in mountinfo.mount_lines() if line.filesystem in on_disks and line.is_written]


def _unmount_once() -> bool:
    """Unmount what can be; True if anything could."""
    has_moved = False
    lines = list(mountinfo.mount_lines())
    written = {line.id for line in _written()}
    for line in reversed(lines):
        if (line.path, line.filesystem) in _SYSTEM:
            continue
        if line.id in written and sum(other.number == line.number for other in lines) == 1:
            # Something that shows nowhere may keep the file system alive when its last mount is gone.
            _make_read_only(line.path)
        if not _libc.umount2(os.fsencode(line.path), _UMOUNT_NOFOLLOW):
            has_moved = True
            lines.remove(line)
    return has_moved


def _make_read_only(path: str) -> None:
    _libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(_MS_REMOUNT | _MS_RDONLY), None)


def _let_go_of_devices() -> None:
    """Take apart the loop devices and the mappings that nothing uses."""
    for name in holders.loop_names():
        with contextlib.suppress(OSError):
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CLR_FD, 0)
            finally:
                os.close(fd)
    for mapping in Path(holders.SYS, "block").glob("dm-*/dm/name"):
        with contextlib.suppress(OSError, Fault):
            dm.close(mapping.read_text(errors="surrogateescape").strip())


def _others() -> list[int]:
    return [process.pid for process in all_processes() if process.pid not in (1, os.getpid())]
