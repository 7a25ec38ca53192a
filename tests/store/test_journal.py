"""A VM's journal: what is read is what was written, all of it or nothing, and never a key."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utilityvm.errors import StoreError
from utilityvm.scsi.ports import (
    AttachmentType,
    CallerKey,
    DiskFormat,
    DiskRecord,
    Holder,
    MountConfig,
    MountRecord,
    ReservationRecord,
    ScratchKey,
    Verity,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.store import SqliteJournal, Store, database

VECTORS = Path(__file__).parents[1] / "vectors"

DISK = DiskRecord(
    attachment="a1",
    slot=Slot(1, 63),
    host_path="/srv/disks/a.qcow2",
    identity="file:1:2",
    kind=AttachmentType.VIRTUAL_DISK,
    format=DiskFormat.QCOW2,
    access=VMAccess.INDIVIDUAL,
    read_only=True,
    size_bytes=1 << 40,
    state="attaching",
    since=1.5,
    sector_size_bytes=4096,
)
MOUNT = MountRecord(
    mount="m1",
    attachment="a1",
    guest_path=PurePosixPath("/data"),
    config=MountConfig(partition=2, read_only=True, options=("noatime", "x=a,b")),
    state="mounting",
    since=2.5,
    notes=("it is read-only", "its journal was replayed"),
)
RESERVATION = ReservationRecord(
    reservation="r1", attachment="a1", mount="m1", holder=Holder(name="cli"), state="held", since=3.5
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("state") / "state.db") as opened:
        yield opened


@pytest.fixture
def journal(store: Store) -> Iterator[SqliteJournal]:
    vm = store.add("one", uuid="u", config={})
    yield SqliteJournal(store, vm)
    store.remove(vm)


async def test_records_come_back_as_they_were(journal: SqliteJournal) -> None:
    await journal.write([RESERVATION, MOUNT, DISK])
    assert journal.read() == [DISK, MOUNT, RESERVATION]


async def test_a_journal_of_version_4_is_read_as_one_of_today(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((VECTORS / "store_4.sql").read_text())
        db.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 4")
    verity = Verity(
        root_hash=b"\x00\xff",
        hash_offset_bytes=4096,
        data_blocks=2,
        salt=b"\x01",
        algorithm="sha256",
        block_size_bytes=4096,
    )
    with Store.open(path) as store:
        journal = SqliteJournal(store, store.get("worker"))
        mounts = [record for record in journal.read() if isinstance(record, MountRecord)]
        assert [record.config for record in mounts] == [
            MountConfig(),
            MountConfig(partition=2, read_only=True, options=("noatime", "a,b"), filesystem="xfs", verity=verity),
            MountConfig(ensure_filesystem=True, reformat=True, encryption=ScratchKey()),
            MountConfig(block_device=True, encryption=CallerKey(b"")),
        ]
        assert [record.guest_path for record in mounts] == [PurePosixPath(f"/m/{number}") for number in range(4)]
        await journal.write(mounts)
        assert journal.had_key()


def test_a_row_of_version_4_that_nobody_wrote_keeps_no_store_from_opening(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((VECTORS / "store_4.sql").read_text())
        db.execute("UPDATE mounts SET encryption = 'rot13' WHERE mount = 'm0'")
        db.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 4")
        db.commit()
    with Store.open(path) as store, pytest.raises(StoreError, match="holds what no utilityvm wrote"):
        SqliteJournal(store, store.get("worker")).read()


async def test_a_record_takes_the_place_of_one_of_its_id(journal: SqliteJournal) -> None:
    await journal.write([DISK])
    changed = replace(DISK, state="attached", host_path="/elsewhere", slot=Slot(0, 0), size_bytes=1)
    await journal.write([changed])
    assert journal.read() == [changed]


async def test_a_dropped_record_is_gone_and_dropping_it_again_is_no_error(journal: SqliteJournal) -> None:
    await journal.write([DISK, MOUNT, RESERVATION])
    await journal.write([], [RESERVATION, MOUNT])
    await journal.write([], [RESERVATION])
    assert journal.read() == [DISK]


async def test_what_is_dropped_and_put_at_once_is_there(journal: SqliteJournal) -> None:
    await journal.write([DISK])
    await journal.write([DISK], [DISK])
    assert journal.read() == [DISK]


async def test_two_vms_do_not_see_each_other(store: Store, journal: SqliteJournal) -> None:
    other = store.add("two", uuid="u", config={})
    await journal.write([DISK])
    await SqliteJournal(store, other).write([replace(DISK, host_path="/b")], [DISK])
    assert journal.read() == [DISK]
    store.remove(other)
    assert journal.read() == [DISK]


async def test_a_write_that_fails_in_the_middle_changes_nothing(journal: SqliteJournal) -> None:
    await journal.write([DISK])
    broken = replace(DISK, attachment="a2", size_bytes="many")  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        await journal.write([replace(DISK, state="attached"), broken], [MOUNT])
    assert journal.read() == [DISK]
    await journal.write([MOUNT])  # and the connection is good for more


async def test_the_journal_of_a_removed_vm_refuses(store: Store) -> None:
    vm = store.add("gone", uuid="u", config={})
    journal = SqliteJournal(store, vm)
    store.remove(vm)
    store.add("gone", uuid="u", config={})
    with pytest.raises(StoreError, match="was removed"):
        await journal.write([DISK])
    store.remove(store.get("gone"))


async def test_a_path_that_is_not_text_is_refused(journal: SqliteJournal) -> None:
    with pytest.raises(StoreError, match="UTF-8"):
        await journal.write([replace(DISK, host_path="/srv/\udcff")])
    assert journal.read() == []


async def test_a_key_is_nowhere_in_the_files(store: Store, journal: SqliteJournal) -> None:
    key = b"0123456789abcdefFEDCBA9876543210"
    await journal.write([replace(MOUNT, config=MountConfig(encryption=CallerKey(key)))])
    (found,) = journal.read()
    assert isinstance(found, MountRecord)
    assert found.config.encryption == CallerKey(b"")
    for file in store.path.parent.iterdir():
        assert key not in file.read_bytes()


KEYED = replace(MOUNT, config=MountConfig(encryption=CallerKey(b"k" * 64)))


async def test_that_a_vm_had_a_key_is_never_forgotten(store: Store, journal: SqliteJournal) -> None:
    await journal.write([MOUNT])
    assert not journal.had_key()
    await journal.write([KEYED])
    assert journal.had_key()
    await journal.write([], [KEYED])
    assert journal.read() == []
    assert journal.had_key()
    with Store.open(store.path) as other:
        assert SqliteJournal(other, other.get("one")).had_key()


async def test_that_a_vm_had_a_key_is_written_with_the_step_that_sends_it(store: Store, journal: SqliteJournal) -> None:
    """The key is marked in the same transaction, beside whatever else is written, or nothing is written at all."""
    await journal.write([DISK, KEYED], [RESERVATION])
    assert journal.had_key()
    with pytest.raises(StoreError, match="UTF-8"):
        await journal.write([KEYED, replace(DISK, host_path="/srv/\udcff")])
    another = SqliteJournal(store, store.add("another", uuid="2", config={}))
    with pytest.raises(StoreError, match="UTF-8"):
        await another.write([KEYED, replace(DISK, host_path="/srv/\udcff")])
    assert not another.had_key()


async def test_a_vm_whose_record_was_lost_may_have_had_a_key(store: Store) -> None:
    record = {"name": "found", "uuid": "3", "created": 1.0, "config": {}, "process": {"pid": 1, "started": "1"}}
    store.restore(record)
    assert SqliteJournal(store, store.get("found")).had_key()
    vm = store.add("damaged", uuid="4", config={})
    store.heal(vm, {**record, "name": "damaged", "uuid": "4"})
    assert SqliteJournal(store, vm).had_key()


async def test_a_journal_that_another_program_wrote_is_a_store_error(store: Store, journal: SqliteJournal) -> None:
    await journal.write([DISK])
    store.db.execute("UPDATE disks SET lun = 64")
    with pytest.raises(StoreError, match="no utilityvm wrote"):
        journal.read()


async def test_a_busy_store_is_waited_for_and_the_loop_goes_on(store: Store, journal: SqliteJournal) -> None:
    turns = 0
    with Store.open(store.path) as other, database.transaction(other.db):
        writing = asyncio.create_task(journal.write([DISK]))
        while turns < 5:
            await asyncio.sleep(0.005)
            turns += 1
        assert not writing.done()
    await writing
    assert journal.read() == [DISK]


async def test_a_write_that_is_cancelled_while_the_store_is_busy_writes_nothing(
    store: Store, journal: SqliteJournal
) -> None:
    with Store.open(store.path) as other, database.transaction(other.db):
        writing = asyncio.create_task(journal.write([DISK]))
        await asyncio.sleep(0.01)
        writing.cancel()
        await asyncio.wait({writing})
    assert writing.cancelled()
    assert journal.read() == []


async def test_a_store_that_stays_busy_is_an_error(
    store: Store, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    with Store.open(store.path) as other, database.transaction(other.db):
        with pytest.raises(StoreError, match="locked") as refused:
            await journal.write([DISK, MOUNT])
        assert "fuser" in str(refused.value.remedy)
    await journal.write([DISK])
    assert journal.read() == [DISK]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
numbers = st.integers(0, 2**62)
verities = st.builds(
    Verity,
    root_hash=st.binary(min_size=1, max_size=64),
    hash_offset_bytes=numbers,
    data_blocks=st.none() | numbers,
    salt=st.none() | st.binary(max_size=32),
    algorithm=st.none() | names,
    block_size_bytes=st.none() | numbers,
)
configs = st.builds(
    MountConfig,
    partition=st.integers(0, 128),
    read_only=st.booleans(),
    options=st.lists(names, max_size=4).map(tuple),
    filesystem=st.none() | names,
    ensure_filesystem=st.booleans(),
    reformat=st.booleans(),
    block_device=st.booleans(),
    encryption=st.none() | st.builds(ScratchKey),
    verity=st.none() | verities,
)
slots = st.builds(Slot, st.integers(0, 3), st.integers(0, 63))
times = st.floats(0, 4e9)
disks = st.builds(
    DiskRecord,
    attachment=names,
    slot=slots,
    host_path=names,
    identity=names,
    kind=st.sampled_from(AttachmentType),
    format=st.sampled_from(DiskFormat),
    access=st.sampled_from(VMAccess),
    read_only=st.booleans(),
    size_bytes=numbers,
    state=st.sampled_from(DiskState).map(str),
    since=times,
)
mounts = st.builds(
    MountRecord,
    mount=names,
    attachment=names,
    guest_path=names.map(PurePosixPath),
    config=configs,
    state=st.sampled_from(MountState).map(str),
    since=times,
)
holders = st.builds(Holder, name=names, pid=st.none() | numbers, started=st.none() | names)
reservations = st.builds(
    ReservationRecord,
    reservation=names,
    attachment=names,
    mount=st.none() | names,
    holder=holders,
    state=st.sampled_from(ReservationState).map(str),
    since=times,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(disks | mounts | reservations, max_size=8))
def test_any_records_come_back(store: Store, records: list[DiskRecord | MountRecord | ReservationRecord]) -> None:
    vm = store.add("any", uuid="u", config={})
    try:
        journal = SqliteJournal(store, vm)
        asyncio.run(journal.write(records))
        expected = {(type(record), _id(record)): record for record in records}
        assert {(type(record), _id(record)): record for record in journal.read()} == expected
    finally:
        store.remove(vm)


def _id(record: DiskRecord | MountRecord | ReservationRecord) -> str:
    match record:
        case DiskRecord():
            return record.attachment
        case MountRecord():
            return record.mount
        case ReservationRecord():
            return record.reservation


async def test_the_wal_does_not_grow_for_ever(
    store: Store, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_WRITES", 50)
    wal = store.path.with_name(f"{store.path.name}-wal")
    sizes: list[int] = []
    for _ in range(20):
        for number in range(50):
            await journal.write([replace(DISK, since=float(number))])
        assert store._checkpoint is not None
        store._checkpoint.join()
        sizes.append(wal.stat().st_size)
    assert max(sizes) <= 3 * sizes[0], "after each checkpoint the file is written from its beginning again"


async def test_writes_go_on_while_a_checkpoint_runs(
    store: Store, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_WRITES", 10)
    for number in range(500):
        await journal.write([replace(DISK, since=float(number))])
    assert journal.read() == [replace(DISK, since=499.0)]
