"""Paths of disks: absolute, as they were written, and the disk that they lead to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utilityvm.errors import InvalidRequest
from utilityvm.hosts.qemu.disk import describe
from utilityvm.machine.hostpath import absolute, identity_of


def test_a_relative_path_counts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("disk.raw") == absolute(Path("disk.raw")) == str(tmp_path / "disk.raw")


def test_links_and_dots_are_left_to_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr/lib")
    assert absolute(tmp_path / "link/../x") == f"{tmp_path}/link/../x"


@pytest.mark.parametrize("path", ["", "a\0b", "/srv/\udcff"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        absolute(path)


def test_bytes_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        absolute(b"/srv/disk")  # type: ignore[arg-type]


def test_every_spelling_has_one_identity(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    (tmp_path / "link").symlink_to(disk)
    os.link(disk, tmp_path / "hard")
    names = (disk, tmp_path / "link", tmp_path / "hard", f"{tmp_path}/../{tmp_path.name}/disk")
    assert {identity_of(name) for name in names} == {describe(disk)}


def test_a_path_that_leads_nowhere_has_none(tmp_path: Path) -> None:
    assert identity_of(tmp_path / "none") is None
