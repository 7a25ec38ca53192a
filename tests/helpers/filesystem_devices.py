"""Files that stand for devices, and what is made on them."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import pytest

from utilityvm.agent.filesystems import Below, ensure

MIB = 1 << 20

needs_xfs = pytest.mark.skipif(not shutil.which("mkfs.xfs"), reason="mkfs.xfs is not installed")


def soon() -> float:
    return time.monotonic() + 60


def device(path: Path, mib: int = 32) -> str:
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    return str(path)


def digest(node: str) -> str:
    return hashlib.sha256(Path(node).read_bytes()).hexdigest()


def write(node: str, offset: int, data: bytes) -> None:
    with Path(node).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def make(
    node: str, filesystem: str = "ext4", *, users: tuple[str, ...] = (), reformat: bool = False, deadline: float = 0.0
) -> None:
    ensure(node, filesystem, below=Below(node, lambda: [*users]), reformat=reformat, deadline=deadline or soon())
