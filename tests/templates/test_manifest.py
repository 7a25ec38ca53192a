"""A manifest is what was written, or it is refused whole."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests_made import manifest, mount
from utilityvm.errors import TemplateDamaged
from utilityvm.templates import manifest as manifests
from utilityvm.templates.manifest import Fingerprint

VECTORS = Path(__file__).parents[1] / "vectors"


def written(folder: Path, data: bytes) -> Path:
    path = folder / "warm/manifest.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    before = manifest()
    assert manifests.read(written(tmp_path, manifests.encode(before))) == before
    assert [entry.path for entry in before.chain()] == ["/cache/root.img", "/images/a.raw"]


def test_a_manifest_of_version_1_is_read_as_one_of_today(tmp_path: Path) -> None:
    assert manifests.read(written(tmp_path, (VECTORS / "manifest_1.json").read_bytes())) == manifest()


def test_none_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        manifests.read(tmp_path / "none/manifest.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, "version 3"),
        ({"version": 0}, "version 0"),
        ({"name": "other"}, "template 'other'"),
        ({"memory_mib": "256"}, "memory_mib"),
        ({"disks": [{}]}, "disks"),
        ({"root": None}, "root"),
    ],
)
def test_what_is_no_manifest_is_refused_where_it_is_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    document = {**json.loads(manifests.encode(manifest())), **changes}
    with pytest.raises(TemplateDamaged, match=words):
        manifests.read(written(tmp_path, json.dumps(document).encode()))


@pytest.mark.parametrize(
    "changes",
    [
        {"controller": 4},
        {"lun": 64},
        {"lun": -1},
        {"layers": ()},
        {"size_bytes": -512},
        {"mounts": (mount("m1", "/data"), mount("m2", "/data"))},
        {"mounts": (mount("m1", "data"),)},
    ],
)
def test_a_disk_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    good = manifest()
    disk = msgspec.structs.replace(good.disks[0], **changes)
    with pytest.raises(TemplateDamaged):
        manifests.read(written(tmp_path, manifests.encode(msgspec.structs.replace(good, disks=(disk,)))))


def test_two_disks_in_one_slot_are_refused(tmp_path: Path) -> None:
    good = manifest()
    twin = msgspec.structs.replace(good.disks[0], attachment="a2", mounts=())
    with pytest.raises(TemplateDamaged, match="one slot"):
        manifests.read(written(tmp_path, manifests.encode(msgspec.structs.replace(good, disks=(good.disks[0], twin)))))


@given(st.data())
def test_cut_or_changed_it_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = manifests.encode(manifest())
    cut = data.draw(st.integers(0, len(good)))
    noise = data.draw(st.binary(max_size=8))
    path = written(tmp_path_factory.mktemp("cut"), good[:cut] + noise + good[cut + len(noise) :])
    with suppress(TemplateDamaged):
        assert manifests.read(path).name == "warm"


def test_a_file_that_was_written_to_has_another_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    before = Fingerprint.at(file)
    assert before.is_unchanged(Fingerprint.at(file))
    file.write_bytes(b"more")
    now = Fingerprint.at(file)
    assert before.is_file(now)
    assert not before.is_unchanged(now)


THEN = Fingerprint(device=7, inode=12, size_bytes=512, mtime_ns=5, lasting="birth 12 99")


@pytest.mark.parametrize(
    ("now", "is_file", "is_unchanged"),
    [
        ({}, True, True),
        ({"device": 8}, True, True),  # after a reboot
        ({"mtime_ns": 6}, True, False),
        ({"device": 8, "size_bytes": 1024}, True, False),
        ({"lasting": "birth 12 100"}, False, False),  # the next file of that inode
        ({"inode": 13, "lasting": "birth 13 99"}, False, False),
    ],
)
def test_a_file_is_the_same_whatever_number_its_device_has(
    now: dict[str, Any], is_file: bool, is_unchanged: bool
) -> None:
    later = msgspec.structs.replace(THEN, **now)
    assert (THEN.is_file(later), THEN.is_unchanged(later)) == (is_file, is_unchanged)


@pytest.mark.parametrize(("mtime_ns", "is_file"), [(5, True), (6, False)])
def test_what_nothing_else_tells_apart_is_told_by_its_inode_and_what_is_in_it(mtime_ns: int, is_file: bool) -> None:
    then = msgspec.structs.replace(THEN, lasting=None)
    later = msgspec.structs.replace(then, device=8, mtime_ns=mtime_ns)
    assert then.is_file(later) is is_file


def test_a_manifest_of_an_earlier_version_still_protects_its_disks() -> None:
    then = msgspec.structs.replace(THEN, lasting=None)
    assert then.is_file(msgspec.structs.replace(THEN, mtime_ns=6))


def test_whether_a_disk_without_a_name_is_that_of_before_the_boot_cannot_be_told() -> None:
    then = Fingerprint(device=7, inode=0, size_bytes=0, mtime_ns=0, lasting="boot one 7")
    assert then.is_file(msgspec.structs.replace(then, lasting="boot two 7")) is None
    assert not then.is_unchanged(msgspec.structs.replace(then, lasting="boot two 7"))
    assert then.is_file(msgspec.structs.replace(then, lasting="boot one 8")) is False
    assert then.is_file(msgspec.structs.replace(then, lasting="wwid x")) is False
