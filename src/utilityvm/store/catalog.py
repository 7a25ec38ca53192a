"""The VMs of this host, as the store has them."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from utilityvm.errors import VMExists, VMNotFound
from utilityvm.machine import paths
from utilityvm.machine.processes import is_running
from utilityvm.store import database
from utilityvm.store.formats import Formats


class VMState(StrEnum):
    """What a VM is, as its owner last wrote it down."""

    STARTING = "starting"  # its QEMU may run; nothing is attached
    RUNNING = "running"  # the guest answered
    WAITING = "waiting"  # a clone in a pool, paused
    SAVING = "saving"  # it is becoming a template: frozen and paused, or about to be
    STOPPING = "stopping"  # it is being ended, and everything of it removed
    DEAD = "dead"  # its QEMU ended by itself; its disks are free


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVM:
    """A VM as the store has it. `id` is never used for another one."""

    id: int
    name: str
    uuid: str
    state: VMState
    created: float
    config: Mapping[str, Any]
    process: Mapping[str, Any] | None

    @property
    def pid(self) -> int | None:
        return None if self.process is None else int(self.process["pid"])

    def is_alive(self) -> bool:
        """Does its QEMU run: that very process? Asks /proc alone."""
        return self.process is not None and is_running(int(self.process["pid"]), str(self.process["started"]))

    @property
    def seen_state(self) -> VMState:
        """The state, corrected by whether its QEMU runs."""
        return self.state if self.process is None or self.is_alive() else VMState.DEAD


class Store:
    """The open store. One for each thread that writes; `with` closes it."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        """Use `open`."""
        self.db = db
        self.path = path
        self._unwaiting: sqlite3.Connection | None = None
        self.formats = Formats(path)  # a connection of its own, for threads
        self._writes = 0
        self._checkpoint: threading.Thread | None = None

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """The store at `path`, made if it is missing; None: this user's. See `database.connect` for the errors."""
        where = path or paths.store_file()
        return cls(database.connect(where), where)

    def close(self) -> None:
        """Twice is once."""
        if self._checkpoint is not None:
            self._checkpoint.join()
        if self._unwaiting is not None:
            self._unwaiting.close()
        self.formats.close()
        self.db.close()

    def unwaiting(self) -> sqlite3.Connection:
        """A second connection, on which no statement waits for another writer; for those who may not block."""
        if self._unwaiting is None:
            self._unwaiting = database.connect_unwaiting(self.path)
        return self._unwaiting

    def count_write(self) -> None:
        """After each write of a journal: sees to it that the WAL does not grow for ever."""
        self._writes += 1
        if self._writes >= database.CHECKPOINT_WRITES and (self._checkpoint is None or not self._checkpoint.is_alive()):
            self._writes = 0
            self._checkpoint = threading.Thread(target=database.checkpoint, args=(self.path,), daemon=True)
            self._checkpoint.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def vms(self) -> list[StoredVM]:
        """Every VM, by name."""
        return [_vm(row) for row in self._ask("SELECT * FROM vms ORDER BY name")]

    def get(self, name: str) -> StoredVM:
        """Raises:
        VMNotFound: names those that there are.
        """
        vm = self.find(name)
        if vm is None:
            raise VMNotFound(f"there is no VM named {name!r}", vm=name, remedy=self._known())
        return vm

    def find(self, name: str) -> StoredVM | None:
        rows = self._ask("SELECT * FROM vms WHERE name = ?", name)
        return _vm(rows[0]) if rows else None

    def add(self, name: str, *, uuid: str, config: Mapping[str, Any]) -> StoredVM:
        """A new VM, in state `starting`.

        Raises:
            VMExists: the name is taken.
            StoreError: nothing was written.
        """
        created = time.time()
        try:
            cursor = self.db.execute(
                "INSERT INTO vms (name, uuid, state, created, config) VALUES (?, ?, ?, ?, ?)",
                (name, uuid, VMState.STARTING.value, created, json.dumps(config)),
            )
        except sqlite3.IntegrityError as error:
            raise VMExists(
                f"there is a VM named {name!r} already",
                vm=name,
                remedy=f"choose another name, or end that VM: uvm stop {name}",
            ) from error
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error
        assert cursor.lastrowid is not None
        return StoredVM(
            id=cursor.lastrowid,
            name=name,
            uuid=uuid,
            state=VMState.STARTING,
            created=created,
            config=config,
            process=None,
        )

    def restore(self, record: Mapping[str, Any]) -> bool:
        """Put back a VM that a lost store had, from the copy in its runtime folder. False: the name is there.

        Its disks and reservations are not in that copy: whoever opens the VM finds them on its bus.
        """
        values = (record["name"], record["uuid"], VMState.RUNNING.value, record["created"])
        documents = (json.dumps(record["config"]), json.dumps(record["process"]))
        return bool(
            self._do(
                "INSERT OR IGNORE INTO vms (name, uuid, state, created, config, process) VALUES (?, ?, ?, ?, ?, ?)",
                *values,
                *documents,
            )
        )

    def set_state(self, vm: StoredVM, state: VMState) -> None:
        self._do("UPDATE vms SET state = ? WHERE id = ?", state.value, vm.id)

    def set_process(self, vm: StoredVM, process: Mapping[str, Any]) -> None:
        """Write down which process the VM is, so that a later owner knows it again."""
        self._do("UPDATE vms SET process = ? WHERE id = ?", json.dumps(process), vm.id)

    def set_dead(self, vm: StoredVM) -> None:
        """Its QEMU ended: it is dead, and holds no disk any more."""
        try:
            with database.transaction(self.db):
                self.db.execute("UPDATE vms SET state = ? WHERE id = ?", (VMState.DEAD.value, vm.id))
                for table in ("disks", "mounts", "reservations"):
                    self.db.execute(f"DELETE FROM {table} WHERE vm = ?", (vm.id,))
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error

    def remove(self, vm: StoredVM) -> None:
        """Forget the VM and its journal. Forgotten before is done."""
        self._do("DELETE FROM vms WHERE id = ?", vm.id)

    def user_of(self, identity: str, *, other_than: StoredVM | None = None) -> str | None:
        """A VM that has this disk by its journal, alive or not: for messages, never for decisions."""
        rows = self._ask(
            "SELECT vms.name FROM disks JOIN vms ON vms.id = disks.vm WHERE identity = ? AND vms.id IS NOT ? LIMIT 1",
            identity,
            other_than.id if other_than else None,
        )
        return str(rows[0][0]) if rows else None

    def _known(self) -> str:
        names = [str(row[0]) for row in self._ask("SELECT name FROM vms ORDER BY name")]
        return f"there are {', '.join(names)}" if names else "start one: uvm start NAME"

    def _ask(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self.db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error

    def _do(self, sql: str, *values: object) -> int:
        try:
            return self.db.execute(sql, values).rowcount
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error


def _vm(row: tuple[Any, ...]) -> StoredVM:
    id_, name, uuid, state, created, config, process = row
    return StoredVM(
        id=id_,
        name=name,
        uuid=uuid,
        state=VMState(state),
        created=created,
        config=json.loads(config),
        process=None if process is None else json.loads(process),
    )
