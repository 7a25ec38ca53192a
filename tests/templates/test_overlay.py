"""The overlay is a qcow2 as QEMU's own tools make it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utilityvm.errors import NotSupported, SetupError
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.templates import overlay

QEMU_IMG = find_program("qemu-img", package="qemu-utils")


def make(path: Path, base: Path, base_format: DiskFormat, size_bytes: int) -> None:
    os.close(overlay.create(path, size_bytes=size_bytes, base=base, base_format=base_format))


@pytest.mark.parametrize("size_bytes", [512, 1 << 20, (1 << 29) - 512, 1 << 29, (1 << 29) + 512, 5 << 40])
def test_qemu_finds_it_whole_and_of_the_size(tmp_path: Path, size_bytes: int) -> None:
    base = tmp_path / "base.raw"
    base.touch()
    os.truncate(base, min(size_bytes, 1 << 20))
    path = tmp_path / "overlay.qcow2"
    make(path, base, DiskFormat.RAW, size_bytes)
    found = json.loads(run([QEMU_IMG, "info", "--output=json", path]))
    assert found["virtual-size"] == size_bytes
    assert (found["full-backing-filename"], found["backing-filename-format"]) == (str(base), "raw")
    checked = json.loads(run([QEMU_IMG, "check", "--output=json", path]))
    assert checked["check-errors"] == 0
    assert checked.get("leaks", 0) == 0
    assert path.stat().st_blocks * 512 <= 1 << 20


@pytest.mark.parametrize("base_format", [DiskFormat.RAW, DiskFormat.QCOW2, DiskFormat.VHDX, DiskFormat.VMDK])
def test_what_is_written_to_it_leaves_the_disk_under_it(tmp_path: Path, base_format: DiskFormat) -> None:
    raw, base, path = tmp_path / "raw", tmp_path / "base", tmp_path / "overlay.qcow2"
    raw.write_bytes(bytes([7]) * (1 << 20))
    run([QEMU_IMG, "convert", "-f", "raw", "-O", base_format, raw, base])
    before = base.read_bytes()
    make(path, base, base_format, 1 << 20)
    qemu_io = find_program("qemu-io", package="qemu-utils")
    run([qemu_io, "-f", "qcow2", "-c", "write -P 9 65536 512", path])
    run([QEMU_IMG, "check", path])
    run([QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "flat"])
    expected = bytearray(raw.read_bytes())
    expected[65536 : 65536 + 512] = bytes([9]) * 512
    assert (tmp_path / "flat").read_bytes() == bytes(expected)
    assert base.read_bytes() == before


def test_only_its_owner_may_read_it_and_none_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    make(path, tmp_path / "base", DiskFormat.RAW, 512)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SetupError, match="File exists"):
        make(path, tmp_path / "base", DiskFormat.RAW, 512)


def test_a_name_that_no_header_can_have_is_left_out(tmp_path: Path) -> None:
    for base in (tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200) / ("w" * 200) / ("v" * 250), Path("nbd:odd")):
        path = tmp_path / f"{len(str(base))}.qcow2"
        make(path, base, DiskFormat.RAW, 512)
        assert "backing-filename" not in json.loads(run([QEMU_IMG, "info", "--output=json", path]))


def test_too_large(tmp_path: Path) -> None:
    with pytest.raises(NotSupported):
        make(tmp_path / "overlay", tmp_path / "base", DiskFormat.RAW, (1 << 51) + 512)
    assert not (tmp_path / "overlay").exists()


def test_no_folder_is_a_setup_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        make(tmp_path / "none/overlay", tmp_path / "base", DiskFormat.RAW, 512)
