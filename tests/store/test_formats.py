"""What images are is remembered for the file, by any process, and not without end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.errors import StoreError
from utilityvm.machine.fileid import FileId
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store, formats

FILE = FileId(device=1, inode=2, birth_ns=3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state.db") as opened:
        yield opened


def test_what_was_decided_is_there_for_the_next_process(store: Store) -> None:
    assert store.formats.recall(FILE) is None
    store.formats.remember(FILE, DiskFormat.RAW, size_bytes=512)
    with Store.open(store.path) as other:
        assert other.formats.recall(FILE) == (DiskFormat.RAW, 512)


def test_the_last_word_counts(store: Store) -> None:
    store.formats.remember(FILE, DiskFormat.RAW, size_bytes=512)
    store.formats.remember(FILE, DiskFormat.QCOW2, size_bytes=1024)
    assert store.formats.recall(FILE) == (DiskFormat.QCOW2, 1024)


@pytest.mark.parametrize(
    "other",
    [
        FileId(device=1, inode=3, birth_ns=3),
        FileId(device=1, inode=2, birth_ns=4),
        FileId(device=1, inode=2, birth_ns=None),
        FileId(device=1, inode=2, birth_ns=None, mark="handle 01"),
    ],
)
def test_another_file_is_another(store: Store, other: FileId) -> None:
    store.formats.remember(FILE, DiskFormat.RAW, size_bytes=512)
    assert store.formats.recall(other) is None


def test_a_device_may_have_another_number_after_a_reboot(store: Store) -> None:
    store.formats.remember(FILE, DiskFormat.RAW, size_bytes=512)
    assert store.formats.recall(FileId(device=9, inode=2, birth_ns=3)) == (DiskFormat.RAW, 512)


def test_without_a_birth_the_device_counts(store: Store) -> None:
    store.formats.remember(FileId(device=1, inode=2, birth_ns=None), DiskFormat.RAW, size_bytes=512)
    assert store.formats.recall(FileId(device=9, inode=2, birth_ns=None)) is None
    assert store.formats.recall(FileId(device=1, inode=2, birth_ns=None)) == (DiskFormat.RAW, 512)


def test_an_inode_of_64_bits_is_kept(store: Store) -> None:
    large = FileId(device=1, inode=(1 << 64) - 1, birth_ns=3)
    store.formats.remember(large, DiskFormat.RAW, size_bytes=512)
    assert store.formats.recall(large) == (DiskFormat.RAW, 512)


def test_what_was_not_opened_for_the_longest_time_is_forgotten_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "KEPT", 10)
    monkeypatch.setattr(formats, "_SPARE", 2)
    clock = iter(range(1, 1000))
    monkeypatch.setattr("utilityvm.store.formats.time.time", lambda: float(next(clock)))
    files = [FileId(device=1, inode=number, birth_ns=1) for number in range(1, 12)]
    for file in files:
        store.formats.remember(file, DiskFormat.RAW, size_bytes=512)
    (count,) = store.db.execute("SELECT count(*) FROM images").fetchone()
    assert count == 8
    assert [file.inode for file in files if store.formats.recall(file) is None] == [1, 2, 3]


def test_threads_may_ask_at_once(store: Store) -> None:
    def ask(number: int) -> None:
        file = FileId(device=1, inode=number, birth_ns=1)
        store.formats.remember(file, DiskFormat.RAW, size_bytes=number)
        answers.append(store.formats.recall(file) == (DiskFormat.RAW, number))

    answers: list[bool] = []
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8


def test_a_store_that_cannot_be_read_is_told(store: Store) -> None:
    store.db.execute("DROP TABLE images")
    with pytest.raises(StoreError, match="no such table"):
        store.formats.recall(FILE)
    with pytest.raises(StoreError, match="no such table"):
        store.formats.remember(FILE, DiskFormat.RAW, size_bytes=512)
