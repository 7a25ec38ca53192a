"""A disk is found by every name that it has, and by no other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from utilityvm.errors import InvalidRequest, NotAttached
from utilityvm.scsi.slot import Slot
from utilityvm.vm.naming import find


@dataclass
class Disk:
    slot: Slot
    host_path: str
    identity: str
    guest_paths: tuple[PurePosixPath, ...] = ()


ONE = Disk(Slot(0, 1), "/srv/one.raw", "file:1", (PurePosixPath("/data"), PurePosixPath("/again")))
TWO = Disk(Slot(0, 2), "/state/overlays/0-2.qcow2", "file:2", (PurePosixPath("/srv/one.raw"),))
THREE = Disk(Slot(0, 3), "/srv/three.raw", "file:3")
ALIASES = {"/srv/two.raw": TWO.host_path, "/srv/gone.raw": "/state/overlays/0-9.qcow2"}


@pytest.mark.parametrize(
    ("name", "identity", "disk", "guest_path"),
    [
        ("/any/link", "file:1", ONE, None),
        ("/srv/three.raw", None, THREE, None),
        ("/srv/three.raw", "file:of another", THREE, None),
        ("/srv/two.raw", "file:under the overlay", TWO, None),
        ("/data", None, ONE, "/data"),
        (PurePosixPath("/again"), None, ONE, "/again"),
    ],
)
def test_a_disk_is_found_by_each_of_its_names(
    name: str, identity: str | None, disk: Disk, guest_path: str | None
) -> None:
    found, at = find([ONE, TWO, THREE], name, identity, aliases=ALIASES, vm="v")
    assert found is disk
    assert at == (None if guest_path is None else PurePosixPath(guest_path))


@pytest.mark.parametrize("name", ["/srv/four.raw", "/srv/gone.raw", "/nowhere"])
def test_another_name_is_no_disks(name: str) -> None:
    with pytest.raises(NotAttached, match=name) as raised:
        find([ONE, TWO, THREE], name, None, aliases=ALIASES, vm="v")
    assert raised.value.vm == "v"


def test_a_name_of_two_disks_is_refused_and_both_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"0:1.*0:2") as raised:
        find([ONE, TWO], "/srv/one.raw", "file:1", aliases={}, vm="v")
    assert raised.value.remedy is not None
    assert ONE.host_path in raised.value.remedy
    assert TWO.host_path in raised.value.remedy


def test_the_file_that_a_name_leads_to_comes_before_the_name() -> None:
    assert find([ONE, THREE], ONE.host_path, THREE.identity, aliases={}, vm="v")[0] is THREE
