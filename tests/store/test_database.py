"""The store's file: whole or not at all, its version, and what becomes of a damaged one."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from utilityvm.errors import SetupError, StoreDamaged, StoreError, StoreTooNew
from utilityvm.store import Store, database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def test_only_its_user_may_read_it(path: Path) -> None:
    with Store.open(path) as store:
        store.add("one", uuid="u", config={})
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert set(modes) == {"state.db", "state.db-wal", "state.db-shm"}
        assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_open_to_others_is_closed_to_them(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o755)
    Store.open(path).close()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_but_the_store_is_left_in_its_folder(path: Path) -> None:
    Store.open(path).close()
    Store.open(path).close()
    assert [file.name for file in path.parent.iterdir()] == ["state.db"]


def test_what_is_written_is_there_when_it_is_opened_again(path: Path) -> None:
    with Store.open(path) as store:
        store.add("one", uuid="u", config={"memory_mib": 256})
    with Store.open(path) as store:
        assert store.get("one").config == {"memory_mib": 256}


def test_what_is_written_survives_a_kill(path: Path) -> None:
    Store.open(path).close()
    script = (
        "import os, sys; from pathlib import Path; from utilityvm.store import Store\n"
        "store = Store.open(Path(sys.argv[1])); store.add('one', uuid='u', config={}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    with Store.open(path) as store:
        assert [vm.name for vm in store.vms()] == ["one"]


def test_a_later_version_is_refused_and_not_touched(path: Path) -> None:
    Store.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match="version 99"):
        Store.open(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        Store.open(path)


def test_an_older_store_is_migrated_in_one_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(path) as store:
        store.add("one", uuid="u", config={})
    step = "ALTER TABLE vms ADD COLUMN note TEXT NOT NULL DEFAULT 'none'; UPDATE vms SET note = name || ';';"
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, step))
    monkeypatch.setattr(database, "VERSION", database.VERSION + 1)
    db = database.connect(path)
    assert db.execute("SELECT note FROM vms").fetchall() == [("one;",)]
    assert db.execute("PRAGMA user_version").fetchone() == (database.VERSION,)
    db.close()


STORE_4 = Path(__file__).parents[1] / "vectors/store_4.sql"


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    db = sqlite3.connect(path)
    try:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: db.execute(f"PRAGMA table_info({name})").fetchall() for name in tables}
    finally:
        db.close()


def test_a_store_of_version_1_becomes_as_a_new_one_and_keeps_its_vms(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(STORE_4.read_text())
        db.execute("DROP TABLE images")
        db.execute("ALTER TABLE disks DROP COLUMN sector_size_bytes")
        # SQLite cuts the text of the last column out of the statement, and is confused by comments before it.
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_schema SET sql = substr(sql, 1, instr(sql, 'process') - 1) || 'process TEXT) STRICT' "
            "WHERE name = 'vms'"
        )
        db.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.commit()

    with Store.open(path) as store:
        assert [vm.name for vm in store.vms()] == ["worker"]
    Store.open(tmp_path / "new.db").close()
    assert columns(path) == columns(tmp_path / "new.db")


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(path).close()
    step = "ALTER TABLE vms ADD COLUMN note TEXT; UPDATE no_such_table SET x = 1;"
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, step))
        patch.setattr(database, "VERSION", database.VERSION + 1)
        with pytest.raises(StoreError, match="no such table"):
            database.connect(path)
    with Store.open(path) as store:
        assert store.db.execute("PRAGMA user_version").fetchone() == (database.VERSION,)
        assert store.vms() == []


@pytest.mark.parametrize("where", [0, 20, 1024 * 3, 1024 * 5])
def test_a_damaged_store_is_kept_whole_and_a_new_one_takes_its_place(path: Path, where: int) -> None:
    with Store.open(path) as store:
        for number in range(40):
            store.add(f"vm{number}", uuid="u", config={"filler": "x" * 200})
    data = bytearray(path.read_bytes())
    data[where : where + 600] = b"\xff" * 600
    path.write_bytes(data)
    with pytest.raises(StoreDamaged) as caught:
        Store.open(path)
    assert caught.value.kept.read_bytes() == data
    with Store.open(path) as store:
        assert store.vms() == []


def test_a_second_damaged_store_does_not_replace_the_first(path: Path) -> None:
    kept = []
    for text in (b"first", b"second"):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(text * 300)
        with pytest.raises(StoreDamaged) as caught:
            Store.open(path)
        kept.append(caught.value.kept)
    assert [file.read_bytes()[:5] for file in kept] == [b"first", b"secon"]


def test_an_empty_file_is_not_taken_for_a_store(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch()
    with pytest.raises(StoreError):
        Store.open(path)
    assert path.stat().st_size == 0


def test_a_writer_that_is_stuck_costs_a_bounded_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.01)
    with Store.open(path) as stuck, Store.open(path) as store:
        stuck.db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.add("one", uuid="u", config={})
        stuck.db.execute("ROLLBACK")
        store.add("one", uuid="u", config={})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_setup_error(path: Path) -> None:
    path.parent.parent.chmod(0o500)
    with pytest.raises(SetupError, match="state folder"):
        Store.open(path)


def test_a_folder_that_is_a_file_is_a_setup_error(path: Path) -> None:
    path.parent.write_text("not a folder")
    with pytest.raises(SetupError, match="state folder"):
        Store.open(path)
