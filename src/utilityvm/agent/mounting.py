"""mount(2) and umount2(2), and which file system a device holds."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from utilityvm.agent.faults import Fault
from utilityvm.bridge import mount_options
from utilityvm.bridge.mount_options import MS_RDONLY, MountOptions

MS_BIND: Final = 4096  # linux/mount.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

# Where a file system signs its superblock: (offset, signature, name).
_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"XFSB", "xfs"),
    (0, b"hsqs", "squashfs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1080, b"\x53\xef", "ext4"),  # the ext4 driver mounts ext2 and ext3 as well
    (65600, b"_BHRfS_M", "btrfs"),
    (32769, b"CD001", "iso9660"),
    (82, b"FAT32   ", "vfat"),
    (54, b"FAT16   ", "vfat"),
    (54, b"FAT12   ", "vfat"),
    (3, b"EXFAT   ", "exfat"),
)
# What keeps a file system from writing to its device while it is mounted read-only.
_NO_RECOVERY: Final = {"ext4": "noload", "ext3": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}

# What an error in the image does. The superblock may ask for a panic of the kernel, which would take every disk of the
# VM with it; so the mount asks for its own end alone, which overrides that. XFS shuts itself down, and btrfs, vfat and
# exfat become read-only, whatever their images say. Source: Linux Documentation/admin-guide/ext4.rst.
_ON_ERROR: Final = "errors=remount-ro"
_EXT: Final = ("ext2", "ext3", "ext4")

# Causes that the kernel tells and that the caller can do something about: words of its log, and the remedy.
_REMEDIES: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("duplicate uuid",),
        "it is a copy of an XFS that is mounted: mount it with the option nouuid, or give the copy a UUID of its own "
        "(xfs_admin -U generate)",
    ),
    (
        ("devid", "missing"),
        "attach the other disks of this btrfs first, without a guest path; or mount it read-only with the option "
        "degraded",
    ),
    (
        ("failed to read chunk tree",),
        "attach the other disks of this btrfs first, without a guest path; or mount it read-only with the option "
        "degraded",
    ),
    (
        ("operation in progress",),
        "making or changing this file system was cut short, and it holds nothing that can be read: have it made anew "
        "(ensure_filesystem with reformat)",
    ),
    (
        ("log mount", "failed"),
        "the journal cannot be replayed: mount it read-only, which does not need it, and copy what is there",
    ),
    (
        ("error loading journal",),
        "the journal cannot be replayed: mount it read-only, which does not need it, and copy what is there",
    ),
    (("unknown parameter",), "the file system knows no such mount option: leave it out"),
    (("unrecognized mount option",), "the file system knows no such mount option: leave it out"),
)

_LINES_AT_MOST: Final = 3  # of the kernel's log, in an error
_RECORDS_AT_MOST: Final = 1000
_KERNEL_LOG: Final = "/dev/kmsg"
_LEVEL_MASK: Final = 7  # of a record's number: syslog's priority, 3 is an error

_PARTITIONS: Final = "/proc/partitions"
_BTRFS_CONTROL: Final = "/dev/btrfs-control"
_BTRFS_IOC_SCAN_DEV: Final = 0x50009404  # linux/btrfs.h
_BTRFS_ARGUMENTS_BYTES: Final = 4096  # struct btrfs_ioctl_vol_args: a descriptor, and a text
_BTRFS_ID_AT: Final = 65536 + 32  # the file system's id, in its superblock

_libc = ctypes.CDLL(None, use_errno=True)


def words(options: Sequence[str], *, read_only: bool) -> MountOptions:
    """Mount options as mount(2) wants them.

    Raises:
        Fault: as `mount_options.parse`.
    """
    try:
        return mount_options.parse(options, read_only=read_only)
    except ValueError as why:
        raise Fault(f"the mount option {why}", kind="invalid") from None


def detect(node: str) -> str | None:
    """The file system on a device, by its signature. None: none that we know."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(fd, 4096, 0)
        for offset, signature, name in _SIGNATURES:
            if offset + len(signature) <= len(head):
                found = head[offset : offset + len(signature)]
            else:
                found = os.pread(fd, len(signature), offset)
            if found == signature:
                return name
    finally:
        os.close(fd)
    return None


def mount(node: str, target: str, filesystem: str, how: MountOptions) -> None:
    """Mount `node` at `target`, and set its propagation. On an error nothing is mounted there.

    Raises:
        Fault: the kernel refused; names its reason.
    """
    data = with_defaults(filesystem, how)
    try:
        _mount(os.fsencode(node), target, filesystem.encode(), how.flags, data.encode() or None)
    except Fault:
        if filesystem != "btrfs" or not _introduce_fellows(node):
            raise
        _mount(os.fsencode(node), target, filesystem.encode(), how.flags, data.encode() or None)
    try:
        for flag in how.propagation:
            _mount(b"none", target, None, flag, None)
    except Fault:
        unmount(target, lazily=True)
        raise


def mount_again(node: str, target: str, filesystem: str, how: MountOptions) -> None:
    """As `mount`, of a file system that was mounted so and lives on, whatever has become of it: read-only, by an error.

    Raises:
        Fault: the kernel refused.
    """
    try:
        mount(node, target, filesystem, how)
    except Fault:
        if how.flags & MS_RDONLY:
            raise
        mount(node, target, filesystem, how._replace(flags=how.flags | MS_RDONLY))


def with_defaults(filesystem: str, how: MountOptions) -> str:
    """The file system's options, with those that hold unless the caller says otherwise."""
    given = [option for option in mount_options.split([how.data]) if option]
    added = []
    if how.flags & MS_RDONLY and (never_write := _NO_RECOVERY.get(filesystem)) and never_write not in given:
        added.append(never_write)
    if filesystem in _EXT and not any(word.startswith("errors=") for word in given):
        added.append(_ON_ERROR)
    return ",".join([*given, *added])


def _introduce_fellows(node: str) -> bool:
    """Tell the kernel of the other disks of the btrfs on `node`, as udev would. False: there is none."""
    found = False
    ours = _btrfs_id(node)
    with open(_PARTITIONS) as lines:
        names = [line.split()[3] for line in lines if line[:1] == " "]
    for other in (f"/dev/{name}" for name in names):
        with suppress(OSError):
            if other == node or detect(other) != "btrfs" or _btrfs_id(other) != ours:
                continue
            argument = bytearray(_BTRFS_ARGUMENTS_BYTES)
            argument[8 : 8 + len(other)] = os.fsencode(other)
            control = os.open(_BTRFS_CONTROL, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(control, _BTRFS_IOC_SCAN_DEV, argument)
                found = True
            finally:
                os.close(control)
    return found


def _btrfs_id(node: str) -> bytes:
    with open(node, "rb", buffering=0) as device:
        return os.pread(device.fileno(), 16, _BTRFS_ID_AT)


def bind(source: str, target: str) -> None:
    """Make `source` appear at `target`.

    Raises:
        Fault: the kernel refused.
    """
    _mount(os.fsencode(source), target, None, MS_BIND, None)


def _mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
    with _kernel_log() as log:
        if not _libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data):
            return
        number = ctypes.get_errno()
        lines = _said_of(log, os.path.basename(os.fsdecode(source)), kind.decode() if kind else "")
    what = f"mount {source.decode()} at {target}"
    text = f"{what} as {kind.decode()}" if kind else what
    said = f" ({'; '.join(lines[:_LINES_AT_MOST])})" if lines else ""
    text += f" with {data.decode() if data else 'no options'}: {os.strerror(number)}{said}"
    raise Fault(text, remedy=_remedy(lines))


def _remedy(lines: Sequence[str]) -> str | None:
    text = "\n".join(lines).lower()
    return next((remedy for words, remedy in _REMEDIES if all(word in text for word in words)), None)


@contextmanager
def _kernel_log() -> Iterator[int]:
    """The kernel's log from here on, as a descriptor; of no use where there is none."""
    try:
        fd = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        os.lseek(fd, 0, os.SEEK_END)
        yield fd
    finally:
        os.close(fd)


def _said_of(log: int, device: str, filesystem: str) -> list[str]:
    """What the kernel said, such as why a file system was not mounted: an errno tells little.

    The worst comes first, as that says why; of equals those that name the device, in their order.
    """
    records = list(_records(log))
    found = [
        (level, bool(device) and device not in text, text)
        for level, text in records
        if any(name and name.lower() in text.lower() for name in (device, filesystem))
    ]
    return [text for _, _, text in sorted(found, key=lambda one: one[:2])]


def _records(log: int) -> Iterator[tuple[int, str]]:
    """The records that came since the log was opened: their levels, and their first lines."""
    for _ in range(_RECORDS_AT_MOST):
        try:
            record = os.read(log, 8192).decode(errors="replace")
        except BrokenPipeError:
            continue  # so many came that some were overwritten
        except OSError:
            return  # that was all
        if not record:
            return
        head, _, rest = record.partition(";")
        number = head.partition(",")[0]
        if number.isdecimal():
            yield int(number) & _LEVEL_MASK, rest.partition("\n")[0]


def unmount(target: str, *, lazily: bool = False) -> None:
    """Unmount what is at `target`.

    Raises:
        OSError: EBUSY, or what else the kernel said.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazily else 0)
    if _libc.umount2(os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def sync_filesystem(target: str) -> None:
    """Write out all that the file system at `target` holds back.

    Raises:
        OSError: the disk did not take it.
    """
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), target)
    finally:
        os.close(fd)
