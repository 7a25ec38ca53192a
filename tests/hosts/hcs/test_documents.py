from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.errors import InvalidRequest, NotSupported, RequestError, TooManyAttachments
from utilityvm.hosts.hcs import documents as d
from utilityvm.hosts.hcs.documents import Attachment, Dialect, GuestMount, Schema, Slot

VECTORS = Path(__file__).parents[2] / "vectors"
SEED = json.loads((VECTORS / "hcs_seed.json").read_text())
HEAD = json.loads((VECTORS / "hcs_head.json").read_text())

NAMES = [vector["name"] for vector in SEED["requests"]]


@pytest.mark.parametrize("vector", SEED["requests"], ids=NAMES)
def test_the_seeds_documents_are_byte_for_byte(vector: dict[str, Any]) -> None:
    if vector.get("rejected"):
        with pytest.raises(TooManyAttachments):
            d.seed_request(**vector["input"])
        return
    request = d.seed_request(**vector["input"])
    assert d.encode(request) == vector["json"]
    assert [{"to": part.to, "json": part.json} for part in d.split(request)] == vector["split"]


@pytest.mark.parametrize("vector", HEAD["host"], ids=[vector["name"] for vector in HEAD["host"]])
def test_todays_host_documents_are_byte_for_byte(vector: dict[str, Any]) -> None:
    slot = Slot(vector["controller"], vector["lun"])
    if vector["op"] == "detach":
        request = d.detach_request(slot)
    else:
        config = vector["config"]
        attachment = Attachment(
            type=config["type"],
            path=config["path"],
            read_only=config["read_only"],
            extensible_virtual_disk_type=config["evd_type"],
        )
        request = d.attach_request(slot, attachment)
    assert d.encode(request) == vector["json"]


def guest_request(vector: dict[str, Any], dialect: Dialect) -> d.GuestRequest | None:
    slot = Slot(vector["controller"], vector["lun"])
    if vector["op"] == "unplug":
        return d.eject_request(vector["os"], slot, dialect=dialect)
    make = {"mount": d.mount_request, "unmount": d.unmount_request}[vector["op"]]
    return make(vector["os"], slot, vector["path"], GuestMount(**vector["config"]), dialect=dialect)


@pytest.mark.parametrize("vector", HEAD["guest"], ids=[vector["name"] for vector in HEAD["guest"]])
def test_todays_guest_requests_are_byte_for_byte(vector: dict[str, Any]) -> None:
    if vector.get("rejected"):
        with pytest.raises(RequestError):
            guest_request(vector, Dialect.MANAGER)
        return
    request = guest_request(vector, Dialect.MANAGER)
    assert (request is not None) is vector["sent"]
    if request is not None:
        assert d.encode(request, escape_html=False) == vector["bridge_json"]
        assert d.encode(d.forwarded(request)) == vector["hcs_json"]


# Where ours is another than the recorded one, and what it is instead. Each row is a defect of theirs.
DIFFERENT: dict[str, str | type[RequestError]] = {
    "linux_unmount_encrypted": '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"Encrypted":true}',
    "linux_unmount_ensure_filesystem": (
        '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"EnsureFilesystem":true,"Filesystem":"ext4"}'
    ),
    "linux_unmount_filesystem_only": ('{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"Filesystem":"xfs"}'),
    "linux_unmount_format_with_refs": NotSupported,
    "linux_mount_everything": NotSupported,
    "windows_mount_block_dev": NotSupported,
    "windows_unmount_partition": NotSupported,
    "windows_unmount_options": NotSupported,
    "windows_unmount_controller_1": NotSupported,
    "linux_mount_controller_256_wraps": InvalidRequest,
}


@pytest.mark.parametrize("vector", HEAD["guest"], ids=[vector["name"] for vector in HEAD["guest"]])
def test_ours_differ_from_todays_where_those_are_wrong_and_nowhere_else(vector: dict[str, Any]) -> None:
    different = DIFFERENT.get(vector["name"])
    if isinstance(different, type) or vector.get("rejected"):
        with pytest.raises(different if isinstance(different, type) else RequestError):
            guest_request(vector, Dialect.OURS)
        return
    request = guest_request(vector, Dialect.OURS)
    if request is None:
        assert not vector["sent"]
    elif different is None:
        assert d.encode(request, escape_html=False) == vector["bridge_json"]
    else:
        assert d.encode(request.settings) == different


def sent_by_controller(sequence: str, os: str, do: str) -> list[str]:
    """What hcsshim's controller sent to the guest in one step of a recorded sequence."""
    for recorded in HEAD["controller"]["sequences"]:
        if (recorded["name"], recorded["os"]) == (sequence, os):
            step = next(step for step in recorded["steps"] if step["do"].strip() == do)
            return [sent["json"] for sent in step["sent"] if sent["to"] == "gcs"]
    raise LookupError(sequence)


@pytest.mark.parametrize(
    ("sequence", "os", "path", "config"),
    [
        ("map_unmap_plain", "linux", "/run/mounts/scsi/0_0_0", {}),
        ("map_unmap_partition_readonly", "linux", "/run/mounts/scsi/0_0_2", {"partition": 2, "read_only": True}),
        (
            "map_unmap_encrypted_xfs",
            "linux",
            "/run/mounts/scsi/0_0_0",
            {"encrypted": True, "ensure_filesystem": True, "filesystem": "xfs"},
        ),
        ("map_unmap_options", "linux", "/run/mounts/scsi/0_0_0", {"options": ["rshared", "noatime"]}),
        ("map_unmap_block_dev", "linux", "/run/mounts/scsi/0_0_1", {"partition": 1, "block_dev": True}),
        ("map_unmap_plain", "windows", "C:\\mounts\\scsi\\0_0_0", {}),
        (
            "map_unmap_partition_readonly",
            "windows",
            "C:\\mounts\\scsi\\0_0_2",
            {"partition": 2, "read_only": True},
        ),
        ("map_unmap_format_with_refs", "windows", "C:\\mounts\\scsi\\0_0_0", {"format_with_refs": True}),
    ],
)
def test_the_controllers_guest_requests_are_byte_for_byte(
    sequence: str, os: str, path: str, config: dict[str, Any]
) -> None:
    slot, mount, dialect = Slot(0, 0), GuestMount(**config), Dialect.CONTROLLER
    mounted = d.mount_request(os, slot, path, mount, dialect=dialect)
    unmounted = d.unmount_request(os, slot, path, mount, dialect=dialect)
    ejected = d.eject_request(os, slot, dialect=dialect)
    assert [d.encode(mounted, escape_html=False)] == sent_by_controller(sequence, os, "MapToGuest")
    removed = [d.encode(request, escape_html=False) for request in (unmounted, ejected) if request is not None]
    assert removed == sent_by_controller(sequence, os, "UnmapFromGuest")


@pytest.mark.parametrize("vector", HEAD["evd_paths"], ids=lambda vector: vector["input"])
def test_evd_paths_are_read_as_recorded_when_not_strict(vector: dict[str, Any]) -> None:
    if vector["rejected"]:
        with pytest.raises(InvalidRequest):
            d.parse_evd(vector["input"], strict=False)
    else:
        assert d.parse_evd(vector["input"], strict=False) == (vector["evd_type"], vector["mount_path"])


def test_evd_paths_are_read_strictly() -> None:
    assert d.parse_evd("evd://space/mnt/path") == ("space", "mnt/path")
    for path in ("evd://t/", "evd:///x", "evd://", "space/x/y", "EVD://t/x", "evd://evd://t/x", "evd://t", ""):
        with pytest.raises(InvalidRequest, match="no extensible virtual disk"):
            d.parse_evd(path)


def test_controllers_have_their_guids() -> None:
    assert list(d.CONTROLLER_GUIDS) == HEAD["controller_guids"]
    namespace = uuid.UUID("d422512d-2bf2-4752-809d-7b82b5fcb1b4")
    assert d.CONTROLLER_GUIDS[3] == str(uuid.uuid5(namespace, "3"))


def test_the_scsi_part_of_a_document_is_byte_for_byte() -> None:
    disks = {
        Slot(0, 0): Attachment(type="VirtualDisk", path="C:\\rootfs.vhd", read_only=True),
        Slot(3, 63): Attachment(type="ExtensibleVirtualDisk", path="mnt/e", extensible_virtual_disk_type="space"),
        Slot(0, 1): Attachment(type="VirtualDisk", path="C:\\a.vhdx"),
    }
    assert d.encode(d.scsi_section(disks)) == HEAD["controller"]["hcs_attachments"]["json"]


def test_the_keys_of_the_scsi_part_are_sorted_as_text() -> None:
    disks = {Slot(1, lun): Attachment(type="VirtualDisk", path=str(lun)) for lun in (9, 63, 10, 1)}
    section = d.scsi_section({**disks, Slot(0, 5): Attachment(path="p")}, schema=Schema.SEED)
    assert list(section) == ["0", "1"]
    assert list(section["1"].attachments) == ["1", "10", "63", "9"]


@pytest.mark.parametrize("slot", [(-1, 0), (4, 0), (0, -1), (0, 64)])
def test_a_slot_that_does_not_exist_is_refused(slot: tuple[int, int]) -> None:
    for make in (
        lambda: d.attach_request(Slot(*slot), Attachment(path="p")),
        lambda: d.detach_request(Slot(*slot)),
        lambda: d.scsi_section({Slot(*slot): Attachment(path="p")}),
        lambda: d.mount_request("linux", Slot(*slot), "/m"),
        lambda: d.unmount_request("linux", Slot(*slot), "/m"),
        lambda: d.eject_request("linux", Slot(*slot)),
        lambda: d.seed_add_request(os="linux", controller=slot[0], lun=slot[1], host_path="p"),
        lambda: d.seed_remove_request(os="linux", controller=slot[0], lun=slot[1]),
    ):
        with pytest.raises(InvalidRequest):
            make()


def test_a_windows_guest_is_not_told_what_it_cannot_be_told() -> None:
    for config in (
        GuestMount(partition=1),
        GuestMount(encrypted=True),
        GuestMount(block_dev=True),
        GuestMount(options=["ro"]),
        GuestMount(ensure_filesystem=True),
        GuestMount(filesystem="ntfs"),
    ):
        with pytest.raises(NotSupported):
            d.check_expressible("windows", None, config)
    with pytest.raises(NotSupported, match="controller 1"):
        d.mount_request("windows", Slot(1, 0), "C:\\m")
    with pytest.raises(NotSupported, match="controller 1"):
        d.unmount_request("windows", Slot(1, 0), "C:\\m")


def test_unknown_seed_operations_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        d.seed_request(op="modify", os="linux", controller=0, lun=0)


CONFIGS = st.builds(
    GuestMount,
    partition=st.integers(0, 128),
    read_only=st.booleans(),
    encrypted=st.booleans(),
    block_dev=st.booleans(),
    options=st.lists(st.sampled_from(["ro", "noatime", "x=<&>"]), max_size=3),
    ensure_filesystem=st.booleans(),
    filesystem=st.sampled_from(["", "ext4", "xfs"]),
)


@given(st.integers(0, 3), st.integers(0, 63), CONFIGS)
def test_an_unmount_says_again_all_that_the_mount_said(controller: int, lun: int, config: GuestMount) -> None:
    slot = Slot(controller, lun)
    mount = d.mount_request("linux", slot, "/m", config)
    unmount = d.unmount_request("linux", slot, "/m", config)
    assert mount.settings == unmount.settings


@given(st.integers(0, 3), st.integers(0, 63), CONFIGS)
def test_no_zero_is_in_a_document(controller: int, lun: int, config: GuestMount) -> None:
    request = d.mount_request("linux", Slot(controller, lun), "/m", config)
    settings = json.loads(d.encode(request))["Settings"]
    assert all(settings.values())
    assert (settings.get("Lun", 0), settings.get("Controller", 0)) == (lun, controller)
