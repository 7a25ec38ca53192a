"""The manager's state as a document: written by the VM's owner here, taken up by its owner there (see `migration`).

For a VM that moves to another host, or to another manager, with its disks where they are. Only what is settled travels:
disks that are attached, mounts that are mounted, reservations that are held. The document is believed when all of it is
valid, and not before.

Not in it: callers' keys, which are never written anywhere, and `reformat`, which was done when the disk was mounted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, Self

import msgspec

from utilityvm.errors import InvalidRequest, NotAttached, RequestError, WrongState
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.mount import Mount, check_beside, checked_config, checked_guest_path
from utilityvm.scsi.mount_config import MountConfig, decode_hook, encode_hook
from utilityvm.scsi.older import FlatMount
from utilityvm.scsi.ports import (
    AttachmentType,
    DiskFormat,
    DiskRecord,
    DiskRequest,
    Holder,
    MountRecord,
    Record,
    ReservationRecord,
    VMAccess,
)
from utilityvm.scsi.reservation import Claim
from utilityvm.scsi.slot import MAX_CONTROLLERS, FreeSlots, Slot
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState

_encoder: Final = msgspec.json.Encoder(enc_hook=encode_hook)
FORMAT: Final = "utilityvm scsi state"
VERSION: Final = 3  # 1 had no sector sizes; 2 had a mount's settings beside its name (see `older`)
MAX_BYTES: Final = 16 << 20  # 256 disks with some hundred reservations each

_NAME: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")  # of an attachment, a mount, a reservation; devices are named so

Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Time = Annotated[float, msgspec.Meta(ge=0)]


class SavedMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mount, and how it was asked for."""

    mount: str
    guest_path: str
    config: MountConfig
    since: Time

    @classmethod
    def of(cls, mount: Mount) -> Self:
        return cls(mount=mount.id, guest_path=str(mount.guest_path), config=mount.config, since=mount.since)


class SavedReservation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reservation that its holder can still give back after the move, by the same name."""

    reservation: str
    mount: str | None = None  # None: attached only
    holder: str
    pid: int | None = None
    started: str | None = None
    since: Time

    @classmethod
    def of(cls, claim: Claim) -> Self:
        return cls(
            reservation=claim.id,
            mount=claim.mount.id if claim.mount else None,
            holder=claim.holder.name,
            pid=claim.holder.pid,
            started=claim.holder.started,
            since=claim.since,
        )


class _Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk at its slot, and who holds it, without its mounts."""

    attachment: str
    slot: str
    host_path: str
    kind: AttachmentType
    format: DiskFormat
    access: VMAccess
    read_only: bool
    size_bytes: Size
    sector_size_bytes: int | None = None
    since: Time
    reservations: tuple[SavedReservation, ...]


class SavedDisk(_Disk, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk at its slot, its mounts, and who holds them. References are not counted: they are the reservations."""

    mounts: tuple[SavedMount, ...] = ()

    @classmethod
    def of(cls, disk: Disk) -> Self:
        return cls(
            attachment=disk.id,
            slot=str(disk.slot),
            host_path=disk.request.host_path,
            kind=disk.request.kind,
            format=DiskFormat(disk.format),
            access=disk.request.access,
            read_only=disk.request.read_only,
            size_bytes=disk.size_bytes,
            sector_size_bytes=disk.request.sector_size_bytes,
            since=disk.since,
            mounts=tuple(map(SavedMount.of, disk.mounts.values())),
            reservations=tuple(map(SavedReservation.of, disk.claims.values())),
        )

    def where(self) -> Slot:
        return Slot.parse(self.slot)

    def records(self, identity: str, *, holder: Holder) -> list[Record]:
        """What the journal of the VM's owner had of it. What processes held is `holder`'s: they were another host's."""
        disk = DiskRecord(
            attachment=self.attachment,
            slot=self.where(),
            host_path=self.host_path,
            identity=identity,
            kind=self.kind,
            format=self.format,
            access=self.access,
            read_only=self.read_only,
            size_bytes=self.size_bytes,
            state=DiskState.ATTACHED,
            since=self.since,
            sector_size_bytes=self.sector_size_bytes,
        )
        mounts = (
            MountRecord(
                mount=mount.mount,
                attachment=self.attachment,
                guest_path=PurePosixPath(mount.guest_path),
                config=mount.config,
                state=MountState.MOUNTED,
                since=mount.since,
            )
            for mount in self.mounts
        )
        reservations = (
            ReservationRecord(
                reservation=one.reservation,
                attachment=self.attachment,
                mount=one.mount,
                holder=Holder(name=one.holder) if one.pid is None else holder,
                state=ReservationState.HELD,
                since=one.since,
            )
            for one in self.reservations
        )
        return [disk, *mounts, *reservations]

    def request(self) -> DiskRequest:
        return DiskRequest(
            host_path=self.host_path,
            read_only=self.read_only,
            kind=self.kind,
            format=self.format,
            access=self.access,
            sector_size_bytes=self.sector_size_bytes,
        )


class ScsiState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a manager has: every disk with its mounts and reservations. Each value of this type is valid as a whole."""

    format: Literal["utilityvm scsi state"] = FORMAT
    version: int = VERSION
    controllers: int
    disks: tuple[SavedDisk, ...]

    def __post_init__(self) -> None:
        try:
            self._check()
        except RequestError as error:
            raise InvalidRequest(f"this is no state of a manager: {error}", remedy="export it again") from error

    @classmethod
    def of(cls, disks: Iterable[Disk], *, controllers: int) -> Self:
        """The state of these disks.

        Raises:
            WrongState: a disk or a mount is half-way; names it.
        """
        settled = list(disks)
        for disk in settled:
            _check_settled(disk)
        return cls(controllers=controllers, disks=tuple(map(SavedDisk.of, settled)))

    def to_json(self) -> bytes:
        """The document. The same state is the same bytes.

        Raises:
            InvalidRequest: a path is not valid Unicode.
        """
        try:
            return _encoder.encode(self)
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{error.object!r} is not valid Unicode", remedy="rename it") from error

    @classmethod
    def from_json(cls, document: bytes | str) -> Self:
        """Read a document that `to_json` wrote.

        Raises:
            InvalidRequest: it is another document, of a later version, cut short, or contradicts itself; says where.
        """
        data = document.encode(errors="surrogatepass") if isinstance(document, str) else document
        try:
            if len(data) > MAX_BYTES:
                raise ValueError(f"{len(data)} bytes; {MAX_BYTES} is the most")
            version = msgspec.json.decode(data, type=_Versioned).version
            if not 1 <= version <= VERSION:
                raise ValueError(f"it is of version {version}, and this utilityvm knows 1 to {VERSION}")
            if version < 3:
                older = msgspec.json.decode(data, type=_OlderState)
                return cls(controllers=older.controllers, disks=tuple(disk.now() for disk in older.disks))
            return msgspec.json.decode(data, type=cls, dec_hook=decode_hook)
        except (ValueError, RecursionError) as error:  # msgspec.DecodeError among them
            raise InvalidRequest(f"this is no state of a manager: {error}", remedy="export it again") from error

    def relocated(self, host_paths: Mapping[str, str]) -> Self:
        """The same with other host paths: where the files are on the host that the VM moves to. Old path to new.

        Raises:
            NotAttached: a path that no disk has.
            InvalidRequest: two disks would have one path.
        """
        known = {disk.host_path for disk in self.disks}
        for path in host_paths:
            if path not in known:
                raise NotAttached(f"{path} is no disk of this state", host_path=path)
        moved = (
            msgspec.structs.replace(disk, host_path=host_paths.get(disk.host_path, disk.host_path))
            for disk in self.disks
        )
        return msgspec.structs.replace(self, disks=tuple(moved))

    def _check(self) -> None:
        if not 0 <= self.controllers <= MAX_CONTROLLERS:
            raise InvalidRequest(f"{self.controllers} SCSI controllers")
        free = FreeSlots(self.controllers)
        for disk in self.disks:
            free.take(disk.where())
            _check_disk(disk)
        mounts = [mount for disk in self.disks for mount in disk.mounts]
        reservations = [one.reservation for disk in self.disks for one in disk.reservations]
        for what, names in (
            ("host path", [disk.host_path for disk in self.disks]),
            ("attachment", [disk.attachment for disk in self.disks]),
            ("guest path", [mount.guest_path for mount in mounts]),
            ("mount", [mount.mount for mount in mounts]),
            ("reservation", reservations),
        ):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise InvalidRequest(f"{what} {twice[0]} is there more than once")


class _OlderDisk(_Disk, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of version 1 or 2."""

    mounts: tuple[FlatMount, ...] = ()

    def now(self) -> SavedDisk:
        mounts = tuple(
            SavedMount(mount=one.mount, guest_path=one.guest_path, config=one.config(), since=one.since)
            for one in self.mounts
        )
        return SavedDisk(**{name: getattr(self, name) for name in _Disk.__struct_fields__}, mounts=mounts)


class _OlderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["utilityvm scsi state"]
    version: Literal[1, 2]
    controllers: int
    disks: tuple[_OlderDisk, ...]


class _Versioned(msgspec.Struct):
    format: Literal["utilityvm scsi state"]
    version: int


def _check_disk(disk: SavedDisk) -> None:
    where = f"the disk at {disk.slot}"
    _check_name(disk.attachment, where)
    disk.request()  # refuses what no disk can have
    if not disk.host_path or "\0" in disk.host_path:
        raise InvalidRequest(f"{where}: host path {disk.host_path!r}")
    if not disk.reservations:
        raise InvalidRequest(f"{where}: nobody holds it")
    for number, mount in enumerate(disk.mounts):
        _check_name(mount.mount, where)
        if str(checked_guest_path(PurePosixPath(mount.guest_path))) != mount.guest_path:
            raise InvalidRequest(f"{where}: guest path {mount.guest_path} has another spelling")
        if checked_config(mount.config, disk_read_only=disk.read_only) != mount.config:
            raise InvalidRequest(f"{where} is read-only, its mount at {mount.guest_path} is not")
        if mount.config.reformat:
            raise InvalidRequest(
                f"{where}: its mount at {mount.guest_path} has reformat, which was done when it was mounted"
            )
        for other in disk.mounts[:number]:
            check_beside(other.config, mount.config, where=where)
    mounts = {mount.mount for mount in disk.mounts}
    for one in disk.reservations:
        _check_name(one.reservation, where)
        if one.mount is not None and one.mount not in mounts:
            raise InvalidRequest(f"{where}: reservation {one.reservation} is of a mount that it does not have")
        if not one.holder or not one.holder.isprintable() or (one.pid is None) != (one.started is None):
            raise InvalidRequest(f"{where}: reservation {one.reservation} is of nobody")
    if idle := mounts - {one.mount for one in disk.reservations}:
        raise InvalidRequest(f"{where}: nobody holds its mount {min(idle)}")


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where}: {name!r} cannot be a name")


def _check_settled(disk: Disk) -> None:
    state: str = disk.state
    ready = disk.state is DiskState.ATTACHED and disk.is_wanted and not disk.leaving
    for mount in disk.mounts.values():
        if mount.state is not MountState.MOUNTED or not mount.is_wanted:
            state, ready = f"{mount.state} at {mount.guest_path}", False
    if not ready or any(claim.state is not ReservationState.HELD for claim in disk.claims.values()):
        raise WrongState(
            f"{disk.request.host_path} at {disk.slot} is half-way: {state}",
            slot=disk.slot,
            host_path=disk.request.host_path,
            remedy="repair it, or release it again, and export then",
        )
