"""What hcsshim's gcs does harm at: when a mount fails it removes the mount's path, with everything below it.

So no mount may be asked of it at a path that holds something which is not the mount's: a folder of the guest's own
system, or one above or inside another mount, whose files would go with it. A path below the guest's own folders for
such things (/run, /mnt, /var/lib) is made by gcs, and is empty.

Source: hcsshim internal/guest/storage/scsi/scsi.go, Mount.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

_SYSTEM: Final = frozenset({"bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr"})
_SHARED: Final = frozenset({"home", "media", "mnt", "opt", "root", "run", "srv", "tmp", "var"})


def is_precious(path: PurePosixPath) -> bool:
    """Would a guest miss what is at this path, or be broken without it?"""
    names = path.parts[1:]
    return not names or names[0] in _SYSTEM or (len(names) == 1 and names[0] in _SHARED)


def overlapping(path: PurePosixPath, others: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """The first of `others` that is above or below `path`."""
    return next((other for other in others if other in path.parents or path in other.parents), None)
