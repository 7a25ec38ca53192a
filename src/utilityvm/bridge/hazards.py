"""What may be asked of hcsshim's gcs, the Linux guest's agent, without loss: the rules for both ways to it.

It takes the words that our own agent takes, and does other things with them:

* When a mount fails, and at each unmount, it removes the mount's path with everything below it. So nothing is mounted
  but where only mounts are (`is_for_mounts`), and nothing above or below another mount (`overlapping`).
* It tells ext4 from everything else, and no more. Asked to ensure a file system, it formats a disk that holds
  anything else; asked for XFS, also one that holds XFS. Asked to encrypt, it formats first of all, also if the mount
  then fails. (`objection`)
* Of mount options it applies the propagation flags; it takes all others, and ignores them. (`objection`)

Source: hcsshim internal/guest/storage/scsi/scsi.go (Mount, Unmount), internal/guest/storage/mount.go
(ParseMountOptions, UnmountPath), internal/guest/storage/crypt/crypt.go; tried on the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final, NamedTuple

# Where hcsshim has gcs mount disks. gcs makes these folders itself, and nobody else keeps files there.
# Source: hcsshim internal/guestpath/paths.go; its functional tests mount at /run/gcs/c/0/scsi0.
_FOR_MOUNTS: Final = re.compile(r"/run/(mounts/(scsi/)?|layers/|drivers/|gcs/c/[^/]+/(scsi|mounts/))[^/]+(/.*)?")
_PARENTS: Final = frozenset({"/run/mounts/scsi", "/run/gcs/c"})
# The folders at the root that may hold files of the guest's own. Any other there is gcs's to make, and to remove.
# Source: Filesystem Hierarchy Standard 3.0, section 3; and what Linux and systemd add.
_SYSTEM: Final = frozenset(
    {
        "bin",
        "boot",
        "dev",
        "etc",
        "home",
        "init",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "lost+found",
        "media",
        "mnt",
        "nix",
    }
    | {"opt", "proc", "root", "run", "sbin", "snap", "srv", "sys", "tmp", "usr", "var"}
)
PLACES: Final = "/run/mounts, /run/layers, /run/drivers, /run/gcs/c/ID/mounts or /run/gcs/c/ID/scsi*"

PROPAGATION: Final = frozenset(
    {"private", "shared", "slave", "unbindable", "rprivate", "rshared", "rslave", "runbindable"}
)
_MADE: Final = ("ext4", "xfs")
_MAY_GO: Final = "say ensure_filesystem=True and reformat=True if all that is on the disk may go"


class Objection(NamedTuple):
    """Why a mount is not asked for, and what to do instead."""

    reason: str
    remedy: str


def is_for_mounts(path: PurePosixPath, vouched: Iterable[PurePosixPath] = ()) -> bool:
    """Is the path one where only mounts are? `vouched`: folders below which the caller says that it is so too."""
    text = str(path)
    if ".." in path.parts:
        return False
    if any(folder in path.parents for folder in vouched):
        return True
    if len(path.parts) == 2 and path.is_absolute():
        return path.name not in _SYSTEM
    return text not in _PARENTS and _FOR_MOUNTS.fullmatch(text) is not None


def place_objection(path: PurePosixPath) -> Objection:
    """Why nothing is mounted at a path that is not for mounts."""
    return Objection(
        f"guest path {path} may hold files of the guest's own, and this guest's agent removes the path with all that "
        "is below it when the disk is unmounted, or its mount fails",
        f"choose a new folder at the root, or a path below {PLACES}; or vouch for a folder of mounts alone, with "
        "allow_mounts_below",
    )


def overlapping(path: PurePosixPath, others: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """The first of `others` that is above or below `path`."""
    return next((other for other in others if other in path.parents or path in other.parents), None)


def objection(
    *,
    filesystem: str | None,
    ensure_filesystem: bool,
    reformat: bool,
    encrypted: bool,
    block_device: bool,
    options: Sequence[str],
) -> Objection | None:
    """Why a mount with these settings would do what its words do not say; None if it does what they say.

    What is left is said in the documents: with ext4, `reformat` keeps an ext4 that is there already.
    """
    ignored = [option for option in options if option not in PROPAGATION]
    if ignored:
        return Objection(
            f"this guest's agent ignores the mount option {ignored[0]!r}: it applies propagation flags alone",
            "drop it; for ro say read_only=True",
        )
    if block_device and (options or encrypted):
        what = "encrypts no published device" if encrypted else "applies no options to a published device"
        return Objection(f"this guest's agent {what}", "drop block_device, or the other")
    if ensure_filesystem and filesystem not in _MADE:
        return Objection(f"this guest's agent makes no {filesystem}: it makes ext4 and xfs", "use ext4 or xfs")
    if encrypted and not (ensure_filesystem and reformat):
        return Objection("this guest's agent formats each disk that it encrypts, whatever is on it", _MAY_GO)
    if ensure_filesystem and not reformat:
        but = "holds anything but ext4" if filesystem == "ext4" else f"holds anything, {filesystem} too"
        return Objection(
            f"this guest's agent, asked to ensure {filesystem}, formats a disk that {but}",
            f"{_MAY_GO}; if it has its file system, leave ensure_filesystem out",
        )
    return None
