"""The payload in which hcsshim's controller hands its SCSI state to the host that a VM moves to.

`encode` and `decode` are its Save and Import, to the byte; `to_state` and `from_state` go between it and the document
of our own manager (`scsi.document`), which has all that this one has not: whether a disk is attached at all, which
file it is, reservations without a mount, several mounts of a partition.

Decoding gives a whole value or raises, where hcsshim's Import takes what makes it fail later: a reservation of an empty
slot, a count of references that is not the number of reservations, two disks of one path, more than 4 controllers.

Source: hcsshim internal/controller/device/scsi/save.go and save/payload.proto, as recorded in tests/vectors.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from utilityvm.errors import InvalidRequest, NotSupported, ProtocolError
from utilityvm.hosts.hcs.disk import Disks, attachment_for
from utilityvm.hosts.hcs.documents import Attachment, Scsi, scsi_section
from utilityvm.hosts.hcs.protowire import Fields, Kind, message, number, text
from utilityvm.scsi import document
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.mount import checked_guest_path
from utilityvm.scsi.mount_config import CallerKey, MountConfig, ScratchKey
from utilityvm.scsi.ports import AttachmentType, DiskRequest, VMAccess
from utilityvm.scsi.slot import LUNS_PER_CONTROLLER, MAX_CONTROLLERS, Slot

__all__ = [
    "SCHEMA_VERSION",
    "TYPE_URL",
    "SavedDisk",
    "SavedMount",
    "SavedReservation",
    "SavedState",
    "decode",
    "encode",
    "from_state",
    "guid_of",
    "section_of",
    "to_state",
]

TYPE_URL: Final = "type.microsoft.com/hcsshim.controller.scsi.save.v1.Payload"
SCHEMA_VERSION: Final = 1

_GUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_OURS: Final = uuid.uuid5(uuid.NAMESPACE_URL, "utilityvm:reservation")  # of the GUIDs that our reservations get


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMount:
    """A partition in the guest. `guest_path` is empty if it was reserved and never mounted."""

    guest_path: str = ""
    references: int = 0
    read_only: bool = False
    encrypted: bool = False
    options: tuple[str, ...] = ()
    ensure_filesystem: bool = False
    filesystem: str = ""
    block_dev: bool = False
    is_blank: bool = False  # a Windows guest's: hcsshim saves nothing of it, not even its references


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDisk:
    """A disk; whether it is attached is not saved."""

    host_path: str
    read_only: bool = False
    type: str = AttachmentType.VIRTUAL_DISK.value
    evd_type: str = ""
    mounts: Mapping[int, SavedMount] = field(default_factory=dict)  # by partition


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReservation:
    """A holder's claim on a partition of a disk."""

    slot: Slot
    partition: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A controller's state, as hcsshim saves it."""

    controllers: int
    disks: Mapping[Slot, SavedDisk] = field(default_factory=dict)
    reservations: Mapping[str, SavedReservation] = field(default_factory=dict)  # by a GUID

    def relocated(self, host_paths: Mapping[str, str]) -> SavedState:
        """The same with other host paths (hcsshim's UpdateDiskHostPath); old path to new.

        Raises:
            InvalidRequest: a path that no disk has, or two disks would have one.
        """
        if unknown := host_paths.keys() - {disk.host_path for disk in self.disks.values()}:
            raise InvalidRequest(f"{min(unknown)} is no disk of this state", host_path=min(unknown))
        disks = {
            slot: SavedDisk(
                host_path=host_paths.get(disk.host_path, disk.host_path),
                read_only=disk.read_only,
                type=disk.type,
                evd_type=disk.evd_type,
                mounts=disk.mounts,
            )
            for slot, disk in self.disks.items()
        }
        moved = SavedState(controllers=self.controllers, disks=disks, reservations=self.reservations)
        _refuse(_problem(moved))
        return moved


def section_of(state: SavedState | ScsiState) -> dict[str, Scsi]:
    """The `Scsi` part of the compute-system document of a VM that has these disks: hcsshim's HCSAttachments."""
    if isinstance(state, ScsiState):
        return scsi_section({disk.where(): attachment_for(disk.request()) for disk in state.disks})
    return scsi_section(
        {
            slot: Attachment(
                type=disk.type,
                path=disk.host_path,
                read_only=disk.read_only,
                extensible_virtual_disk_type=disk.evd_type,
            )
            for slot, disk in state.disks.items()
        }
    )


# The payload.


def encode(state: SavedState) -> bytes:
    """The payload that hcsshim's Save makes. Go writes a map in any order; here it is the mapping's own.

    Raises:
        InvalidRequest: it contradicts itself, or a text is not valid Unicode.
    """
    _refuse(_problem(state))
    pieces = [number(1, SCHEMA_VERSION), number(2, state.controllers)]
    for slot, disk in state.disks.items():
        pieces.append(message(3, number(1, slot.number, always=True) + message(2, _disk(disk))))
    for id, one in state.reservations.items():
        value = number(1, one.slot.number) + number(2, one.partition)
        pieces.append(message(4, text(1, id, always=True) + message(2, value)))
    return b"".join(pieces)


def _disk(disk: SavedDisk) -> bytes:
    config = text(1, disk.host_path) + number(2, disk.read_only) + text(3, disk.type) + text(4, disk.evd_type)
    pieces = [message(1, config)]
    for partition, mount in disk.mounts.items():
        pieces.append(message(2, number(1, partition, always=True) + message(2, _mount(mount))))
    return b"".join(pieces)


def _mount(mount: SavedMount) -> bytes:
    if mount.is_blank:
        return b""
    config = b"".join(
        (
            number(1, mount.read_only),
            number(2, mount.encrypted),
            *(text(3, option, always=True) for option in mount.options),
            number(4, mount.ensure_filesystem),
            text(5, mount.filesystem),
            number(6, mount.block_dev),
        )
    )
    return message(1, config) + number(2, mount.references) + text(3, mount.guest_path)


def decode(payload: bytes, *, type_url: str = TYPE_URL) -> SavedState:
    """The state in a payload of hcsshim's.

    Raises:
        ProtocolError: it is of another type or version, no payload, or says what cannot be.
    """
    if type_url != TYPE_URL:
        raise ProtocolError(f"a saved state of the type {type_url[:100]!r}, and {TYPE_URL} is known", message=type_url)
    kinds = {1: Kind.UINT32, 2: Kind.UINT32, 3: Kind.MESSAGES, 4: Kind.MESSAGES}
    fields = Fields(payload, kinds, "saved state")
    if (version := fields.number(1)) != SCHEMA_VERSION:
        raise ProtocolError(f"a saved state of schema version {version}, and version {SCHEMA_VERSION} is known")
    disks: dict[Slot, SavedDisk] = {}
    for entry in fields.messages(3):
        key, value = _entry(entry, Kind.UINT32, "disk")
        slot = Slot(*divmod(key.number(1), LUNS_PER_CONTROLLER))
        if slot in disks:
            raise ProtocolError(f"no saved state: two disks at {slot}")
        disks[slot] = _read_disk(value)
    reservations: dict[str, SavedReservation] = {}
    for entry in fields.messages(4):
        key, value = _entry(entry, Kind.STRING, "reservation")
        if (id := key.text(1)) in reservations:
            raise ProtocolError(f"no saved state: reservation {id} is there twice")
        about = Fields(value, {1: Kind.UINT32, 2: Kind.UINT64}, "reservation")
        slot = Slot(*divmod(about.number(1), LUNS_PER_CONTROLLER))
        reservations[id] = SavedReservation(slot=slot, partition=about.number(2))
    state = SavedState(controllers=fields.number(2), disks=disks, reservations=reservations)
    if problem := _problem(state):
        raise ProtocolError(f"no saved state: {problem}")
    return state


def _entry(data: bytes, key: Kind, what: str) -> tuple[Fields, bytes]:
    fields = Fields(data, {1: key, 2: Kind.MESSAGE}, f"entry of a {what}")
    return fields, fields.message(2) or b""


def _read_disk(data: bytes) -> SavedDisk:
    fields = Fields(data, {1: Kind.MESSAGE, 2: Kind.MESSAGES}, "disk")
    kinds = {1: Kind.STRING, 2: Kind.BOOL, 3: Kind.STRING, 4: Kind.STRING}
    config = Fields(fields.message(1) or b"", kinds, "disk")
    mounts: dict[int, SavedMount] = {}
    for entry in fields.messages(2):
        key, value = _entry(entry, Kind.UINT64, "mount")
        if (partition := key.number(1)) in mounts:
            raise ProtocolError(f"no saved state: two mounts of partition {partition} of {config.text(1)}")
        mounts[partition] = _read_mount(value)
    return SavedDisk(
        host_path=config.text(1),
        read_only=config.flag(2),
        type=config.text(3),
        evd_type=config.text(4),
        mounts=mounts,
    )


def _read_mount(data: bytes) -> SavedMount:
    if not data:
        return SavedMount(is_blank=True)
    fields = Fields(data, {1: Kind.MESSAGE, 2: Kind.UINT32, 3: Kind.STRING}, "mount")
    kinds = {
        1: Kind.BOOL,
        2: Kind.BOOL,
        3: Kind.STRINGS,
        4: Kind.BOOL,
        5: Kind.STRING,
        6: Kind.BOOL,
    }
    config = Fields(fields.message(1) or b"", kinds, "mount")
    return SavedMount(
        guest_path=fields.text(3),
        references=fields.number(2),
        read_only=config.flag(1),
        encrypted=config.flag(2),
        options=config.texts(3),
        ensure_filesystem=config.flag(4),
        filesystem=config.text(5),
        block_dev=config.flag(6),
    )


def _problem(state: SavedState) -> str | None:
    """What cannot be in it."""
    if not 0 <= state.controllers <= MAX_CONTROLLERS:
        return f"{state.controllers} controllers, and {MAX_CONTROLLERS} is the most"
    for slot, disk in state.disks.items():
        if not (0 <= slot.controller < state.controllers and 0 <= slot.lun < LUNS_PER_CONTROLLER):
            return f"a disk at {slot}, and there are {state.controllers} controllers"
        if not disk.host_path:
            return f"the disk at {slot} has no path"
        if disk.type not in {*AttachmentType}:
            return f"the disk at {slot} is of type {disk.type[:100]!r}"
    for path, count in Counter(disk.host_path for disk in state.disks.values()).items():
        if count > 1:
            return f"{count} disks are {path}"
    holders = Counter((one.slot, one.partition) for one in state.reservations.values())
    for id, one in state.reservations.items():
        if not _GUID.fullmatch(id):
            return f"{id[:100]!r} is no reservation's GUID"
        if one.slot not in state.disks or one.partition not in state.disks[one.slot].mounts:
            return f"reservation {id} is of partition {one.partition} at {one.slot}, which is not there"
    for slot, disk in state.disks.items():
        for partition, mount in disk.mounts.items():
            if not mount.is_blank and mount.references != holders[slot, partition]:
                return (
                    f"partition {partition} at {slot} has {mount.references} references and "
                    f"{holders[slot, partition]} reservations"
                )
    return None


def _refuse(problem: str | None) -> None:
    if problem:
        raise InvalidRequest(f"no saved state: {problem}")


# To and from our manager's state.


def to_state(
    saved: SavedState,
    *,
    disks: Disks,
    holder: str,
    access: VMAccess = VMAccess.NOOP,
    now: float | None = None,
    new_id: Callable[[], str] = lambda: secrets.token_hex(6),
) -> tuple[ScsiState, dict[Slot, str]]:
    """The same for our manager, and the slots that it is to reserve: those of disks that nobody holds, as the root's.

    Every reservation keeps its GUID, and gets `holder`. `access` is the right that was given to the VM, and is to be
    taken back. The files are looked at, through `disks`: their formats and sizes were not saved. Blocks for as long.

    Raises:
        NotSupported: a mount that was reserved and never mounted, or a Windows guest's: what is so was not saved.
        RequestError, ImageError: as `Disks.read`.
    """
    since = time.time() if now is None else now
    reserved: dict[Slot, str] = {}
    held: list[document.SavedDisk] = []
    for slot, disk in sorted(saved.disks.items()):
        claims = [(id, one.partition) for id, one in saved.reservations.items() if one.slot == slot]
        if not claims:
            reserved[slot] = disk.host_path
            continue
        request = DiskRequest(
            host_path=_our_path(disk), read_only=disk.read_only, kind=AttachmentType(disk.type), access=access
        )
        facts = disks.read(request)
        names = {partition: new_id() for _, partition in claims}
        held.append(
            document.SavedDisk(
                attachment=new_id(),
                slot=str(slot),
                host_path=request.host_path,
                kind=request.kind,
                format=facts.format,
                access=access,
                read_only=disk.read_only,
                size_bytes=facts.size_bytes,
                since=since,
                mounts=tuple(
                    _our_mount(disk, slot, partition, name=name, since=since) for partition, name in names.items()
                ),
                reservations=tuple(
                    document.SavedReservation(reservation=id, mount=names[partition], holder=holder, since=since)
                    for id, partition in claims
                ),
            )
        )
    return ScsiState(controllers=saved.controllers, disks=tuple(held)), reserved


def _our_path(disk: SavedDisk) -> str:
    if disk.type == AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
        return f"evd://{disk.evd_type}/{disk.host_path}"
    return disk.host_path


def _our_mount(disk: SavedDisk, slot: Slot, partition: int, *, name: str, since: float) -> document.SavedMount:
    mount = disk.mounts[partition]
    if mount.is_blank or not mount.guest_path:
        why = "a Windows guest's, of which nothing was saved" if mount.is_blank else "reserved, and never mounted"
        raise NotSupported(
            f"partition {partition} of {disk.host_path} is {why}",
            slot=slot,
            host_path=disk.host_path,
            remedy="unmap it before the VM moves, and add it again after",
        )
    return document.SavedMount(
        mount=name,
        guest_path=str(checked_guest_path(PurePosixPath(mount.guest_path))),
        config=MountConfig(
            partition=partition,
            read_only=mount.read_only or disk.read_only,
            options=mount.options,
            filesystem=mount.filesystem or None,
            ensure_filesystem=mount.ensure_filesystem and not (mount.read_only or disk.read_only),
            block_device=mount.block_dev,
            encryption=ScratchKey() if mount.encrypted else None,
        ),
        since=since,
    )


def from_state(state: ScsiState, *, reserved: Mapping[Slot, SavedDisk] | None = None) -> SavedState:
    """Our manager's state for hcsshim's, of a Linux guest; `reserved` has the disks that nobody holds, as the root's.

    A reservation whose name is no GUID gets one made from it (version 5), the same each time: `guid_of` says which.

    Raises:
        NotSupported: what hcsshim's has no words for: a disk that is attached only, two mounts of one partition, a
            caller's key, dm-verity.
        InvalidRequest: a path cannot be.
    """
    disks = dict(reserved or {})
    reservations: dict[str, SavedReservation] = {}
    for disk in state.disks:
        slot, attachment = disk.where(), attachment_for(disk.request())
        partitions = {mount.mount: mount.config.partition for mount in disk.mounts}
        for one in disk.reservations:
            if one.mount is None:
                raise _no_words(disk, "a reservation without a mount")
            reservations[guid_of(one.reservation)] = SavedReservation(slot=slot, partition=partitions[one.mount])
        if len(set(partitions.values())) < len(partitions):
            raise _no_words(disk, "two mounts of one partition")
        disks[slot] = SavedDisk(
            host_path=attachment.path,
            read_only=disk.read_only,
            type=attachment.type,
            evd_type=attachment.extensible_virtual_disk_type,
            mounts={mount.config.partition: _their_mount(disk, mount) for mount in disk.mounts},
        )
    saved = SavedState(controllers=state.controllers, disks=disks, reservations=reservations)
    _refuse(_problem(saved))
    return saved


def guid_of(reservation: str) -> str:
    """The GUID of a reservation of ours in hcsshim's state."""
    return reservation.lower() if _GUID.fullmatch(reservation) else str(uuid.uuid5(_OURS, reservation))


def _their_mount(disk: document.SavedDisk, mount: document.SavedMount) -> SavedMount:
    config = mount.config
    for wanted, what in (
        (isinstance(config.encryption, CallerKey), "a key of the caller's"),
        (config.verity is not None, "dm-verity"),
    ):
        if wanted:
            raise _no_words(disk, what)
    return SavedMount(
        guest_path=mount.guest_path,
        references=sum(one.mount == mount.mount for one in disk.reservations),
        read_only=config.read_only,
        encrypted=config.encryption is not None,
        options=config.mount_options,
        ensure_filesystem=config.ensure_filesystem,
        filesystem=config.filesystem or "",
        block_dev=config.block_device,
    )


def _no_words(disk: document.SavedDisk, what: str) -> NotSupported:
    return NotSupported(
        f"{disk.host_path} has {what}, which hcsshim's saved state cannot say",
        slot=disk.where(),
        host_path=disk.host_path,
        remedy="move it with ScsiManager.export_state, or release it before",
    )
