"""Mount options as mount(8) takes them: which are flags of mount(2), which are its own, and which a file system's.

Source: mount(8) of util-linux 2.38, FILESYSTEM-INDEPENDENT MOUNT OPTIONS; linux/mount.h; libmount's maps of options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_MANDLOCK = 1, 2, 4, 8, 16, 64
MS_DIRSYNC, MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_REC, MS_SILENT = 128, 256, 1024, 2048, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_RELATIME, MS_I_VERSION, MS_STRICTATIME, MS_LAZYTIME = (
    1 << bit for bit in (17, 18, 19, 20, 21, 23, 24, 25)
)

# A word sets the bits of the first number and clears those of the second.
_FLAGS: Final[dict[str, tuple[int, int]]] = {
    "ro": (MS_RDONLY, 0),
    "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0),
    "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0),
    "dev": (0, MS_NODEV),
    "noexec": (MS_NOEXEC, 0),
    "exec": (0, MS_NOEXEC),
    "sync": (MS_SYNCHRONOUS, 0),
    "async": (0, MS_SYNCHRONOUS),
    "dirsync": (MS_DIRSYNC, 0),
    "mand": (MS_MANDLOCK, 0),
    "nomand": (0, MS_MANDLOCK),
    "nosymfollow": (MS_NOSYMFOLLOW, 0),
    "symfollow": (0, MS_NOSYMFOLLOW),
    "noatime": (MS_NOATIME, 0),
    "atime": (0, MS_NOATIME),
    "nodiratime": (MS_NODIRATIME, 0),
    "diratime": (0, MS_NODIRATIME),
    "relatime": (MS_RELATIME, 0),
    "norelatime": (0, MS_RELATIME),
    "strictatime": (MS_STRICTATIME, 0),
    "nostrictatime": (0, MS_STRICTATIME),
    "lazytime": (MS_LAZYTIME, 0),
    "nolazytime": (0, MS_LAZYTIME),
    "iversion": (MS_I_VERSION, 0),
    "noiversion": (0, MS_I_VERSION),
    "silent": (MS_SILENT, 0),
    "loud": (0, MS_SILENT),
    # Who may mount it is of no use here; that a user's mount is a careful one is. A later word can undo it.
    "user": (MS_NOEXEC | MS_NOSUID | MS_NODEV, 0),
    "users": (MS_NOEXEC | MS_NOSUID | MS_NODEV, 0),
    "owner": (MS_NOSUID | MS_NODEV, 0),
    "group": (MS_NOSUID | MS_NODEV, 0),
}
_PROPAGATION: Final = {
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}
# What mount(8) keeps for itself or for others that read fstab: without effect on a mount that is asked for.
_KEPT: Final = {"defaults", "auto", "noauto", "nouser", "nousers", "noowner", "nogroup", "nofail", "_netdev"}
_KEPT_WITH_VALUE: Final = {"user", "comment", "uhelper", "helper"}
_KEPT_PREFIXES: Final = ("x-", "X-")
# These ask for another act than mounting a disk, and one that is not done here.
_OTHER_ACTS: Final = {
    "bind", "rbind", "move", "remount", "sub", "nosub", "sharing-group",
    "loop", "offset", "sizelimit", "encryption",
}  # fmt: skip
_OTHER_ACTS_PREFIXES: Final = (
    "verity.", "x-mount.idmap", "X-mount.idmap", "X-mount.subdir", "X-mount.owner", "X-mount.group", "X-mount.mode",
)  # fmt: skip


class MountOptions(NamedTuple):
    """Mount options, sorted by who takes them."""

    flags: int
    propagation: tuple[int, ...]
    data: str  # the file system's own, as the last argument of mount(2)


def parse(options: Sequence[str], *, read_only: bool) -> MountOptions:
    """Sort mount options as mount(8) does: of two that contradict each other the later one counts.

    What is none of mount(8)'s is the file system's to judge.

    Raises:
        ValueError: a quote is not closed, an option asks for another act than mounting the disk, or `rw` contradicts
            `read_only`. The message follows "the mount option".
    """
    flags = MS_RDONLY if read_only else 0
    propagation: list[int] = []
    data: list[str] = []
    for option in split(options):
        name, equals, _ = option.partition("=")
        if name in _OTHER_ACTS or option.startswith(_OTHER_ACTS_PREFIXES):
            raise ValueError(f"{option} asks for something else than mounting a disk, which is not done here")
        if option in _FLAGS:
            add, drop = _FLAGS[option]
            if read_only and drop & MS_RDONLY:
                raise ValueError(f"{option} contradicts read_only: the disk itself is read-only")
            flags = (flags & ~drop) | add
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif not (
            option in _KEPT or (equals and name in _KEPT_WITH_VALUE) or option.startswith(_KEPT_PREFIXES) or not option
        ):
            data.append(option)
    return MountOptions(flags, tuple(propagation), ",".join(data))


def split(options: Sequence[str]) -> Iterator[str]:
    """The options, one by one. Each text may hold several, with commas between them; a comma in quotes is none.

    Raises:
        ValueError: a quote is not closed.
    """
    for text in options:
        if text.count('"') % 2:
            raise ValueError(f"{text} has a quote that is not closed")
        begin, is_quoted = 0, False
        for at, sign in enumerate(text):
            if sign == '"':
                is_quoted = not is_quoted
            elif sign == "," and not is_quoted:
                yield text[begin:at]
                begin = at + 1
        yield text[begin:]
