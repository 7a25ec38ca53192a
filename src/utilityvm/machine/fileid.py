"""Which file it is, whatever its name: by device, inode, and when it was born.

Device and inode alone are not enough beyond the life of a file: the next file gets the inode of one that was removed,
and a device may have another number after a reboot. The time of birth, in nanoseconds, tells them apart.

Source: statx(2), stx_btime.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self

_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256
_MASK_AT, _BIRTH_AT = 0, 80
_BIRTH: Final = struct.Struct("qI")  # seconds, nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FileId:
    """A file of this host. It has the same value as long as the file exists, also under another name."""

    device: int
    inode: int
    birth_ns: int | None  # None: its file system does not keep it

    @classmethod
    def of(cls, fd: int) -> Self:
        """Raises:
        OSError: its storage fails.
        """
        status = os.fstat(fd)
        return cls(device=status.st_dev, inode=status.st_ino, birth_ns=_birth_ns(fd))


def _birth_ns(fd: int) -> int | None:
    if (statx := _statx()) is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("I", buffer, _MASK_AT)
    seconds, nanoseconds = _BIRTH.unpack_from(buffer, _BIRTH_AT)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME and (seconds or nanoseconds) else None


@cache
def _statx() -> Any:
    """The C library's function; None where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return function
