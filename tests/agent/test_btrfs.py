"""The disks of a btrfs are known by what its superblocks say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from filesystem_images import blank, filesystem_image
from utilityvm.agent import btrfs, holders, mountinfo

pytestmark = pytest.mark.skipif(not shutil.which("mkfs.btrfs"), reason="mkfs.btrfs is not installed")


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    disks = [str(blank(tmp_path / f"{number}.raw", 128)) for number in (1, 2, 3)]
    subprocess.run(["mkfs.btrfs", "-q", "-f", *disks], check=True, capture_output=True)
    return disks


def attach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disks: Sequence[str]) -> None:
    lines = [f"   8        0     131072 {os.path.relpath(disk, '/dev')}" for disk in disks]
    (tmp_path / "partitions").write_text("\n".join(["major minor  #blocks  name", "", *lines, ""]))
    monkeypatch.setattr(btrfs, "_DISKS", str(tmp_path / "partitions"))


def test_a_disk_says_which_of_how_many_it_is(disks: list[str], tmp_path: Path) -> None:
    members = [btrfs.member(disk) for disk in disks]
    assert [member and (member.disks, member.number) for member in members] == [(3, 1), (3, 2), (3, 3)]
    assert len({member and member.fsid for member in members}) == 1
    assert btrfs.member(str(blank(tmp_path / "blank.raw", 1))) is None
    assert btrfs.member(str(blank(tmp_path / "tiny.raw", 0))) is None
    assert btrfs.member(str(tmp_path / "none")) is None


def test_the_missing_ones_are_named(disks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = str(filesystem_image("btrfs", tmp_path / "another.raw", {"a": "a"}))
    attach(tmp_path, monkeypatch, [*disks[::2], another])
    assert btrfs.missing_fellows(disks[0]) == "this btrfs has 3 disks: 2 here (devid 1, 3), 1 missing (devid 2)"
    attach(tmp_path, monkeypatch, [*disks, another])
    assert btrfs.missing_fellows(disks[0]) is None
    assert len(btrfs.fellows(disks[0])) == 3  # by other names in this test, its own too
    assert btrfs.fellows(another) == {}
    assert btrfs.missing_fellows(another) is None


def test_a_mount_of_a_btrfs_is_known_by_any_of_its_disks(
    disks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells one of them as what it was mounted from, and not the one that it was."""
    attach(tmp_path, monkeypatch, disks)
    numbers = {os.path.realpath(disk): (8, number) for number, disk in enumerate(disks)}
    monkeypatch.setattr(holders, "_number", lambda node: numbers.get(os.path.realpath(node)))
    text = "30 1 0:40 / /data rw shared:1 - btrfs /dev/sda rw\n"
    lines = list(mountinfo.mount_lines(_written(tmp_path, text)))
    monkeypatch.setattr(holders, "lines_at", lambda path: [line for line in lines if line.path == path])
    assert holders._fellows("/data", disks[2]) == {(8, 0), (8, 1), (8, 2)}
    assert holders._fellows("/other", disks[2]) == set()


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(text)
    return path
