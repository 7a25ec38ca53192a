"""The VM's init: prepares the system, starts the agent, reaps what is left, and starts the agent again if it dies.

Two processes, because one cannot both reap every orphan and wait for the programs that it runs itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Final, NoReturn

_RB_POWER_OFF: Final = 0x4321FEDC  # linux/reboot.h, LINUX_REBOOT_CMD_POWER_OFF
_RB_DISABLE_CAD: Final = 0x00000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8  # linux/mount.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Run as process 1, or as an ordinary process beside a system that is already up."""
    if os.getpid() == 1:
        _prepare()
        while True:
            _reap_until_end_of(_start_agent())
    _serve()
    sys.exit(0)


def _prepare() -> None:
    os.environ.clear()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    os.umask(0o022)
    flags = _MS_NOSUID | _MS_NODEV
    for source, target, kind, options in (
        ("tmpfs", "/run", "tmpfs", "mode=0755"),
        ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
        ("devpts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ):
        try:
            os.makedirs(target, exist_ok=True)
        except OSError:
            continue
        _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    # Mounts of a program's own namespace must not come back into ours, nor ours be hidden from it.
    _libc.mount(b"none", b"/", None, 0x4000 | 0x100000, None)  # MS_REC | MS_SHARED
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")
    socket.sethostname(Path("/etc/hostname").read_text().strip() or "utilityvm")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        current = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", current | _IFF_UP))
    _libc.reboot(_RB_DISABLE_CAD)


def _start_agent() -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    try:
        _serve()
    finally:
        os._exit(1)


def _reap_until_end_of(agent: int) -> None:
    while True:
        pid, status = os.wait()
        if pid == agent:
            print(f"utilityvm: the agent ended with {status:#x} and is started again", flush=True)
            return


def _serve() -> None:
    # Imported here so that process 1 stays small, and the agent is as new after a restart.
    from utilityvm.agent.disks import DiskTable
    from utilityvm.agent.port import Port, find_port
    from utilityvm.agent.serve import Serve

    port = Port(os.open(find_port(), os.O_RDWR | os.O_CLOEXEC))
    Serve(port, DiskTable(_controllers()), shutdown=_power_off).forever()


def _controllers() -> list[str]:
    for word in Path("/proc/cmdline").read_text().split():
        if word.startswith("utilityvm.scsi="):
            return word.partition("=")[2].split(",")
    return []


def _power_off() -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in (1, os.getpid()):
                try:
                    # Kernel threads take no signals.
                    os.kill(int(entry), sign)
                except OSError:
                    pass
    os.sync()
    _libc.reboot(ctypes.c_uint(_RB_POWER_OFF))
