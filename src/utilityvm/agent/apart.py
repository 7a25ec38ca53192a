"""Calls a function in a child that can read one descriptor, compute and answer, and do nothing else.

For code that reads what a disk holds: C that parses whatever bytes there are, while the agent is the guest's root. The
child has the device open for reading, a pipe to say what it found, and nothing else: another user's id, no capability,
a few system calls, bounded memory and time. A crash, a hang or a memory bomb ends the child, and is told of the disk.
That the guest has no memory for the child is not: see `turns`.

The child is forked, as a new interpreter would take most of a mount's time. The agent has threads, any of which may
hold a lock at the fork: so what the child calls is loaded before, and it calls that, the kernel and little else.

Source: linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h; setrlimit(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from utilityvm.agent import turns
from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import is_readable
from utilityvm.agent.turns import OutOfMemoryError

_WHAT: Final = "reading what the disk holds"
_LIMIT_S: Final = 20.0
_CPU_S: Final = 10
_MEMORY_BYTES: Final = 64 << 20  # beyond what the agent has
_ANSWER_BYTES: Final = 65536
_NOBODY: Final = 65534
_DEFAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGXCPU)

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SECCOMP_ALLOW, _SECCOMP_EPERM, _SECCOMP_KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
# read, write, close, fstat, lseek, pread, mmap, mprotect, munmap, mremap, brk, madvise, futex, sigreturn, sigprocmask,
# clock_gettime, exit, exit_group, newfstatat, getrandom: the machine's AUDIT_ARCH, and their numbers.
_CALLS: Final[dict[str, tuple[int, tuple[int, ...]]]] = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 17, 9, 10, 11, 25, 12, 28, 202, 15, 14, 228, 60, 231, 262, 318)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 67, 222, 226, 215, 216, 214, 233, 98, 139, 135, 113, 93, 94, 79, 278)),
}

_libc = ctypes.CDLL(None, use_errno=True)


def apart(examine: Callable[[], bytes], *, keep: int, deadline: float) -> bytes:
    """What `examine` gives, called in a child that can read the descriptor `keep`, and do nothing else.

    Raises:
        Fault: the child crashed, or did not end in time; or the guest had no memory for it.
    """
    return turns.disks.take(_WHAT, lambda: _in_child(examine, keep, deadline), deadline)


def failed(how: str) -> Fault:
    """The fault of a disk whose bytes a child did not survive."""
    text = f"{_WHAT} {how}: it is damaged, or made to do harm"
    return Fault(text, remedy="name its file system, if you trust it all the same (filesystem)")


def _in_child(examine: Callable[[], bytes], keep: int, deadline: float) -> bytes:
    limit = min(deadline, time.monotonic() + _LIMIT_S)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[0]) * resource.getpagesize()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        child = _fork()
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
    has_closed = False
    try:
        answer = _read_until(reading, limit)
        has_closed = answer is not None
    finally:
        os.close(reading)
        code, cpu_s = _end(child, limit if has_closed else 0.0)
    if answer and code == 0:
        return answer
    raise _why(code, cpu_s, has_time=time.monotonic() < deadline)


def _fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfMemoryError from None
        raise


def _end(child: int, limit: float) -> tuple[int | None, float]:
    """Wait for the child's end until `limit`, and then kill it. Its exit code, None if we killed it; its CPU time."""
    end = os.pidfd_open(child)
    try:
        has_ended = is_readable(end, limit - time.monotonic())
    finally:
        os.close(end)
    if not has_ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status) if has_ended else None, usage.ru_utime + usage.ru_stime


def _why(code: int | None, cpu_s: float, *, has_time: bool) -> Exception:
    """Why there is no answer."""
    if code == -signal.SIGXCPU or cpu_s >= _CPU_S:
        return failed(f"took {_CPU_S} s of the processor")
    if code == -signal.SIGKILL:
        return OutOfMemoryError()
    if code is None:
        how = f"took longer than {_LIMIT_S:.0f} s" if has_time else "took all of the time"
        text = f"{_WHAT} {how}, {cpu_s:.1f} s of it on the processor: its storage is slow, or it is made to do harm"
        return Fault(text, remedy="see whether the disk's storage answers; or name its file system (filesystem)")
    return failed(f"ended with {signal.Signals(-code).name}" if code < 0 else "failed")


def _read_until(fd: int, limit: float) -> bytes | None:
    """All that is written to the pipe before it is closed. None: it was not closed in time.

    Raises:
        Fault: there is too much.
    """
    data = b""
    while len(data) < _ANSWER_BYTES:
        if not is_readable(fd, limit - time.monotonic()):
            return None
        if not (more := os.read(fd, _ANSWER_BYTES)):
            return data
        data += more
    raise failed("answered without end")


def _give_up_rights(*keep: int, memory_bytes: int) -> None:
    """Leave the calling process, a child, the descriptors `keep`, and what it needs to read and to compute."""
    for number in _DEFAULTS:
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    first = 0
    for fd in (*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        os.closerange(first, min(fd, 1 << 20))
        first = fd + 1
    for what, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    # At the first the kernel says why it ends the process (SIGXCPU), at the second it does not (SIGKILL).
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))
    if not os.geteuid():
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)  # and with it go the capabilities
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        os._exit(1)


def allow_few_calls() -> None:
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
