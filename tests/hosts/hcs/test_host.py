from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from utilityvm.errors import (
    AccessDenied,
    AlreadyAttached,
    ConfigDiffers,
    DeadlineExceeded,
    DiskInUse,
    HostRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    VMGone,
)
from utilityvm.hosts.hcs.disk import HcsDisk
from utilityvm.hosts.hcs.documents import Schema
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRecord, DiskRequest, VMAccess
from utilityvm.scsi.slot import Slot
from utilityvm.testing.fakes import Break, FakeDisk, FakeWorld
from utilityvm.testing.hcs import HcsWorld

HEAD = json.loads((Path(__file__).parents[2] / "vectors/hcs_head.json").read_text())

PATH = "C:\\disks\\d.vhdx"
SLOT = Slot(0, 3)
SOON = {"timeout_s": 5.0}
NOW = {"timeout_s": 0.0}


@pytest.fixture
def world() -> HcsWorld:
    world = HcsWorld()
    world.add_file(PATH)
    return world


@pytest.fixture
def host(world: HcsWorld) -> HcsHost:
    return host_on(world)


def host_on(world: HcsWorld, **options: Any) -> HcsHost:
    return HcsHost(world, disks=world.disks, group_access=GroupAccess(), **options)


def request(path: str = PATH, **fields: Any) -> DiskRequest:
    return DiskRequest(**{"host_path": path, "read_only": False, **fields})


async def attach(host: HcsHost, slot: Slot = SLOT, name: str = "a1", *, timeout_s: float = 5.0, **fields: Any) -> None:
    disk = await host.open(request(**fields))
    await host.attach(slot, disk, attachment=name, timeout_s=timeout_s)


async def attach_and_detach(host: HcsHost) -> None:
    await attach(host)
    await host.detach(SLOT, attachment="a1", **SOON)


async def test_a_disk_is_put_on_the_bus_and_taken_off(host: HcsHost, world: HcsWorld) -> None:
    await attach(host)
    assert list(world.bus) == [SLOT]
    assert await host.probe(SLOT, attachment="a1", **SOON)
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.bus == {}
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert [json.loads(sent.json)["RequestType"] for sent in world.sent] == ["Add", "Remove"]


# Not the one without a path: a disk without a path is refused here.
WITH_A_PATH = [vector for vector in HEAD["host"] if vector.get("config", {"path": PATH})["path"]]


@pytest.mark.parametrize("vector", WITH_A_PATH, ids=lambda vector: vector["name"])
async def test_it_sends_todays_documents(vector: dict[str, Any]) -> None:
    config = vector.get("config", {"path": PATH, "type": "VirtualDisk", "read_only": False, "evd_type": ""})
    world = HcsWorld()
    path = f"evd://{config['evd_type']}/{config['path']}" if config["evd_type"] else config["path"]
    world.add_file(config["path"])
    host, slot = host_on(world), Slot(vector["controller"], vector["lun"])
    fields = {"path": path, "read_only": config["read_only"], "kind": AttachmentType(config["type"])}
    await attach(host, slot, **fields)
    if vector["op"] == "detach":
        await host.detach(slot, attachment="a1", **SOON)
    assert world.sent[-1].json == vector["json"]


async def test_it_sends_the_seeds_documents_in_the_seeds_schema() -> None:
    world = HcsWorld(schema=Schema.SEED)
    world.add_file(PATH)
    await attach(host_on(world, schema=Schema.SEED), Slot(2, 9))
    assert '"VirtualMachine/Devices/Scsi/2/Attachments/9"' in world.sent[0].json


# The right to the file.


async def test_an_individual_right_is_given_before_and_taken_after(host: HcsHost, world: HcsWorld) -> None:
    await attach(host, access=VMAccess.INDIVIDUAL)
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.log == [f"grant vm-1 {PATH}", "attach", "detach", f"revoke vm-1 {PATH}"]


async def test_no_right_is_given_that_was_not_asked_for(host: HcsHost, world: HcsWorld) -> None:
    world.add_file(PATH, rights={"group"})
    await attach(host, access=VMAccess.NOOP)
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.log == ["attach", "detach"]


async def test_a_vm_without_the_right_is_told_so(host: HcsHost, world: HcsWorld) -> None:
    with pytest.raises(AccessDenied, match=r"d\.vhdx"):
        await attach(host, access=VMAccess.NOOP)
    assert world.bus == {}


async def test_the_right_is_taken_back_when_the_attach_is_refused(host: HcsHost, world: HcsWorld) -> None:
    world.fail_next("attach")
    with pytest.raises(HostRefused, match=r"attach C:\\disks\\d\.vhdx at 0:3"):
        await attach(host)
    assert world.log == [f"grant vm-1 {PATH}", f"revoke vm-1 {PATH}"]


async def test_nothing_is_sent_when_the_right_cannot_be_given(host: HcsHost, world: HcsWorld) -> None:
    world.fail_next("grant")
    with pytest.raises(AccessDenied, match="cannot be given the right"):
        await attach(host)
    assert world.sent == []
    await attach(host)


async def test_a_right_that_cannot_be_taken_back_is_a_warning(
    host: HcsHost, world: HcsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    await attach(host)
    world.fail_next("revoke")
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.bus == {}
    assert "keeps its right" in caplog.text


async def test_the_groups_right_goes_with_the_last_attachment_of_it() -> None:
    group = GroupAccess()
    worlds = [HcsWorld("vm-1"), HcsWorld("vm-2")]
    file = worlds[0].add_file(PATH)
    for world in worlds:
        world.files = worlds[0].files
    hosts = [HcsHost(world, disks=world.disks, group_access=group) for world in worlds]
    for host in hosts:
        await attach(host, read_only=True, access=VMAccess.GROUP)
    await hosts[0].detach(SLOT, attachment="a1", **SOON)
    assert file.rights == {"group"}
    await hosts[1].detach(SLOT, attachment="a1", **SOON)
    assert file.rights == set()


async def test_the_groups_right_stays_if_it_is_to_be_kept(world: HcsWorld) -> None:
    host = HcsHost(world, disks=world.disks, group_access=GroupAccess(keep=True))
    await attach(host, access=VMAccess.GROUP)
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.file(PATH).rights == {"group"}  # type: ignore[union-attr]


async def test_an_extensible_disk_is_no_file_to_give_a_right_to(host: HcsHost, world: HcsWorld) -> None:
    await attach(host, path="evd://space/mnt/x", kind=AttachmentType.EXTENSIBLE_VIRTUAL_DISK)
    assert world.log == ["attach"]


# What is refused.


@pytest.mark.parametrize("slot", [(4, 0), (0, 64), (-1, 0)])
async def test_a_slot_that_does_not_exist_is_refused(host: HcsHost, world: HcsWorld, slot: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest):
        await attach(host, Slot(*slot))
    assert world.log == []


async def test_a_controller_that_the_vm_lacks_is_refused(world: HcsWorld) -> None:
    with pytest.raises(InvalidRequest, match="1 SCSI controllers"):
        await attach(host_on(world, controllers=1), Slot(1, 0))
    assert world.log == []


async def test_a_slot_or_a_name_in_use_is_refused(host: HcsHost, world: HcsWorld) -> None:
    world.add_file("C:\\e.vhdx")
    await attach(host)
    before = len(world.log)
    with pytest.raises(AlreadyAttached, match=r"d\.vhdx"):
        await attach(host, path="C:\\e.vhdx", name="a2")
    with pytest.raises(AlreadyAttached, match="a1"):
        await attach(host, Slot(0, 4), path="C:\\e.vhdx")
    assert len(world.log) == before


async def test_a_location_that_hcs_has_in_use_is_refused_by_hcs(host: HcsHost, world: HcsWorld) -> None:
    world.bus[SLOT] = {"Type": "VirtualDisk", "Path": "C:\\boot.vhdx"}
    with pytest.raises(HostRefused, match="in use"):
        await attach(host)


async def test_a_disk_that_another_vm_has_is_in_use(host: HcsHost, world: HcsWorld) -> None:
    world.file(PATH).opened_by["other"] = False  # type: ignore[union-attr]
    with pytest.raises(DiskInUse):
        await attach(host)


async def test_a_disk_of_another_host_is_refused(host: HcsHost) -> None:
    foreign = FakeDisk("x", DiskFormat.VHDX, 1, False, FakeWorld())
    with pytest.raises(InvalidRequest, match="not opened by this host"):
        await host.attach(SLOT, foreign, attachment="a1", **SOON)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"path": ""}, InvalidRequest),
        ({"path": "d.vhdx"}, InvalidRequest),
        ({"path": "C:d.vhdx"}, InvalidRequest),
        ({"path": "C:\\a\0b.vhdx"}, InvalidRequest),
        ({"path": "C:\\\ud800.vhdx"}, InvalidRequest),
        ({"path": "C:\\missing.vhdx"}, InvalidRequest),
        ({"path": "\\\\.\\PHYSICALDRIVE2"}, InvalidRequest),
        ({"kind": AttachmentType.PASS_THRU}, InvalidRequest),
        ({"path": "evd://t/", "kind": AttachmentType.EXTENSIBLE_VIRTUAL_DISK}, InvalidRequest),
        ({"path": "C:\\d.vhdx", "kind": AttachmentType.EXTENSIBLE_VIRTUAL_DISK}, InvalidRequest),
        ({"format": DiskFormat.QCOW2}, NotSupported),
        ({"format": DiskFormat.RAW}, NotSupported),
        (
            {
                "path": "\\\\.\\PHYSICALDRIVE2",
                "kind": AttachmentType.PASS_THRU,
                "format": DiskFormat.VHDX,
            },
            ConfigDiffers,
        ),
    ],
)
async def test_what_is_no_disk_is_not_opened(
    host: HcsHost, world: HcsWorld, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await host.open(request(**fields))
    assert world.log == []


async def test_every_spelling_of_a_path_is_one_disk(host: HcsHost) -> None:
    spellings = ["C:\\disks\\d.vhdx", "c:\\DISKS\\.\\D.vhdx", "\\\\?\\C:\\disks\\d.vhdx", "C:/disks/d.vhdx"]
    disks = [await host.open(request(path)) for path in spellings]
    assert len({disk.identity for disk in disks}) == 1
    assert [disk.attachment.path for disk in disks if isinstance(disk, HcsDisk)] == spellings


async def test_an_attached_disk_is_opened_again_without_reading_it(
    host: HcsHost, world: HcsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    await attach(host)

    def cannot_read(_: DiskRequest) -> None:
        raise DiskInUse("the VM has it open")

    monkeypatch.setattr(world.disks, "read", cannot_read)
    assert (await host.open(request())).size_bytes == 1 << 30
    await host.detach(SLOT, attachment="a1", **SOON)
    with pytest.raises(DiskInUse):
        await host.open(request())


async def test_resizing_is_not_supported(host: HcsHost) -> None:
    with pytest.raises(NotSupported):
        await host.resize(SLOT, attachment="a1", size_bytes=1, **SOON)


# No answer.


@pytest.mark.parametrize("step", ["modify", "attach"])
async def test_an_attach_that_hcs_takes_its_time_for_is_found_when_it_is_done(world: HcsWorld, step: str) -> None:
    world.add_file(PATH, rights={"group"})
    host, done = host_on(world), world.hold(step)
    with pytest.raises(DeadlineExceeded):
        await attach(host, timeout_s=0.0, access=VMAccess.NOOP)
    with pytest.raises(DeadlineExceeded):
        await host.probe(SLOT, attachment="a1", timeout_s=0.01)
    done.set()
    assert await host.probe(SLOT, attachment="a1", **SOON)
    assert world.log == ["attach"]


async def test_an_attach_that_is_refused_late_is_absent(host: HcsHost, world: HcsWorld) -> None:
    done = world.hold("attach")
    world.fail_next("attach")
    with pytest.raises(DeadlineExceeded):
        await attach(host, timeout_s=0.2)
    done.set()
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert world.file(PATH).rights == set()  # type: ignore[union-attr]
    await attach(host)


async def test_a_slot_is_not_used_again_while_an_answer_is_out(host: HcsHost, world: HcsWorld) -> None:
    world.add_file("C:\\e.vhdx")
    world.hold("attach")
    with pytest.raises(DeadlineExceeded):
        await attach(host, timeout_s=0.2)
    with pytest.raises(AlreadyAttached):
        await attach(host, path="C:\\e.vhdx", name="a2")


@pytest.mark.parametrize("how", [Break.LOSE_REQUEST, Break.LOSE_ANSWER])
async def test_an_attach_whose_answer_will_not_come_is_taken_off(host: HcsHost, world: HcsWorld, how: Break) -> None:
    world.fail_next("attach", how)
    with pytest.raises(OutcomeUnknown):
        await attach(host)
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert world.bus == {}
    assert world.file(PATH).rights == set()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [Break.LOSE_REQUEST, Break.LOSE_ANSWER])
async def test_a_detach_whose_answer_will_not_come_is_finished(host: HcsHost, world: HcsWorld, how: Break) -> None:
    await attach(host)
    world.fail_next("detach", how)
    with pytest.raises(OutcomeUnknown):
        await host.detach(SLOT, attachment="a1", **SOON)
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert world.bus == {}


async def test_a_detach_that_hcs_takes_its_time_for_is_waited_for_by_the_next(host: HcsHost, world: HcsWorld) -> None:
    await attach(host)
    done = world.hold("detach")
    with pytest.raises(DeadlineExceeded):
        await host.detach(SLOT, attachment="a1", **NOW)
    done.set()
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.log.count("detach") == 1
    assert world.bus == {}


async def test_a_detach_that_is_refused_leaves_the_disk(host: HcsHost, world: HcsWorld) -> None:
    await attach(host)
    world.fail_next("detach")
    with pytest.raises(HostRefused):
        await host.detach(SLOT, attachment="a1", **SOON)
    assert await host.probe(SLOT, attachment="a1", **SOON)
    assert world.file(PATH).rights == {"vm-1"}  # type: ignore[union-attr]
    await host.detach(SLOT, attachment="a1", **SOON)


@pytest.mark.parametrize("step", ["attach", "detach"])
@pytest.mark.parametrize("how", [Break.LOSE_REQUEST, Break.LOSE_ANSWER])
async def test_what_may_be_there_and_is_not_removed_stays_unknown(
    host: HcsHost, world: HcsWorld, step: str, how: Break
) -> None:
    world.fail_next(step, how)
    with pytest.raises(OutcomeUnknown):
        await attach_and_detach(host)
    world.fail_next("detach", times=2)
    with pytest.raises(OutcomeUnknown, match="may be at 0:3"):
        await host.probe(SLOT, attachment="a1", **SOON)
    with pytest.raises(OutcomeUnknown, match="may be at 0:3"):
        await host.detach(SLOT, attachment="a1", **SOON)
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert world.bus == {}


async def test_gone_before_is_done(host: HcsHost, world: HcsWorld) -> None:
    await host.detach(SLOT, attachment="never", **SOON)
    assert world.sent == []
    await attach(host)
    del world.bus[SLOT]
    await host.detach(SLOT, attachment="a1", **SOON)
    assert not await host.probe(SLOT, attachment="a1", **SOON)


async def test_a_vm_that_stopped_is_gone(host: HcsHost, world: HcsWorld) -> None:
    await attach(host)
    world.state = "Stopped"
    with pytest.raises(VMGone):
        await host.probe(SLOT, attachment="a1", **SOON)
    with pytest.raises(VMGone):
        await host.detach(SLOT, attachment="a1", **SOON)


async def test_a_caller_that_goes_away_leaves_no_doubt(host: HcsHost, world: HcsWorld) -> None:
    done = world.hold("attach")
    caller = asyncio.ensure_future(attach(host))
    while not world.sent:
        await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    done.set()
    assert await host.probe(SLOT, attachment="a1", **SOON)


async def test_steps_on_different_disks_overlap(host: HcsHost, world: HcsWorld) -> None:
    done = world.hold("attach")
    work: list[Coroutine[Any, Any, None]] = []
    for number in range(8):
        world.add_file(f"C:\\{number}.vhdx")
        work.append(attach(host, Slot(0, number), f"n{number}", path=f"C:\\{number}.vhdx"))
    all_of_it = asyncio.gather(*work)
    while len(world.sent) < 8:
        await asyncio.sleep(0)
    done.set()
    await all_of_it
    assert len(world.bus) == 8


async def test_a_right_that_is_not_given_in_time_is_a_refusal(host: HcsHost, world: HcsWorld) -> None:
    given = world.hold("grant")
    with pytest.raises(HostRefused, match="rights were not changed"):
        await attach(host, timeout_s=0.01)
    assert world.sent == []
    given.set()
    await attach(host)


async def test_a_right_that_is_not_taken_in_time_holds_up_nobody(
    host: HcsHost, world: HcsWorld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utilityvm.hosts.hcs.host._TAKE_RIGHT_S", 0.01)
    await attach(host)
    world.hold("revoke")
    await host.detach(SLOT, attachment="a1", **SOON)
    assert world.bus == {}
    assert "keeps its right" in caplog.text


# Taking over.


def record(state: str, **fields: Any) -> DiskRecord:
    values: dict[str, Any] = {
        "attachment": "a1",
        "slot": SLOT,
        "host_path": PATH,
        "identity": "path:C:\\DISKS\\D.VHDX",
        "kind": AttachmentType.VIRTUAL_DISK,
        "format": DiskFormat.VHDX,
        "access": VMAccess.INDIVIDUAL,
        "read_only": False,
        "size_bytes": 1 << 30,
        "state": state,
        "since": time.time(),
    }
    return DiskRecord(**{**values, **fields})


async def test_an_adopted_disk_is_there_and_can_be_taken_off(host: HcsHost, world: HcsWorld) -> None:
    await attach(host)
    heir = host_on(world)
    heir.adopt([record("attached")])
    assert await heir.probe(SLOT, attachment="a1", **SOON)
    await heir.detach(SLOT, attachment="a1", **SOON)
    assert world.bus == {}
    assert world.file(PATH).rights == set()  # type: ignore[union-attr]


@pytest.mark.parametrize("state", ["attaching", "attach unknown", "detaching", "detach unknown"])
@pytest.mark.parametrize("is_there", [True, False])
async def test_what_was_not_answered_is_finished_by_the_heir(world: HcsWorld, state: str, is_there: bool) -> None:
    if is_there:
        await attach(host_on(world))
    heir = host_on(world)
    heir.adopt([record(state)])
    assert not await heir.probe(SLOT, attachment="a1", **SOON)
    assert world.bus == {}


async def test_what_was_never_sent_is_not_adopted(host: HcsHost, world: HcsWorld) -> None:
    host.adopt([record("reserved"), record("detached", attachment="a2")])
    assert not await host.probe(SLOT, attachment="a1", **SOON)
    assert world.sent == []
    await attach(host)
