"""Copies the RAM of a paused VM into a file, as sparse as the RAM is.

A VM that was started has its RAM in a memfd, which QEMU's process keeps open. A clone has it as a private mapping of
its template's file: what is in the file there was not changed is seen only through the process's own address space.

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
from utilityvm.hosts.qemu.launch import QemuProcess

_MEMFD: Final = "/memfd:memory-backend-memfd"
_CHUNK: Final = 1 << 20
_PAGE: Final = 4096
_ZEROS: Final = bytes(_PAGE)
_SEND: Final = 1 << 22


def copy(target: int, process: QemuProcess, size_bytes: int, stop: Event) -> int:
    """Write the RAM to `target`, an empty file, and give the number of bytes that are not holes. Blocks.

    It ends soon after `stop` is set, with the file half written. `target` must be the calling thread's own: a caller
    that gave up may have closed its own descriptor, and the number may be another file's by then.

    Raises:
        SetupError: no right to read it, or no space; says what to do.
        VMGone: QEMU ended meanwhile.
    """
    try:
        os.ftruncate(target, size_bytes)
        if is_tmpfs(target):
            # A clone maps the file. A hole is a page that tmpfs has yet to find, and the clone dies if it cannot.
            os.posix_fallocate(target, 0, size_bytes)
        memfd = _memfd(process, size_bytes)
        if memfd is None:
            return _copy_mapping(process, target, size_bytes, stop)
        return _copy_file(memfd, target, stop)
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


def _memfd(process: QemuProcess, size_bytes: int) -> int | None:
    """A descriptor of our own of the memfd that is the RAM; None if the RAM is a mapping.

    QEMU may have been taken over, and offer others beside it: there must be one of the RAM's size, and no second.

    Raises:
        HostRefused: which one is the RAM cannot be told.
    """
    found: dict[tuple[int, int], int] = {}
    is_there = False
    with ExitStack() as undo:
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                if not str(entry.readlink()).startswith(_MEMFD):
                    continue
                fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # closed meanwhile
            undo.callback(os.close, fd)
            is_there = True
            status = os.fstat(fd)
            if status.st_size == size_bytes:
                found[status.st_dev, status.st_ino] = fd
        if not is_there:
            return None
        if len(found) != 1:
            raise HostRefused(
                f"QEMU of VM {process.name} has {len(found)} memory files of {size_bytes >> 20} MiB, and not one",
                vm=process.name,
                remedy="its QEMU was tampered with: stop the VM, and trust none of its disks",
            )
        (only,) = found.values()
        return os.dup(only)


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
    copied = 0
    with ExitStack() as closing:
        closing.callback(os.close, memfd)
        for begin, end in _data(memfd):
            os.lseek(target, begin, os.SEEK_SET)
            while begin < end and not stop.is_set():
                sent = os.sendfile(target, memfd, begin, min(end - begin, _SEND))
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


def _copy_mapping(process: QemuProcess, target: int, size_bytes: int, stop: Event) -> int:
    memory = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    copied = 0
    with ExitStack() as closing:
        closing.callback(os.close, memory)
        for address, length, offset in _ram_mappings(process, size_bytes):
            for at in range(0, length, _CHUNK):
                if stop.is_set():
                    return copied
                chunk = os.pread(memory, min(_CHUNK, length - at), address + at)
                for page in range(0, len(chunk), _PAGE):
                    if (data := chunk[page : page + _PAGE]) != _ZEROS:
                        copied += os.pwrite(target, data, offset + at + page)
    return copied


def _ram_mappings(process: QemuProcess, size_bytes: int) -> list[tuple[int, int, int]]:
    """Address, length and offset in the RAM of each part of the mapping. It may have been split, never moved."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        span, mode, offset, device, inode = line.split(maxsplit=5)[:5]
        begin, end = (int(number, 16) for number in span.split("-"))
        if mode == "rw-p" and inode != "0":
            found.setdefault(f"{device} {inode}", []).append((begin, end - begin, int(offset, 16)))
    for parts in found.values():
        if sum(length for _, length, _ in parts) == size_bytes:
            return parts
    raise HostRefused(
        f"the memory of VM {process.name} is not found in process {process.pid}",
        vm=process.name,
        remedy="only a VM that utilityvm started or cloned can become a template",
    )
