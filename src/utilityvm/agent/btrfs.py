"""A btrfs over several disks: which of them are here, and which are not.

The kernel mounts one when it has heard of all its disks; without udev nobody tells it. libblkid tells a disk's file
system, and not its place in it, so the superblock is read here.

Source: Linux include/uapi/linux/btrfs_tree.h, btrfs_super_block; linux/btrfs.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from typing import Final, NamedTuple

_DISKS: Final = "/proc/partitions"
_CONTROL: Final = "/dev/btrfs-control"
_IOC_SCAN_DEV: Final = 0x50009404
_ARGUMENTS_BYTES: Final = 4096  # struct btrfs_ioctl_vol_args: a descriptor, and a text
_AT: Final = 65536
_SUPERBLOCK: Final = struct.Struct("<32x 16s 16x 8s 64x Q 57x Q")  # fsid, magic, num_devices, dev_item.devid
_MAGIC: Final = b"_BHRfS_M"


class Member(NamedTuple):
    """A disk of a btrfs."""

    fsid: bytes
    disks: int  # that the btrfs has
    number: int  # of this one


def member(node: str) -> Member | None:
    """What the disk says of itself; None if it is of no btrfs."""
    try:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fsid, magic, disks, number = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, _AT))
    except (OSError, struct.error):
        return None
    finally:
        os.close(fd)
    return Member(fsid, disks, number) if magic == _MAGIC else None


def fellows(node: str) -> dict[str, Member]:
    """The other disks of the btrfs on `node` that the guest has, by their nodes."""
    if (ours := member(node)) is None or ours.disks < 2:
        return {}
    with open(_DISKS) as lines:
        nodes = [f"/dev/{line.split()[3]}" for line in lines if line[:1] == " "]
    found = {other: member(other) for other in nodes if other != node}
    return {other: theirs for other, theirs in found.items() if theirs and theirs.fsid == ours.fsid}


def introduce_fellows(node: str) -> bool:
    """Tell the kernel of the other disks of the btrfs on `node`, as udev would. False: there is none."""
    found = False
    for other in fellows(node):
        argument = bytearray(_ARGUMENTS_BYTES)
        argument[8 : 8 + len(other)] = os.fsencode(other)
        with suppress(OSError):
            control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(control, _IOC_SCAN_DEV, argument)
                found = True
            finally:
                os.close(control)
    return found


def missing_fellows(node: str) -> str | None:
    """Which disks of the btrfs on `node` the guest does not have, in words; None if it has them all."""
    if (ours := member(node)) is None:
        return None
    here = sorted({ours.number, *(other.number for other in fellows(node).values())})
    if len(here) >= ours.disks:
        return None
    count = ours.disks - len(here)
    # Its disks have the numbers from 1, unless some were taken away or replaced.
    absent = [number for number in range(1, min(ours.disks, 1000) + 1) if number not in here]
    which = f" (devid {_listed(absent)})" if max(here) <= ours.disks else ""
    return f"this btrfs has {ours.disks} disks: {len(here)} here (devid {_listed(here)}), {count} missing{which}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
