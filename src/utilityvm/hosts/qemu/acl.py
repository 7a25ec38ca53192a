"""Give a group a right to a file, as one entry of its POSIX access list, and take that back.

The list is an extended attribute of little-endian entries: a version, then tag, permissions and id of each, in the
order of their tags. A file without a list has its mode bits, which say the same as the list's three first entries.
With one, the mode's group bits show the mask, which caps every entry but the owner's and the others'.

Source: Linux include/uapi/linux/posix_acl_xattr.h; acl(5).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from typing import Final, TypeAlias

ATTRIBUTE: Final = "system.posix_acl_access"
READ: Final = 4
WRITE: Final = 2
_VERSION: Final = 2
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID: Final = 0xFFFFFFFF
_CAPPED: Final = frozenset({_USER, _OWNING_GROUP, _GROUP})
_HEAD: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")

_Entries: TypeAlias = dict[tuple[int, int], int]  # (tag, id) -> permissions


@dataclass(frozen=True, slots=True)
class Before:
    """A file's rights before a `grant`."""

    attribute: bytes | None
    mode: int


def grant(fd: int, gid: int, permissions: int) -> Before | None:
    """Let the group do at least `permissions`. Gives what `restore` needs, or None if it could already.

    Nobody else can do more than before.

    Raises:
        OSError: the file is not ours, or its file system keeps no access lists; nothing changed.
    """
    before = Before(_read(fd), stat.S_IMODE(os.fstat(fd).st_mode))
    entries = _parse(before.attribute) if before.attribute else _of_mode(before.mode)
    mask = entries.get((_MASK, _NO_ID), 7)
    if entries.get((_GROUP, gid), 0) & mask & permissions == permissions:
        return None
    # The mask has to let the new right through. What it kept from others they lose, or it would now be given to them.
    for (tag, owner), allowed in entries.items():
        if tag in _CAPPED:
            entries[tag, owner] = allowed & mask
    entries[_GROUP, gid] = entries.get((_GROUP, gid), 0) | permissions
    entries[_MASK, _NO_ID] = 0
    for (tag, _), allowed in entries.items():
        if tag in _CAPPED:
            entries[_MASK, _NO_ID] |= allowed
    os.setxattr(fd, ATTRIBUTE, _pack(entries))
    return before


def restore(fd: int, before: Before) -> None:
    """Make the file's rights what they were.

    Raises:
        OSError: they are as the grant left them.
    """
    if before.attribute is not None:
        os.setxattr(fd, ATTRIBUTE, before.attribute)
    else:
        os.removexattr(fd, ATTRIBUTE)
        os.fchmod(fd, before.mode)  # the list is gone, and its mask stayed behind as the group's bits


def _read(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


def _of_mode(mode: int) -> _Entries:
    return {
        (_OWNER, _NO_ID): mode >> 6 & 7,
        (_OWNING_GROUP, _NO_ID): mode >> 3 & 7,
        (_OTHER, _NO_ID): mode & 7,
    }


def _parse(attribute: bytes) -> _Entries:
    (version,) = _HEAD.unpack_from(attribute)
    if version != _VERSION:
        raise OSError(errno.EOPNOTSUPP, f"access list of version {version}")
    return {(tag, owner): allowed for tag, allowed, owner in _ENTRY.iter_unpack(attribute[_HEAD.size :])}


def _pack(entries: _Entries) -> bytes:
    packed = (_ENTRY.pack(tag, allowed, owner) for (tag, owner), allowed in sorted(entries.items()))
    return _HEAD.pack(_VERSION) + b"".join(packed)
