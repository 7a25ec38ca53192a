"""A connection to SQLite that may be closed while another thread uses it: what is under way is finished first.

SQLite itself frees the statements of a connection that is closed, also one that a thread executes at that moment, and
the process dies of it (SIGSEGV), with the VMs that it owns. A thread outlives the call that it works for, see
`machine.threads`; so whoever is cancelled, and closes, could meet its own work. Afterwards every statement is a
`sqlite3.ProgrammingError`.

Source: sqlite.org, sqlite3_close: "undefined and probably harmful"; python, Modules/_sqlite/connection.c.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import Any


class Connection(sqlite3.Connection):
    """For `sqlite3.connect(factory=...)`. One statement at a time, as SQLite has it anyway."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.lock = threading.RLock()
        super().__init__(*arguments, **named)

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(_Cursor if factory is None else factory)

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        with self.lock:
            cursor = super().cursor(_Cursor)
            try:
                return cursor.execute(sql, parameters)
            except BaseException:
                cursor.close()  # the error's traceback has it, and it would keep the file open behind our close
                raise

    def close(self) -> None:
        with self.lock:
            super().close()


class _Cursor(sqlite3.Cursor):
    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        assert isinstance(connection, Connection)
        self._lock = connection.lock

    def execute(self, sql: str, parameters: Any = (), /) -> _Cursor:
        with self._lock:
            super().execute(sql, parameters)
        return self

    def fetchone(self) -> Any:
        with self._lock:
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with self._lock:
            return super().fetchall()

    def __next__(self) -> Any:
        with self._lock:
            return super().__next__()
