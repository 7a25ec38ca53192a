"""Which file is a VM's RAM: looked at once, when QEMU has mapped it and no guest has run yet, and written down.

Afterwards nothing that QEMU shows of itself is believed: one that its guest has taken over can open, map and name
files as it likes.

Source: proc(5), /proc/PID/maps, /proc/PID/fd; memfd_create(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utilityvm.errors import HostRefused
from utilityvm.machine.fileid import FileId


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """The file that QEMU has mapped as the RAM."""

    mapping: str  # device and inode, as in /proc/PID/maps
    size_bytes: int
    is_private: bool  # of a clone: what it writes is in the mapping alone; else it is in the file, a memfd
    birth_ns: int | None  # of a memfd


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the mapping: it may have been split, never moved."""

    address: int
    length: int
    offset: int  # in the RAM


def find(pid: int, size_bytes: int, *, vm: str) -> Ram:
    """The RAM of a QEMU whose guest has not run yet. Blocks.

    Raises:
        HostRefused: there is no such mapping, or more than one.
        OSError: the process cannot be looked at.
    """
    found = []
    for (mapping, mode), parts in _mappings(pid).items():
        if mode in ("rw-s", "rw-p") and sum(part.length for part in parts) == size_bytes:
            found.append((mapping, mode == "rw-p"))
    if len(found) != 1:
        raise HostRefused(
            f"process {pid} has {len(found)} mappings of {size_bytes >> 20} MiB that could be the RAM of VM {vm}",
            vm=vm,
            remedy="give the VM another size, and report this",
        )
    ((mapping, is_private),) = found
    ram = Ram(mapping=mapping, size_bytes=size_bytes, is_private=is_private, birth_ns=None)
    if is_private:
        return ram
    fd = open_file(pid, ram, vm=vm)
    try:
        return Ram(mapping=mapping, size_bytes=size_bytes, is_private=False, birth_ns=FileId.of(fd).birth_ns)
    finally:
        os.close(fd)


def open_file(pid: int, ram: Ram, *, vm: str) -> int:
    """A descriptor of our own of that memfd. Blocks.

    Raises:
        HostRefused: QEMU has it no more, or changed its size: its guest has taken it over.
        OSError: the process cannot be looked at.
    """
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if _mapping_of(entry.stat()) != ram.mapping:
                continue
            fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # closed meanwhile
        status, birth_ns = os.fstat(fd), FileId.of(fd).birth_ns
        is_it = _mapping_of(status) == ram.mapping and ram.birth_ns in (None, birth_ns)
        if is_it and status.st_size == ram.size_bytes:
            return fd
        os.close(fd)
    raise HostRefused(
        f"QEMU of VM {vm} (process {pid}) has not the memory file of {ram.size_bytes >> 20} MiB that it began with",
        vm=vm,
        remedy="its QEMU was tampered with: stop the VM, and trust none of its disks",
    )


def parts_of(pid: int, ram: Ram, *, vm: str) -> list[Part]:
    """Where the private mapping is now. Blocks.

    Raises:
        HostRefused: it is not there whole: QEMU's guest has taken it over.
        OSError: the process cannot be looked at.
    """
    parts = _mappings(pid).get((ram.mapping, "rw-p"), [])
    if sum(part.length for part in parts) != ram.size_bytes:
        raise HostRefused(
            f"QEMU of VM {vm} (process {pid}) has not the memory that it began with",
            vm=vm,
            remedy="its QEMU was tampered with: stop the VM, and trust none of its disks",
        )
    return parts


def _mappings(pid: int) -> dict[tuple[str, str], list[Part]]:
    """The parts of each file's mapping, by device and inode, and mode."""
    found: dict[tuple[str, str], list[Part]] = {}
    for mapping, mode, part in _lines(pid):
        found.setdefault((mapping, mode), []).append(part)
    return found


def _lines(pid: int) -> Iterator[tuple[str, str, Part]]:
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        span, mode, offset, device, inode = line.split(maxsplit=5)[:5]
        begin, end = (int(number, 16) for number in span.split("-"))
        if inode != "0":
            yield f"{device} {inode}", mode, Part(begin, end - begin, int(offset, 16))


def _mapping_of(status: os.stat_result) -> str:
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino}"
