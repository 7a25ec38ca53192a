"""What libblkid finds, and what of a child's answer is believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from filesystem_images import blank, filesystem_image, gpt_disk
from utilityvm.agent import blkid
from utilityvm.agent.blkid import Look, Superblock, look
from utilityvm.agent.faults import Fault

LIMIT_S = 60.0


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"superblocks": [["../x", "filesystem", 0]], "table": null}', b"{}"])
def test_what_a_child_that_was_taken_over_says_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(blkid, "_examine", lambda *_: said)
    with pytest.raises(Fault, match="answered what is no answer"):
        look(str(blank(tmp_path / "disk.raw", 1)), time.monotonic() + LIMIT_S)


def test_who_reads_the_signatures_has_given_up_its_rights_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> list[list[object]]:
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except PermissionError:
            return [["refused", "other", 0]]
        return []

    monkeypatch.setattr(blkid, "_superblocks", read)
    found = look(str(blank(tmp_path / "disk.raw", 1)), time.monotonic() + LIMIT_S)
    assert [one.kind for one in found.superblocks] == ["refused"]


def test_what_is_there_is_found(tmp_path: Path) -> None:
    def found(path: Path) -> Look:
        return look(str(path), time.monotonic() + LIMIT_S)

    part = filesystem_image("ext4", tmp_path / "part.raw", {})
    assert found(part) == Look((Superblock("ext4", "filesystem"),))
    assert found(blank(tmp_path / "blank.raw", 4)) == Look()
    table = found(gpt_disk(tmp_path / "disk.raw", [part, part])).table
    assert table
    assert (table.kind, [part.number for part in table.partitions]) == ("gpt", [1, 2])
    assert table.partitions[0].begin_bytes == 1 << 20
    assert table.partitions[0].size_bytes == part.stat().st_size


def test_without_the_library_the_remedy_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blkid, "LIBRARY", "libnone.so.1")
    with pytest.raises(Fault, match="not in the guest image") as caught:
        look(str(blank(tmp_path / "disk.raw", 1)), time.monotonic() + LIMIT_S)
    assert "libblkid1" in str(caught.value.remedy)
