"""Where a disk can be mounted: the same on both sides."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

from utilityvm.agent.disks import DiskTable
from utilityvm.agent.faults import Fault
from utilityvm.bridge import guest_path
from utilityvm.errors import InvalidRequest
from utilityvm.guests.mount_settings import check_path
from utilityvm.scsi.mount import checked_guest_path

SYSTEM = [
    "/",
    "/bin",
    "/dev/disk",
    "/etc",
    "/etc/hosts",
    "/lib",
    "/lib64/x",
    "/proc/1/root",
    "/run",  # above ours
    "/run/utilityvm",
    "/run/utilityvm/x",
    "/sbin",
    "/sys",
    "/usr",
    "/usr/local/data",
    "//usr///lib/",
]
ODD = [
    "data",
    "",
    "/mnt/../usr",
    "/mnt/..",
    "/a\0b",
    "/a\nb",
    "/\udcff",
    "/a\x1b[2J",
    "/a\x7f",
    "/a\x9b",
    "/a\u202eb",
    "/" + "x" * 256,
    "/x" * 2048,
]
FREE = ["/mnt/data", "/data", "/run/mounts/scsi/m0", "/run/utilityvm2", "/usrx", "/home/usr", "/mnt/usr", "/var/lib/x"]


@pytest.mark.parametrize("text", SYSTEM + ODD, ids=repr)
def test_no_side_mounts_over_the_system_or_at_what_is_no_path(text: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"^(belongs to|is|has) "):
        guest_path.mountable(text)
    table = DiskTable(["0000:00:10.0"], state=tmp_path / "mounts.json")
    with pytest.raises(Fault) as caught:
        table.add({"MountPath": text, "Lun": 1}, 0.0)
    assert caught.value.kind == "invalid"
    if text:  # pathlib makes it another
        for check in (checked_guest_path, lambda path: check_path(path, to_mount=True)):
            with pytest.raises(InvalidRequest) as refused:
                check(PurePosixPath(text))
            assert refused.value.remedy


@pytest.mark.parametrize("text", FREE)
def test_both_sides_mount_elsewhere(text: str) -> None:
    path = PurePosixPath(text)
    assert guest_path.mountable(text) == path
    assert checked_guest_path(path) == path
    check_path(path, to_mount=True)


def test_a_path_has_one_spelling() -> None:
    assert str(guest_path.mountable("//mnt//data/./x//")) == "/mnt/data/x"


@pytest.mark.parametrize("text", ["/usr/x", "/run"])
def test_what_is_mounted_where_it_is_forbidden_by_now_can_be_unmounted(text: str, tmp_path: Any) -> None:
    check_path(PurePosixPath(text), to_mount=False)
    DiskTable(["0000:00:10.0"], state=tmp_path / "mounts.json").remove({"MountPath": f"{text}/not-mounted"}, 0.0)
