from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from utilityvm.errors import (
    AccessDenied,
    ConfigDiffers,
    DiskInUse,
    ImageDamaged,
    ImageUnsafe,
    InvalidRequest,
    NotSupported,
    SetupError,
)
from utilityvm.hosts.hcs.disk import DiskFacts, LocalDisks
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest

MIB = 1 << 20


def image(path: Path, format: DiskFormat, *options: str, size: str = "16M") -> Path:
    run([find_program("qemu-img", package="qemu-utils"), "create", "-q", "-f", format, *options, path, size])
    return path


def request(path: Path | str, **fields: Any) -> DiskRequest:
    return DiskRequest(**{"host_path": str(path), "read_only": False, **fields})


@pytest.mark.parametrize("format", [DiskFormat.VHD, DiskFormat.VHDX])
def test_an_image_is_read(tmp_path: Path, format: DiskFormat) -> None:
    options = ("-o", "force_size=on") if format is DiskFormat.VHD else ()
    disk = image(tmp_path / "d", format, *options)
    assert LocalDisks().read(request(disk)) == DiskFacts(format=format, size_bytes=16 * MIB)


@pytest.mark.parametrize("format", [DiskFormat.RAW, DiskFormat.QCOW2, DiskFormat.VMDK])
def test_a_format_that_hcs_does_not_attach_is_refused(tmp_path: Path, format: DiskFormat) -> None:
    with pytest.raises(NotSupported, match=f"no {format} images") as caught:
        LocalDisks().read(request(image(tmp_path / "d", format)))
    assert "vhdx" in str(caught.value.remedy)


def test_another_format_than_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigDiffers):
        LocalDisks().read(request(image(tmp_path / "d", DiskFormat.VHDX), format=DiskFormat.VHD))


def differencing(path: Path) -> Path:
    """A dynamic VHD whose footer and copy of it say that it is a differencing one."""
    data = bytearray(image(path, DiskFormat.VHD).read_bytes())
    for at in (0, len(data) - 512):
        footer = data[at : at + 512]
        footer[60:64] = (4).to_bytes(4, "big")
        footer[64:68] = bytes(4)
        footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
        data[at : at + 512] = footer
    path.write_bytes(data)
    return path


def test_a_differencing_image_takes_a_word(tmp_path: Path) -> None:
    disk = differencing(tmp_path / "d.vhd")
    with pytest.raises(ImageUnsafe, match="parent"):
        LocalDisks().read(request(disk))
    assert LocalDisks(allow_parents=True).read(request(disk)).format is DiskFormat.VHD


def test_an_image_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    disk = image(tmp_path / "d", DiskFormat.VHDX)
    with disk.open("r+b") as file:
        file.truncate(256 << 10)
    with pytest.raises(ImageDamaged):
        LocalDisks().read(request(disk))


def test_a_file_is_one_disk_by_every_path_to_it(tmp_path: Path) -> None:
    disk = image(tmp_path / "d", DiskFormat.VHDX)
    (tmp_path / "link").symlink_to(disk)
    (tmp_path / "hard").hardlink_to(disk)
    other = image(tmp_path / "other", DiskFormat.VHDX)
    identities = [
        LocalDisks().identity(request(tmp_path / name)) for name in ("d", "link", "hard", "../" + tmp_path.name + "/d")
    ]
    assert len(set(identities)) == 1
    assert LocalDisks().identity(request(other)) not in identities


def test_a_file_without_an_id_is_known_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", lambda _: os.stat_result((0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0)))
    disks = LocalDisks()
    assert disks.identity(request("C:\\A\\d.vhdx")) == disks.identity(request("c:/a/D.VHDX"))
    assert disks.identity(request("C:\\A\\d.vhdx")) != disks.identity(request("C:\\A\\e.vhdx"))


def test_devices_and_extensible_disks_have_identities() -> None:
    disks = LocalDisks()
    physical, extensible = AttachmentType.PASS_THRU, AttachmentType.EXTENSIBLE_VIRTUAL_DISK
    assert disks.identity(request("\\\\.\\PHYSICALDRIVE2", kind=physical)) == disks.identity(
        request("\\\\?\\physicaldrive2", kind=physical)
    )
    assert disks.identity(request("evd://space/x", kind=extensible)) == "evd:space/x"
    assert disks.read(request("evd://space/x", kind=extensible)).size_bytes == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for look in (LocalDisks().identity, LocalDisks().read):
        with pytest.raises(InvalidRequest, match="no such file"):
            look(request(tmp_path / "missing.vhdx"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(13, "denied"), AccessDenied),
        (OSError(22, "invalid"), InvalidRequest),
        (ValueError("embedded null"), InvalidRequest),
    ],
)
def test_a_file_that_cannot_be_looked_at(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(os, "stat", fails)
    with pytest.raises(kind, match=r"C:\\d\.vhdx"):
        LocalDisks().identity(request("C:\\d.vhdx"))


def test_a_file_that_windows_has_locked_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = PermissionError(13, "the process cannot access the file")
    locked.winerror = 32  # type: ignore[attr-defined, unused-ignore]

    def fails(*_: object, **__: object) -> None:
        raise locked

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(DiskInUse):
        LocalDisks().read(request(tmp_path / "d.vhdx"))


@pytest.mark.skipif(sys.platform == "win32", reason="this is Windows")
def test_off_windows_there_are_no_physical_drives_by_that_name() -> None:
    with pytest.raises(SetupError):
        LocalDisks().read(request("\\\\.\\PHYSICALDRIVE2", kind=AttachmentType.PASS_THRU))
