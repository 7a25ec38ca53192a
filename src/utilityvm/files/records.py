"""The stream: records of a kind, a length and a payload.

::

    f head name          a file; its data follows, and its end
    D offset bytes       some of it. What lies between two of these is a hole
    e size               its end, and so its size: it is complete
    d head name          a folder; what is in it follows, sorted by name
    u                    its end
    l head target NUL name   a symbolic link
    s text               something was left out, and why
    Z                    the end of all: the sender has said everything

The first entry has no name: what it is called is for the receiver to know. A name is one component of a path.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

FILE, DATA, FILE_END, FOLDER, FOLDER_END, LINK, SKIPPED, DONE = b"f", b"D", b"e", b"d", b"u", b"l", b"s", b"Z"

HEADER: Final = struct.Struct("<cI")
OFFSET: Final = struct.Struct("<Q")
_HEAD: Final = struct.Struct("<IIIq")
DATA_BYTES: Final = 131072  # in one record
_MAX_BYTES: Final = DATA_BYTES + OFFSET.size
MAX_DEPTH: Final = 128  # folders in one another; each costs either side a descriptor
_MAX_TIME_NS: Final = 1 << 62
_MAX_SKIPPED: Final = 100
_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class CopyFault(Exception):
    """A copy cannot be done, and why. Nothing that is half done is left under its name.

    `kind` is "refused" (what is at one of the two places forbids it), "unsafe" (what was sent may not be made here),
    "limit" (it is more than was allowed) or "broken" (the stream is none).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(slots=True)
class Counts:
    """What was copied, and what was left out of it."""

    files: int = 0
    folders: int = 0
    links: int = 0
    bytes: int = 0  # of data: holes do not count
    skipped: list[str] = field(default_factory=list)  # the first of them, a line each
    skipped_count: int = 0

    def skip(self, line: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < _MAX_SKIPPED:
            self.skipped.append(line)


class Head(NamedTuple):
    """What is kept of an entry beside its content."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int


def record(kind: bytes, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(payload)) + payload


def headed(kind: bytes, head: Head, name: bytes, target: bytes | None = None) -> bytes:
    """The record of an entry."""
    rest = name if target is None else target + b"\0" + name
    return record(kind, _HEAD.pack(*head) + rest)


def read_head(payload: bytes) -> tuple[Head, bytes]:
    """The head of an entry, and what follows it.

    Raises:
        CopyFault: there is none.
    """
    if len(payload) < _HEAD.size:
        raise CopyFault("broken", "an entry of the stream has no head")
    mode, uid, gid, mtime_ns = _HEAD.unpack_from(payload)
    if not -_MAX_TIME_NS < mtime_ns < _MAX_TIME_NS:
        raise CopyFault("broken", f"{mtime_ns} ns is no time of a file")
    return Head(stat.S_IMODE(mode), uid, gid, mtime_ns), payload[_HEAD.size :]


def kind_of(mode: int) -> str:
    """What is no file and no link, for people."""
    return "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "something unknown")


class Decoder:
    """Takes a stream apart, wherever it was cut. It keeps no more than one record."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records that are complete now.

        Raises:
            CopyFault: what comes is no record.
        """
        self._pending += data
        at = 0
        try:
            while len(self._pending) - at >= HEADER.size:
                kind, size = HEADER.unpack_from(self._pending, at)
                if size > _MAX_BYTES:
                    raise CopyFault(
                        "broken", f"the stream has a record of {size} bytes; they have {_MAX_BYTES} at most"
                    )
                end = at + HEADER.size + size
                if end > len(self._pending):
                    break
                payload = bytes(memoryview(self._pending)[at + HEADER.size : end])
                at = end
                yield kind, payload
        finally:
            del self._pending[:at]
