"""What an image has allocated: all else reads as zeros."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from utilityvm.diskimage import allocated as module
from utilityvm.diskimage.allocated import allocated
from utilityvm.scsi.ports import DiskFormat

MIB = 1 << 20


def ranges(path: Path, image_format: DiskFormat = DiskFormat.RAW) -> list[tuple[int, int]] | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return allocated(fd, image_format, name=str(path))
    finally:
        os.close(fd)


def raw(path: Path, mib: int, *places: int) -> Path:
    with path.open("wb") as file:
        file.truncate(mib * MIB)
        for place in places:
            file.seek(place)
            file.write(b"x" * 4096)
    return path


def holds(found: list[tuple[int, int]] | None, place: int) -> bool:
    assert found is not None
    return any(offset <= place < offset + length for offset, length in found)


def test_a_sparse_image_has_what_was_written(tmp_path: Path) -> None:
    assert ranges(raw(tmp_path / "blank", 102400)) == []
    found = ranges(raw(tmp_path / "disk", 102400, 0, 5 << 30, (100 << 30) - 4096))
    assert found
    assert all(holds(found, place) for place in (0, 5 << 30, (100 << 30) - 4096))
    assert sum(length for _, length in found) < 64 * MIB


def test_an_image_that_is_zeros_and_no_hole_has_it_all(tmp_path: Path) -> None:
    path = tmp_path / "full"
    path.write_bytes(bytes(MIB))
    assert ranges(path) == [(0, MIB)]


def test_many_pieces_are_told_as_few_that_cover_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_MOST", 10)
    places = [n * MIB for n in range(0, 400, 4)] + [1000 * MIB]
    found = ranges(raw(tmp_path / "disk", 2000, *places))
    assert found
    assert len(found) <= 10
    assert all(holds(found, place) for place in places)
    assert not holds(found, 900 * MIB)
    assert found == sorted(found)


def test_too_many_pieces_to_look_at_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXTENTS_AT_MOST", 2)
    assert ranges(raw(tmp_path / "disk", 64, 0, 16 * MIB, 32 * MIB)) is None


def qemu_img(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)


def test_a_qcow2_has_what_its_table_names(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("qemu-img", "create", "-q", "-f", "qcow2", path, "100G")
    assert ranges(path, DiskFormat.QCOW2) == []
    qemu_img("qemu-io", "-f", "qcow2", "-c", "write 7G 4k", path)
    assert ranges(path, DiskFormat.QCOW2) == [(7 << 30, 512 * MIB)]


def test_what_lies_on_another_image_is_not_told(tmp_path: Path) -> None:
    base = raw(tmp_path / "base.raw", 64, 0)
    path = tmp_path / "over.qcow2"
    qemu_img("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    assert ranges(path, DiskFormat.QCOW2) is None


def test_other_formats_and_damaged_images_are_not_told(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk", 4)
    for image_format in DiskFormat:
        if image_format is not DiskFormat.RAW:
            assert ranges(path, image_format) is None
