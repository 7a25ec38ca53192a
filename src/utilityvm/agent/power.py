"""The end of the VM: programs end, disks are unmounted, and the power goes."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Final

from utilityvm.agent import mountinfo
from utilityvm.agent.processes import all_processes, send

_RB_POWER_OFF: Final = 0x4321FEDC  # linux/reboot.h, LINUX_REBOOT_CMD_POWER_OFF
_RB_DISABLE_CAD: Final = 0x00000000
_MS_RDONLY, _MS_REMOUNT, _MNT_DETACH = 1, 32, 2  # linux/mount.h
_TERM_S: Final = 1.0
_KILL_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.01

_libc = ctypes.CDLL(None, use_errno=True)


def off() -> None:
    """End every program, unmount every disk, and turn the VM off. Does not return."""
    end_programs()
    unmount_disks()
    os.sync()
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


def unmount_disks() -> None:
    """Unmount what is on a block device, the last mounted first; what will not go is made read-only."""
    for line in reversed(list(mountinfo.mount_lines())):
        if line.source.startswith("/dev/") and line.path != "/":
            target = line.path.encode("utf-8", "surrogateescape")
            if _libc.umount2(target, 0):
                _libc.mount(None, target, None, _MS_REMOUNT | _MS_RDONLY, None)
                _libc.umount2(target, _MNT_DETACH)


def _others() -> list[int]:
    return [process.pid for process in all_processes() if process.pid not in (1, os.getpid())]
