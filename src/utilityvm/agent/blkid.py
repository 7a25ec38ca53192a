"""What is on a device, as Debian's libblkid reads it: every superblock that it finds, and the partition table.

libblkid is C that parses whatever bytes a disk holds, and the agent is the guest's root. So it runs in a child that has
the device open for reading, a pipe to say what it found, and nothing else: another user's id, no capability, a few
system calls, bounded memory and time. A crash, a hang or a memory bomb ends the child, and is an error of this device.

The child is forked, as a new interpreter would take most of a mount's time. The agent has threads, any of which may
hold a lock at the fork: so the library is loaded before, and the child calls it, the kernel and little else.

`blkid_do_safeprobe` would tell one file system, or that there are several, but not which; and of a disk below 1.44 MB
only the first. So the probe is asked for one after the other, and `content` decides, by the same rules.

Source: libblkid 2.38, blkid.h; linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import re
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from utilityvm.agent.faults import Fault

LIBRARY: Final = "libblkid.so.1"
UNIT: Final = 512  # bytes, in which libblkid counts, whatever the device's sectors are
_SUBLKS_TYPE, _SUBLKS_USAGE, _SUBLKS_MAGIC, _SUBLKS_BADCSUM = 1 << 5, 1 << 7, 1 << 9, 1 << 10
_PARTS_FORCE_GPT: Final = 1 << 1  # also without a protective MBR
_BLKSSZGET: Final = 0x1268  # linux/fs.h

_LIMIT_S: Final = 20.0
_CPU_S: Final = 10
_MEMORY_BYTES: Final = 64 << 20  # beyond what the agent has
_ANSWER_BYTES: Final = 65536
_MOST: Final = 128  # superblocks, partitions
_NOBODY: Final = 65534
_CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)
_SECTOR_SIZES: Final = (512, 4096)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}")
_NUMBERS: Final = range(1 << 63)

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SECCOMP_ALLOW, _SECCOMP_EPERM, _SECCOMP_KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
# read, write, close, fstat, lseek, pread, mmap, mprotect, munmap, mremap, brk, madvise, futex, sigreturn, sigprocmask,
# clock_gettime, exit, exit_group, newfstatat, getrandom: the machine's AUDIT_ARCH, and their numbers.
_CALLS: Final[dict[str, tuple[int, tuple[int, ...]]]] = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 17, 9, 10, 11, 25, 12, 28, 202, 15, 14, 228, 60, 231, 262, 318)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 67, 222, 226, 215, 216, 214, 233, 98, 139, 135, 113, 93, 94, 79, 278)),
}


class Superblock(NamedTuple):
    """One signature with what belongs to it."""

    kind: str  # libblkid's word: ext4, crypto_LUKS, LVM2_member
    usage: str  # filesystem, raid, crypto, other
    is_damaged: bool = False  # its checksum is wrong


class Partition(NamedTuple):
    number: int
    begin_bytes: int
    size_bytes: int


class Table(NamedTuple):
    """A partition table."""

    kind: str  # gpt, dos, mac, ...
    sector_bytes: int  # the size of the sectors that it counts in
    partitions: tuple[Partition, ...]


class Look(NamedTuple):
    """What libblkid found on a device."""

    superblocks: tuple[Superblock, ...] = ()
    table: Table | None = None  # as a kernel would read it
    hidden: Table | None = None  # one that a kernel would not: in other sectors, or without its protective MBR


_libc = ctypes.CDLL(None, use_errno=True)


def look(node: str, deadline: float) -> Look:
    """What libblkid finds on `node`: a device, or a file.

    Raises:
        Fault: reading it crashed, hung or took too much memory; or libblkid is not in the guest.
        OSError: it cannot be opened.
    """
    library = _load()
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        sector = _sector_bytes(fd)
        answer = apart(lambda: _examine(library, fd, size, sector), keep=fd, deadline=deadline)
    finally:
        os.close(fd)
    try:
        return _read(json.loads(answer))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _failed("answered what is no answer") from None


def sizes(node: str) -> tuple[int, int]:
    """The size of a device and of its sectors, in bytes.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END), _sector_bytes(fd)
    finally:
        os.close(fd)


def _load() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        text = f"{LIBRARY} is not in the guest image, and without it nothing is found out about a disk"
        raise Fault(text, remedy="name the file system, or build the image with the package libblkid1") from None
    for name in ("blkid_new_probe", "blkid_probe_get_partitions", "blkid_partlist_get_table"):
        getattr(library, name).restype = ctypes.c_void_p
    library.blkid_partlist_get_partition.restype = ctypes.c_void_p
    for name in ("blkid_partition_get_start", "blkid_partition_get_size"):
        getattr(library, name).restype = ctypes.c_int64
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.blkid_parttable_get_type.restype = ctypes.c_char_p
    library.blkid_parttable_get_type.argtypes = (ctypes.c_void_p,)
    library.blkid_probe_set_device.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return library


def _sector_bytes(fd: int) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
    except OSError:
        return UNIT  # a file


# The child.


def apart(examine: Callable[[], bytes], *, keep: int, deadline: float) -> bytes:
    """What `examine` gives, called in a child that can read the descriptor `keep`, and do nothing else.

    Raises:
        Fault: the child crashed, or did not end in time.
    """
    limit = min(deadline, time.monotonic() + _LIMIT_S)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[0]) * resource.getpagesize()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if not child:
            try:
                _give_up_rights(keep, writing, memory_bytes=before + _MEMORY_BYTES)
                data = examine()
                while data:
                    data = data[os.write(writing, data) :]
            except BaseException:
                os._exit(1)
            os._exit(0)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        answer = _read_until(reading, limit)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer is None:
        raise _failed(f"took longer than {_LIMIT_S:.0f} s" if time.monotonic() < deadline else "took all of the time")
    code = os.waitstatus_to_exitcode(status)
    if not answer:
        raise _failed(f"ended with {signal.Signals(-code).name}" if code < 0 else "failed")
    return answer


def _read_until(fd: int, limit: float) -> bytes | None:
    """All that is written to the pipe before it is closed. None: it was not closed in time, or there is too much."""
    data = b""
    while len(data) < _ANSWER_BYTES:
        if not select.select([fd], [], [], max(0.0, limit - time.monotonic()))[0]:
            return None
        if not (more := os.read(fd, _ANSWER_BYTES)):
            return data
        data += more
    return None


def _failed(how: str) -> Fault:
    text = f"reading what the disk holds {how}: it is damaged, or made to do harm"
    return Fault(text, remedy="name its file system, if you trust it all the same (filesystem)")


def _give_up_rights(*keep: int, memory_bytes: int) -> None:
    """Leave the calling process, a child, the descriptors `keep`, and what it needs to read and to compute."""
    for number in _CRASHES:
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    first = 0
    for fd in (*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        os.closerange(first, min(fd, 1 << 20))
        first = fd + 1
    for what, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    if not os.geteuid():
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)  # and with it go the capabilities
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        os._exit(1)


def _allow_few_calls() -> None:
    """From here on the kernel refuses all other system calls, so that nothing is opened, sent or started."""
    if platform.machine() not in _CALLS:
        return
    machine, numbers = _CALLS[platform.machine()]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _SECCOMP_KILL), (_LOAD, 0, 0, 0)]
    program += [(_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _SECCOMP_EPERM), (_RETURN, 0, 0, _SECCOMP_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        os._exit(1)


def _examine(library: Any, fd: int, size: int, sector: int) -> bytes:
    probe = ctypes.c_void_p(library.blkid_new_probe())
    if not probe or library.blkid_probe_set_device(probe, fd, 0, size):  # it reads nothing yet
        return b"{}"
    library.blkid_probe_set_sectorsize(probe, sector)
    _allow_few_calls()
    found: dict[str, Any] = {"superblocks": _superblocks(library, probe)}
    found["table"] = _table(library, probe, sector, 0)
    if not found["table"]:
        for other in (sector, *(size for size in _SECTOR_SIZES if size != sector)):
            library.blkid_probe_set_sectorsize(probe, other)
            if table := _table(library, probe, other, _PARTS_FORCE_GPT):
                found["hidden"] = table
                break
    return json.dumps(found).encode()


def _superblocks(library: Any, probe: ctypes.c_void_p) -> list[list[Any]]:
    library.blkid_probe_enable_superblocks(probe, 1)
    library.blkid_probe_enable_partitions(probe, 0)
    wanted = _SUBLKS_TYPE | _SUBLKS_USAGE | _SUBLKS_MAGIC | _SUBLKS_BADCSUM
    library.blkid_probe_set_superblocks_flags(probe, wanted)
    found: list[list[Any]] = []
    while len(found) < _MOST and library.blkid_do_probe(probe) == 0:
        one = [_value(library, probe, b"TYPE"), _value(library, probe, b"USAGE"), _value(library, probe, b"SBBADCSUM")]
        found.append([one[0] or "unknown", one[1] or "other", one[2] is not None])
    return found


def _value(library: Any, probe: ctypes.c_void_p, name: bytes) -> str | None:
    data = ctypes.c_char_p()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(data), None):
        return None
    return (data.value or b"").decode("ascii", "replace")


def _table(library: Any, probe: ctypes.c_void_p, sector: int, flags: int) -> list[Any] | None:
    library.blkid_probe_enable_partitions(probe, 1)
    library.blkid_probe_set_partitions_flags(probe, flags)
    partitions = ctypes.c_void_p(library.blkid_probe_get_partitions(probe))
    if not partitions or not (table := library.blkid_partlist_get_table(partitions)):
        return None
    found = []
    for number in range(min(library.blkid_partlist_numof_partitions(partitions), _MOST)):
        part = ctypes.c_void_p(library.blkid_partlist_get_partition(partitions, number))
        at = library.blkid_partition_get_partno(part)
        begin, size = library.blkid_partition_get_start(part), library.blkid_partition_get_size(part)
        found.append([at, begin * UNIT, size * UNIT])
    return [library.blkid_parttable_get_type(table).decode("ascii", "replace"), sector, found]


# What the child says is the disk's word: it may have taken the child over.


def _read(found: Any) -> Look:
    superblocks = [Superblock(_name(kind), _name(usage), bool(bad)) for kind, usage, bad in found["superblocks"]]
    return Look(tuple(superblocks[:_MOST]), _read_table(found["table"]), _read_table(found.get("hidden")))


def _read_table(found: Sequence[Any] | None) -> Table | None:
    if not found:
        return None
    kind, sector, partitions = found
    return Table(
        _name(kind),
        _number(sector),
        tuple(Partition(_number(at), _number(begin), _number(size)) for at, begin, size in partitions[:_MOST]),
    )


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(value)
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or value not in _NUMBERS:
        raise ValueError(value)
    return value
