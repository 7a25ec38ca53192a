"""Making and growing file systems."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Final

from utilityvm.agent import mounting
from utilityvm.agent.faults import Fault

_PROBED_BYTES: Final = 1 << 20
# Discarding would undo a hole-free image's allocation and costs time; the rest of the tables is written when needed.
_MAKERS: Final[dict[str, tuple[str, ...]]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}


def is_blank(node: str, size_bytes: int) -> bool:
    """Is there nothing but zeros where a file system, a partition table or anything else signs a device?"""
    with open(node, "rb", buffering=0) as device:
        for offset in (0, max(0, size_bytes - _PROBED_BYTES)):
            os.lseek(device.fileno(), offset, os.SEEK_SET)
            if any(os.read(device.fileno(), _PROBED_BYTES)):
                return False
    return True


def ensure(node: str, size_bytes: int, filesystem: str, *, reformat: bool, deadline: float, trust_blank: bool) -> None:
    """See to it that `node` holds a `filesystem`: one that is there stays, a blank device gets one.

    `trust_blank`: what the device holds means nothing (it is seen through a fresh random key).

    Raises:
        Fault: it holds something else and `reformat` is not set; or making it failed.
    """
    if filesystem not in _MAKERS:
        raise Fault(f"cannot make a {filesystem} file system: {' and '.join(_MAKERS)} are supported", kind="invalid")
    if not reformat and not trust_blank:
        found = mounting.detect(node)
        if found == filesystem:
            return
        if found or not is_blank(node, size_bytes):
            what = f"a {found} file system" if found else "something that is not a file system that we know"
            raise Fault(f"the device is not blank: it holds {what}; it was not formatted")
    _run([*_MAKERS[filesystem], node], deadline)


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
        case _:
            raise Fault(f"a {filesystem} file system cannot be grown while it is mounted")


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
