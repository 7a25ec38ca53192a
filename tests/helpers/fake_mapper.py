"""The kernel's device-mapper without a kernel: it takes the ioctls of linux/dm-ioctl.h, and refuses what it refuses.

A mapping has a table in use and one that waits for the next resume. Its node appears with its first table, as a link to
the device below it: what it would do to the data is not imitated.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from utilityvm.agent import dm

CREATE, REMOVE, SUSPEND, LOAD, CLEAR, STATUS = 3, 4, 6, 9, 10, 12
NAMES = {CREATE: "create", REMOVE: "remove", SUSPEND: "suspend", LOAD: "load", CLEAR: "clear", STATUS: "status"}
READONLY, SUSPENDED, AS_TABLE, SECURE, DEFERRED = 1, 2, 16, 1 << 15, 1 << 17
MAJOR = 253


class Head(ctypes.Structure):
    """struct dm_ioctl."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 3),
        ("data_size", ctypes.c_uint32),
        ("data_start", ctypes.c_uint32),
        ("target_count", ctypes.c_uint32),
        ("open_count", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("event_nr", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("dev", ctypes.c_uint64),
        ("name", ctypes.c_char * 128),
        ("uuid", ctypes.c_char * 129),
        ("data", ctypes.c_char * 7),
    )


class Spec(ctypes.Structure):
    """struct dm_target_spec."""

    _fields_ = (
        ("sector_start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("next", ctypes.c_uint32),
        ("target_type", ctypes.c_char * 16),
    )


class Table(NamedTuple):
    kind: str
    sectors: int
    text: str
    read_only: bool


@dataclass
class Mapping:
    minor: int
    table: Table | None = None
    waiting: Table | None = None
    is_suspended: bool = False
    is_going: bool = False


@dataclass
class FakeMapper:
    """Use `install`."""

    folder: Path
    mappings: dict[str, Mapping] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # names that something has open
    refuses: dict[str, int] = field(default_factory=dict)  # the next call of that name, with this errno
    asked: list[str] = field(default_factory=list)
    told: list[bytes] = field(default_factory=list)  # tables that came without a demand to be forgotten
    below: dict[str, str] = field(default_factory=dict)  # devices, by number

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeMapper:
        """Have the agent's module ask this."""
        (self.folder / "control").touch()
        monkeypatch.setattr(dm, "_CONTROL", self.folder / "control")
        monkeypatch.setattr(dm, "_DEV", str(self.folder))
        monkeypatch.setattr(dm, "_number", lambda node: next(n for n, one in self.below.items() if one == node))
        monkeypatch.setattr("fcntl.ioctl", self.ioctl)
        return self

    def device(self, node: str, number: str) -> None:
        """A block device that can be mapped."""
        self.below[number] = node

    def ioctl(self, fd: int, request: int, buffer: bytearray) -> int:
        """See ioctl(2)."""
        assert os.path.samestat(os.fstat(fd), (self.folder / "control").stat())
        command = request & 0xFF
        assert request == 3 << 30 | ctypes.sizeof(Head) << 16 | 0xFD << 8 | command
        head = Head.from_buffer(buffer)
        assert (next(iter(head.version)), head.data_size) == (4, len(buffer))
        name = head.name.decode()
        self.asked.append(NAMES[command])
        if number := self.refuses.pop(NAMES[command], 0):
            raise OSError(number, os.strerror(number))
        if command == CREATE:
            if name in self.mappings:
                raise OSError(errno.EBUSY, "Device or resource busy")
            self.mappings[name] = Mapping(next(n for n in range(999) if n not in self._minors()))
            head.dev = os.makedev(MAJOR, self.mappings[name].minor)
            return 0
        mapping = self.mappings.get(name)
        if mapping is None:
            raise OSError(errno.ENXIO, "No such device or address")
        if command == REMOVE:
            self._remove(name, mapping, is_deferred=bool(head.flags & DEFERRED))
        elif command == LOAD:
            mapping.waiting = self._table(head, bytes(buffer))
        elif command == CLEAR:
            mapping.waiting = None
        elif command == SUSPEND and head.flags & SUSPENDED:
            mapping.is_suspended = True
        elif command == SUSPEND:
            mapping.is_suspended = False
            mapping.table, mapping.waiting = mapping.waiting or mapping.table, None
            self._show(mapping)
        elif command == STATUS:
            self._tell(head, buffer, mapping)
        return 0

    def unused(self, name: str) -> None:
        """The last user lets go."""
        self.used.discard(name)
        if self.mappings[name].is_going:
            self._remove(name, self.mappings[name], is_deferred=False)

    def _minors(self) -> set[int]:
        return {mapping.minor for mapping in self.mappings.values()}

    def _remove(self, name: str, mapping: Mapping, *, is_deferred: bool) -> None:
        if name in self.used:
            if not is_deferred:
                raise OSError(errno.EBUSY, "Device or resource busy")
            mapping.is_going = True
            return
        del self.mappings[name]
        (self.folder / f"dm-{mapping.minor}").unlink(missing_ok=True)

    def _table(self, head: Head, data: bytes) -> Table:
        assert head.target_count == 1
        spec = Spec.from_buffer_copy(data, head.data_start)
        begin = head.data_start + ctypes.sizeof(Spec)
        text = data[begin : data.index(b"\0", begin)]
        if not head.flags & SECURE:
            self.told.append(text)
        assert (spec.sector_start, spec.length > 0) == (0, True)
        return Table(spec.target_type.decode(), spec.length, text.decode(), bool(head.flags & READONLY))

    def _show(self, mapping: Mapping) -> None:
        node = self.folder / f"dm-{mapping.minor}"
        number = next(word for word in mapping.table.text.split() if ":" in word) if mapping.table else ""
        if number in self.below and not node.is_symlink():
            node.symlink_to(self.below[number])

    def _tell(self, head: Head, buffer: bytearray, mapping: Mapping) -> None:
        assert head.flags & AS_TABLE
        assert mapping.table
        text = mapping.table.text.encode() + b"\0"
        if not head.flags & SECURE:
            self.told.append(text)
        spec = Spec(0, mapping.table.sectors, 0, 0, mapping.table.kind.encode())
        head.data_start, head.target_count = 320, 1  # aligned to 8 bytes behind the head
        head.flags |= READONLY if mapping.table.read_only else 0
        body = bytes(spec) + text
        for at, byte in enumerate(body):
            buffer[320 + at] = byte
