"""A VM's disks taken up from the state that another manager exported (`document`).

What the document says of the VM is looked for there, disk by disk, before anything is made of it: the file under each
path, the disk on the bus, the mount in the guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from msgspec import structs

from utilityvm.errors import AlreadyAttached, ConfigDiffers, InvalidRequest, WrongState
from utilityvm.scsi.document import SavedDisk, ScsiState
from utilityvm.scsi.ports import (
    DiskRecord,
    GuestBackend,
    Holder,
    HostBackend,
    MountConfig,
    MountRecord,
    Record,
    ScratchKey,
)
from utilityvm.scsi.slot import FreeSlots
from utilityvm.scsi.transitions import DiskState, MountState

__all__ = ["ScsiState", "check_fits", "locate"]


def check_fits(state: ScsiState, free: FreeSlots, guest: GuestBackend) -> None:
    """Refuse a state that this VM cannot have.

    Raises:
        InvalidRequest, AlreadyAttached: it has no such slot, or something else there.
        NotSupported: its guest cannot express a mount.
    """
    for disk in state.disks:
        slot = disk.where()
        if slot.controller >= free.controllers:
            raise InvalidRequest(
                f"{disk.host_path} is at {slot}, and this VM has {free.controllers} SCSI controllers",
                slot=slot,
                host_path=disk.host_path,
                remedy=f"start it with {state.controllers}",
            )
        if slot not in free:
            raise AlreadyAttached(
                f"{disk.host_path} is at {slot}, which is taken in this VM",
                slot=slot,
                host_path=disk.host_path,
                remedy="import into a VM without disks, whose own are where the other VM's were",
            )
        guest.check(slot, None)
        for mount in disk.mounts:
            guest.check(slot, _once_mounted(mount.config))


def _once_mounted(config: MountConfig) -> MountConfig:
    """What a guest must be able to express of a mount that it has: not what was needed to make it."""
    encryption = None if isinstance(config.encryption, ScratchKey) else config.encryption
    return structs.replace(
        config, options=(), filesystem=None, ensure_filesystem=False, reformat=False, encryption=encryption
    )


async def locate(
    state: ScsiState,
    host: HostBackend,
    guest: GuestBackend,
    *,
    holder: Holder,
    new_id: Callable[[], str],
    timeout_s: float,
) -> list[Record]:
    """What the journal is to hold, as the VM is: each disk is opened here, and looked for on the bus and in the guest.

    A disk that is not on the bus, and a mount that is not in the guest, is recorded as one that is still to be made.
    Reservations of processes are `holder`'s from now on: those processes were another host's.

    Raises:
        ConfigDiffers: a file is not the one that it was: another format or size, or the same one twice.
        WrongState: an encrypted mount is not there, and its key is nowhere.
        others: as `HostBackend.open` and the probes. Nothing changed.
    """
    identities: dict[str, str] = {}
    for disk in state.disks:
        identity = await _identity(disk, host)
        if other := identities.get(identity):
            raise ConfigDiffers(
                f"{disk.host_path} and {other} are one disk",
                slot=disk.where(),
                remedy="give each disk a path of its own: ScsiState.relocated({old: new})",
            )
        identities[identity] = disk.host_path
    records: list[Record] = []
    for disk, identity in zip(state.disks, identities, strict=True):
        as_exported = disk.records(identity, holder=holder)
        records += await _located(disk, as_exported, host, guest, new_id=new_id, timeout_s=timeout_s)
    return sorted(records, key=_place)


def _place(record: Record) -> int:
    """Disks come first in a journal, then mounts, then reservations."""
    return 0 if isinstance(record, DiskRecord) else 1 if isinstance(record, MountRecord) else 2


async def _identity(disk: SavedDisk, host: HostBackend) -> str:
    opened = await host.open(disk.request())
    try:
        for name, saved, found in (
            ("format", disk.format, opened.format),
            ("size_bytes", disk.size_bytes, opened.size_bytes),
        ):
            if saved != found:
                raise ConfigDiffers(
                    f"{disk.host_path} has {name}={found} here, and was exported with {name}={saved}",
                    slot=disk.where(),
                    host_path=disk.host_path,
                    remedy="give the file that the VM has, with ScsiState.relocated",
                )
        return opened.identity
    finally:
        opened.close()


async def _located(
    disk: SavedDisk,
    records: Sequence[Record],
    host: HostBackend,
    guest: GuestBackend,
    *,
    new_id: Callable[[], str],
    timeout_s: float,
) -> list[Record]:
    slot = disk.where()
    there = await host.probe(slot, attachment=disk.attachment, timeout_s=timeout_s)
    attachment = disk.attachment if there else new_id()
    located: list[Record] = []
    for record in records:
        record = replace(record, attachment=attachment)
        if isinstance(record, DiskRecord) and not there:
            record = replace(record, state=DiskState.RESERVED)
        elif isinstance(record, MountRecord):
            path = record.guest_path
            if not (there and await guest.probe_mount(slot, guest_path=path, timeout_s=timeout_s)):
                record = replace(record, state=MountState.RESERVED)
                if record.config.encryption is not None:
                    raise WrongState(
                        f"{disk.host_path} is not mounted at {path} in this VM, and its key did not travel",
                        slot=slot,
                        host_path=disk.host_path,
                        remedy="release it before the export, and add it with its key after the move",
                    )
        located.append(record)
    return located
