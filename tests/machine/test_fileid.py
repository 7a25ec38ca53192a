"""A file is the same as long as it exists, and the next one is another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from utilityvm.machine.fileid import FileId


def file_id(path: Path) -> FileId:
    fd = os.open(path, os.O_RDONLY)
    try:
        return FileId.of(fd)
    finally:
        os.close(fd)


def test_its_birth_is_what_stat_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    seconds = int(subprocess.check_output(["stat", "-c", "%W", path], text=True))
    if not seconds:
        pytest.skip("this file system does not keep it")
    birth_ns = file_id(path).birth_ns
    assert birth_ns is not None
    assert birth_ns // 1_000_000_000 == seconds


def test_it_stays_the_same_when_it_is_written_linked_and_renamed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    before = file_id(path)
    path.write_bytes(b"and after")
    path.chmod(0o600)
    os.link(path, tmp_path / "link")
    path.rename(tmp_path / "other")
    assert file_id(tmp_path / "link") == file_id(tmp_path / "other") == before


def test_a_copy_and_the_next_file_of_that_name_are_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    first = file_id(path)
    path.unlink()
    path.write_bytes(b"")
    (tmp_path / "copy").write_bytes(b"")
    if first.birth_ns is None:
        pytest.skip("this file system may give the next file the same inode, and keeps no birth")
    assert len({first, file_id(path), file_id(tmp_path / "copy")}) == 3
