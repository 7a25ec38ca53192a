"""Making and growing file systems."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Final

from utilityvm.agent import mounting
from utilityvm.agent.faults import Fault

_MIB: Final = 1 << 20
_READ_WHOLE_BYTES: Final = 4 << 30
_EDGE_BYTES: Final = 1 << 30
_SAMPLES: Final = 4096
_SAMPLE_BYTES: Final = 1 << 16
# Discarding would undo a hole-free image's allocation and costs time; the rest of the tables is written when needed.
_MAKERS: Final[dict[str, tuple[str, ...]]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}
# What else signs a device, for the refusal's text: (offset, signature, what it is).
_OTHERS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (512, b"EFI PART", "a partition table (GPT)"),
    (536, b"LVM2 001", "a volume of LVM"),
    (4086, b"SWAPSPACE2", "swap space"),
    (510, b"\x55\xaa", "a partition table (MBR)"),
)
_BTRFS_IOC_RESIZE: Final = 0x50009403  # linux/btrfs.h
_BTRFS_ARGUMENTS_BYTES: Final = 4096  # struct btrfs_ioctl_vol_args: a descriptor, and a text


def ensure(node: str, filesystem: str, *, below: str, reformat: bool, deadline: float) -> None:
    """See to it that `node` holds a `filesystem`: one that is there stays, a blank device gets one.

    `below` is the disk or the partition that `node` is, or shows decrypted. It has to be blank, as through a key that
    is not the right one everything looks like noise.

    Raises:
        Fault: it holds something else and `reformat` is not set, and nothing was written; or making it failed.
    """
    if filesystem not in _MAKERS:
        raise Fault(f"cannot make a {filesystem} file system: {' and '.join(_MAKERS)} are supported", kind="invalid")
    if not reformat:
        if mounting.detect(node) == filesystem:
            return
        if not is_blank(below, deadline):
            what = _what_is_on(node) or "something that we do not know"
            if below != node and mounting.detect(node) is None:
                what = _what_is_on(below) or "data, and no file system shows with this key"
            raise Fault(f"the device is not blank: it holds {what}; it was not formatted (reformat would)")
    if reformat:
        _wipe(node)
    _run([*_MAKERS[filesystem], node], deadline)


def is_blank(node: str, deadline: float) -> bool:
    """Does the device hold nothing but zeros, in the `places_to_read`?

    Raises:
        Fault: the deadline came first.
    """
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)  # the page cache would make it eight times as long
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        zeros = bytes(_MIB)
        with mmap.mmap(-1, _MIB) as page:
            for offset, length in places_to_read(size):
                if time.monotonic() >= deadline:
                    text = f"reading whether the device of {size >> 20} MiB is blank took longer than the time given"
                    raise Fault(f"{text}; it was not formatted")
                if os.preadv(fd, [memoryview(page)[:length]], offset) < length:
                    raise Fault(f"the device cannot be read at byte {offset}; it was not formatted")
                if page[:length] != zeros[:length]:
                    return False
        return True
    finally:
        os.close(fd)


def places_to_read(size: int) -> Iterator[tuple[int, int]]:
    """Where to look whether a device of `size` bytes is blank: offsets and lengths.

    Up to 4 GiB all of it. Of a larger one the first and the last GiB, where all that signs a device is, and 64 KiB at
    each of 4096 places that lie evenly between.
    """
    if size <= _READ_WHOLE_BYTES:
        yield from _whole(0, size)
        return
    begin, end = _EDGE_BYTES, (size - _EDGE_BYTES) // _SAMPLE_BYTES * _SAMPLE_BYTES
    step = max((end - begin) // _SAMPLES // _SAMPLE_BYTES * _SAMPLE_BYTES, _SAMPLE_BYTES)
    yield from _whole(0, begin)
    for offset in range(begin, end, step):
        yield offset, _SAMPLE_BYTES
    yield from _whole(end, size)


def _whole(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for offset in range(begin, end, _MIB):
        yield offset, min(_MIB, end - offset)


def _what_is_on(node: str) -> str | None:
    if found := mounting.detect(node):
        return f"a {found} file system"
    with open(node, "rb", buffering=0) as device:
        head = device.read(8192)
    return next((what for offset, sign, what in _OTHERS if head[offset : offset + len(sign)] == sign), None)


def _wipe(node: str) -> None:
    """Zero the places where the old content is signed, so that nobody finds it beside the new file system."""
    with open(node, "r+b", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        for offset in (0, max(0, size - _MIB)):
            device.seek(offset)
            device.write(bytes(min(_MIB, size)))


def grow(node: str, path: str, filesystem: str, deadline: float) -> None:
    """Grow the mounted file system to the size of its device.

    Raises:
        Fault: it cannot grow, or growing failed.
    """
    match filesystem:
        case "ext4" | "ext3" | "ext2":
            _run(["resize2fs", node], deadline)
        case "xfs":
            _run(["xfs_growfs", "-d", path], deadline)
        case "btrfs":
            _grow_btrfs(path)
        case _:
            raise Fault(f"a {filesystem} file system cannot be grown while it is mounted")


def _grow_btrfs(path: str) -> None:
    arguments = bytearray(_BTRFS_ARGUMENTS_BYTES)
    arguments[8:11] = b"max"
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BTRFS_IOC_RESIZE, arguments)
    except OSError as error:
        raise Fault(f"the btrfs at {path} does not grow: {os.strerror(error.errno or errno.EIO)}") from None
    finally:
        os.close(fd)


def _run(command: list[str], deadline: float) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=max(0.1, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"{command[0]} was not done within the time given", kind="timeout") from None
    except FileNotFoundError:
        raise Fault(f"{command[0]} is not in the guest image") from None
    if done.returncode:
        raise Fault(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()}")
