"""Which file it is, whatever its name: the one place that says so, for as long as the machine is up and beyond.

Until the next boot a file is its device and inode, a block device its number: `identity`. Of two file systems that are
there at once it tells the files apart, even if one is a copy of the other.

After a boot a device may have another number (LVM, loop, btrfs, USB), and another device that number. So what is kept
for longer has `FileId.lasting`: of a file the inode and the time of its birth, in nanoseconds, or else the handle by
which the kernel finds it again; of a block device the identifier that its hardware or driver gives it. The files of a
copied file system have those of the original.

Source: statx(2), stx_btime; name_to_handle_at(2); sysfs, Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256
_MASK_AT, _BIRTH_AT = 0, 80
_BIRTH: Final = struct.Struct("qI")  # seconds, nanoseconds
_HANDLE: Final = struct.Struct("Ii")  # bytes, type
_HANDLE_BYTES: Final = 128  # MAX_HANDLE_SZ
_INODE_AND_GENERATION: Final = 1  # FILEID_INO32_GEN: ext2 to ext4, f2fs
_UNTIL_BOOT: Final = "boot"
_MARKS: Final = (  # below /sys/dev/block/N:N, the first that is there
    ("dm", "dm/uuid"),
    ("md", "md/uuid"),
    ("wwid", "wwid"),
    ("wwid", "device/wwid"),
    ("serial", "serial"),
    ("serial", "device/serial"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileId:
    """A file or block device of this host. It has the same value as long as it is there, also under another name."""

    device: int  # until the next boot; of a block device its own number
    inode: int  # 0 of a block device
    birth_ns: int | None  # None: its file system does not keep it
    mark: str | None = None  # what tells it apart if there is no time of birth

    @classmethod
    def of(cls, fd: int) -> Self:
        """`fd` may be open for nothing but its path (O_PATH).

        Raises:
            OSError: its storage fails.
        """
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return cls(device=status.st_rdev, inode=0, birth_ns=None, mark=_block_mark(status.st_rdev))
        birth_ns = _birth_ns(fd)
        mark = _handle(fd) if birth_ns is None else None
        return cls(device=status.st_dev, inode=status.st_ino, birth_ns=birth_ns, mark=mark)

    @property
    def lasting(self) -> str | None:
        """What names it also after a boot; None: nothing does."""
        return self.mark if self.birth_ns is None else f"birth {self.inode} {self.birth_ns}"


def identity(status: os.stat_result) -> str:
    """The same text for the same disk, however its path is spelled; until the next boot."""
    if stat.S_ISBLK(status.st_mode):
        return f"block:{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file:{status.st_dev}:{status.st_ino}"


def is_same(before: str, now: str) -> bool | None:
    """Do two values of `lasting` name the same file? None if it cannot be told: a boot lies between them."""
    if before == now:
        return True
    is_bound = before.startswith(_UNTIL_BOOT) and now.startswith(_UNTIL_BOOT)
    return None if is_bound and before.split()[1] != now.split()[1] else False


def _birth_ns(fd: int) -> int | None:
    if (statx := _statx()) is None:
        return None
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("I", buffer, _MASK_AT)
    seconds, nanoseconds = _BIRTH.unpack_from(buffer, _BIRTH_AT)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME and (seconds or nanoseconds) else None


@cache
def _statx() -> Any:
    """The C library's function; None where there is none."""
    import ctypes  # late: commands that only read the store do without it

    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return function


def _handle(fd: int) -> str | None:
    """The kernel's handle: an inode and its generation, which the next file of that inode does not have."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "name_to_handle_at", None)
    if function is None:
        return None
    buffer = ctypes.create_string_buffer(_HANDLE.size + _HANDLE_BYTES)
    _HANDLE.pack_into(buffer, 0, _HANDLE_BYTES, 0)
    if function(fd, b"", buffer, ctypes.byref(ctypes.c_int()), _AT_EMPTY_PATH) != 0:
        return None
    size, kind = _HANDLE.unpack_from(buffer)
    if kind != _INODE_AND_GENERATION:
        return None  # such as FUSE, whose number of a file holds until it is mounted again
    return f"handle {buffer.raw[_HANDLE.size : _HANDLE.size + size].hex()}"


def _block_mark(number: int) -> str:
    """What the hardware or driver calls the device; if nothing, its number in this boot."""
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if _text(folder / "partition"):
        main, start = _mark_in(folder.resolve().parent), _text(folder / "start")
        mark = main and f"{main} from {start}"
    else:
        mark = _mark_in(folder)
    return mark or f"{_UNTIL_BOOT} {_text(Path('/proc/sys/kernel/random/boot_id'))} {number}"


def _mark_in(folder: Path) -> str | None:
    for name, place in _MARKS:
        if text := _text(folder / place):
            return f"{name} {text}"
    if not (backing := _text(folder / "loop/backing_file")):
        return None
    try:
        fd = os.open(backing, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        file = FileId.of(fd).lasting
    finally:
        os.close(fd)
    offset, limit = (_text(folder / "loop" / name) for name in ("offset", "sizelimit"))
    return file and f"loop {offset} {limit} {file}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
