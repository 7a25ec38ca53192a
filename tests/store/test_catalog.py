"""The VMs in the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.errors import VMExists, VMNotFound
from utilityvm.machine.processes import own_start
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRecord, VMAccess
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, VMState


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
    assert caught.value.remedy == "there are one"


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
