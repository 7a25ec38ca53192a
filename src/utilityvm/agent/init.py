"""The VM's init: prepares the system, starts the agent, reaps what is left, and starts the agent again if it dies.

Two processes, because one cannot both reap every orphan and wait for the programs that it runs itself. The root is a
writable overlay that the initramfs made, over a root disk that is read-only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from typing import Final, NoReturn

from utilityvm.agent import power

# linux/mount.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SHARED = 2, 4, 8, 0x4000, 0x100000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
_PORT_S: Final = 30.0
_RESTART_S: Final = 1.0  # an agent that dies is started so often at the most

_SYSTEM_MOUNTS: Final = (
    ("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
)
_DEV_LINKS: Final = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Run as process 1, or as an ordinary process beside a system that is already up."""
    if os.getpid() != 1:
        _serve()
    _prepare()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPWR):
        signal.signal(number, lambda _number, _frame: power.off())
    while True:
        begun = time.monotonic()
        _reap_until_end_of(_start_agent())
        # What the agent had started is nobody's now, and would disturb the next one.
        power.end_programs()
        time.sleep(max(0.0, begun + _RESTART_S - time.monotonic()))


def _prepare() -> None:
    os.environ.clear()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    os.umask(0o022)
    os.chdir("/")
    for source, target, kind, flags, options in _SYSTEM_MOUNTS:
        if not os.path.ismount(target):
            _mount(source, target, kind, flags, options)
    # Mounts of a program's own namespace must not come back into ours, nor ours be hidden from it.
    _mount("none", "/", None, _MS_REC | _MS_SHARED, "")
    for name, link in _DEV_LINKS:
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(link, f"/dev/{name}")
    try:
        with open("/etc/hostname") as file:
            socket.sethostname(file.read().strip() or "utilityvm")
        _raise_loopback()
    except OSError as error:
        _say(f"the network is not as it should be: {error}")
    _end_thrashing_early()
    power.disable_reboot_key()


def _end_thrashing_early() -> None:
    """Without swap, a VM whose memory runs out reads its programs from the disk again and again, for minutes.

    With this the kernel ends the largest program as soon as it cannot keep what was used in the last second.
    Source: Linux Documentation/admin-guide/mm/multigen_lru.rst.
    """
    for name, value in (("enabled", "y"), ("min_ttl_ms", "1000")):
        try:
            with open(f"/sys/kernel/mm/lru_gen/{name}", "w") as file:
                file.write(value)
        except OSError:
            return  # a kernel that has no such thing


def _mount(source: str, target: str, kind: str | None, flags: int, options: str) -> None:
    try:
        os.makedirs(target, exist_ok=True)
    except OSError as error:
        _say(f"cannot make {target}: {error.strerror}")
        return
    if _libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, options.encode()):
        _say(f"cannot mount {target}: {os.strerror(ctypes.get_errno())}")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        current = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", current | _IFF_UP))


def _start_agent() -> int:
    pid = os.fork()
    if pid:
        return pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPWR):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    try:
        # When memory runs out the kernel kills a program, and not who has to tell of it. See `run` for the programs.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
        _serve()
    except BaseException as error:
        _say(f"the agent failed: {type(error).__name__}: {error}")
    finally:
        os._exit(1)


def _reap_until_end_of(agent: int) -> None:
    while True:
        pid, status = os.wait()
        if pid == agent:
            _say(f"the agent ended with {os.waitstatus_to_exitcode(status)} and is started again")
            return


def _serve() -> NoReturn:
    # Imported here so that process 1 stays small, and the agent is as new after a restart.
    from utilityvm.agent import cgroups, processes
    from utilityvm.agent.disks import DiskTable
    from utilityvm.agent.freezing import Freezer, KernelFilesystems
    from utilityvm.agent.identity import Identity, ThisKernel
    from utilityvm.agent.port import Port, find_port
    from utilityvm.agent.serve import Serve
    from utilityvm.agent.template import Template

    port = Port(os.open(find_port(timeout_s=_PORT_S), os.O_RDWR | os.O_CLOEXEC))
    processes.raise_file_limit()
    cgroups.here().end_strays()
    template = Template(Freezer(KernelFilesystems()), Identity(ThisKernel()))
    disks = DiskTable(_controllers())
    Serve(port, disks, template, shutdown=power.prepare, power_off=power.now).forever()
    sys.exit("unreachable")


def _controllers(cmdline: str = "/proc/cmdline") -> list[str]:
    with open(cmdline) as file:
        words = file.read().split()
    return [name for word in words if word.startswith("utilityvm.scsi=") for name in word.partition("=")[2].split(",")]


def _say(text: str) -> None:
    """To the console."""
    print(f"utilityvm: {text}", file=sys.stderr, flush=True)
