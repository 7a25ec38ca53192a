"""The VMs of this host, as the store has them."""

from __future__ import annotations

import functools
import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from utilityvm.errors import StoreError, VMExists, VMNotFound
from utilityvm.machine import paths, patience
from utilityvm.machine.processes import Life, life_of
from utilityvm.store import database
from utilityvm.store.formats import Formats

if TYPE_CHECKING:
    from utilityvm.machine.threads import Lane

_COLUMNS: Final = "id, name, uuid, state, created, config, process, owner"


class VMState(StrEnum):
    """What a VM is, as its owner last wrote it down."""

    STARTING = "starting"  # its QEMU may run; nothing is attached
    RUNNING = "running"  # the guest answered
    WAITING = "waiting"  # a clone in a pool, paused
    SAVING = "saving"  # it is becoming a template: frozen and paused, or about to be
    STOPPING = "stopping"  # it is being ended, and everything of it removed
    DEAD = "dead"  # its QEMU ended by itself; its disks are free
    DAMAGED = "damaged"  # never written: the record cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVM:
    """A VM as the store has it. `id` is never used for another one.

    A row that cannot be read is a VM too, so that it can be named and cleared away, and the others used: `damage` says
    what is wrong with it, and what could not be read is empty.
    """

    id: int
    name: str
    uuid: str
    state: VMState
    created: float
    config: Mapping[str, Any]
    process: Mapping[str, Any] | None
    owner: Mapping[str, Any] | None = None  # as `Owner.to_json`; the process may have ended
    damage: str | None = None

    @property
    def pid(self) -> int | None:
        return None if self.process is None else int(self.process["pid"])

    @property
    def life(self) -> Life:
        """Does its QEMU run: that very process? Asks /proc alone."""
        if self.process is None:
            return Life.UNKNOWN if self.damage else Life.ENDED
        return life_of(int(self.process["pid"]), str(self.process["started"]))

    def is_alive(self) -> bool:
        """May its QEMU run? Also true if that cannot be told: nothing may be concluded then."""
        return self.life is not Life.ENDED

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

    @functools.cached_property
    def lane(self) -> Lane:
        """For event loops: `await store.lane.run(store.get, name)`. Commands that only look need none."""
        from utilityvm.machine.threads import Lane

        return Lane()

    def close(self) -> None:
        """Twice is once."""
        if self._checkpoint is not None:
            self._checkpoint.join(patience.left_s(database.BUSY_S))  # it can be left out, and has its own connection
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
        return [_vm(row) for row in self._ask(f"SELECT {_COLUMNS} FROM vms ORDER BY name")]

    def get(self, name: str) -> StoredVM:
        """Raises:
        VMNotFound: names those that there are.
        """
        vm = self.find(name)
        if vm is None:
            raise VMNotFound(f"there is no VM named {name!r}", vm=name, remedy=self._known())
        return vm

    def find(self, name: str) -> StoredVM | None:
        rows = self._ask(f"SELECT {_COLUMNS} FROM vms WHERE name = ?", name)
        return _vm(rows[0]) if rows else None

    def has_uuid(self, uuid: str) -> bool:
        """Is there a VM of that UUID?"""
        return bool(self._ask("SELECT 1 FROM vms WHERE uuid = ?", uuid))

    def add(
        self, name: str, *, uuid: str, config: Mapping[str, Any], owner: Mapping[str, Any] | None = None
    ) -> StoredVM:
        """A new VM, in state `starting`.

        Raises:
            VMExists: the name is taken.
            StoreError: nothing was written.
        """
        created = time.time()
        try:
            cursor = database.patient(self.db).execute(
                "INSERT INTO vms (name, uuid, state, created, config, owner) VALUES (?, ?, ?, ?, ?, ?)",
                (name, uuid, VMState.STARTING.value, created, json.dumps(config), owner and json.dumps(owner)),
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
            owner=owner,
        )

    def restore(self, record: Mapping[str, Any]) -> bool:
        """Put back a VM that a lost store had, from the copy in its runtime folder. False: the name is there.

        It may have had a key: that was in the store alone.

        Its disks and reservations are not in that copy: whoever opens the VM finds them on its bus.
        """
        values = (record["name"], record["uuid"], VMState.RUNNING.value, record["created"])
        documents = (json.dumps(record["config"]), json.dumps(record["process"]))
        return bool(
            self._do(
                "INSERT OR IGNORE INTO vms (name, uuid, state, created, config, process, had_key) "
                "VALUES (?, ?, ?, ?, ?, ?, 1)",
                *values,
                *documents,
            )
        )

    def set_state(self, vm: StoredVM, state: VMState) -> None:
        self._do("UPDATE vms SET state = ? WHERE id = ?", state.value, vm.id)

    def set_process(self, vm: StoredVM, process: Mapping[str, Any]) -> None:
        """Write down which process the VM is, so that a later owner knows it again.

        Raises:
            StoreError: it was not written, or the VM is not in the store any more: another process ended it.
        """
        if not self._do("UPDATE vms SET process = ? WHERE id = ?", json.dumps(process), vm.id):
            raise StoreError(f"VM {vm.name} was ended by another process while it started", vm=vm.name)

    def set_owner(self, vm: StoredVM, owner: Mapping[str, Any] | None) -> None:
        """Write down which process owns the VM. See `ownership` for what that is good for."""
        self._do("UPDATE vms SET owner = ? WHERE id = ?", None if owner is None else json.dumps(owner), vm.id)

    def drop_owner(self, vm: StoredVM, owner: Mapping[str, Any]) -> None:
        """Forget the owner, if it is still that one."""
        self._do("UPDATE vms SET owner = NULL WHERE id = ? AND owner = ?", vm.id, json.dumps(owner))

    def heal(self, vm: StoredVM, record: Mapping[str, Any]) -> None:
        """Replace a damaged record by the copy in the VM's runtime folder."""
        self._do(
            "UPDATE vms SET uuid = ?, state = ?, created = ?, config = ?, process = ?, had_key = 1 WHERE id = ?",
            record["uuid"],
            VMState.RUNNING.value,
            record["created"],
            json.dumps(record["config"]),
            json.dumps(record["process"]),
            vm.id,
        )

    def set_dead(self, vm: StoredVM) -> None:
        """Its QEMU ended: it is dead, and holds no disk any more."""
        try:
            with database.transaction(database.patient(self.db)):
                self.db.execute("UPDATE vms SET state = ? WHERE id = ?", (VMState.DEAD.value, vm.id))
                for table in ("disks", "mounts", "reservations"):
                    self.db.execute(f"DELETE FROM {table} WHERE vm = ?", (vm.id,))
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error

    def remove(self, vm: StoredVM) -> None:
        """Forget the VM and its journal. Calling it again is no error."""
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
        return f"the VMs: {', '.join(names)}" if names else "start one: uvm start NAME"

    def _ask(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return database.patient(self.db).execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error

    def _do(self, sql: str, *values: object) -> int:
        try:
            return database.patient(self.db).execute(sql, values).rowcount
        except sqlite3.Error as error:
            raise database.failure(error, self.path) from error


def _vm(row: tuple[Any, ...]) -> StoredVM:
    id_, name, uuid, state, created, config, process, owner = row
    wrong: list[str] = []
    if not (is_plain(name) and is_plain(uuid)):
        wrong.append(f"name {name!r} or UUID {uuid!r}")
    if state not in set(VMState) - {VMState.DAMAGED}:
        wrong.append(f"state {state!r}")
    read_config = _document(config)
    if read_config is None:
        wrong.append("config")
    read_process = _document(process)
    if process is not None and not (
        read_process and type(read_process.get("pid")) is int and type(read_process.get("started")) is str
    ):
        read_process = None
        wrong.append("process")
    return StoredVM(
        id=id_,
        name=name,
        uuid=uuid,
        state=VMState.DAMAGED if wrong else VMState(state),
        created=created,
        config=read_config or {},
        process=read_process,
        owner=_document(owner),
        damage=f"it cannot be read: {', '.join(wrong)}" if wrong else None,
    )


def is_plain(name: str) -> bool:
    """Does it name one file in a folder, and nothing above or below it?"""
    return bool(name) and name not in (".", "..") and not {"/", "\0"} & set(name)


def _document(text: str | None) -> dict[str, Any] | None:
    try:
        document = None if text is None else json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
