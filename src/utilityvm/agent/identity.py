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
from typing import Any, Final, Protocol

from utilityvm.agent import mounting
from utilityvm.agent.faults import Fault

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
SEED_BYTES: Final = range(32, 513)
BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MACHINE_ID: Final = re.compile(r"[0-9a-f]{32}")
_COPIES: Final = ("/run/machine-id", "/var/lib/dbus/machine-id")  # of the machine id, on some systems
_OURS: Final = "/run/utilityvm/own"  # files of ours that are mounted over those that cannot be written


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
        seed, hostname, machine_id, clock_ns = (body.get(key) for key in ("Seed", "Hostname", "MachineId", "ClockNs"))
        try:
            data = bytes.fromhex(seed) if isinstance(seed, str) else b""
        except ValueError:
            data = b""
        if len(data) not in SEED_BYTES:
            raise Fault(f"Seed must be {SEED_BYTES[0]} to {SEED_BYTES[-1]} bytes, in hex", kind="invalid")
        if not isinstance(hostname, str) or not _HOSTNAME.fullmatch(hostname):
            raise Fault(f"{str(hostname)[:100]!r} cannot be a hostname", kind="invalid")
        if not isinstance(machine_id, str) or not _MACHINE_ID.fullmatch(machine_id) or not machine_id.strip("0"):
            raise Fault(f"{str(machine_id)[:100]!r} is no machine id: 32 hexadecimal digits, not all 0", kind="invalid")
        if not isinstance(clock_ns, int) or isinstance(clock_ns, bool) or not 0 < clock_ns < 1 << 63:
            raise Fault("ClockNs must be nanoseconds since 1970", kind="invalid")
        return cls(data, hostname, machine_id, clock_ns)


class Kernel(Protocol):
    """What the kernel is told. Each raises OSError."""

    def seed(self, data: bytes) -> None: ...
    def set_clock(self, clock_ns: int) -> None: ...
    def set_hostname(self, name: str) -> None: ...
    def bind(self, source: str, target: str) -> None: ...


class ThisKernel:
    """The one that we run on."""

    def seed(self, data: bytes) -> None:
        """Mix `data` into the random numbers, and draw none any more from what was before."""
        with open("/dev/urandom", "wb", buffering=0) as device:
            fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
            fcntl.ioctl(device, _RNDRESEEDCRNG)

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


class Identity:
    """The system's own. One thread at a time."""

    def __init__(self, kernel: Kernel, *, root: str = "") -> None:
        self._kernel = kernel
        self._root = root

    def prepare(self) -> None:
        """Give the system what it has already, so that a clone finds all of it written once, and in memory.

        Nothing that a program can see is changed, but that the boot id is a file of ours from now on.
        """
        for path in ("/etc/hostname", "/etc/machine-id", BOOT_ID):
            if (text := self._read(path)) is not None:
                self._write(path, text)

    def draw_anew(self, given: Given) -> None:
        """Random numbers and the clock: before anything of the template's goes on.

        Raises:
            Fault: the kernel refused.
        """
        self._do("seed the random numbers", lambda: self._kernel.seed(given.seed))
        if random := sys.modules.get("random"):
            random.seed(os.urandom(32))
        self._do("set the clock", lambda: self._kernel.set_clock(given.clock_ns))

    def become(self, given: Given) -> str:
        """Take the name and the ids; give the boot id.

        Raises:
            Fault: a step was refused; names it. Those before it are done.
        """
        old = self._read("/etc/hostname")
        self._do("set the hostname", lambda: self._kernel.set_hostname(given.hostname))
        self._write("/etc/hostname", f"{given.hostname}\n")
        self._rename_in_hosts((old or "").strip(), given.hostname)
        copies = [path for path in _COPIES if os.path.isfile(self._root + path)]
        for path in ("/etc/machine-id", *copies):
            self._write(path, f"{given.machine_id}\n")
        boot_id = _uuid(os.urandom(16))
        self._write(BOOT_ID, f"{boot_id}\n")
        return boot_id

    def _rename_in_hosts(self, old: str, new: str) -> None:
        hosts = self._read("/etc/hosts")
        if old and hosts and old in hosts and old != "localhost":
            name = re.compile(rf"(?<=\s){re.escape(old)}(?=\s|$)")
            self._write("/etc/hosts", name.sub(new, hosts))

    def _read(self, path: str) -> str | None:
        try:
            with open(self._root + path) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _write(self, path: str, text: str) -> None:
        """Let `path` read as `text`: written, or where that cannot be, by a file of ours that is mounted over it."""
        self._do(f"write {path}", lambda: self._put(path, text.encode()))

    def _put(self, path: str, data: bytes) -> None:
        target, ours = self._root + path, f"{self._root}{_OURS}/{path.rpartition('/')[2]}"
        try:
            # In place: what is mounted elsewhere from this file is the same then.
            if os.path.exists(ours):
                _overwrite(ours, data)
                return
            if path == BOOT_ID:
                raise PermissionError(errno.EPERM, "the kernel's own")
            _overwrite(target, data)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            os.makedirs(os.path.dirname(ours), mode=0o755, exist_ok=True)
            _overwrite(ours, data)
            try:
                self._kernel.bind(ours, target)
            except OSError:
                os.unlink(ours)
                raise

    def _do(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            raise Fault(f"cannot {what}: {error.strerror}") from None


def _overwrite(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _uuid(data: bytes) -> str:
    """A random UUID, as RFC 9562 marks it."""
    marked = bytearray(data)
    marked[6] = marked[6] & 0x0F | 0x40
    marked[8] = marked[8] & 0x3F | 0x80
    text = marked.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
