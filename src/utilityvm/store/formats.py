"""What the images of this host are, remembered beyond their attachments: see `hosts.qemu.format`.

A row for each image that was ever opened, and no more than `KEPT` of them: those that were not opened for the longest
time go first. A file whose time of birth is known is known by that and its inode, whatever number its device has after
a reboot; else by its inode and what else tells it apart (`FileId.mark`), in place of the time as a negative number; a
file without either by its device and inode, of which the next file there may take over the row.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import Final

from utilityvm.machine.fileid import FileId
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import database

KEPT: Final = 20_000
_SPARE: Final = KEPT // 20  # that many are removed at once
_REFRESH_S: Final = 86_400.0  # how old the time of the last opening may be


class Formats:
    """The images that the store knows. For any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Twice is once; asking again opens it again."""
        with self._lock:
            db, self._db = self._db, None
            if db is not None:
                db.close()

    def recall(self, file: FileId) -> tuple[DiskFormat, int] | None:
        """The format of the file and its size when it was opened last; None: never, or too long ago.

        Raises:
            StoreError: the store cannot be read.
        """
        with self._lock:
            try:
                row = self._open().execute(
                    "SELECT format, size_bytes, seen FROM images WHERE inode = ? AND birth_ns = ? AND device = ?",
                    _key(file),
                ).fetchone()  # fmt: skip
                if row is None:
                    return None
                if not 0 <= time.time() - row[2] < _REFRESH_S:
                    self._put(file, row[0], row[1])
            except sqlite3.Error as error:
                raise database.failure(error, self._path) from error
        try:
            return DiskFormat(row[0]), int(row[1])
        except ValueError:
            return None  # of a later version

    def remember(self, file: FileId, format: DiskFormat, *, size_bytes: int) -> None:
        """Raises:
        StoreError: nothing was written.
        """
        with self._lock:
            try:
                self._put(file, format.value, size_bytes)
            except sqlite3.Error as error:
                raise database.failure(error, self._path) from error

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = database.connect_beside(self._path)
        return database.patient(self._db)

    def _put(self, file: FileId, format: str, size_bytes: int) -> None:
        db = self._open()
        with database.transaction(db):
            row = (*_key(file), format, size_bytes, time.time())
            db.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?)", row)
            (count,) = db.execute("SELECT count(*) FROM images").fetchone()
            if count > KEPT:
                oldest = "SELECT inode, birth_ns, device FROM images ORDER BY seen LIMIT ?"
                db.execute(
                    f"DELETE FROM images WHERE (inode, birth_ns, device) IN ({oldest})", (count - KEPT + _SPARE,)
                )


def _key(file: FileId) -> tuple[int, int, int]:
    # SQLite's integers are signed.
    inode = file.inode - (1 << 64) if file.inode >= 1 << 63 else file.inode
    if file.birth_ns is not None:
        return inode, file.birth_ns, 0
    if file.mark is not None:
        return inode, -int.from_bytes(hashlib.sha256(file.mark.encode()).digest()[:7]) - 1, 0
    return inode, 0, file.device
