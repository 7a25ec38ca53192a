"""mount(2) and umount2(2), and what the kernel says when it refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from utilityvm.agent import btrfs
from utilityvm.agent.faults import Fault
from utilityvm.bridge import mount_options
from utilityvm.bridge.mount_options import MS_RDONLY, MountOptions

MS_BIND: Final = 4096  # linux/mount.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_SYS_FSOPEN, _SYS_FSCONFIG = 430, 431  # of every architecture; the C library of Debian 12 has them, others may not
_FSOPEN_CLOEXEC, _FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING = 1, 0, 1

# What keeps a file system from writing to its device while it is mounted read-only.
_NO_RECOVERY: Final = {"ext4": "noload", "ext3": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}

# What an error in the image does. The superblock may ask for a panic of the kernel, which would take every disk of the
# VM with it; so the mount asks for its own end alone, which overrides that. XFS shuts itself down, and btrfs, vfat and
# exfat become read-only, whatever their images say. Source: Linux Documentation/admin-guide/ext4.rst.
_ON_ERROR: Final = "errors=remount-ro"
_EXT: Final = ("ext2", "ext3", "ext4")

# Causes that the kernel tells and that the caller can do something about: words of its log, and the remedy.
_ANOTHER: Final = "it is another file system: leave filesystem=... out, and it is detected"

_REMEDIES: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("duplicate uuid",),
        "it is a copy of an XFS that is mounted: mount it with the option nouuid, or give the copy a UUID of its own "
        "(xfs_admin -U generate)",
    ),
    (
        ("duplicate device",),
        "it is a copy of a btrfs that is mounted, and btrfs cannot mount both: release the other one, or give the copy "
        "a UUID of its own (btrfstune -u)",
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
        "(ensure_filesystem=True with reformat=True)",
    ),
    (
        ("log mount", "failed"),
        "the journal cannot be replayed: mount it read-only, which does not need it, and copy what is there",
    ),
    (
        ("error loading journal",),
        "the journal cannot be replayed: mount it read-only, which does not need it, and copy what is there",
    ),
    (("invalid superblock magic",), _ANOTHER),
    (("can't find",), _ANOTHER),
    (("unknown parameter",), "the file system knows no such mount option: leave it out"),
    (("unrecognized mount option",), "the file system knows no such mount option: leave it out"),
)

_NO_DRIVER: Final = (
    "use a guest image with a kernel that does (uvm image build --kernel linux-image-amd64 keeps all its modules), or "
    "its device without mounting it (block_device=True)"
)

_NO_MEMORY: Final = "the guest has too little memory: give the VM more (memory_mib, --memory)"

_LINES_AT_MOST: Final = 3  # of the kernel's log, in an error
_RECORDS_AT_MOST: Final = 1000
_KERNEL_LOG: Final = "/dev/kmsg"
_LEVEL_WARNING: Final = 4
_RECOVERED: Final = ("recovery complete", "Ending recovery")  # ext4's words and XFS'
_LEVEL_MASK: Final = 7  # of a record's number: syslog's priority, 3 is an error

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


class _Refused(Fault):
    """The kernel's no, with its number."""

    def __init__(self, message: str, number: int, *, remedy: str | None) -> None:
        super().__init__(message, remedy=remedy)
        self.number = number


def mount(node: str, target: str, filesystem: str, how: MountOptions) -> list[str]:
    """Mount `node` at `target`, and set its propagation. On an error nothing is mounted there.

    What cannot be written to is mounted read-only, as mount(8) does. Gives what is to be said of that, and what the
    kernel says of the file system: that it replayed its journal, or that it is to be checked.

    Raises:
        Fault: the kernel refused; names its reason.
    """
    _refuse_without_disk(filesystem)
    said = _try_to_mount(node, target, filesystem, how)
    try:
        _refuse_without_disk(filesystem)  # of a driver that the mount has loaded
        for flag in how.propagation:
            _mount(b"none", target, None, flag, None)
    except Fault:
        unmount(target, lazily=True)
        raise
    notes = [f"the kernel says of the file system at {target}: {line}" for line in said[:_LINES_AT_MOST]]
    if not how.flags & MS_RDONLY and is_read_only(target):
        text = f"{target} is mounted read-only: a {filesystem} file system, or its disk, cannot be written to here"
        notes.insert(0, text)
    return notes


def _refuse_without_disk(filesystem: str) -> None:
    """Refuse what the kernel mounts without looking at the disk: proc, tmpfs, overlay, 9p and the like.

    Source: filesystems(5), which lists the drivers that are loaded.
    """
    with open("/proc/filesystems", encoding="ascii") as file:
        if any(line.split() == ["nodev", filesystem] for line in file):
            raise Fault(f"{filesystem} is not a file system on a disk", kind="invalid", remedy="name one that is")


def _try_to_mount(node: str, target: str, filesystem: str, how: MountOptions) -> list[str]:
    """Gives the lines of the kernel's log that a person should see."""

    def attempt(flags: int) -> list[str]:
        data = with_defaults(filesystem, how._replace(flags=flags))
        return _mount(os.fsencode(node), target, filesystem.encode(), flags, data.encode() or None)

    try:
        return attempt(how.flags)
    except _Refused as refused:
        if refused.number in (errno.EROFS, errno.EACCES) and not how.flags & MS_RDONLY:
            return attempt(how.flags | MS_RDONLY)
        if filesystem == "btrfs" and btrfs.introduce_fellows(node):
            try:
                return attempt(how.flags)
            except _Refused as again:
                raise _with_missing_disks(node, again) from None
        if filesystem == "btrfs":
            raise _with_missing_disks(node, refused) from None
        raise


def _with_missing_disks(node: str, refused: _Refused) -> Fault:
    if missing := btrfs.missing_fellows(node):
        remedy = "attach the missing disks without a guest path, and mount it then; or mount it read-only, degraded"
        return Fault(f"{refused.message}; {missing}", remedy=f"{remedy} (options ro, degraded)")
    return refused


def is_read_only(target: str) -> bool:
    """Is what is mounted there read-only, for whatever reason?"""
    try:
        return bool(os.statvfs(target).f_flag & os.ST_RDONLY)
    except OSError:
        return False


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


def bind(source: str, target: str) -> None:
    """Make `source` appear at `target`.

    Raises:
        Fault: the kernel refused.
    """
    _mount(os.fsencode(source), target, None, MS_BIND, None)


def _mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> list[str]:
    device = os.path.basename(os.fsdecode(source))
    with _kernel_log() as log:
        if not _libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data):
            return list(_worth_a_note(log, device)) if kind else []
        number = ctypes.get_errno()
        lines = _said_of(log, device, kind.decode() if kind else "")
    what = f"mount {source.decode()} at {target}"
    text = f"{what} as {kind.decode()}" if kind else what
    said = f" ({'; '.join(lines[:_LINES_AT_MOST])})" if lines else ""
    text += f" with {data.decode() if data else 'no options'}: {os.strerror(number)}{said}"
    if number == errno.ENODEV and kind:
        text = f"{what} as {kind.decode()}: the guest's kernel knows no such file system"
        raise _Refused(text, number, remedy=_NO_DRIVER)
    raise _Refused(text, number, remedy=_NO_MEMORY if number == errno.ENOMEM else _remedy(lines))


def check_options(filesystem: str, how: MountOptions) -> None:
    """Refuse options that the file system does not know, before there is one.

    Only a driver of the kernel's newer kind can be asked, as ext4's and xfs's are; of others nothing is refused here.
    A value in quotes is a security module's, and is not judged either.

    Raises:
        Fault: the driver refused one; has its words.
    """
    context = _libc.syscall(_SYS_FSOPEN, filesystem.encode(), _FSOPEN_CLOEXEC)
    if context < 0:
        return
    try:
        for option in mount_options.split([with_defaults(filesystem, how)]):
            name, equals, value = option.partition("=")
            if not option or '"' in option:
                continue
            command, given = (_FSCONFIG_SET_STRING, value.encode()) if equals else (_FSCONFIG_SET_FLAG, None)
            if _libc.syscall(_SYS_FSCONFIG, context, command, name.encode(), given, 0):
                number = ctypes.get_errno()
                lines = list(_messages(context)) or [os.strerror(number)]
                text = f"{filesystem} does not take the mount option {option}: {'; '.join(lines[:_LINES_AT_MOST])}"
                raise Fault(f"{text}; nothing was written", remedy=_remedy(lines))
    finally:
        os.close(context)


def _messages(context: int) -> Iterator[str]:
    """What the driver says. Each read gives a message, with a letter for its kind before it."""
    while True:
        try:
            message = os.read(context, 4096)
        except OSError:
            return
        if not message:
            return
        yield message.decode(errors="replace")[2:].rstrip("\n")


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
    why = [one for one in found if one[0] <= _LEVEL_WARNING] or found  # the rest is what a driver says of itself
    return [text for _, _, text in sorted(why, key=lambda one: one[:2])]


def _worth_a_note(log: int, device: str) -> Iterator[str]:
    """What the kernel said of a device that it has mounted: its warnings, and that a journal was replayed."""
    name = re.compile(rf"\b{re.escape(device)}\b")
    for level, text in _records(log):
        if name.search(text) and (level <= _LEVEL_WARNING or any(word in text for word in _RECOVERED)):
            yield text


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
