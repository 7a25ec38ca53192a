"""The stand-in of hcsshim's gcs does what the real one does: to disks, to the guest's files, and to its requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_gcs import FakeGcs
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder
from utilityvm.scsi.slot import Slot
from utilityvm.testing.gcs import Content, Failed, Gcs

VECTORS = {
    message["name"]: message
    for message in json.loads((Path(__file__).parents[1] / "vectors/gcs.json").read_text())["messages"]
}
SLOT = Slot(0, 1)


class Guest:
    """A gcs with one disk."""

    def __init__(self, filesystem: str = "ext4") -> None:
        self.content = Content(filesystem=filesystem, has_data=True)
        self.gcs = Gcs(lambda _: self.content, is_read_only=lambda _: False)
        self.gcs.devices.add(SLOT)

    def mount(self, path: str = "/run/mounts/a", **settings: Any) -> None:
        self.gcs.modify("Add", "MappedVirtualDisk", {"MountPath": path, "Lun": 1, **settings})

    def unmount(self, path: str = "/run/mounts/a") -> None:
        self.gcs.modify("Remove", "MappedVirtualDisk", {"MountPath": path, "Lun": 1})


@pytest.mark.parametrize(
    ("there", "wanted", "is_kept"),
    [("ext4", "ext4", True), ("xfs", "ext4", False), ("ext4", "xfs", False), ("xfs", "xfs", False)],
)
def test_whatever_is_not_what_was_asked_for_is_formatted(there: str, wanted: str, is_kept: bool) -> None:
    guest = Guest(there)
    guest.mount(EnsureFilesystem=True, Filesystem=wanted)
    assert guest.content == Content(filesystem=wanted, has_data=is_kept)
    assert bool(guest.gcs.harm) is not is_kept


def test_a_disk_that_is_to_be_encrypted_is_formatted_also_when_the_mount_fails() -> None:
    guest = Guest()
    with pytest.raises(Failed, match="invalid argument"):
        guest.mount(Encrypted=True)
    assert not guest.content.has_data


def test_no_file_system_is_made_without_its_name() -> None:
    with pytest.raises(Failed, match="unsupported filesystem  requested for device"):
        Guest("ext4").mount(EnsureFilesystem=True)


def test_only_ext4_is_known_without_its_name() -> None:
    guest = Guest("xfs")
    with pytest.raises(Failed, match="could not get device filesystem type"):
        guest.mount()
    guest.mount(Filesystem="xfs")
    assert not guest.gcs.harm


def test_a_failed_mount_and_each_unmount_remove_the_path_with_all_that_is_below() -> None:
    guest = Guest("xfs")
    with pytest.raises(Failed):
        guest.mount("/opt/app")
    assert "/opt/app/run" not in guest.gcs.files
    guest.mount("/srv/site", Filesystem="xfs")
    guest.unmount("/srv/site")
    guest.unmount("/home")  # nothing is mounted there
    assert not {"/srv/site/index.html", "/home/u/file"} & guest.gcs.files
    assert len(guest.gcs.harm) == 3


def test_a_second_mount_at_its_own_path_deletes_the_disks_files() -> None:
    guest = Guest()
    guest.mount()
    with pytest.raises(Failed, match="device or resource busy"):
        guest.mount()
    assert "files of the disk at 0:1 were deleted" in guest.gcs.harm[0]


def test_options_but_for_propagation_flags_are_taken_and_ignored() -> None:
    guest = Guest()
    guest.mount(Options=["ro", "rshared", "made up"])
    assert guest.gcs.ignored == ["ro", "made up"]


def test_its_answers_before_a_negotiate_are_the_recorded_ones() -> None:
    gcs = FakeGcs()
    [frame] = Decoder().feed(bytes.fromhex(VECTORS["modify_add_disk_request"]["hex"]))
    answer = gcs._answer(frame)
    recorded = json.loads(VECTORS["modify_before_negotiate_response"]["body"])
    assert answer is not None
    assert {name: answer[name] for name in ("Result", "ErrorMessage")} == {
        name: recorded[name] for name in ("Result", "ErrorMessage")
    }


def test_its_answers_to_recorded_requests_are_the_recorded_ones() -> None:
    gcs = FakeGcs()
    gcs.attached.add(SLOT)
    [negotiate] = Decoder().feed(bytes.fromhex(VECTORS["negotiate_request"]["hex"]))
    assert (gcs._answer(negotiate) or {})["Version"] == messages.PROTOCOL_VERSION
    again = gcs._answer(negotiate) or {}
    assert again["Result"] == messages.signed(messages.E_NOT_IMPLEMENTED)
    [add] = Decoder().feed(bytes.fromhex(VECTORS["modify_add_disk_request"]["hex"]))
    assert gcs._answer(add) == json.loads(VECTORS["modify_add_disk_response"]["body"])
