"""A VM's journal: what its manager is about to do, and what came of it, as lines of the store."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from utilityvm.errors import InvalidRequest, StoreError
from utilityvm.scsi import mount_config
from utilityvm.scsi.ports import (
    AttachmentType,
    CallerKey,
    DiskFormat,
    DiskRecord,
    Holder,
    MountRecord,
    Record,
    ReservationRecord,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.store import database
from utilityvm.store.catalog import Store, StoredVM


class DiskRow(msgspec.Struct, array_like=True, frozen=True):
    """A row of `disks`, column by column. Enum members are kept by value, and flags as numbers."""

    vm: int
    attachment: str
    controller: int
    lun: int
    host_path: str
    identity: str
    kind: AttachmentType
    format: DiskFormat
    access: VMAccess
    read_only: int
    size_bytes: int
    state: DiskState
    since: float
    sector_size_bytes: int | None


class MountRow(msgspec.Struct, array_like=True, frozen=True):
    """A row of `mounts`."""

    vm: int
    mount: str
    attachment: str
    guest_path: str
    config: str  # see `mount_config.to_json`
    state: MountState
    since: float
    notes: str  # a list of texts, as JSON


class ReservationRow(msgspec.Struct, array_like=True, frozen=True):
    """A row of `reservations`. `holder` is the name."""

    vm: int
    reservation: str
    attachment: str
    mount: str | None
    holder: str
    pid: int | None
    started: str | None
    state: ReservationState
    since: float


def _put_into(table: str, row: type[msgspec.Struct]) -> str:
    columns = row.__struct_fields__
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' for _ in columns)})"


def _read_from(table: str, row: type[msgspec.Struct]) -> str:
    return f"SELECT {', '.join(row.__struct_fields__)} FROM {table} WHERE vm = ? ORDER BY since, 2"


_PUT_DISK: Final = _put_into("disks", DiskRow)
_PUT_MOUNT: Final = _put_into("mounts", MountRow)
_PUT_RESERVATION: Final = _put_into("reservations", ReservationRow)
_READ_DISKS: Final = _read_from("disks", DiskRow)
_READ_MOUNTS: Final = _read_from("mounts", MountRow)
_READ_RESERVATIONS: Final = _read_from("reservations", ReservationRow)
_DROP_DISK: Final = "DELETE FROM disks WHERE vm = ? AND attachment = ?"
_DROP_MOUNT: Final = "DELETE FROM mounts WHERE vm = ? AND mount = ?"
_DROP_RESERVATION: Final = "DELETE FROM reservations WHERE vm = ? AND reservation = ?"


_MARK_KEY: Final = "UPDATE vms SET had_key = 1 WHERE id = ?"


class SqliteJournal:
    """The journal of one VM, for the one process that owns it."""

    def __init__(self, store: Store, vm: StoredVM) -> None:
        self._store = store
        self._vm = vm
        self._cursor: sqlite3.Cursor | None = None  # one for all that gives no rows

    async def write(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        """Store `put` and forget `drop`, in one transaction; see `scsi.ports.Journal`.

        The first attempt is made at once, without giving the event loop a turn. While another process writes, the
        loop goes on, and it is tried again.

        Raises:
            StoreError: nothing was written: no space, no right, the VM was removed, or the file was busy for 2 s.
        """
        waits = iter(database.WAITS_S)
        ends: float | None = None
        while True:
            try:
                self._write(put, drop)
                break
            except database.StoreBusy:
                now = time.monotonic()
                ends = now + database.BUSY_S if ends is None else ends
                if now >= ends:
                    raise
                import asyncio  # late, as those who only read have no use for it

                await asyncio.sleep(next(waits, database.WAITS_S[-1]))
        self._store.count_write()

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        if self._cursor is None:
            self._cursor = self._store.unwaiting().cursor()
        self._cursor.execute(sql, values)

    def _write(self, put: Sequence[Record], drop: Sequence[Record]) -> None:
        """Try it, without any waiting."""
        execute = self._execute
        try:
            has_key = any(map(_has_key, put))
            if (
                len(put) + len(drop) == 1 and not has_key
            ):  # a statement alone is its own transaction, without two more to say so
                for record in put:
                    execute(*_put(self._vm.id, record))
                for record in drop:
                    execute(*_drop(self._vm.id, record))
                return
            execute("BEGIN IMMEDIATE")
            try:
                if has_key:
                    execute(_MARK_KEY, (self._vm.id,))
                # Dropped first: what is put may have taken the place of what is dropped.
                for record in drop:
                    execute(*_drop(self._vm.id, record))
                for record in put:
                    execute(*_put(self._vm.id, record))
                execute("COMMIT")
            except BaseException:
                if self._cursor is not None and self._cursor.connection.in_transaction:
                    execute("ROLLBACK")
                raise
        except sqlite3.IntegrityError as error:
            raise StoreError(
                f"the journal of VM {self._vm.name} is closed: the VM was removed from the store ({error})",
                vm=self._vm.name,
                remedy="another process stopped it; start it again",
            ) from error
        except sqlite3.Error as error:
            raise database.failure(error, self._store.path) from error
        except UnicodeEncodeError as error:
            raise StoreError(f"a path is not UTF-8 text: {error}", vm=self._vm.name, remedy="rename it") from error

    def had_key(self) -> bool:
        """Was a caller's key ever sent to the guest, or may it have been? Also if its mount was released since.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            db = database.patient(self._store.db)
            rows = db.execute("SELECT had_key FROM vms WHERE id = ?", (self._vm.id,)).fetchall()
        except sqlite3.Error as error:
            raise database.failure(error, self._store.path) from error
        return rows != [(0,)]

    def read(self) -> Sequence[Record]:
        """Every record of this VM: disks, then mounts, then reservations, each in the order of their making.

        Raises:
            StoreError: the store cannot be read, or holds what no version of us wrote.
        """
        try:
            db = database.patient(self._store.db)
            disks, mounts, reservations = (
                db.execute(reading, (self._vm.id,)).fetchall()
                for reading in (_READ_DISKS, _READ_MOUNTS, _READ_RESERVATIONS)
            )
        except sqlite3.Error as error:
            raise database.failure(error, self._store.path) from error
        return records(disks, mounts, reservations, vm=self._vm.name)


def records(
    disks: Sequence[tuple[Any, ...]],
    mounts: Sequence[tuple[Any, ...]],
    reservations: Sequence[tuple[Any, ...]],
    *,
    vm: str,
) -> list[Record]:
    """The rows of a VM as what they record.

    Raises:
        StoreError: one holds what no version of us wrote.
    """
    try:
        return [*map(_disk, disks), *map(_mount, mounts), *map(_reservation, reservations)]
    except (ValueError, InvalidRequest, RecursionError) as error:
        raise StoreError(
            f"the journal of VM {vm} holds what no utilityvm wrote: {error}",
            vm=vm,
            remedy=f"stop the VM, which needs no journal: uvm stop {vm}",
        ) from error


def _has_key(record: Record) -> bool:
    return isinstance(record, MountRecord) and isinstance(record.config.encryption, CallerKey)


def _put(vm: int, record: Record) -> tuple[str, tuple[Any, ...]]:
    # Enum members are passed by value and flags as numbers: sqlite3 takes exact types several times faster.
    if isinstance(record, DiskRecord):
        controller, lun = record.slot
        return _PUT_DISK, (
            vm,
            record.attachment,
            controller,
            lun,
            record.host_path,
            record.identity,
            record.kind.value,
            record.format.value,
            record.access.value,
            int(record.read_only),
            record.size_bytes,
            str(record.state),
            record.since,
            record.sector_size_bytes,
        )
    if isinstance(record, MountRecord):
        return _PUT_MOUNT, (
            vm,
            record.mount,
            record.attachment,
            str(record.guest_path),
            mount_config.to_json(record.config),
            str(record.state),
            record.since,
            msgspec.json.encode(record.notes).decode(),
        )
    holder = record.holder
    return _PUT_RESERVATION, (
        vm,
        record.reservation,
        record.attachment,
        record.mount,
        holder.name,
        holder.pid,
        holder.started,
        str(record.state),
        record.since,
    )


def _drop(vm: int, record: Record) -> tuple[str, tuple[int, str]]:
    if isinstance(record, DiskRecord):
        return _DROP_DISK, (vm, record.attachment)
    if isinstance(record, MountRecord):
        return _DROP_MOUNT, (vm, record.mount)
    return _DROP_RESERVATION, (vm, record.reservation)


def _disk(values: tuple[Any, ...]) -> DiskRecord:
    row = msgspec.convert(values, DiskRow)
    return DiskRecord(
        attachment=row.attachment,
        slot=Slot.checked(row.controller, row.lun),
        host_path=row.host_path,
        identity=row.identity,
        kind=row.kind,
        format=row.format,
        access=row.access,
        read_only=bool(row.read_only),
        size_bytes=row.size_bytes,
        state=row.state.value,
        since=row.since,
        sector_size_bytes=row.sector_size_bytes,
    )


def _mount(values: tuple[Any, ...]) -> MountRecord:
    row = msgspec.convert(values, MountRow)
    return MountRecord(
        mount=row.mount,
        attachment=row.attachment,
        guest_path=PurePosixPath(row.guest_path),
        config=mount_config.from_json(row.config),
        state=row.state.value,
        since=row.since,
        notes=msgspec.json.decode(row.notes, type=tuple[str, ...]),
    )


def _reservation(values: tuple[Any, ...]) -> ReservationRecord:
    row = msgspec.convert(values, ReservationRow)
    return ReservationRecord(
        reservation=row.reservation,
        attachment=row.attachment,
        mount=row.mount,
        holder=Holder(name=row.holder, pid=row.pid, started=row.started),
        state=row.state.value,
        since=row.since,
    )
