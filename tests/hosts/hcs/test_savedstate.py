from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utilityvm.errors import InvalidRequest, NotSupported, ProtocolError
from utilityvm.hosts.hcs import documents, savedstate
from utilityvm.hosts.hcs.disk import DiskFacts
from utilityvm.hosts.hcs.protowire import message, number, text
from utilityvm.hosts.hcs.savedstate import SavedDisk, SavedMount, SavedReservation, SavedState
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.ports import DiskFormat, DiskRequest, VMAccess
from utilityvm.scsi.slot import Slot

RECORDED = json.loads((Path(__file__).parents[2] / "vectors/hcs_head.json").read_text())["controller"]["save_payloads"]
MAPPED = bytes.fromhex(RECORDED[2]["payload_hex"])

GUID = "4a57b660-74db-4180-8d3f-cb142bfff1aa"
OTHER = "4a57b660-74db-4180-8d3f-cb142bfff1ab"
A = "C:\\a.vhdx"


def mapped(**mount: Any) -> SavedState:
    """A disk with one partition, mapped by one holder."""
    partition = SavedMount(**{"guest_path": "/run/mounts/scsi/0_0_1", "references": 1, **mount})
    return SavedState(
        controllers=1,
        disks={Slot(0, 0): SavedDisk(host_path=A, mounts={1: partition})},
        reservations={GUID: SavedReservation(slot=Slot(0, 0), partition=1)},
    )


# What each recording says it holds.
WANTED = {
    "empty": SavedState(controllers=2),
    "rootfs": SavedState(controllers=1, disks={Slot(0, 0): SavedDisk(host_path="C:\\rootfs.vhd", read_only=True)}),
    "one_mapped": mapped(),
    "one_reserved_every_field": SavedState(
        controllers=4,
        disks={
            Slot(0, 0): SavedDisk(
                host_path="mnt/e",
                read_only=True,
                type="ExtensibleVirtualDisk",
                evd_type="space",
                mounts={
                    0: SavedMount(
                        references=1,
                        read_only=True,
                        encrypted=True,
                        options=("b", "a"),
                        ensure_filesystem=True,
                        filesystem="ext4",
                        block_dev=True,
                    )
                },
            )
        },
        reservations={"402e9a53-59b8-451f-8526-86f233afb80a": SavedReservation(slot=Slot(0, 0), partition=0)},
    ),
}


@pytest.mark.parametrize("recorded", RECORDED, ids=[each["name"] for each in RECORDED])
def test_payloads_are_byte_for_byte(recorded: dict[str, Any]) -> None:
    payload = bytes.fromhex(recorded["payload_hex"])
    state = savedstate.decode(payload, type_url=recorded["type_url"])
    assert state == WANTED[recorded["name"]]
    assert savedstate.encode(state) == payload
    assert documents.encode(savedstate.section_of(state)) == recorded["attachments_after_import"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
MOUNTS = st.builds(
    SavedMount,
    guest_path=TEXTS,
    read_only=st.booleans(),
    encrypted=st.booleans(),
    options=st.lists(TEXTS, max_size=3).map(tuple),
    ensure_filesystem=st.booleans(),
    filesystem=TEXTS,
    block_dev=st.booleans(),
)
DISKS = st.builds(
    SavedDisk,
    host_path=TEXTS.filter(bool),
    read_only=st.booleans(),
    type=st.sampled_from(["VirtualDisk", "PassThru", "ExtensibleVirtualDisk"]),
    evd_type=TEXTS,
    mounts=st.dictionaries(st.integers(0, (1 << 64) - 1), MOUNTS | st.just(SavedMount(is_blank=True)), max_size=2),
)
SLOTS = st.builds(Slot, st.integers(0, 3), st.integers(0, 63))


@st.composite
def states(draw: st.DrawFn) -> SavedState:
    disks = draw(st.dictionaries(SLOTS, DISKS, max_size=3))
    disks = {slot: dataclasses.replace(disk, host_path=f"{slot} {disk.host_path}") for slot, disk in disks.items()}
    places = [(slot, partition) for slot, disk in disks.items() for partition in disk.mounts]
    chosen = draw(st.dictionaries(st.uuids().map(str), st.sampled_from(places), max_size=4)) if places else {}
    for slot, disk in disks.items():
        counted = {
            partition: mount
            if mount.is_blank
            else dataclasses.replace(mount, references=list(chosen.values()).count((slot, partition)))
            for partition, mount in disk.mounts.items()
        }
        disks[slot] = dataclasses.replace(disk, mounts=counted)
    reservations = {id: SavedReservation(slot=slot, partition=partition) for id, (slot, partition) in chosen.items()}
    return SavedState(controllers=4, disks=disks, reservations=reservations)


@given(states())
def test_what_is_written_is_read_as_it_was(state: SavedState) -> None:
    payload = savedstate.encode(state)
    again = savedstate.decode(payload)
    assert again == state
    assert savedstate.encode(again) == payload


def payload(*pieces: bytes, version: int = 1, controllers: int = 1) -> bytes:
    return number(1, version) + number(2, controllers) + b"".join(pieces)


def disk(slot: int, *pieces: bytes, path: str = A, kind: str = "VirtualDisk") -> bytes:
    config = message(1, text(1, path) + text(3, kind))
    return message(3, number(1, slot, always=True) + message(2, config + b"".join(pieces)))


def mount(partition: int, content: bytes) -> bytes:
    return message(2, number(1, partition, always=True) + message(2, content))


def reservation(id: str, slot: int, partition: int = 0) -> bytes:
    return message(4, text(1, id) + message(2, number(1, slot) + number(2, partition)))


ONE = mount(0, message(1, b"") + number(2, 1) + text(3, "/m"))

CANNOT_BE = {
    "of no version": b"",
    "of a later version": payload(version=2),
    "with five controllers": payload(controllers=5),
    "with a disk beyond the controllers": payload(disk(64)),
    "with a disk beyond all": payload(disk(256), controllers=4),
    "with a disk without a path": payload(disk(0, path="")),
    "with a disk of no type": payload(disk(0, kind="")),
    "with a disk of another type": payload(disk(0, kind="Iso")),
    "with two disks of one path": payload(disk(0), disk(1)),
    "with two disks in one slot": payload(disk(0), disk(0, path="C:\\b.vhdx")),
    "with a reservation that is no GUID": payload(disk(0, ONE), reservation("not-a-guid", 0)),
    "with a reservation of an empty slot": payload(reservation(GUID, 5)),
    "with a reservation of another partition": payload(disk(0, ONE), reservation(GUID, 0, 1)),
    "with a reservation twice": payload(disk(0, ONE), reservation(GUID, 0), reservation(GUID, 0)),
    "with more references than reservations": payload(disk(0, ONE)),
    "with fewer references": payload(disk(0, ONE), reservation(GUID, 0), reservation(OTHER, 0)),
    "with a partition twice": payload(disk(0, ONE, ONE), reservation(GUID, 0)),
    "with a field that there is not": payload(message(5, b"")),
    "with a field of another kind": payload(number(3, 1)),
    "with a field twice": payload(number(2, 1)),
    "with a flag of two": payload(disk(0, mount(0, message(1, number(1, 2)) + number(2, 1)))),
    "with a number beyond 32 bits": number(1, 1) + number(2, 1 << 32),
    "with a text that is none": payload(disk(0, mount(0, message(1, b"") + number(2, 1) + message(3, b"\xff")))),
    "with a group": payload(b"\x2b\x2c"),
    "with a number without an end": payload(b"\xff" * 11),
    "that is one byte": b"\xff",
}  # fmt: skip


@pytest.mark.parametrize("what", CANNOT_BE)
def test_a_payload_that_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        savedstate.decode(CANNOT_BE[what])


def test_a_payload_of_another_type_is_refused() -> None:
    with pytest.raises(ProtocolError, match="bogus"):
        savedstate.decode(MAPPED, type_url="bogus")


def test_a_payload_cut_short_is_refused() -> None:
    for cut in range(len(MAPPED)):
        try:
            state = savedstate.decode(MAPPED[:cut])
        except ProtocolError:
            continue
        # A message may end between its fields: then it holds what came until there.
        assert state == SavedState(controllers=state.controllers), cut


@given(st.binary(max_size=200))
@example(b"\x08\x01\x1a\xff\xff\xff\xff\x0f")
def test_anything_is_read_whole_or_refused(data: bytes) -> None:
    try:
        state = savedstate.decode(b"\x08\x01" + data)
    except ProtocolError:
        return
    assert savedstate.decode(savedstate.encode(state)) == state


@given(st.data())
@settings(max_examples=300)
def test_a_changed_payload_is_read_whole_or_refused(data: st.DataObject) -> None:
    changed = bytearray(MAPPED)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        state = savedstate.decode(bytes(changed))
    except ProtocolError:
        return
    assert savedstate.decode(savedstate.encode(state)) == state


def test_an_announced_length_takes_no_memory() -> None:
    data = payload(b"\x1a\xff\xff\xff\xff\x07")
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="announced"):
        savedstate.decode(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_cannot_be_is_not_written() -> None:
    for wrong in (
        SavedState(controllers=5),
        SavedState(controllers=1, disks={Slot(1, 0): SavedDisk(host_path=A)}),
        SavedState(controllers=1, disks={Slot(0, 64): SavedDisk(host_path=A)}),
        SavedState(controllers=1, disks={Slot(0, 0): SavedDisk(host_path="\ud800")}),
        mapped(references=2),
    ):
        with pytest.raises(InvalidRequest):
            savedstate.encode(wrong)


def test_disks_can_be_elsewhere_on_the_other_host() -> None:
    state = SavedState(
        controllers=1, disks={Slot(0, 0): SavedDisk(host_path=A), Slot(0, 1): SavedDisk(host_path="C:\\b.vhdx")}
    )
    moved = state.relocated({A: "D:\\a.vhdx"})
    assert [disk.host_path for disk in moved.disks.values()] == ["D:\\a.vhdx", "C:\\b.vhdx"]
    with pytest.raises(InvalidRequest, match="2 disks are"):
        state.relocated({A: "C:\\b.vhdx"})
    with pytest.raises(InvalidRequest, match="no disk of this state"):
        state.relocated({"C:\\c.vhdx": A})


# To and from our manager.


class Everything:
    """Disks of any path, all alike."""

    def identity(self, request: DiskRequest) -> str:
        return request.host_path

    def read(self, request: DiskRequest) -> DiskFacts:
        return DiskFacts(format=DiskFormat.VHDX, size_bytes=1 << 30)


def test_what_hcsshim_saved_becomes_our_managers_state_and_back() -> None:
    saved = SavedState(
        controllers=4,
        disks={
            Slot(0, 0): SavedDisk(host_path="C:\\rootfs.vhd", read_only=True),
            Slot(0, 1): SavedDisk(
                host_path=A,
                mounts={
                    0: SavedMount(guest_path="/m0", references=2, options=("rshared",), encrypted=True),
                    2: SavedMount(guest_path="/m2", references=1, ensure_filesystem=True, filesystem="xfs"),
                },
            ),
            Slot(3, 63): SavedDisk(
                host_path="mnt/e",
                type="ExtensibleVirtualDisk",
                evd_type="space",
                read_only=True,
                mounts={0: SavedMount(guest_path="/e", references=1, read_only=True)},
            ),
        },
        reservations={
            GUID: SavedReservation(slot=Slot(0, 1)),
            OTHER: SavedReservation(slot=Slot(0, 1)),
            "4a57b660-74db-4180-8d3f-cb142bfff1ac": SavedReservation(slot=Slot(0, 1), partition=2),
            "4a57b660-74db-4180-8d3f-cb142bfff1ad": SavedReservation(slot=Slot(3, 63)),
        },
    )
    state, reserved = savedstate.to_state(saved, disks=Everything(), holder="pods", access=VMAccess.GROUP)

    assert reserved == {Slot(0, 0): "C:\\rootfs.vhd"}
    assert [(entry.slot, entry.host_path, entry.format) for entry in state.disks] == [
        ("0:1", A, "vhdx"),
        ("3:63", "evd://space/mnt/e", "vhdx"),
    ]
    assert [mount.guest_path for entry in state.disks for mount in entry.mounts] == ["/m0", "/m2", "/e"]
    assert {one.holder for entry in state.disks for one in entry.reservations} == {"pods"}
    assert ScsiState.from_json(state.to_json()) == state
    again = savedstate.from_state(state, reserved={Slot(0, 0): saved.disks[Slot(0, 0)]})
    assert again == saved
    section = savedstate.section_of(state)
    assert section == {
        name: documents.Scsi(attachments={lun: one for lun, one in scsi.attachments.items() if lun != "0"})
        for name, scsi in savedstate.section_of(saved).items()
    }


def test_what_was_not_saved_is_not_made_up() -> None:
    for state in (mapped(guest_path=""), mapped(guest_path="", is_blank=True)):
        with pytest.raises(NotSupported, match="partition 1 of"):
            savedstate.to_state(state, disks=Everything(), holder="pods")


def test_a_mount_that_nobody_holds_any_more_is_left_out() -> None:
    saved = mapped()
    entry = saved.disks[Slot(0, 0)]
    left = dataclasses.replace(entry, mounts={**entry.mounts, 2: SavedMount()})
    state, _ = savedstate.to_state(
        dataclasses.replace(saved, disks={Slot(0, 0): left}), disks=Everything(), holder="pods"
    )
    assert [mount.config.partition for mount in state.disks[0].mounts] == [1]


def _ours(**changes: Any) -> ScsiState:
    names = map("id{}".format, itertools.count())
    state, _ = savedstate.to_state(mapped(), disks=Everything(), holder="pods", new_id=lambda: next(names))
    whole = json.loads(state.to_json())
    for name, value in changes.items():
        whole["disks"][0][name] = value
    return ScsiState.from_json(json.dumps(whole))


def test_what_hcsshim_has_no_words_for_is_refused() -> None:
    entry = json.loads(_ours().to_json())["disks"][0]
    held, mount = entry["reservations"][0], entry["mounts"][0]
    second = {**mount, "mount": "two", "guest_path": "/two"}
    for changes in (
        {"mounts": [], "reservations": [{**held, "mount": None}]},
        {"mounts": [mount, second], "reservations": [held, {**held, "reservation": "r2", "mount": "two"}]},
        {"mounts": [{**mount, "config": {"encryption": "caller"}}]},
        {
            "read_only": True,
            "mounts": [
                {**mount, "config": {"read_only": True, "verity": {"root_hash": "AA==", "hash_offset_bytes": 0}}}
            ],
        },
    ):
        with pytest.raises(NotSupported, match="cannot say"):
            savedstate.from_state(_ours(**changes))


def test_a_reservation_of_ours_gets_a_guid_that_stays() -> None:
    entry = json.loads(_ours().to_json())["disks"][0]
    saved = savedstate.from_state(_ours(reservations=[{**entry["reservations"][0], "reservation": "0c1d2e3f4a5b"}]))
    assert list(saved.reservations) == [savedstate.guid_of("0c1d2e3f4a5b")] == ["4e9279e7-60cf-54e1-aaed-1b59d93db25b"]
    assert savedstate.guid_of(GUID.upper()) == GUID
