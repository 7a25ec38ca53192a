"""Making and growing file systems."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

from utilityvm.agent import content, tools
from utilityvm.agent.faults import Fault

_MIB: Final = 1 << 20
_BLKRRPART: Final = 0x125F  # linux/fs.h
# Discarding would undo a hole-free image's allocation and costs time; the rest of the tables is written when needed.
_MAKERS: Final[dict[str, tuple[str, ...]]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}
_ONLY_ASK: Final = {"ext4": "-n", "xfs": "-N"}  # what has the tool say whether it could, and write nothing
_XFS: Final = b"XFSB"
_XFS_IN_PROGRESS_AT: Final = 126  # in the superblock: not 0 until mkfs.xfs, or xfs_copy, is done
# On the device from before the tool's first write until what it made is on the disk. It lies where neither tool writes:
# both zero the ends of a device (64 and 128 KiB), and lay their tables and logs at the beginnings of its parts.
# Should a part begin just there, the mark is lost, and what was cut short is refused in place of being made again.
_MARK: Final = "utilityvm is making a file system here, of {} bytes"
_MARK_FROM_END: Final = 256 << 10
_MARK_BYTES: Final = 512
_LEAST_TO_MARK: Final = 2 << 20
_NOT_YET: Final = 4096  # so many bytes stay zeros until mkfs.ext4 is done: it writes its superblock last, after a flush
_EXT: Final = ("ext2", "ext3", "ext4")
_GROWN: Final = (*_EXT, "xfs", "btrfs")  # while they are mounted
_EXT_SUPERBLOCK: Final = struct.Struct("<I 68x I")  # s_log_block_size, s_feature_incompat; Linux fs/ext4/ext4.h
_EXT_AT: Final = 1024 + 24
_EXT_64BIT: Final = 0x80
_EXT_LEAST_SHIFT: Final = 10  # a block has 1024 bytes at the least
_EXT_BLOCKS: Final = (1 << 32) - 1
_BTRFS_IOC_RESIZE: Final = 0x50009403  # linux/btrfs.h
_BTRFS_ARGUMENTS_BYTES: Final = 4096  # struct btrfs_ioctl_vol_args: a descriptor, and a text


Ranges: TypeAlias = Sequence[tuple[int, int]]  # offsets and lengths


@dataclass(frozen=True, slots=True)
class Below:
    """The disk or the partition that a file system is made on, or below the mapping that it is made on.

    `users` says who uses it. `may_hold` are the ranges outside of which it reads as zeros, if the host could tell and
    nothing was written to it since it came.
    """

    node: str
    users: Callable[[], list[str]]
    may_hold: Ranges | None = None


def ensure(node: str, filesystem: str, *, below: Below, reformat: bool, deadline: float) -> None:
    """See to it that `node` holds a `filesystem`: one that is there stays, a blank device gets one, and so does one
    whose making was cut short.

    All that can refuse comes before the first write: who uses the device, what it holds, and what the tool says of it.
    `below` has to be blank too, as through a key that is not the right one everything looks like noise.

    Raises:
        Fault: it is used, or holds something else and `reformat` is not set, or is too small, and nothing was written;
            or making it failed.
    """
    if filesystem not in _MAKERS:
        raise Fault(f"cannot make a {filesystem} file system: {' and '.join(_MAKERS)} are supported", kind="invalid")
    is_remade = reformat or is_half_made(node, deadline)
    if not is_remade and content.of(node, deadline).filesystem == filesystem:
        _refuse_half_made(node, filesystem)
        _finish(node, filesystem, deadline)
        return
    if users := below.users():
        more = f", and {len(users) - 1} more" if len(users) > 1 else ""
        text = f"the device is in use: {users[0]}{more}; it was not formatted"
        raise Fault(text, remedy="end what uses it, and ask again")
    impossible = _impossible(node, filesystem, deadline)
    with _claimed(node) as fd:
        if not is_remade:
            _refuse_data(node, below, deadline)
        if impossible:
            raise impossible
        _wipe(fd)
    tools.run([*_MAKERS[filesystem], node], deadline)
    with _claimed(node) as fd:
        _unmark(fd)


def is_half_made(node: str, deadline: float) -> bool:
    """Was a file system begun here by us, and cut short: by a kill, or the end of the power? Then it holds nothing.

    Our mark alone does not say so: somebody may have made something of the device since, and that is kept.
    """
    with open(node, "rb", buffering=0) as device:
        fd = device.fileno()
        if not _is_marked(fd):
            return False
        head = os.pread(fd, _NOT_YET, 0)
    if head.startswith(_XFS):
        return head[_XFS_IN_PROGRESS_AT] != 0
    return not any(head) and not str(content.of(node, deadline))


def refuse_unfinished(node: str, filesystem: str) -> None:
    """Refuse to mount an XFS that may have reached the disk in part: its superblock is not written last.

    Raises:
        Fault: it is marked.
    """
    if filesystem == "xfs":
        with open(node, "rb", buffering=0) as device:
            if _is_marked(device.fileno()):
                text = "making the xfs file system on the device was cut short"
                raise Fault(text, remedy="ask for it with ensure_filesystem: it is checked, or made again")


def _finish(node: str, filesystem: str, deadline: float) -> None:
    """Take the mark off a file system that was made, and whose maker ended before it could."""
    with open(node, "rb", buffering=0) as device:
        if not _is_marked(device.fileno()):
            return
    if filesystem == "xfs":
        done = tools.ask(["xfs_repair", "-n", node], deadline)
        if done.exit_code:
            why = tools.failure("xfs_repair", done).message
            text = f"making the xfs file system on the device was cut short, and it is not whole: {why}"
            raise Fault(text, remedy="have it made anew: ensure_filesystem with reformat")
    with suppress(Fault), _claimed(node) as fd:  # one that is mounted is left alone
        _unmark(fd)


def _mark_of(size: int) -> tuple[int, bytes] | None:
    """Where the mark of a device of so many bytes is, and what it says. None: it is too small to be marked."""
    if size < _LEAST_TO_MARK:
        return None
    return (size - _MARK_FROM_END) // 4096 * 4096, _MARK.format(size).encode().ljust(_MARK_BYTES, b"\0")


def _is_marked(fd: int) -> bool:
    place = _mark_of(os.lseek(fd, 0, os.SEEK_END))
    return place is not None and os.pread(fd, _MARK_BYTES, place[0]) == place[1]


def _unmark(fd: int) -> None:
    """What was made is on the disk, and then the mark is gone."""
    os.fsync(fd)
    if (place := _mark_of(os.lseek(fd, 0, os.SEEK_END))) and _is_marked(fd):
        os.pwrite(fd, bytes(_MARK_BYTES), place[0])
        os.fsync(fd)


def is_blank(node: str, deadline: float, may_hold: Ranges | None = None) -> bool:
    """Does the device hold nothing but zeros? Every byte is read, but of those outside `may_hold`.

    Its first and last MiB are always read: they are quickly read, and hold what signs a disk.

    Raises:
        Fault: the deadline came first.
    """
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)  # the page cache would make it eight times as long
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        zeros = bytes(_MIB)
        with mmap.mmap(-1, _MIB) as page:
            for offset in places_to_read(size, may_hold):
                length = min(_MIB, size - offset)
                if time.monotonic() >= deadline:
                    read = f"{offset >> 20} of {size >> 20} MiB were read"
                    text = f"whether the device is blank was not known in time: {read}; it was not formatted"
                    raise Fault(text, remedy="give it more time (timeout_s); or, if nothing on it is wanted, reformat")
                if os.preadv(fd, [memoryview(page)[:length]], offset) < length:
                    raise Fault(f"the device cannot be read at byte {offset}; it was not formatted")
                if page[:length] != zeros[:length]:
                    return False
        return True
    finally:
        os.close(fd)


def places_to_read(size: int, may_hold: Ranges | None) -> Iterator[int]:
    """The MiBs to look at, by their offsets, for whether a device of `size` bytes is blank: all, or those that may hold
    something, and the first and the last."""
    end = -(-size // _MIB)
    if may_hold is None:
        yield from range(0, end * _MIB, _MIB)
        return
    spans = [(0, 1), (end - 1, end)]
    spans += [(offset // _MIB, -(-(offset + length) // _MIB)) for offset, length in may_hold if length > 0]
    done = 0
    for begin, until in sorted(spans):
        yield from (mib * _MIB for mib in range(max(begin, done), min(until, end)))
        done = max(done, until)


def _refuse_half_made(node: str, filesystem: str) -> None:
    if filesystem == "xfs":
        with open(node, "rb", buffering=0) as device:
            if os.pread(device.fileno(), 1, _XFS_IN_PROGRESS_AT) != b"\0":
                text = "making the xfs file system on the device was cut short: it holds nothing that can be read"
                raise Fault(text, remedy="have it made anew: ensure_filesystem with reformat")


def _refuse_data(node: str, below: Below, deadline: float) -> None:
    if is_blank(below.node, deadline, below.may_hold):
        return
    found = content.of(node, deadline)
    what = str(found) or "something that we do not know"
    if below.node != node and not found.filesystem:
        what = str(content.of(below.node, deadline)) or "data, and no file system shows with this key"
    raise Fault(f"the device is not blank: it holds {what}; it was not formatted (reformat would)")


def _impossible(node: str, filesystem: str, deadline: float) -> Fault | None:
    """What the tool says against it, such as that the device is too small; it writes nothing."""
    try:
        maker, *options = _MAKERS[filesystem]
        tools.run([maker, _ONLY_ASK[filesystem], *options, node], deadline)
    except Fault as fault:
        return Fault(f"{fault.message}; nothing was written", kind=fault.kind, remedy=fault.remedy)
    return None


@contextmanager
def _claimed(node: str) -> Iterator[int]:
    """The device, open for writing, while nobody else mounts, maps or swaps on it or on a part of it.

    Raises:
        Fault: somebody does, or it cannot be written to.
    """
    try:
        fd = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        text = f"the device cannot be had alone: {error.strerror}; it was not formatted"
        raise Fault(text, remedy="end what uses it, and ask again") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _wipe(fd: int) -> None:
    """Zero the places where the old content is signed, so that nobody finds it beside the new file system; and mark
    the device. The beginning goes first: what is left of the old content is not found with a mark in it."""
    size = os.lseek(fd, 0, os.SEEK_END)
    os.pwrite(fd, bytes(min(_MIB, size)), 0)
    os.fsync(fd)
    os.pwrite(fd, bytes(min(_MIB, size)), max(0, size - _MIB))
    if place := _mark_of(size):
        os.pwrite(fd, place[1], place[0])
    os.fsync(fd)
    with suppress(OSError):  # what has no partitions
        fcntl.ioctl(fd, _BLKRRPART, 0)  # those that it had could be mounted otherwise


def check_grow(node: str, path: str, filesystem: str, size_bytes: int) -> None:
    """Refuse what `grow` could never do.

    Raises:
        Fault: names the mount, and the limit.
    """
    if filesystem not in _GROWN:
        raise Fault(
            f"{path} is a {filesystem} file system, which cannot be grown while it is mounted; nothing was changed",
            remedy="release that mount first: then the disk grows, and the file system stays as it is",
        )
    if filesystem in _EXT:
        with open(node, "rb", buffering=0) as device:
            block_shift, features = _EXT_SUPERBLOCK.unpack(os.pread(device.fileno(), _EXT_SUPERBLOCK.size, _EXT_AT))
        if not features & _EXT_64BIT and size_bytes >> (_EXT_LEAST_SHIFT + block_shift) > _EXT_BLOCKS:
            most = _EXT_BLOCKS << (_EXT_LEAST_SHIFT + block_shift)
            text = f"{path} is a {filesystem} file system without the feature 64bit, of {most} bytes at the most"
            raise Fault(f"{text}, and {size_bytes} were asked for; nothing was changed")


def grow(node: str, path: str, filesystem: str, deadline: float) -> None:
    """Grow the mounted file system to the size of its device.

    Raises:
        Fault: it cannot grow, or growing failed.
    """
    if filesystem in _EXT:
        tools.run(["resize2fs", node], deadline)
    elif filesystem == "xfs":
        tools.run(["xfs_growfs", "-d", path], deadline)
    elif filesystem == "btrfs":
        _grow_btrfs(path)
    else:
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
