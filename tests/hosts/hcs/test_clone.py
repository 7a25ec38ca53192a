from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.errors import AlreadyAttached, HostRefused, InvalidRequest, NotSupported, ProtocolError
from utilityvm.hosts.hcs import clone, gob, winpath
from utilityvm.hosts.hcs.documents import CONTROLLER_GUIDS, Schema, encode
from utilityvm.hosts.hcs.gob import SCSIMount

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/clone.json").read_text())
CLONES = VECTORS["clones"]

SCRATCH = SCSIMount(host_path="C:\\template\\sandbox.vhdx", controller=0, lun=0, attachment_type="")
LAYER = SCSIMount(host_path="C:\\layers\\base.vhdx", uvm_path="C:\\l1", controller=0, lun=1, read_only=True)
DATA = SCSIMount(host_path="C:\\data\\d.vhdx", uvm_path="C:\\d", controller=1, lun=10)


class Files:
    """A file system that keeps files, folders and rights, and fails where it is told to."""

    def __init__(self, *paths: str) -> None:
        self.files = set(paths)
        self.folders: set[str] = set()
        self.rights: set[tuple[str, str]] = set()
        self.actions: list[str] = []
        self.fail = ""
        self.stuck = False  # nothing can be removed

    def make_folder(self, parent: str, prefix: str) -> str:
        self._may("make_folder", parent)
        folder = winpath.below(parent, f"{prefix}123456789")
        self.folders.add(folder)
        return folder

    def copy(self, source: str, target: str) -> None:
        self.actions.append(f"copy {source} -> {target}")
        self._may("copy", source)
        if source not in self.files:
            raise FileNotFoundError(2, "there is no such file")
        if target in self.files:
            raise FileExistsError(17, "the file exists")
        self.files.add(target)

    def grant(self, vm_id: str, path: str) -> None:
        self.actions.append(f"grant-vm {vm_id} {path}")
        self._may("grant", path)
        self.rights.add((vm_id, path))

    def revoke(self, vm_id: str, path: str) -> None:
        self._may("revoke", path)
        self.rights.discard((vm_id, path))

    def remove(self, path: str) -> None:
        if self.stuck:
            raise OSError(13, "it may not be removed")
        self.files.discard(path)

    def remove_folder(self, path: str) -> None:
        if any(file.startswith(path) for file in self.files):
            raise OSError(39, "the folder is not empty")
        self.folders.discard(path)

    def _may(self, what: str, path: str) -> None:
        if self.fail in (what, f"{what} {path}"):
            raise OSError(5, f"{what} failed")


def clone_disks(mounts: list[SCSIMount], files: Files, **options: Any) -> clone.Clone:
    defaults: dict[str, Any] = {
        "document": {"VirtualMachine": {"Devices": {}}},
        "scratch_folder": "C:\\clones\\c1",
        "clone_id": "clone-1",
    }
    return clone.clone_disks(mounts, files=files, **{**defaults, **options})


def sources(mounts: list[SCSIMount]) -> Files:
    return Files(*(mount.host_path for mount in mounts))


@pytest.mark.parametrize("vector", CLONES, ids=[vector["name"] for vector in CLONES])
def test_the_seeds_clones_are_byte_for_byte(vector: dict[str, Any]) -> None:
    mounts = [gob.decode(gob.encode(SCSIMount(**mount))) for mount in vector["mounts"]]
    files = sources(mounts)
    files.fail = "grant" if vector.get("rejected") else ""
    devices = {"Scsi": vector["devices_before"]} if "devices_before" in vector else {}
    options = {
        "document": {"VirtualMachine": {"Devices": devices}},
        "scratch_folder": vector["scratch_folder"],
        "clone_id": vector["clone_id"],
        "seed_compatible": True,
    }
    if vector.get("rejected"):
        with pytest.raises(HostRefused):
            clone_disks(mounts, files, **options)
    else:
        made = clone_disks(mounts, files, **options)
        assert encode(made.document) == vector["document_json"]
        assert encode(made.document["VirtualMachine"]["Devices"]["Scsi"]) == vector["scsi_json"]
        for mount, expected in zip(made.mounts, vector["cloned_mounts"], strict=True):
            assert {name: getattr(mount, name) for name in expected if name != "ref_count"} == {
                name: value for name, value in expected.items() if name != "ref_count"
            }
        assert sorted(files.folders) == vector["temp_dirs"]
    assert files.actions == vector["actions"]


def disk_in(made: clone.Clone, controller: str, lun: str) -> dict[str, Any]:
    disk: dict[str, Any] = made.document["VirtualMachine"]["Devices"]["Scsi"][controller]["Attachments"][lun]
    return disk


def test_a_read_only_disk_stays_read_only() -> None:
    made = clone_disks([LAYER], sources([LAYER]))
    assert disk_in(made, "0", "1") == {"Type": "VirtualDisk", "Path": "C:\\layers\\base.vhdx", "ReadOnly": True}


def test_the_clone_is_given_the_right_to_what_it_shares() -> None:
    files = sources([LAYER])
    made = clone_disks([LAYER], files)
    assert files.rights == {("clone-1", LAYER.host_path)}
    assert made.granted == (LAYER.host_path,)
    assert made.copies == ()


def test_a_disk_without_a_type_is_a_virtual_disk() -> None:
    made = clone_disks([SCRATCH], sources([SCRATCH]))
    assert disk_in(made, "0", "0")["Type"] == "VirtualDisk"
    assert made.mounts[0].attachment_type == "VirtualDisk"


def test_copies_and_folders_are_told() -> None:
    made = clone_disks([SCRATCH, LAYER, DATA], sources([SCRATCH, LAYER, DATA]))
    assert made.copies == ("C:\\clones\\c1\\sandbox.vhdx", "C:\\clones\\c1\\clone-mount-1-10123456789\\d.vhdx")
    assert made.folders == ("C:\\clones\\c1\\clone-mount-1-10123456789",)


@pytest.mark.parametrize(
    "fail",
    [
        "make_folder",
        f"copy {DATA.host_path}",
        "grant C:\\clones\\c1\\sandbox.vhdx",
        f"grant {LAYER.host_path}",
        "grant C:\\clones\\c1\\clone-mount-1-10123456789\\d.vhdx",
    ],
)
def test_a_clone_that_fails_leaves_nothing(fail: str) -> None:
    mounts = [SCRATCH, LAYER, DATA]
    files = sources(mounts)
    document: dict[str, Any] = {"VirtualMachine": {"Devices": {}}}
    before, untouched = set(files.files), copy.deepcopy(document)
    files.fail = fail
    with pytest.raises(HostRefused, match="clone-1"):
        clone_disks(mounts, files, document=document)
    assert (files.files, files.folders, files.rights) == (before, set(), set())
    assert document == untouched


def test_what_cannot_be_cleaned_up_is_not_hidden_behind_the_failure(caplog: pytest.LogCaptureFixture) -> None:
    files = sources([SCRATCH, DATA])
    files.fail = f"copy {DATA.host_path}"
    files.stuck = True
    with pytest.raises(HostRefused, match=r"d\.vhdx"):
        clone_disks([SCRATCH, DATA], files)
    assert "leaves C:\\clones\\c1\\sandbox.vhdx behind" in caplog.text


def test_a_file_in_the_scratch_folder_is_not_written_over() -> None:
    files = sources([SCRATCH])
    files.files.add("C:\\clones\\c1\\sandbox.vhdx")
    with pytest.raises(HostRefused, match="exists"):
        clone_disks([SCRATCH], files)
    assert "C:\\clones\\c1\\sandbox.vhdx" in files.files


def test_a_slot_of_the_document_that_is_taken_is_refused_before_anything_is_copied() -> None:
    taken = {"0": {"Attachments": {"1": {"Type": "VirtualDisk", "Path": "C:\\old.vhdx"}}}}
    files = sources([SCRATCH, LAYER])
    with pytest.raises(AlreadyAttached, match=r"C:\\old\.vhdx"):
        clone_disks([SCRATCH, LAYER], files, document={"VirtualMachine": {"Devices": {"Scsi": taken}}})
    assert files.actions == []


def test_two_disks_at_one_slot_are_refused() -> None:
    other = dataclasses.replace(LAYER, host_path="C:\\layers\\other.vhdx")
    with pytest.raises(AlreadyAttached, match="0:1"):
        clone_disks([LAYER, other], sources([LAYER, other]))


@pytest.mark.parametrize("change", [{"controller": 9}, {"lun": 200}, {"controller": -1}])
def test_a_slot_that_does_not_exist_is_refused(change: dict[str, Any]) -> None:
    files = sources([LAYER])
    with pytest.raises(InvalidRequest):
        clone_disks([dataclasses.replace(LAYER, **change)], files)
    assert files.actions == []


@pytest.mark.parametrize("kind", ["PassThru", "ExtensibleVirtualDisk"])
def test_a_disk_that_cannot_be_copied_is_refused(kind: str) -> None:
    disk = dataclasses.replace(DATA, attachment_type=kind, host_path="\\\\.\\PHYSICALDRIVE4")
    with pytest.raises(NotSupported, match="cannot be copied"):
        clone_disks([disk], Files())


def test_a_relative_scratch_folder_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not absolute"):
        clone_disks([LAYER], sources([LAYER]), scratch_folder="clones")


def test_the_rest_of_the_document_is_kept_in_its_order() -> None:
    document = {
        "Owner": "o",
        "VirtualMachine": {
            "StopOnReset": True,
            "Devices": {
                "ComPorts": {"0": {"NamedPipe": "\\\\.\\pipe\\p"}},
                "VirtualSmb": {},
                "Plan9": {},
            },
            "GuestState": {"GuestStateFilePath": "g"},
        },
    }
    made = clone_disks([LAYER], sources([LAYER]), document=document)
    assert list(made.document) == ["Owner", "VirtualMachine"]
    assert list(made.document["VirtualMachine"]) == ["StopOnReset", "Devices", "GuestState"]
    assert list(made.document["VirtualMachine"]["Devices"]) == ["ComPorts", "Scsi", "VirtualSmb", "Plan9"]
    assert "Scsi" not in document["VirtualMachine"]["Devices"]  # type: ignore[index]


def test_attachments_of_the_document_keep_every_field() -> None:
    disk = {"Path": "C:\\nine.vhdx", "Type": "VirtualDisk", "ReadOnly": True, "CachingMode": "Cached"}
    odd = {"Type": "VirtualDisk", "Path": "C:\\x.vhdx", "NewInNextVersion": 1}
    before = {"0": {"Attachments": {"9": disk, "10": odd}}}
    made = clone_disks([LAYER], sources([LAYER]), document={"VirtualMachine": {"Devices": {"Scsi": before}}})
    attachments = made.document["VirtualMachine"]["Devices"]["Scsi"]["0"]["Attachments"]
    assert list(attachments) == ["1", "10", "9"]
    assert attachments["9"] == disk
    assert list(attachments["9"]) == ["Type", "Path", "CachingMode", "ReadOnly"]
    assert attachments["10"] == odd


def test_controllers_go_by_their_guids_in_todays_schema() -> None:
    made = clone_disks([DATA], sources([DATA]), schema=Schema.HEAD)
    assert list(made.document["VirtualMachine"]["Devices"]["Scsi"]) == [CONTROLLER_GUIDS[1]]


def test_an_extensible_disk_is_shared_without_a_right() -> None:
    disk = dataclasses.replace(LAYER, attachment_type="ExtensibleVirtualDisk", host_path="evd://space/x")
    files = Files()
    made = clone_disks([disk], files)
    assert files.actions == []
    assert made.mounts == (disk,)


# Templates.


def test_a_template_comes_back() -> None:
    config = clone.template_config("vm", [DATA, LAYER, SCRATCH], container_id="c")
    assert [mount.slot for mount in config.mounts] == [(0, 0), (0, 1), (1, 10)]
    assert clone.load(clone.save(config)) == config


def test_a_template_without_disks_comes_back() -> None:
    config = clone.template_config("vm", [])
    assert clone.load(clone.save(config)) == config


def test_a_template_has_one_disk_a_slot() -> None:
    with pytest.raises(AlreadyAttached):
        clone.template_config("vm", [LAYER, LAYER])
    with pytest.raises(InvalidRequest):
        clone.template_config("vm", [dataclasses.replace(LAYER, lun=64)])


# Written by Go: a template with two disks and a VSMB share, and options that are not ours.
GOS_TEMPLATE = (
    "ff8fff810301010e54656d706c617465436f6e66696701ff82000105010f53657269616c56657273696f6e4944010600010d54656d706c"
    "61746555564d4944010c00011454656d706c61746555564d5265736f757263657301ff8400011554656d706c61746555564d437265617465"
    "4f70747301ff8600011354656d706c617465436f6e7461696e65724944010c0000001eff83020101105b5d6d61696e2e436c6f6e656162"
    "6c6501ff84000110000032ff850301010b4f7074696f6e7357434f5701ff8600010201074f7074696f6e7301ff880001064c6179657273"
    "01ff8e00000050ff87030101074f7074696f6e7301ff8800010801024944010c0001014e01080001014d01ff8a0001044465657001ff8800"
    "010142010a00010143010e00010341727201ff8c000103416e79011000000021ff89040101116d61705b737472696e675d737472696e6701"
    "ff8a00010c010c000018ff8b010101085b335d75696e743801ff8c0001060106000016ff8d020101085b5d737472696e6701ff8e00010c00"
    "0027ff820101010675766d2d696401030e2a75766d2e534353494d6f756e74ff8f050102ff92000000ff88ff90330031030600010b0c0008"
    "433a5c6c2e766864050c00022f6c0304000003040002030200010e0c000b5669727475616c4469736b0e2a75766d2e534353494d6f756e74"
    "ff90270025030600010c0c0009433a5c732e76686478030c0000030400000304000003020000030c00000e2a75766d2e56534d4253686172"
    "65ff93050102ff9600000052ff94070005736861726501010102696401fef83f010101610162010104646565700603000000000102010201"
    "fef03f4001030100020106737472696e670c050003616e790001020178017900010363696400"
)


def test_gos_template_is_read() -> None:
    config = clone.load(bytes.fromhex(GOS_TEMPLATE))
    assert (config.vm_id, config.container_id) == ("uvm-id", "cid")
    assert [(mount.host_path, mount.slot) for mount in config.mounts] == [
        ("C:\\s.vhdx", (0, 0)),
        ("C:\\l.vhd", (0, 1)),
    ]
    assert config.others == ("*uvm.VSMBShare",)
    with pytest.raises(InvalidRequest, match="VSMBShare"):
        clone.save(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"SerialVersionID": 2, "TemplateUVMID": "vm"},
        {"TemplateUVMID": "vm"},
        {"SerialVersionID": 1, "TemplateUVMID": 5},
        {"SerialVersionID": 1, "TemplateUVMResources": "none"},
        {"SerialVersionID": 1, "TemplateUVMResources": [LAYER, LAYER]},
        {"SerialVersionID": 1, "TemplateUVMResources": [dataclasses.replace(LAYER, lun=64)]},
    ],
)
def test_a_template_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    data = gob.encode_outer(gob.Form.STRUCT_WITH_INTERFACE_SLICE, [], name="TemplateConfig", fields=fields)
    with pytest.raises(ProtocolError):
        clone.load(data)


def test_mounts_alone_are_no_template() -> None:
    with pytest.raises(ProtocolError, match="no struct"):
        clone.load(gob.encode_outer(gob.Form.SLICE, [LAYER]))


@given(st.data())
def test_a_broken_template_is_refused_or_read(data: st.DataObject) -> None:
    broken = bytearray(bytes.fromhex(GOS_TEMPLATE))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken)))
        broken[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(ProtocolError):
        clone.load(bytes(broken))


# The files of this machine.


def test_a_local_copy_is_one_and_writes_over_nothing(tmp_path: Path) -> None:
    files = clone.LocalFiles(lambda *_: None, lambda *_: None)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"disk" * 1000)
    files.copy(str(source), str(target))
    assert target.read_bytes() == source.read_bytes()
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        files.copy(str(source), str(target))
    assert target.read_bytes() == b"precious"


def test_a_local_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = clone.LocalFiles(lambda *_: None, lambda *_: None)
    (tmp_path / "a").write_bytes(b"disk")

    def fails(source: Any, target: Any, length: int) -> None:
        target.write(b"di")
        raise OSError(28, "the disk is full")

    monkeypatch.setattr("shutil.copyfileobj", fails)
    with pytest.raises(OSError, match="full"):
        files.copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_local_folders_and_files_go(tmp_path: Path) -> None:
    files = clone.LocalFiles(lambda *_: None, lambda *_: None)
    folder = files.make_folder(str(tmp_path), "clone-mount-0-2")
    assert Path(folder).name.startswith("clone-mount-0-2")
    (Path(folder) / "f").touch()
    for _ in range(2):
        files.remove(str(Path(folder) / "f"))
    for _ in range(2):
        files.remove_folder(folder)
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        (b"*uvm.SCSIMount", b"*uvm.SCSIMou\xeet"),
        (b"*uvm.SCSIMount", b"*uvm.SCSIMoun\0"),
        (b"*uvm.SCSIMount", b"*uvm.scsimount"),
        (b"*uvm.VSMBShare", b"*uvm.VSMBSharf"),
        (b"TemplateUVMResources", b"TemplateUVMResourcet"),
        (b"TemplateUVMID", b"TemplateUVMIE"),
        (b"TemplateContainerID", b"TemplateUVMID\0\0\0\0\0\0"),
    ],
)
def test_what_has_no_name_of_hcsshims_is_damaged_and_not_another_resource(name: bytes, damaged: bytes) -> None:
    data = bytes.fromhex(GOS_TEMPLATE)
    assert name in data
    assert len(name) == len(damaged)
    with pytest.raises(ProtocolError):
        clone.load(data.replace(name, damaged))


def test_a_field_that_is_there_twice_is_damaged() -> None:
    data = gob.encode_outer(gob.Form.STRUCT_WITH_INTERFACE_SLICE, [], name="T", fields={"AAAA": 1, "BBBB": 2})
    with pytest.raises(ProtocolError, match="twice"):
        gob.decode_value(data.replace(b"BBBB", b"AAAA"))
