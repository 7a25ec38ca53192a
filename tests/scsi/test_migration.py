"""A manager's state written down, read, and taken up by another manager."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scsi_bench import Bench
from utilityvm.errors import (
    AlreadyAttached,
    ConfigDiffers,
    DeadlineExceeded,
    GuestRefused,
    InvalidRequest,
    Migrating,
    NotAttached,
    NotSupported,
    OutcomeUnknown,
    StoreError,
    VMGone,
    WrongState,
)
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.manager import AddRequest, ScsiManager
from utilityvm.scsi.ports import CallerKey, DiskFormat, DiskRequest, Holder, MountConfig, ScratchKey, Verity
from utilityvm.scsi.slot import Slot
from utilityvm.testing import Break

HERE = Holder(name="process 7", pid=7, started="123")


async def fill(bench: Bench) -> None:
    """Disks of every kind that a state can have: shared, mounted twice, attached only, encrypted, verified."""
    await bench.add("/a", read_only=True, holder="one")
    await bench.add("/a", read_only=True, holder="two")
    await bench.add("/a", "/mnt/again", read_only=True, options=("noexec", "nodev"), holder="two")
    await bench.attach("/b", read_only=False)
    await bench.add("/c", "/mnt/c", read_only=False, encryption=ScratchKey(), ensure_filesystem=True, reformat=True)
    await bench.add("/d", read_only=True, verity=Verity(root_hash=b"\x01" * 32, hash_offset_bytes=4096, salt=b"x"))
    await bench.manager.add(DiskRequest(host_path="/e", read_only=False), holder=HERE)


def same_vm(bench: Bench) -> Bench:
    """The VM on the host that it moved to: what is on its bus and in its guest came with it; its journal did not."""
    there = Bench(controllers=bench.controllers, reserved=bench.reserved)
    there.world.bus = dict(bench.world.bus)
    there.world.guest_devices = dict(bench.world.guest_devices)
    there.world.mounts = dict(bench.world.mounts)
    there.world.names_used = set(bench.world.names_used)
    there.manager = there.new_manager()
    return there


async def imported(bench: Bench, state: ScsiState) -> list[str]:
    bench.manager.import_state(state, holder=Holder(name="here"))
    return await bench.manager.resume()


async def test_a_vm_moves_with_everything_that_it_has(bench: Bench) -> None:
    await fill(bench)
    before = bench.manager.slots(), bench.manager.mounts()
    state = ScsiState.from_json((await bench.manager.export_state()).to_json())
    there = same_vm(bench)

    assert await imported(there, state) == []

    assert [step.split()[0] for step in there.world.log if not step.startswith("probe")] == []
    slots, mounts = there.manager.slots(), there.manager.mounts()
    unmeasured = [{**_fields(view), "phases": {}, "holders": ()} for view in before[0]]
    assert [{**_fields(view), "phases": {}, "holders": ()} for view in slots] == unmeasured
    assert [view.guest_path for view in mounts] == [view.guest_path for view in before[1]]
    assert [view.holders for view in slots] == [("one", "two", "two"), ("test",), ("test",), ("test",), ("here",)]
    there.check_promises()
    for reservation in bench.manager.reservations():  # by the names that their holders know
        await there.manager.release(reservation.id)
    there.check_empty()


async def test_what_was_imported_is_in_the_journal(bench: Bench) -> None:
    await fill(bench)
    there = same_vm(bench)
    await imported(there, await bench.manager.export_state())
    slots = there.manager.slots()

    there.kill_owner()
    findings = await there.manager.restore(is_alive=lambda holder: True)

    assert (findings, there.manager.slots()) == ([], slots)


async def test_a_vm_that_has_not_the_disks_gets_them_in_the_same_slots(bench: Bench) -> None:
    first = await bench.attach("/gone")
    await bench.add("/a", "/mnt/a", read_only=False, ensure_filesystem=True, reformat=True)
    await bench.add("/b", holder="two")
    await bench.manager.release(first)
    state = await bench.manager.export_state()
    there = Bench()

    assert await imported(there, state) == []

    assert sorted(there.world.bus) == [Slot(0, 1), Slot(0, 2)]
    assert there.world.mounts[PurePosixPath("/mnt/a")][1].reformat is False, "it would lose what is on it"
    there.check_promises()
    for reservation in bench.manager.reservations():
        await there.manager.release(reservation.id)
    there.check_empty()


async def test_a_disk_that_cannot_come_back_is_told_and_stays_visible(bench: Bench) -> None:
    await bench.attach("/a")
    state = await bench.manager.export_state()
    there = Bench()
    there.world.fail_next("attach")

    findings = await imported(there, state)

    assert findings == ["/a at 0:0 is left reserved"]
    assert [view.references for view in there.manager.slots()] == [1]
    assert there.world.log.count("attach file:/a 0:0") == 1
    await there.manager.repair()
    assert [view.state for view in there.manager.slots()] == ["attached"]


async def test_a_mount_that_cannot_come_back_is_told_and_can_be_given_up(bench: Bench) -> None:
    held = await bench.add("/a", "/mnt/a")
    await bench.add("/a", "/mnt/b")
    state = await bench.manager.export_state()
    there = Bench()
    there.world.fail_next("mount", times=3)

    findings = await imported(there, state)

    assert findings == [f"/a at {path} is left reserved" for path in ("/mnt/a", "/mnt/b")]
    await there.manager.release(held.id)
    await there.manager.repair()
    assert [str(path) for path in there.world.mounts] == ["/mnt/b"]
    there.check_promises()


CHANGES: dict[str, Callable[[ScsiManager, str], Awaitable[object]]] = {
    "add": lambda m, _: m.add(DiskRequest(host_path="/new", read_only=True), holder=HERE),
    "share": lambda m, _: m.add(DiskRequest(host_path="/a", read_only=True), mount=MountConfig(), holder=HERE),
    "add_many": lambda m, _: m.add_many([AddRequest(disk=DiskRequest(host_path="/n", read_only=True))], holder=HERE),
    "release": lambda m, id: m.release(id),
    "release unknown": lambda m, _: m.release("nobody"),
    "remove": lambda m, _: m.remove("/a"),
    "resize": lambda m, _: m.resize("/b", 1 << 30),
    "repair": lambda m, _: m.repair(),
    "export": lambda m, _: m.export_state(),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_every_change_is_refused_from_the_export_until_resume(bench: Bench, change: str) -> None:
    held = await bench.add("/a")
    await bench.attach("/b", read_only=False)
    state = await bench.manager.export_state()
    there = same_vm(bench)
    there.manager.import_state(state, holder=HERE)
    sent = [len(one.world.log) for one in (bench, there)]

    for manager, why in ((bench.manager, "exported"), (there.manager, "imported")):
        with pytest.raises(Migrating, match=why) as refused:
            await CHANGES[change](manager, held.id)
        assert refused.value.remedy

    assert sent == [len(one.world.log) for one in (bench, there)]
    assert not there.journal.records


async def test_remove_many_tells_the_refusal_for_each(bench: Bench) -> None:
    held = await bench.add("/a")
    await bench.manager.export_state()

    assert [type(one) for one in await bench.manager.remove_many([held])] == [Migrating]


async def test_resume_lifts_it_on_both_sides(bench: Bench) -> None:
    held = await bench.add("/a")
    state = await bench.manager.export_state()
    there = same_vm(bench)
    await imported(there, state)
    assert await bench.manager.resume() == []

    for one in (bench, there):
        await one.manager.release(held.id)
        one.check_empty()
        with pytest.raises(WrongState, match="nothing was exported"):
            await one.manager.resume()


async def test_looking_is_allowed_while_it_moves(bench: Bench) -> None:
    held = await bench.add("/a", "/mnt/a")
    await bench.manager.export_state()

    assert bench.manager.guest_path("/a") == PurePosixPath("/mnt/a")
    assert bench.manager.references(held) == 1
    assert len(bench.manager.slots()) == len(bench.manager.mounts()) == len(bench.manager.reservations()) == 1


async def test_an_empty_manager_moves_too(bench: Bench) -> None:
    state = await bench.manager.export_state()
    there = Bench()

    assert await imported(there, ScsiState.from_json(state.to_json())) == []
    there.check_empty()
    await there.attach("/a")


async def test_export_waits_for_what_is_under_way(bench: Bench) -> None:
    gate = asyncio.Event()

    async def hold(step: str) -> None:
        await gate.wait()

    bench.world.gate = hold
    adding = asyncio.create_task(bench.add("/a"))
    await asyncio.sleep(0)
    exporting = asyncio.create_task(bench.manager.export_state())
    await asyncio.sleep(0)
    with pytest.raises(Migrating):
        await bench.add("/b")
    gate.set()

    state = await exporting
    assert [disk.reservations[0].reservation for disk in state.disks] == [(await adding).id]


async def test_an_export_that_runs_out_of_time_changes_nothing(bench: Bench) -> None:
    gate = asyncio.Event()

    async def hold(step: str) -> None:
        await gate.wait()

    bench.world.gate = hold
    adding = asyncio.create_task(bench.add("/a"))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        await bench.manager.export_state(timeout_s=0)
    gate.set()

    await bench.manager.release(await adding)
    bench.check_empty()


async def test_what_is_half_way_is_not_exported(bench: Bench) -> None:
    held = await bench.add("/a", "/mnt/a")
    bench.world.fail_next("eject")
    with pytest.raises(GuestRefused):
        await bench.manager.release(held)

    with pytest.raises(WrongState, match=r"/a at 0:0 is half-way: attached") as refused:
        await bench.manager.export_state()

    assert refused.value.slot == Slot(0, 0)
    await bench.manager.repair()
    bench.check_empty()
    assert (await bench.manager.export_state()).disks == ()


async def test_an_export_waits_for_a_resize_that_is_under_way(bench: Bench) -> None:
    await bench.add("/a", read_only=False)
    gate = asyncio.Event()

    async def hold(step: str) -> None:
        await gate.wait()

    bench.world.gate = hold
    resizing = asyncio.create_task(bench.manager.resize("/a", 1 << 21))
    await asyncio.sleep(0)
    exporting = asyncio.create_task(bench.manager.export_state())
    await asyncio.sleep(0)
    with pytest.raises(Migrating):
        await bench.manager.resize("/a", 1 << 22)
    gate.set()
    await resizing

    assert (await exporting).disks[0].size_bytes == 1 << 21


async def test_a_vm_that_died_is_neither_exported_nor_resumed(bench: Bench) -> None:
    await bench.add("/a")
    await bench.manager.export_state()
    bench.manager.mark_gone(VMGone("it died"))

    with pytest.raises(VMGone):
        await bench.manager.resume()
    with pytest.raises(VMGone):
        await bench.manager.export_state()


async def test_no_key_is_in_the_document(bench: Bench) -> None:
    key = b"\x5a" * 64
    await bench.add("/a", "/mnt/a", read_only=False, encryption=CallerKey(key))

    document = (await bench.manager.export_state()).to_json()

    assert key not in document
    assert json.loads(document)["disks"][0]["mounts"][0]["config"]["encryption"] == "caller"


async def test_an_encrypted_mount_goes_on_where_it_is_and_is_never_made_anew(bench: Bench) -> None:
    held = await bench.add("/a", "/mnt/a", read_only=False, encryption=CallerKey(b"k" * 64))
    state = await bench.manager.export_state()

    with pytest.raises(WrongState, match="its key did not travel"):
        await imported(Bench(), state)

    there = same_vm(bench)
    assert await imported(there, state) == []
    await there.manager.release(held.id)
    there.check_empty()


async def test_host_paths_can_be_others_there(bench: Bench) -> None:
    await bench.add("/a")
    await bench.add("/b")
    state = (await bench.manager.export_state()).relocated({"/a": "/pool/a"})
    there = same_vm(bench)
    for attached in there.world.bus.values():
        attached.identity = attached.identity.replace("file:/a", "file:/pool/a")

    await imported(there, state)

    assert [view.host_path for view in there.manager.slots()] == ["/pool/a", "/b"]
    await there.manager.remove("/pool/a")


async def test_a_path_that_is_no_text_has_no_place_in_a_document(bench: Bench) -> None:
    await bench.add("/a\udcff")

    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        (await bench.manager.export_state()).to_json()


async def test_paths_that_cannot_be_are_refused(bench: Bench) -> None:
    await bench.add("/a")
    await bench.add("/b")
    state = await bench.manager.export_state()

    with pytest.raises(NotAttached, match="/c"):
        state.relocated({"/c": "/d"})
    with pytest.raises(InvalidRequest, match="host path /b is there more than once"):
        state.relocated({"/a": "/b"})
    assert state.relocated({"/a": "/b", "/b": "/a"}).relocated({"/a": "/b", "/b": "/a"}) == state


async def test_two_names_of_one_file_are_found_out(bench: Bench) -> None:
    await bench.add("/a")
    await bench.add("/b")
    there = Bench()
    there.world.links["/b"] = "/a"

    with pytest.raises(ConfigDiffers, match="/b and /a are one disk"):
        await imported(there, await bench.manager.export_state())
    assert not there.world.log


async def test_another_file_in_its_place_is_refused_and_resume_can_be_called_again(bench: Bench) -> None:
    await bench.add("/a")
    there = same_vm(bench)
    there.world.formats["/a"] = DiskFormat.QCOW2
    there.world.missing.add("/a")

    state = await bench.manager.export_state()
    bigger = json.loads(state.to_json())
    bigger["disks"][0]["size_bytes"] *= 2
    with pytest.raises(ConfigDiffers, match="size_bytes"):
        await imported(same_vm(bench), ScsiState.from_json(json.dumps(bigger)))
    there.manager.import_state(state, holder=HERE)
    with pytest.raises(InvalidRequest, match="no such file"):
        await there.manager.resume()
    there.world.missing.clear()
    there.world.fail_next("probe", Break.LOSE_ANSWER)
    with pytest.raises(OutcomeUnknown):
        await there.manager.resume()
    there.journal.fail_next()
    with pytest.raises(StoreError):
        await there.manager.resume()
    with pytest.raises(Migrating):
        await there.manager.add(DiskRequest(host_path="/x", read_only=True), holder=HERE)
    assert not there.journal.records
    assert not there.world.open_disks

    assert await there.manager.resume() == []
    there.check_promises()
    assert len(there.manager.reservations()) == 1


async def test_only_a_vm_without_disks_takes_it_and_only_where_it_fits(bench: Bench) -> None:
    await bench.add("/a")
    state = await bench.manager.export_state()

    other = Bench()
    await other.add("/z")
    with pytest.raises(AlreadyAttached, match="1 disks"):
        other.manager.import_state(state, holder=HERE)
    with pytest.raises(AlreadyAttached, match="/a is at 0:0, which is taken"):
        Bench(reserved={Slot(0, 0): "root"}).manager.import_state(state, holder=HERE)
    with pytest.raises(InvalidRequest, match="0 SCSI controllers"):
        Bench(controllers=0).manager.import_state(state, holder=HERE)
    picky = Bench()

    def refuse(slot: Slot | None, config: MountConfig | None) -> None:
        if config is not None:
            raise NotSupported("no mounts here")

    picky.guest.check = refuse  # type: ignore[method-assign]
    with pytest.raises(NotSupported):
        picky.manager.import_state(state, holder=HERE)
    for one in (other, picky):
        await one.attach("/y")  # a refused import lets it go on


VECTORS = Path(__file__).parents[1] / "vectors"

# Documents that no manager wrote.


async def document(bench: Bench) -> dict[str, Any]:
    await fill(bench)
    return dict(json.loads((await bench.manager.export_state()).to_json()))


def _edit(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        at: Any = whole
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return change


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": _edit("format", to="something else"),
    "a later version": _edit("version", to=4),
    "sectors that there are not": _edit("disks", 0, "sector_size_bytes", to=1000),
    "no version": lambda d: d.pop("version"),
    "no disks": lambda d: d.pop("disks"),
    "five controllers": _edit("controllers", to=5),
    "a negative number of them": _edit("controllers", to=-1),
    "a slot of a controller that there is not": _edit("disks", 0, "slot", to="1:0"),
    "a LUN that there is not": _edit("disks", 0, "slot", to="0:64"),
    "a slot that is none": _edit("disks", 0, "slot", to="0-1"),
    "two disks in a slot": _edit("disks", 0, "slot", to="0:1"),
    "two disks of one path": _edit("disks", 0, "host_path", to="/b"),
    "an empty path": _edit("disks", 0, "host_path", to=""),
    "a NUL in a path": _edit("disks", 0, "host_path", to="/a\0"),
    "two attachments of one name": lambda d: d["disks"][0].update(attachment=d["disks"][1]["attachment"]),
    "a name that is an option": _edit("disks", 0, "attachment", to="x,drive=y"),
    "a size below zero": _edit("disks", 0, "size_bytes", to=-1),
    "a size beyond all": _edit("disks", 0, "size_bytes", to=1 << 63),
    "a size that is text": _edit("disks", 0, "size_bytes", to="1"),
    "a type that there is not": _edit("disks", 0, "kind", to="Floppy"),
    "nobody holds a disk": _edit("disks", 1, "reservations", to=[]),
    "nobody holds a mount": lambda d: d["disks"][0]["reservations"].pop(2),
    "a reservation of no mount of the disk": _edit("disks", 1, "reservations", 0, "mount", to="id0"),
    "one reservation twice": lambda d: d["disks"][0]["reservations"].append(d["disks"][0]["reservations"][0]),
    "a holder without a name": _edit("disks", 0, "reservations", 0, "holder", to=""),
    "a process without a start": _edit("disks", 0, "reservations", 0, "pid", to=1),
    "a relative guest path": _edit("disks", 0, "mounts", 0, "guest_path", to="mnt"),
    "the guest's own path": _edit("disks", 0, "mounts", 0, "guest_path", to="/proc"),
    "a guest path spelled otherwise": _edit("disks", 0, "mounts", 0, "guest_path", to="//mnt/x"),
    "one guest path twice": _edit("disks", 0, "mounts", 0, "guest_path", to="/mnt/c"),
    "a writable mount of a read-only disk": _edit("disks", 0, "mounts", 0, "config", "read_only", to=False),
    "a partition below zero": _edit("disks", 0, "mounts", 0, "config", "partition", to=-1),
    "mounts that contradict each other": _edit("disks", 0, "mounts", 0, "config", "filesystem", to="xfs"),
    "a field that there is not": _edit("disks", 0, "references", to=5),
    "a mount with a setting that there is not": _edit("disks", 0, "mounts", 0, "config", "color", to="red"),
    "a mount that is to be formatted": _edit("disks", 2, "mounts", 0, "config", "reformat", to=True),
    "a key that is written out": _edit("disks", 2, "mounts", 0, "config", "encryption", to={"key": "a2V5"}),
    "version 2 with the mounts of today": _edit("version", to=2),
    "a time that is none": _edit("disks", 0, "since", to=None),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_document_that_cannot_be_is_refused_whole(bench: Bench, wrong: str) -> None:
    whole = await document(bench)
    WRONG[wrong](whole)

    with pytest.raises(InvalidRequest, match="no state of a manager") as refused:
        ScsiState.from_json(json.dumps(whole))
    assert refused.value.remedy


async def test_a_document_of_version_2_is_read_as_one_of_today() -> None:
    bench = Bench(clock=lambda: 1.5e9)
    await fill(bench)
    assert ScsiState.from_json((VECTORS / "scsi_state_2.json").read_bytes()) == await bench.manager.export_state()


async def test_a_document_of_version_1_had_no_sector_sizes() -> None:
    whole = json.loads((VECTORS / "scsi_state_2.json").read_bytes())
    as_2 = ScsiState.from_json(json.dumps(whole))
    whole["version"] = 1
    for disk in whole["disks"]:
        del disk["sector_size_bytes"]
    assert ScsiState.from_json(json.dumps(whole)) == as_2


async def test_the_sectors_of_a_disk_travel_with_it(bench: Bench) -> None:
    await bench.manager.add(DiskRequest(host_path="/a", read_only=False, sector_size_bytes=4096), holder=HERE)
    (disk,) = ScsiState.from_json((await bench.manager.export_state()).to_json()).disks
    assert disk.request().sector_size_bytes == 4096


async def test_a_document_cut_short_or_followed_by_more_is_refused(bench: Bench) -> None:
    await bench.add("/a", "/mnt/a")
    text = (await bench.manager.export_state()).to_json()

    for cut in range(len(text)):
        with pytest.raises(InvalidRequest):
            ScsiState.from_json(text[:cut])
    for more in (b"x", b"{}", text, b"\0"):
        with pytest.raises(InvalidRequest):
            ScsiState.from_json(text + more)
    for other in ("", "[]", "null", "[" * 100_000, "\ud800", b"\xff", b" " * ((16 << 20) + 1)):
        with pytest.raises(InvalidRequest):
            ScsiState.from_json(other)


async def _filled() -> bytes:
    bench = Bench(clock=lambda: 1.5e9)
    await fill(bench)
    return (await bench.manager.export_state()).to_json()


DOCUMENT = asyncio.run(_filled())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_document_changed_anywhere_is_refused_or_still_whole(data: st.DataObject) -> None:
    text = bytearray(DOCUMENT)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        state = ScsiState.from_json(bytes(text))
    except InvalidRequest:
        return
    assert ScsiState.from_json(state.to_json()) == state
    Bench(controllers=4).manager.import_state(state, holder=HERE)


def _fields(view: Any) -> dict[str, Any]:
    return {name: getattr(view, name) for name in view.__dataclass_fields__}
