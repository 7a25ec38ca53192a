"""Our settings against those that hcsshim was recorded to send."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from utilityvm.errors import InvalidRequest
from utilityvm.guests.mount_settings import check_config, disk_extension, disk_settings, nonzero
from utilityvm.scsi.ports import CallerKey, MountConfig, ScratchKey, Verity
from utilityvm.scsi.slot import Slot

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/hcs_head.json").read_text())


def is_ours_too(recorded: dict[str, Any]) -> bool:
    """A mount in a Linux guest, of a kind that we can ask for."""
    config = recorded.get("config") or {}
    if recorded["op"] != "mount" or recorded["os"] != "linux" or not recorded["sent"]:
        return False
    if recorded["controller"] > 3 or recorded["lun"] > 63:
        return False  # it wraps the numbers; we refuse them
    # We always name the file system that is to be made, and formatting with refs is for Windows.
    return not config["format_with_refs"] and not (config["ensure_filesystem"] and not config["filesystem"])


MOUNTS = [recorded for recorded in VECTORS["guest"] if is_ours_too(recorded)]


def test_there_are_recorded_mounts() -> None:
    assert len(MOUNTS) >= 8


@pytest.mark.parametrize("recorded", MOUNTS, ids=lambda recorded: recorded["name"])
def test_a_mounts_settings_are_the_recorded_ones(recorded: dict[str, Any]) -> None:
    theirs = recorded["config"]
    config = MountConfig(
        partition=theirs["partition"],
        read_only=theirs["read_only"],
        options=tuple(theirs["options"] or ()),
        filesystem=theirs["filesystem"] or None,
        ensure_filesystem=theirs["ensure_filesystem"],
        block_device=theirs["block_dev"],
        encryption=ScratchKey() if theirs["encrypted"] else None,
    )
    settings = disk_settings(Slot(recorded["controller"], recorded["lun"]), config, PurePosixPath(recorded["path"]))
    assert json.dumps(settings, separators=(",", ":")) in recorded["bridge_json"]


@pytest.mark.parametrize("recorded", [r for r in VECTORS["guest"] if r["op"] == "unplug" and r["os"] == "linux"])
def test_an_ejects_settings_are_the_recorded_ones(recorded: dict[str, Any]) -> None:
    settings = nonzero(Controller=recorded["controller"], Lun=recorded["lun"])
    assert json.dumps(settings, separators=(",", ":")) in recorded["bridge_json"]


def test_an_unmount_repeats_the_settings_as_the_newest_hcsshim_does() -> None:
    config = MountConfig(encryption=ScratchKey(), ensure_filesystem=True, filesystem="xfs")
    settings = disk_settings(Slot(0, 0), config, PurePosixPath("/run/mounts/scsi/0_0_0"))
    said = json.dumps(
        {"RequestType": "Remove", "ResourceType": "MappedVirtualDisk", "Settings": settings}, separators=(",", ":")
    )
    assert json.dumps(said) in json.dumps(VECTORS["controller"])


def test_what_gcs_has_no_word_for_is_apart() -> None:
    verity = Verity(root_hash=b"\1\2", hash_offset_bytes=4096, salt=b"", data_blocks=7)
    config = MountConfig(encryption=CallerKey(b"k" * 32), verity=verity, read_only=True)
    assert "Encrypted" not in disk_settings(Slot(0, 1), config, PurePosixPath("/a"))
    assert disk_extension(config) == {
        "Utilityvm": {
            "Key": "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=",
            "Verity": {"RootHash": "0102", "HashOffset": 4096, "DataBlocks": 7, "Salt": ""},
        }
    }
    assert disk_extension(MountConfig()) == {}


@pytest.mark.parametrize("option", ["remount,rw", "ro,loop", 'context="a,b', "rw"])
def test_a_mount_option_that_cannot_be_is_refused_before_anything_is_sent(option: str) -> None:
    with pytest.raises(InvalidRequest, match="the mount option"):
        check_config(MountConfig(options=(option,), read_only=True))
