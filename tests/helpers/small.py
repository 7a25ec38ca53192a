"""Small file systems in memory, to be filled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def small_filesystem(folder: Path, size_bytes: int, *, files: int = 0) -> Iterator[Path]:
    """One of so many bytes at `folder`, which is made; with `files`, also of so many files and folders. For root."""
    folder.mkdir(mode=0o700)
    limit = f",nr_inodes={files}" if files else ""
    options = f"size={size_bytes},mode=0700{limit}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", folder], check=True)
    try:
        yield folder
    finally:
        if subprocess.run(["umount", folder], check=False).returncode:
            subprocess.run(["umount", "--lazy", folder], check=True)
            raise AssertionError(f"something is still open in {folder}")


def fill(folder: Path) -> None:
    """Not one byte more can be written to the file system of that folder."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def fill_files(folder: Path) -> None:
    """Not one file more can be made on the file system of that folder."""
    with suppress(OSError):
        for number in range(1 << 20):
            (folder / f"filler{number}").touch()
