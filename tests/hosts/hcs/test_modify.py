from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utilityvm.errors import GuestRefused, HostRefused, OutcomeUnknown, UtilityVMError
from utilityvm.hosts.hcs.documents import GuestOS, Schema, Slot, seed_request
from utilityvm.hosts.hcs.modify import modify
from utilityvm.testing.fakes import Break
from utilityvm.testing.hcs import HcsWorld

SEED = json.loads((Path(__file__).parents[2] / "vectors/hcs_seed.json").read_text())

FAILURES = {
    "add_host_fails": {"attach"},
    "add_guest_fails_rolled_back": {"mount"},
    "add_guest_fails_rollback_fails": {"mount", "detach"},
    "remove_guest_fails": {"unmount"},
    "remove_host_fails": {"detach"},
}


async def world_for(input: dict[str, Any]) -> HcsWorld:
    """A VM in which the request can be met: with the file, the right to it, and for a Remove the disk."""
    world = HcsWorld(os=GuestOS(input["os"]), schema=Schema.SEED)
    if input["host_path"]:
        world.add_file(input["host_path"], rights={world.id})
    if input["op"] == "remove":
        slot = Slot(input["controller"], input["lun"])
        world.bus[slot] = {"Type": input["attachment_type"], "Path": input["host_path"]}
        world.devices.add(slot)
        if input["uvm_path"]:
            world.put_mount(input["uvm_path"], slot)
    return world


@pytest.mark.parametrize("vector", SEED["failures"], ids=lambda vector: vector["name"])
async def test_failures_send_what_the_seed_sends(vector: dict[str, Any]) -> None:
    world = await world_for(vector["input"])
    for step in FAILURES[vector["name"]]:
        world.fail_next(step)
    with pytest.raises((HostRefused, GuestRefused)):
        await modify(seed_request(**vector["input"]), system=world, guest=world.guest_connection, timeout_s=5)
    assert [{"to": sent.to, "json": sent.json} for sent in world.sent] == vector["split"]


# Not those that the VM refuses: the seed's own mistakes for Windows, an empty path.
CAN_BE_MET = [
    vector
    for vector in SEED["requests"]
    if not vector.get("rejected")
    and vector["input"]["host_path"]
    and vector["name"] != "wcow_remove_slot7_attach_only_uses_lcow_settings"
    and vector["name"] != "wcow_remove_controller1_mounted"
]


@pytest.mark.parametrize("vector", CAN_BE_MET, ids=lambda vector: vector["name"])
async def test_with_a_guest_connection_a_request_is_split(vector: dict[str, Any]) -> None:
    world = await world_for(vector["input"])
    await modify(seed_request(**vector["input"]), system=world, guest=world.guest_connection, timeout_s=5)
    assert [{"to": sent.to, "json": sent.json} for sent in world.sent] == vector["split"]
    assert world.harm == []


@pytest.mark.parametrize("vector", CAN_BE_MET, ids=lambda vector: vector["name"])
async def test_without_one_it_goes_to_hcs_whole(vector: dict[str, Any]) -> None:
    world = await world_for(vector["input"])
    await modify(seed_request(**vector["input"]), system=world, timeout_s=5)
    assert [(sent.to, sent.json) for sent in world.sent] == [("hcs", vector["json"])]
    assert world.harm == []


ADD = next(vector["input"] for vector in SEED["failures"] if vector["name"] == "add_guest_fails_rolled_back")


async def test_a_disk_whose_mount_fails_is_off_the_bus_again() -> None:
    world = await world_for(ADD)
    world.fail_next("mount")
    with pytest.raises(GuestRefused):
        await modify(seed_request(**ADD), system=world, guest=world.guest_connection, timeout_s=5)
    assert world.bus == {}


async def test_a_mount_without_an_answer_is_rolled_back_too() -> None:
    world = await world_for(ADD)
    world.fail_next("mount", Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown):
        await modify(seed_request(**ADD), system=world, guest=world.guest_connection, timeout_s=5)
    assert world.bus == {}


async def test_a_rollback_that_fails_tells_both_errors_and_what_is_left() -> None:
    world = await world_for(ADD)
    world.fail_next("mount")
    world.fail_next("detach")
    with pytest.raises(GuestRefused, match=r"mount: no; and the disk is still attached: .*detach: no") as caught:
        await modify(seed_request(**ADD), system=world, guest=world.guest_connection, timeout_s=5)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert all(isinstance(each, UtilityVMError) for each in caught.value.__cause__.exceptions)
    assert list(world.bus) == [(0, 4)]


async def test_a_request_for_the_guest_alone_goes_to_the_guest() -> None:
    from utilityvm.hosts.hcs.documents import eject_request, forwarded

    world = HcsWorld()
    request = eject_request("linux", Slot(0, 1))
    assert request is not None
    await modify(forwarded(request), system=world, guest=world.guest_connection, timeout_s=5)
    await modify(forwarded(request), system=world, timeout_s=5)
    assert [sent.to for sent in world.sent] == ["gcs", "hcs"]
