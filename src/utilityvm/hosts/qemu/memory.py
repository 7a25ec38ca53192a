"""Copies the RAM of a paused VM into a file, as sparse as the RAM is.

A VM that was started has its RAM in a memfd, which QEMU's process keeps open. A clone has it as a private mapping of
its template's file: what is in the file there was not changed is seen only through the process's own address space.
Which file it is was written down when the VM began (ram.py).

Source: proc(5), /proc/PID/fd, /proc/PID/maps, /proc/PID/mem.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Final

from utilityvm.errors import HostRefused, SetupError, VMGone
from utilityvm.hosts.qemu import ram
from utilityvm.hosts.qemu.launch import QemuProcess
from utilityvm.hosts.qemu.ram import Ram

_CHUNK: Final = 1 << 20
_PAGE: Final = 4096
_ZEROS: Final = bytes(_PAGE)
_SEND: Final = 1 << 22


def copy(target: int, process: QemuProcess, size_bytes: int, stop: Event) -> int:
    """Write the RAM to `target`, an empty file, and give the number of bytes that are not holes. Blocks.

    It ends soon after `stop` is set, with the file half written. `target` must be the calling thread's own: a caller
    that gave up may have closed its own descriptor, and the number may be another file's by then.

    Raises:
        HostRefused: it is not the memory that QEMU began with.
        SetupError: no right to read it, or no space; says what to do.
        VMGone: QEMU ended meanwhile.
    """
    known = process.ram
    if known is None or known.size_bytes != size_bytes:
        raise HostRefused(
            f"which file is the memory of VM {process.name} ({size_bytes >> 20} MiB) was not seen when it was started",
            vm=process.name,
            remedy="let this user look into /proc/PID/maps of its processes; then save a VM that was started anew",
        )
    try:
        os.ftruncate(target, size_bytes)
        if is_tmpfs(target):
            # A clone maps the file. A hole is a page that tmpfs has yet to find, and the clone dies if it cannot.
            os.posix_fallocate(target, 0, size_bytes)
        if known.is_private:
            return _copy_mapping(process, known, target, stop)
        return _copy_file(ram.open_file(process.pid, known, vm=process.name), target, stop)
    except PermissionError as error:
        raise SetupError(
            f"the memory of VM {process.name} (process {process.pid}) cannot be read: {error.strerror}",
            vm=process.name,
            remedy="let processes of one user look at each other: sysctl kernel.yama.ptrace_scope=0",
        ) from error
    except ProcessLookupError as error:
        raise VMGone(f"QEMU of VM {process.name} ended", vm=process.name) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(
                f"no space for the memory of VM {process.name}: {size_bytes >> 20} MiB at the most",
                vm=process.name,
                remedy="make room in the state folder, or set UTILITYVM_STATE_DIR to a roomier one",
            ) from error
        raise


def is_tmpfs(file: int) -> bool:
    """Does the file live in memory? Source: proc(5), /proc/PID/mountinfo, fields 3 and 9."""
    device = os.fstat(file).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0] == "tmpfs"
    return False


def _copy_file(memfd: int, target: int, stop: Event) -> int:
    try:
        return copy_data(memfd, target, stop)
    finally:
        os.close(memfd)


def copy_data(source: int, target: int, stop: Event | None = None) -> int:
    """Copy what is not a hole, and give the number of bytes. Blocks; ends soon after `stop` is set."""
    copied = 0
    for begin, end in _data(source):
        os.lseek(target, begin, os.SEEK_SET)
        while begin < end and not (stop and stop.is_set()):
            sent = os.sendfile(target, source, begin, min(end - begin, _SEND))
            if not sent:
                raise OSError(errno.EIO, "the file was cut while it was copied")
            begin += sent
            copied += sent
    return copied


def _data(file: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        end = os.lseek(file, begin, os.SEEK_HOLE)
        yield begin, end


def _copy_mapping(process: QemuProcess, known: Ram, target: int, stop: Event) -> int:
    memory = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    copied = 0
    with ExitStack() as closing:
        closing.callback(os.close, memory)
        for part in ram.parts_of(process.pid, known, vm=process.name):
            for at in range(0, part.length, _CHUNK):
                if stop.is_set():
                    return copied
                chunk = os.pread(memory, min(_CHUNK, part.length - at), part.address + at)
                for page in range(0, len(chunk), _PAGE):
                    if (data := chunk[page : page + _PAGE]) != _ZEROS:
                        copied += os.pwrite(target, data, part.offset + at + page)
    return copied
