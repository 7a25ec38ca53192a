"""What callers ask for is checked before anything is asked of the world."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from utilityvm import GENERATED, DiskSpec, InvalidRequest, ScratchKey, VMConfig
from utilityvm.scsi.ports import AttachmentType, DiskFormat, MountConfig, VMAccess


def test_a_config_comes_back_from_json() -> None:
    config = VMConfig(name="one", memory_mib=512, cpus=2, controllers=1, keep=True, accelerator="tcg")
    assert VMConfig.from_json(config.to_json()) == config


def test_a_config_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert VMConfig.from_json({"name": "one", "colour": "blue"}) == VMConfig(name="one")


def test_without_a_guest_path_nothing_is_mounted() -> None:
    request = DiskSpec(host_path="/srv/a.qcow2", read_only=True).request()
    assert request.mount is None
    assert request.guest_path is None
    assert request.disk.read_only


def test_a_guest_path_means_a_mount_there() -> None:
    request = DiskSpec(host_path="/srv/a", guest_path="/data", options=["noatime"], partition=2).request()
    assert request.guest_path == PurePosixPath("/data")
    assert request.mount == MountConfig(partition=2, options=("noatime",))


def test_a_generated_path_means_a_mount_somewhere() -> None:
    request = DiskSpec(host_path="/srv/a", guest_path=GENERATED).request()
    assert request.guest_path is None
    assert request.mount == MountConfig()


def test_the_mount_of_a_read_only_disk_is_read_only() -> None:
    mount = DiskSpec(host_path="/srv/a", guest_path="/data", read_only=True).request().mount
    assert mount is not None
    assert mount.read_only


def test_a_format_may_be_written_as_text() -> None:
    request = DiskSpec(host_path="/dev/sdz", physical=True, format="raw", access=VMAccess.NOOP).request()
    assert (request.disk.kind, request.disk.format) == (AttachmentType.PASS_THRU, DiskFormat.RAW)


@pytest.mark.parametrize(
    "spec",
    [
        DiskSpec(host_path=""),
        DiskSpec(host_path="/a", guest_path=""),
        DiskSpec(host_path="/a", guest_path="data"),
        DiskSpec(host_path="/a", guest_path="/data/.."),
        DiskSpec(host_path="/a", guest_path="/"),
        DiskSpec(host_path="/a", guest_path="/sys/x"),
        DiskSpec(host_path="/a", format="floppy"),
        DiskSpec(host_path="/a", options="ro"),
        DiskSpec(host_path="/a", options=["ro"]),
        DiskSpec(host_path="/a", partition=1),
        DiskSpec(host_path="/a", guest_path="/data", partition=-1),
        DiskSpec(host_path="/a", guest_path="/data", reformat=True),
        DiskSpec(host_path="/a", guest_path="/data", read_only=True, encryption=ScratchKey()),
    ],
    ids=repr,
)
def test_what_is_wrong_by_itself_is_refused(spec: DiskSpec) -> None:
    with pytest.raises(InvalidRequest):
        spec.request()
