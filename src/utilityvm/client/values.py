"""Values of the library as they go over the wire."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from utilityvm.machine.hostpath import absolute
from utilityvm.scsi.slot import Slot
from utilityvm.server import types

if TYPE_CHECKING:
    from utilityvm.guests.program import Limits
    from utilityvm.guests.programinfo import ProgramInfo
    from utilityvm.scsi.mount_config import Encryption
    from utilityvm.scsi.ports import Verity
    from utilityvm.scsi.views import SlotView
    from utilityvm.vm.config import DiskSpec


def encryption_of(key: Encryption | None) -> types.ScratchKey | types.CallerKey | None:
    if key is None:
        return None
    secret = getattr(key, "key", None)
    return types.ScratchKey() if secret is None else types.CallerKey(key=secret)


def verity_of(verity: Verity | None) -> types.Verity | None:
    if verity is None:
        return None
    return types.Verity(
        root_hash=verity.root_hash,
        hash_offset_bytes=verity.hash_offset_bytes,
        data_blocks=verity.data_blocks,
        salt=verity.salt,
        algorithm=verity.algorithm,
        block_size_bytes=verity.block_size_bytes,
    )


def limits_of(limits: Limits | None) -> types.Limits | None:
    return None if limits is None else types.Limits(**dataclasses.asdict(limits))


def info_of(kept: types.KeptProgram) -> ProgramInfo:
    from utilityvm.guests.programinfo import ProgramInfo

    return ProgramInfo(**{**msgspec.structs.asdict(kept), "command": tuple(kept.command)})


def disk_of(spec: DiskSpec, *, holder: str, timeout_s: float) -> types.AddDisk:
    is_path = isinstance(spec.guest_path, (str, PurePosixPath))
    mount = {
        **msgspec.structs.asdict(spec.mount),
        "options": list(spec.mount.options),
        "encryption": encryption_of(spec.mount.encryption),
        "verity": verity_of(spec.mount.verity),
    }
    return types.AddDisk(
        host_path=absolute(spec.host_path),
        guest_path=str(spec.guest_path) if is_path else None,
        generated=spec.guest_path is not None and not is_path,
        holder=holder,
        access=str(spec.access),
        format=None if spec.format is None else str(spec.format),
        sector_size_bytes=spec.sector_size_bytes,
        physical=spec.physical,
        timeout_s=timeout_s,
        **mount,
    )


def slot_view_of(disk: types.Disk) -> SlotView:
    from utilityvm.scsi.views import SlotView

    return SlotView(
        slot=Slot.parse(disk.slot),
        attachment=disk.attachment,
        host_path=disk.host_path,
        identity=disk.identity,
        format=disk.format,
        read_only=disk.read_only,
        size_bytes=disk.size_bytes,
        state=disk.state,
        guest_paths=tuple(map(PurePosixPath, disk.guest_paths)),
        references=disk.references,
        holders=tuple(disk.holders),
        since=disk.since,
        phases={},
    )
