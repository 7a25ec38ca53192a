"""Opens the store's file: made whole or not at all, migrated, refused when newer, moved aside when damaged.

**What survives what.** The file is in WAL mode with `synchronous=NORMAL`. A commit is then one write into the page
cache of the kernel, without waiting for the storage: it survives `kill -9` of every process of ours at any instruction.
A power cut may take the last commits with it, but leaves the file whole; and it takes the VMs as well, so that what
these commits said is not true any more. The storage is waited for when the WAL is copied back into the file, which
takes milliseconds: once in some thousand writes, by a thread of its own, while others write on.

Source: SQLite, "Write-Ahead Logging", 3.2; PRAGMA synchronous.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError, StoreDamaged, StoreError, StoreTooNew
from utilityvm.log import logger
from utilityvm.machine import oserrors, paths, patience
from utilityvm.store import older
from utilityvm.store.connection import Connection

VERSION: Final = 6
# MIGRATIONS[n] makes a store of version n + 1 out of one of version n; version 1 is the first.
MIGRATIONS: Final[Sequence[str]] = (
    "",
    """
    CREATE TABLE images (
        inode       INTEGER NOT NULL,
        birth_ns    INTEGER NOT NULL,
        device      INTEGER NOT NULL,
        format      TEXT NOT NULL,
        size_bytes  INTEGER NOT NULL,
        seen        REAL NOT NULL,
        PRIMARY KEY (inode, birth_ns, device)
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE disks ADD COLUMN sector_size_bytes INTEGER;
    """,
    "ALTER TABLE vms ADD COLUMN owner TEXT;",
    # Of a VM of before nobody knows.
    "ALTER TABLE vms ADD COLUMN had_key INTEGER NOT NULL DEFAULT 0; UPDATE vms SET had_key = 1;",
    # The settings of a mount become the document of a MountConfig. A hash was in hexadecimal digits, and is in base64.
    """
    CREATE TABLE new_mounts (
        vm                 INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
        mount              TEXT NOT NULL,
        attachment         TEXT NOT NULL,
        guest_path         TEXT NOT NULL,
        config             TEXT NOT NULL,
        state              TEXT NOT NULL,
        since              REAL NOT NULL,
        PRIMARY KEY (vm, mount)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO new_mounts SELECT vm, mount, attachment, guest_path, mount_config(
        partition, read_only, options, filesystem, ensure_filesystem, reformat, block_device, encryption, verity
    ), state, since FROM mounts;
    DROP TABLE mounts;
    ALTER TABLE new_mounts RENAME TO mounts;
    """,
    "ALTER TABLE mounts ADD COLUMN notes TEXT NOT NULL DEFAULT '[]';",
)
APPLICATION_ID: Final = 0x75766D31  # "uvm1"
BUSY_S: Final = 2.0  # a writer holds the file for some 20 us; who holds it for longer is stuck
WAITS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.025)  # between attempts of a writer that may not block; then the last
_PAGE_BYTES: Final = 1024  # a commit writes whole pages, so small ones are quick
CHECKPOINT_WRITES: Final = 1000  # of some 3 pages each
_DAMAGED: Final = ("malformed", "not a database", "file is encrypted")

_log = logger(__name__)


class StoreBusy(StoreError):
    """Another process, or thread, is writing. Nothing was done, and the same can be tried again."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the store at `path`, which is made if it is missing and migrated if it is older.

    Every statement is a transaction of its own unless it stands between BEGIN and COMMIT.

    Raises:
        StoreTooNew: a later utilityvm wrote it; nothing was touched.
        StoreDamaged: it is not whole. It was moved aside under the name in `kept`, and the next call makes a new one.
        StoreError: it is another program's, or busy for `BUSY_S` seconds, or for as long as the caller waits.
        SetupError: its folder cannot be used.
    """
    _make_folder(path.parent)
    if not path.exists():
        _create(path)
    try:
        db = _open(path)
    except sqlite3.Error as error:
        raise failure(error, path) from error
    try:
        _check(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        if is_damage(error):
            raise _set_aside(path, error) from error
        raise failure(error, path) from error
    except BaseException:
        db.close()
        raise
    return db


def connect_unwaiting(path: Path) -> sqlite3.Connection:
    """Another connection to a store that is open; what it cannot do at once is `StoreBusy`.

    Raises:
        sqlite3.Error: as any statement.
    """
    db = _open(path, timeout=0)
    try:
        _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def connect_beside(path: Path) -> sqlite3.Connection:
    """Another connection to a store that is open, which waits for writers as the first one does.

    Raises:
        sqlite3.Error: as any statement.
    """
    db = _open(path)
    try:
        _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def checkpoint(path: Path) -> None:
    """Copy the WAL into the file, so that it is written from its beginning again. It may be left out.

    The first pass keeps nobody waiting, and leaves what was committed meanwhile: a store that is never idle would
    have a WAL that grows for ever. The second has only that to copy, and makes writers wait for it.
    """
    try:
        db = _open(path)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            db.execute("PRAGMA wal_checkpoint(RESTART)")
        finally:
            db.close()
    except sqlite3.Error as error:
        _log.debug("no checkpoint: %s", error)


def is_damage(error: sqlite3.Error) -> bool:
    """Does SQLite say that the file itself is broken?"""
    return any(words in str(error) for words in _DAMAGED)


def failure(error: sqlite3.Error, path: Path) -> StoreError:
    """What to raise for an error of SQLite; nothing of the transaction was done."""
    text = str(error)
    if "locked" in text:
        return StoreBusy(f"the store {path}: {text}", remedy=f"see who has it open: fuser -v {path}")
    if "full" in text:
        remedy = f"make room in {path.parent}; nothing was lost, and nothing was begun"
    elif "unable to open" in text and not oserrors.has_descriptors():
        text += ": too many open files"
        remedy = "raise the limit on open files: ulimit -n"
    elif "locking protocol" in text or "disk I/O error" in text:
        remedy = f"{path.parent} must be on a file system that can lock files and whose storage is in order"
    elif "readonly" in text or "unable to open" in text:
        remedy = f"{path.parent} and all in it must be writable for this user"
    elif is_damage(error):
        remedy = "the next command moves the file aside and goes on with a new one"
    else:
        remedy = f"is the storage of {path.parent} in order?"
    return StoreError(f"the store {path}: {text}", remedy=remedy)


def _make_folder(folder: Path) -> None:
    try:
        paths.make_folder(folder)
        status = folder.stat()
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise SetupError(
            f"cannot use the state folder {folder}: {error.strerror}",
            remedy="set UTILITYVM_STATE_DIR to a folder that you may write to",
        ) from error
    if status.st_uid != os.geteuid():
        raise SetupError(
            f"the state folder {folder} belongs to another user (id {status.st_uid})",
            remedy="set UTILITYVM_STATE_DIR to a folder of your own",
        )


def patient(db: sqlite3.Connection) -> sqlite3.Connection:
    """The connection, whose next statement waits for other writers, but no longer than our caller does."""
    db.execute(f"PRAGMA busy_timeout = {patience.left_s(BUSY_S) * 1000:.0f}")
    return db


def _open(path: Path, *, timeout: float | None = None) -> sqlite3.Connection:
    timeout = patience.left_s(BUSY_S) if timeout is None else timeout
    quoted = str(path.absolute())
    for mark in "%?#":
        quoted = quoted.replace(mark, f"%{ord(mark):02x}")
    # mode=rw: a file that was moved away in between is not made anew here, empty.
    address = f"file:{quoted}?mode=rw"
    db = sqlite3.connect(
        address, uri=True, isolation_level=None, timeout=timeout, check_same_thread=False, factory=Connection
    )
    db.text_factory = _text
    return db


def _text(data: bytes) -> str:
    """A text of one row that a flipped bit made no UTF-8 is that row's fault, and keeps nobody from the others."""
    return data.decode(errors="replace")


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA wal_autocheckpoint = 0")


def _check(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise StoreError(
            f"{path} is a database of another program",
            remedy="move it away, or set UTILITYVM_STATE_DIR to another folder",
        )
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise StoreTooNew(
            f"{path} was written by a later utilityvm (version {version} of the store; this one knows {VERSION})",
            remedy="use that utilityvm, or set UTILITYVM_STATE_DIR to another folder",
        )
    _prepare(db)
    if version < VERSION:
        _migrate(db, MIGRATIONS)
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")


def _migrate(db: sqlite3.Connection, migrations: Sequence[str]) -> None:
    """Bring the store to the last version, one transaction for all of it; done by another process meanwhile is done."""
    db.create_function("mount_config", 9, older.mount_config, deterministic=True)
    with transaction(db):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for number in range(version, len(migrations)):
            for statement in statements(migrations[number]):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(migrations)}")
    _log.info("migrated the store from version %d to %d", version, len(migrations))


def statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: `executescript` would end the transaction that they are to be in."""
    *parts, last = script.split(";")
    text = ""
    for part in parts:
        text += f"{part};"
        if sqlite3.complete_statement(text):  # and not in the middle of a string or a comment
            yield text
            text = ""
    assert not (text + last).strip(), f"an unfinished statement: {text}{last}"


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that the block writes, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _create(path: Path) -> None:
    """Make an empty store at `path`, unless another process is first. It appears complete, or not at all."""
    import tempfile  # late, as it is needed once in the life of a store, and `uvm ls` is to be quick
    from importlib import resources

    schema = resources.files("utilityvm.store").joinpath("schema.sql").read_text()
    try:
        descriptor, name = tempfile.mkstemp(prefix=".new-", suffix=".db", dir=path.parent)  # for its owner alone: 0600
    except OSError as error:
        raise SetupError(
            f"cannot write to the state folder {path.parent}: {error.strerror}",
            remedy="set UTILITYVM_STATE_DIR to a folder that you may write to",
        ) from error
    os.close(descriptor)
    try:
        db = sqlite3.connect(name, isolation_level=None)
        try:
            db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            db.execute("PRAGMA journal_mode = WAL")
            with transaction(db):
                for statement in statements(schema):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
        finally:
            db.close()  # the last connection: the WAL is copied back and removed
        with suppress(FileExistsError):
            os.link(name, path)
    except sqlite3.Error as error:
        raise failure(error, path) from error
    finally:
        for leftover in (name, f"{name}-wal", f"{name}-shm"):
            Path(leftover).unlink(missing_ok=True)


def _set_aside(path: Path, error: sqlite3.Error) -> StoreDamaged:
    """Move a damaged store and what belongs to it out of the way, whole; nothing ever overwrites it."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(folder, path)
        kept = _free_name(path)
        if _is_damaged(path):  # and not yet replaced by another process that saw the same
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    Path(f"{path}{suffix}").rename(f"{kept}{suffix}")
    finally:
        os.close(folder)
    return StoreDamaged(
        f"the store {path} is damaged ({error}); it was kept as {kept.name}",
        kept=kept,
        remedy="run the command again: it goes on with a new store, and finds the VMs that run",
    )


def _lock(folder: int, path: Path) -> None:
    """Have the folder for ourselves. Its holder may stand still, so there is an end to waiting for it."""
    ends = time.monotonic() + patience.left_s(BUSY_S)
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= ends:
                raise StoreBusy(
                    f"the store {path} is damaged, and another process is moving it aside",
                    remedy=f"see which: fuser -v {path.parent}",
                ) from None
        time.sleep(WAITS_S[-1])


def _is_damaged(path: Path) -> bool:
    try:
        db = _open(path)
    except sqlite3.Error:
        return False
    try:
        return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.DatabaseError as error:
        return is_damage(error)
    finally:
        db.close()


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    names = (path.with_name(f"{path.name}.damaged-{stamp}.{number}") for number in range(1, 1000))
    return next(name for name in names if not name.exists())
