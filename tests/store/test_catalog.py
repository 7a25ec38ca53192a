"""The VMs in the store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.errors import StoreError, VMExists, VMNotFound
from utilityvm.machine import paths
from utilityvm.machine.processes import own_start
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRecord, VMAccess
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, VMState
from utilityvm.store.ownership import read_owner
from utilityvm.store.recover import open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state.db") as opened:
        yield opened


def disk(attachment: str, identity: str) -> DiskRecord:
    return DiskRecord(
        attachment=attachment,
        slot=Slot(0, 1),
        host_path="/srv/a.qcow2",
        identity=identity,
        kind=AttachmentType.VIRTUAL_DISK,
        format=DiskFormat.QCOW2,
        access=VMAccess.INDIVIDUAL,
        read_only=True,
        size_bytes=1 << 20,
        state="attached",
        since=1.0,
    )


def test_a_name_is_given_once(store: Store) -> None:
    store.add("one", uuid="u1", config={})
    with pytest.raises(VMExists, match="'one'"):
        store.add("one", uuid="u2", config={})
    assert store.get("one").uuid == "u1"


def test_an_unknown_name_says_which_are_known(store: Store) -> None:
    store.add("one", uuid="u", config={})
    with pytest.raises(VMNotFound) as caught:
        store.get("two")
    assert caught.value.remedy == "the VMs: one"


def test_an_id_is_never_used_again(store: Store) -> None:
    first = store.add("one", uuid="u", config={})
    store.remove(first)
    assert store.add("one", uuid="u", config={}).id != first.id


def test_a_vm_is_alive_while_that_very_process_runs(store: Store) -> None:
    vm = store.add("one", uuid="u", config={})
    store.set_process(vm, {"pid": os.getpid(), "started": own_start()})
    store.set_state(vm, VMState.RUNNING)
    assert store.get("one").seen_state is VMState.RUNNING
    store.set_process(vm, {"pid": os.getpid(), "started": "12"})  # the pid was given to another process
    assert store.get("one").seen_state is VMState.DEAD


async def test_a_dead_vm_holds_no_disk(store: Store) -> None:
    vm = store.add("one", uuid="u", config={})
    await SqliteJournal(store, vm).write([disk("a1", "file:1:1")])
    assert store.user_of("file:1:1") == "one"
    store.set_dead(vm)
    assert store.user_of("file:1:1") is None
    assert SqliteJournal(store, vm).read() == []


async def test_a_vm_does_not_see_itself_as_the_user_of_its_disk(store: Store) -> None:
    vm = store.add("one", uuid="u", config={})
    await SqliteJournal(store, vm).write([disk("a1", "file:1:1")])
    assert store.user_of("file:1:1", other_than=vm) is None


def test_restoring_a_vm_does_not_replace_one_of_that_name(store: Store) -> None:
    store.add("one", uuid="u1", config={})
    record = {"name": "one", "uuid": "u2", "created": 1.0, "config": {}, "process": {}}
    assert not store.restore(record)
    assert store.restore({**record, "name": "two"})
    assert [(vm.name, vm.uuid) for vm in store.vms()] == [("one", "u1"), ("two", "u2")]


DAMAGES = [
    ("state", "runninh"),
    ("state", "damaged"),
    ("config", '{"memory'),
    ("config", "[]"),
    ("process", "{"),
    ("process", "{}"),
    ("process", '{"pid": "7", "started": "x"}'),
    ("process", "[1]"),
    ("uuid", ""),
    ("uuid", ".."),
    ("name", "../bad"),
]


@pytest.mark.parametrize(("column", "value"), DAMAGES)
def test_one_damaged_row_is_a_vm_that_says_so_and_the_others_are_as_they_were(
    store: Store, column: str, value: str
) -> None:
    good, bad = store.add("good", uuid="u1", config={"keep": True}), store.add("bad", uuid="u2", config={})
    for vm in (good, bad):
        store.set_process(vm, {"pid": os.getpid(), "started": own_start()})
    store.db.execute(f"UPDATE vms SET {column} = ? WHERE id = ?", (value, bad.id))
    assert (store.get("good").config, store.get("good").damage) == ({"keep": True}, None)
    [damaged] = [vm for vm in store.vms() if vm.id == bad.id]
    assert column in (damaged.damage or "").lower()
    assert damaged.seen_state is VMState.DAMAGED
    assert damaged.is_alive(), "nothing says that it has ended"
    store.remove(damaged)
    assert [vm.name for vm in store.vms()] == ["good"]


@pytest.mark.parametrize("column", ["name", "uuid", "state", "config", "process", "owner"])
def test_a_text_that_is_no_utf8_keeps_nobody_from_the_other_rows(store: Store, column: str) -> None:
    good, bad = store.add("good", uuid="u1", config={"keep": True}), store.add("bad", uuid="u2", config={})
    store.db.execute(f"UPDATE vms SET {column} = CAST(X'7bff' AS TEXT) WHERE id = ?", (bad.id,))
    assert store.get("good").config == {"keep": True}
    assert {vm.id for vm in store.vms()} == {good.id, bad.id}


@pytest.mark.parametrize("value", ["{", "[]", '{"pid": 1}'])
def test_a_damaged_owner_is_none(store: Store, value: str) -> None:
    vm = store.add("one", uuid="u", config={})
    store.db.execute("UPDATE vms SET owner = ? WHERE id = ?", (value, vm.id))
    assert store.get("one").damage is None
    assert read_owner(store.get("one").owner) is None


def test_a_damaged_row_is_replaced_by_its_copy_while_the_vm_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path / "run"))
    process = {"pid": os.getpid(), "started": own_start()}
    with Store.open(tmp_path / "state.db") as store:
        vm = store.add("one", uuid="u", config={"keep": True})
        store.set_process(vm, process)
        store.db.execute("UPDATE vms SET state = 'runninh', config = '{', process = '{'")
    folder = paths.vm_dir("one")
    folder.mkdir(parents=True)
    copy = {"name": "one", "uuid": "u", "created": 1.0, "config": {"keep": True}, "process": process}
    (folder / paths.RECORD_FILE).write_text(json.dumps({**copy, "store": str(tmp_path / "state.db")}))
    with open_store(tmp_path / "state.db") as store:
        healed = store.get("one")
    assert (healed.id, healed.damage, healed.state) == (vm.id, None, VMState.RUNNING)
    assert (healed.config, healed.process) == ({"keep": True}, process)


def test_a_vm_that_was_ended_while_it_started_is_told_so(store: Store) -> None:
    vm = store.add("one", uuid="u", config={})
    store.remove(vm)
    with pytest.raises(StoreError, match="ended by another process"):
        store.set_process(vm, {"pid": 1, "started": "x"})


def test_an_owner_is_forgotten_by_himself_alone(store: Store) -> None:
    vm = store.add("one", uuid="u", config={}, owner={"pid": 1})
    store.drop_owner(vm, {"pid": 2})
    assert store.get("one").owner == {"pid": 1}
    store.drop_owner(vm, {"pid": 1})
    assert store.get("one").owner is None
