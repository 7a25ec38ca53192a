"""A file is the same as long as it exists, and the next one is another."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from utilityvm.machine.fileid import FileId, identity, is_same
from utilityvm.machine.programs import find_program, run


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


@pytest.fixture
def loops() -> Iterator[Callable[[Path], str]]:
    """Attaches a file to a new loop device."""
    if os.geteuid():
        pytest.skip("needs root, for loop devices")
    made: list[str] = []

    def attach(path: Path) -> str:
        losetup = find_program("losetup", package="mount")
        made.append(run([losetup, "--show", "-f", path]).decode().strip())
        return made[-1]

    yield attach
    for device in made:
        run([find_program("losetup", package="mount"), "-d", device])


def lasting(path: Path | str) -> str | None:
    return file_id(Path(path)).lasting


def test_a_loop_device_is_known_by_its_file_and_not_by_its_number(tmp_path: Path, loops: Callable[[Path], str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(bytes(1 << 20))
    if lasting(one) is None:
        pytest.skip("this file system keeps nothing that names a file for longer")
    first, again, other = loops(one), loops(one), loops(two)
    assert lasting(first) == lasting(again) != lasting(other)
    assert identity(Path(first).stat()) != identity(Path(again).stat())


@pytest.mark.parametrize("inode_bytes", [128, 256])  # the smaller ones have no room for a time of birth
def test_a_file_is_the_same_after_its_file_system_was_mounted_from_another_device(
    tmp_path: Path, loops: Callable[[Path], str], inode_bytes: int
) -> None:
    storage, folder = tmp_path / "storage", tmp_path / "mounted"
    folder.mkdir()
    with storage.open("wb") as file:
        file.truncate(16 << 20)
    run([find_program("mkfs.ext4", package="e2fsprogs"), "-q", "-F", "-I", str(inode_bytes), storage])
    mount, umount = (find_program(name, package="mount") for name in ("mount", "umount"))
    found = []
    for attempt in range(2):
        run([mount, loops(storage), folder])
        try:
            if attempt == 0:
                (folder / "disk").write_bytes(b"1")
                (folder / "other").write_bytes(b"1")
            found.append((file_id(folder / "disk"), file_id(folder / "other")))
        finally:
            run([umount, folder])
    (before, other), (after, _) = found
    assert before.lasting is not None
    assert before.lasting == after.lasting != other.lasting
    assert before.device != after.device


def test_a_device_that_nothing_names_may_be_another_after_a_boot() -> None:
    assert is_same("boot one 1792", "boot one 1792") is True
    assert is_same("boot one 1792", "boot one 1793") is False
    assert is_same("boot one 1792", "boot two 1792") is None
    assert is_same("wwid a", "boot two 1792") is False
