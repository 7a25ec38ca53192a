"""Who this system is: its random numbers, clock, name and ids. A clone has its template's until it gets its own.

What a program took from these before the template was saved it still has in each clone (a random number that it drew,
the name that it remembers): that is for the hooks. The kernel's boot id cannot be changed; a file of ours is mounted
over it, so that programs read another, but for those in a mount namespace with a /proc of its own.

Source: random(4); Linux drivers/char/random.c, random_ioctl; machine-id(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from utilityvm.agent import mountinfo, mounting
from utilityvm.agent.faults import Fault

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
_ENTROPY: Final = struct.Struct("ii")  # bits, bytes
SEED_BYTES: Final = range(32, 513)
BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_HOSTNAME, _HOSTS, _MACHINE_ID = "/etc/hostname", "/etc/hosts", "/etc/machine-id"
_MACHINE_ID_DIGITS: Final = 32
UPPER: Final = "upperdir=/rw/upper"  # of the overlay that the guest image's initramfs makes over a tmpfs
_COPIES: Final = ("/run/machine-id", "/var/lib/dbus/machine-id")  # of the machine id, on some systems
_OURS: Final = "/run/utilityvm/own"  # files of ours that are mounted over those that cannot be written


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """What a clone is given."""

    seed: bytes
    hostname: str
    machine_id: str
    clock_ns: int  # since 1970, of the real-time clock

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Given:
        """Raises:
        Fault: a part is missing or makes no sense.
        """
        try:
            given = cls(bytes.fromhex(body["Seed"]), body["Hostname"], body["MachineId"], body["ClockNs"])
            if given._makes_sense():
                return given
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        text = "a clone needs a Seed of 32 to 512 bytes in hex, a Hostname, a MachineId and the ClockNs"
        raise Fault(text, kind="invalid")

    def _makes_sense(self) -> bool:
        """No name or id that would be taken for something else in a file; if it is a good one the host has asked."""
        is_word = self.hostname.isprintable() and " " not in self.hostname and bool(self.hostname)
        is_id = len(self.machine_id) == _MACHINE_ID_DIGITS
        return is_word and is_id and len(self.seed) in SEED_BYTES and isinstance(self.clock_ns, int)


class Kernel(Protocol):
    """What the kernel is told. Each raises OSError."""

    def prepare(self) -> None: ...
    def seed(self, data: bytes) -> None: ...
    def set_clock(self, clock_ns: int) -> None: ...
    def set_hostname(self, name: str) -> None: ...
    def bind(self, source: str, target: str) -> None: ...
    def is_in_memory(self, fd: int) -> bool: ...


class ThisKernel:
    """The one that we run on."""

    def __init__(self) -> None:
        self._random = -1

    def prepare(self) -> None:
        """Open what will be needed."""
        if self._random < 0:
            self._random = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)

    def seed(self, data: bytes) -> None:
        """Mix `data` into the random numbers, and draw none any more from what was before."""
        self.prepare()
        fcntl.ioctl(self._random, _RNDADDENTROPY, _ENTROPY.pack(len(data) * 8, len(data)) + data)
        fcntl.ioctl(self._random, _RNDRESEEDCRNG)

    def set_clock(self, clock_ns: int) -> None:
        """Set the real-time clock."""
        time.clock_settime_ns(time.CLOCK_REALTIME, clock_ns)

    def set_hostname(self, name: str) -> None:
        """Set the hostname."""
        socket.sethostname(name)

    def bind(self, source: str, target: str) -> None:
        """Make `source` appear at `target`."""
        try:
            mounting.bind(source, target)
        except Fault as fault:
            raise OSError(errno.EPERM, fault.message) from None

    def is_in_memory(self, fd: int) -> bool:
        """Is it a file that can be written while every file system of a disk is frozen? False if in doubt."""
        with open(f"/proc/self/fdinfo/{fd}") as info:
            words = info.read().split()
        mount_id = int(words[words.index("mnt_id:") + 1])
        for line in mountinfo.mount_lines():
            if line.id == mount_id:
                is_ours = line.filesystem == "overlay" and UPPER in line.super_options.split(",")
                return is_ours or line.filesystem == "tmpfs"
        return False


class Identity:
    """The system's own. One thread at a time."""

    def __init__(self, kernel: Kernel, *, root: str = "") -> None:
        self._kernel = kernel
        self._root = root
        self._files: dict[str, _File] = {}
        self._around_name: list[str] = []  # the text of /etc/hosts, cut where it has the hostname
        self._is_prepared = False
        self.is_in_memory = False  # what was prepared needs no disk

    def prepare(self) -> None:
        """Have all at hand that `become` writes to, for in a clone each new thing that the kernel does takes time.

        Nothing that a program can see is changed, but that the boot id is a file of ours from now on.

        Raises:
            Fault: a file cannot be written, nor be covered by one of ours.
        """
        self._open_all()
        self.is_in_memory = all(self._kernel.is_in_memory(file.fileno()) for file in self._files.values())

    def _open_all(self) -> None:
        _do("open /dev/urandom", self._kernel.prepare)
        for file in self._files.values():
            file.close()
        self._files.clear()
        copies = [path for path in _COPIES if os.path.isfile(self._root + path)]
        for path in (_HOSTNAME, _HOSTS, _MACHINE_ID, *copies, BOOT_ID):
            self._files[path] = _do(f"write {path}", partial(self._open, path))
        name = self._files[_HOSTNAME].text().strip()
        hosts = self._files[_HOSTS].text()
        is_whole = rf"(?<=\s){re.escape(name)}(?=\s|$)"
        self._around_name = re.split(is_whole, hosts) if name and name != "localhost" else [hosts]
        self._is_prepared = True

    def draw_anew(self, given: Given) -> None:
        """Random numbers and the clock: before anything of the template's goes on.

        Raises:
            Fault: the kernel refused.
        """
        _do("seed the random numbers", partial(self._kernel.seed, given.seed))
        if random := sys.modules.get("random"):
            random.seed(os.urandom(32))
        _do("set the clock", partial(self._kernel.set_clock, given.clock_ns))

    def become(self, given: Given) -> str:
        """Take the name and the ids; give the boot id.

        Raises:
            Fault: a step was refused; names it. Those before it are done.
        """
        if not self._is_prepared:
            self._open_all()
        self._is_prepared = False  # from now on others may replace the files
        _do("set the hostname", partial(self._kernel.set_hostname, given.hostname))
        boot_id = _uuid(os.urandom(16))
        for path, file in self._files.items():
            if path == _HOSTNAME:
                text = f"{given.hostname}\n"
            elif path == _HOSTS:
                if len(self._around_name) == 1:
                    continue
                text = given.hostname.join(self._around_name)
            elif path == BOOT_ID:
                text = f"{boot_id}\n"
            else:
                text = f"{given.machine_id}\n"
            _do(f"write {path}", partial(file.write, text.encode()))
        return boot_id

    def _open(self, path: str) -> _File:
        """What `path` reads from: itself, or where that cannot be written, a file of ours that is mounted over it."""
        target, ours = self._root + path, f"{self._root}{_OURS}/{path.rpartition('/')[2]}"
        if os.path.exists(ours):
            return _File(ours)
        try:
            if path != BOOT_ID:  # root may not write the kernel's own, but only a file system would say that
                return _File(target)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        os.makedirs(os.path.dirname(ours), mode=0o755, exist_ok=True)
        file = _File(ours)
        try:
            with open(target, "rb") as original:
                file.write(original.read())
            self._kernel.bind(ours, target)
        except BaseException:
            file.close()
            os.unlink(ours)
            raise
        return file


class _File:
    """A file that is held open, and made if need be. Written in place: what is mounted from it elsewhere is it too."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._fd).st_size

    def fileno(self) -> int:
        return self._fd

    def text(self) -> str:
        return os.pread(self._fd, self._size, 0).decode(errors="surrogateescape")

    def write(self, data: bytes) -> None:
        os.pwrite(self._fd, data, 0)
        if len(data) != self._size:
            os.ftruncate(self._fd, len(data))
            self._size = len(data)

    def close(self) -> None:
        os.close(self._fd)


def _do(what: str, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as error:
        raise Fault(f"cannot {what}: {error.strerror}") from None


def _uuid(data: bytes) -> str:
    """A random UUID, as RFC 9562 marks it."""
    marked = bytearray(data)
    marked[6] = marked[6] & 0x0F | 0x40
    marked[8] = marked[8] & 0x3F | 0x80
    text = marked.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
