from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm.hosts.qemu import blockdev
from utilityvm.hosts.qemu.disk import QemuDisk, open_disk
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat, DiskRequest
from utilityvm.scsi.slot import Slot


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., QemuDisk]:
    def make_disk(image_format: DiskFormat, *, read_only: bool = False) -> QemuDisk:
        path = tmp_path / f"disk.{image_format}"
        qemu_img = find_program("qemu-img", package="qemu-utils")
        options = ["-o", "force_size=on"] if image_format is DiskFormat.VHD else []
        run([qemu_img, "create", "-q", "-f", image_format, *options, path, "16M"])
        disk = open_disk(DiskRequest(host_path=str(path), read_only=read_only))
        disk.close()
        return disk

    return make_disk


@pytest.mark.parametrize("image_format", list(DiskFormat))
@pytest.mark.parametrize("read_only", [True, False])
def test_every_layer_names_its_driver_and_the_descriptor(
    make: Callable[..., QemuDisk], image_format: DiskFormat, read_only: bool
) -> None:
    node = blockdev.node(make(image_format, read_only=read_only), 7, locks=True)
    protocol = node["file"] if image_format is not DiskFormat.RAW else node
    assert isinstance(protocol, dict)
    assert protocol["driver"] == "file"
    assert protocol["filename"] == "/dev/fdset/7"
    assert node["driver"] == ("file" if image_format is DiskFormat.RAW else image_format.value)
    assert node.get("read-only", False) is read_only
    assert node["node-name"] == "n7"


@pytest.mark.parametrize("image_format", list(DiskFormat))
@pytest.mark.parametrize("locks", [True, False])
def test_qemu_locks_no_file_where_no_locks_are(
    make: Callable[..., QemuDisk], image_format: DiskFormat, locks: bool
) -> None:
    node = blockdev.node(make(image_format, read_only=True), 7, locks=locks)
    protocol = node["file"] if image_format is not DiskFormat.RAW else node
    assert isinstance(protocol, dict)
    assert protocol.get("locking") == (None if locks else "off")


@pytest.mark.parametrize("image_format", [DiskFormat.QCOW2, DiskFormat.VMDK])
def test_a_backing_file_is_never_followed(make: Callable[..., QemuDisk], image_format: DiskFormat) -> None:
    node = blockdev.node(make(image_format), 7, locks=True)
    assert node["backing"] is None


def test_a_full_host_disk_does_not_pause_the_vm(make: Callable[..., QemuDisk]) -> None:
    assert blockdev.device(make(DiskFormat.RAW), 7, Slot(1, 2))["werror"] == "report"


def test_the_device_is_at_its_slot_and_has_a_serial_that_fits(make: Callable[..., QemuDisk]) -> None:
    disk = make(DiskFormat.RAW)
    device = blockdev.device(disk, 7, Slot(3, 63))
    assert (device["bus"], device["scsi-id"], device["lun"]) == ("scsi3.0", 0, 63)
    assert (device["id"], device["drive"]) == ("d7", "n7")
    assert 0 < len(disk.serial) <= 20


def test_an_fdset_says_what_it_is_for() -> None:
    assert blockdev.parse_opaque(blockdev.opaque("a@b", Slot(2, 3))) == ("a@b", Slot(2, 3))
    assert blockdev.parse_opaque("root") is None


def test_names_fit_qemu() -> None:
    assert len(blockdev.node_name(10**12)) <= 31
    assert os.fsencode(blockdev.device_id(1)) == b"d1"


def node_of(drv: str, file: str) -> dict[str, str]:
    return {"node-name": "#block1", "drv": drv, "file": file}


GIVEN = [node_of("qcow2", "/dev/fdset/2"), node_of("file", "/dev/fdset/2"), node_of("host_device", "/dev/fdset/3")]


@pytest.mark.parametrize(
    "foreign",
    [
        node_of("file", "/etc/shadow"),
        node_of("file", "/dev/fdset/2"),  # a second time: the name of another disk's descriptor
        node_of("file", "/dev/fdset/1"),  # the log
        node_of("file", "/dev/fdset/9"),
        node_of("file", "/dev/fdset/../../etc/shadow"),
        node_of("nbd", "nbd://example.org"),
        node_of("nbd", "/dev/fdset/4"),
        {"node-name": "#block2", "drv": "null-co"},
    ],
)
def test_a_file_that_nobody_gave_is_found_among_the_nodes(foreign: dict[str, str]) -> None:
    assert blockdev.not_given(GIVEN, {2, 3, 4}) == []
    assert blockdev.not_given([*GIVEN, foreign], {2, 3, 4}) == [foreign.get("file") or "null-co"]
