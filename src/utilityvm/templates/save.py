"""Writes a template: what is in the folder when the VM has been paused, and what must be so before that.

The template is there from the moment its folder has its name; until then the VM can go on. See `UtilityVM`, which
quiesces the guest before this and ends the VM after it.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Final, Protocol, TypeVar

from utilityvm.errors import NotSupported, SetupError, WrongState
from utilityvm.hosts.qemu import QemuHost, memory
from utilityvm.hosts.qemu.accelerator import CPU
from utilityvm.hosts.qemu.sizes import ShownDevice
from utilityvm.machine import fileid, paths
from utilityvm.machine.threads import aside, in_thread, lent, to_the_end
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRecord, MountRecord, Record
from utilityvm.scsi.transitions import DiskState, MountState
from utilityvm.tasks import Deadline
from utilityvm.templates import catalog
from utilityvm.templates.catalog import DISKS, MANIFEST, MEMORY, STATE, Template
from utilityvm.templates.clone import host_cpu
from utilityvm.templates.draft import Draft, no_space
from utilityvm.templates.manifest import (
    VERSION,
    DiskEntry,
    File,
    Fingerprint,
    LayerEntry,
    Manifest,
    MountEntry,
    Parent,
    encode,
)

T = TypeVar("T")

_HEADROOM: Final = 64 << 20


class Shape(Protocol):
    """What of a VM's config its clones have too."""

    @property
    def memory_mib(self) -> int: ...
    @property
    def cpus(self) -> int: ...
    @property
    def controllers(self) -> int: ...


def check(records: Sequence[Record], *, had_key: bool, vm: str) -> None:
    """Refuse what a template cannot hold. `had_key`: a caller's key was in the guest, whatever became of its mount.

    Raises:
        WrongState: a disk or a mount is half-way; says which.
        NotSupported: a caller's key would be stored with the guest's memory.
    """
    if had_key:
        raise NotSupported(
            f"VM {vm} had a disk with a key of yours (or its record was lost), and copies of a key stay in the guest's "
            "memory when its mount is released: they would be in the template, and in each clone",
            vm=vm,
            remedy="start a VM anew and save that one, without the key; add the encrypted disk to each clone",
        )
    for record in records:
        if isinstance(record, DiskRecord) and record.state != DiskState.ATTACHED:
            raise WrongState(
                f"{record.host_path} at {record.slot} is {record.state}",
                vm=vm,
                remedy=f"uvm repair {vm}, or release it",
            )
        if isinstance(record, MountRecord) and record.state != MountState.MOUNTED:
            raise WrongState(f"{record.guest_path} is {record.state}", vm=vm, remedy=f"uvm repair {vm}")


async def write(
    draft: Draft,
    *,
    host: QemuHost,
    config: Shape,
    root: Path,
    kernel: str,
    records: Sequence[Record],
    parent: Template | None,
    deadline: Deadline,
) -> Template:
    """Pause the VM and write the template of it. True on return: it is there, whole, and the VM stays paused.

    If this fails no template is left, and `host.resume` lets the VM go on; unless `draft.is_there`, when it failed, or
    was cancelled, in its last moment.

    Raises:
        TemplateExists: the name is taken.
        SetupError: no space, or no right to read the VM's memory.
        HostRefused, OutcomeUnknown, VMGone: QEMU did not save its state.
    """
    process = host.process
    size_bytes = config.memory_mib << 20
    name = draft.name
    async with draft.begun(deadline) as folder:
        with no_space(folder.parent):
            await in_thread(_check_space, folder, size_bytes)
            async with _file(folder / STATE) as state:
                await host.save(state, timeout_s=deadline.left())
            shown = await host.shown_devices(timeout_s=deadline.left())
            final = paths.templates_dir() / name
            disks = await to_the_end(partial(_disks, process.uuid, records, shown, folder, final=final, parent=parent))
            async with _file(folder / MEMORY) as target:
                await _in_thread(lent(target, memory.copy), process, size_bytes)
            files = await _in_thread(_own_files, folder)
            manifest = Manifest(
                version=VERSION,
                name=name,
                uuid=str(uuid.uuid4()),
                vm=process.name,
                vm_uuid=process.uuid,
                created=time.time(),
                memory_mib=config.memory_mib,
                cpus=config.cpus,
                controllers=config.controllers,
                qemu_version=process.qemu_version,
                machine=process.machine,
                accelerator=process.accelerator,
                cpu=CPU[process.accelerator],
                host_cpu=await in_thread(host_cpu, process.accelerator),
                root=await in_thread(_root_layer, root),
                kernel=kernel,
                memory=files[MEMORY],
                state=files[STATE],
                parent=Parent(name=parent.name, uuid=parent.uuid) if parent else None,
                disks=tuple(disks),
            )
            await in_thread((folder / MANIFEST).write_bytes, encode(manifest))
    return await in_thread(catalog.load, name)


def _disks(
    vm_uuid: str,
    records: Sequence[Record],
    shown: Mapping[str, ShownDevice],
    folder: Path,
    *,
    final: Path,
    parent: Template | None,
) -> list[DiskEntry]:
    inherited = {disk.attachment: disk.layers for disk in parent.manifest.disks} if parent else {}
    mounts = [record for record in records if isinstance(record, MountRecord)]
    entries = []
    for record in records:
        if not isinstance(record, DiskRecord):
            continue
        path = named = Path(record.host_path)
        below: tuple[LayerEntry, ...] = ()
        if path.parent == paths.overlays_dir(vm_uuid):
            # The VM's own goes with the template: an overlay, which lies on what the clone's template has there, or a
            # scratch disk.
            (folder / DISKS).mkdir(mode=0o700, exist_ok=True)
            named = final / DISKS / f"{record.attachment}{path.suffix}"
            path = folder / DISKS / named.name
            os.link(record.host_path, path)
            below = inherited.get(record.attachment, ())
        top = _layer(path, record.format, record.kind, named=named)
        if fileid.identity(path.stat()) != record.identity:
            raise NotSupported(
                f"{record.host_path} is another file now than the one that is attached at {record.slot}",
                host_path=record.host_path,
                slot=record.slot,
                remedy="put the file back to its name, or release that disk",
            )
        entries.append(
            DiskEntry(
                attachment=record.attachment,
                controller=record.slot.controller,
                lun=record.slot.lun,
                serial=shown[record.attachment].serial,
                host_path=str(named),
                read_only=record.read_only,
                access=record.access,
                size_bytes=shown[record.attachment].size_bytes,
                logical_block_bytes=shown[record.attachment].logical_block_bytes,
                layers=(top, *below),
                mounts=tuple(
                    MountEntry(mount=mount.mount, guest_path=str(mount.guest_path), config=mount.config)
                    for mount in mounts
                    if mount.attachment == record.attachment
                ),
            )
        )
    return entries


def _layer(path: Path, image_format: DiskFormat, kind: AttachmentType, *, named: Path) -> LayerEntry:
    return LayerEntry(path=str(named), format=image_format, kind=kind, fingerprint=Fingerprint.at(path))


def _root_layer(root: Path) -> LayerEntry:
    return _layer(root, DiskFormat.RAW, AttachmentType.VIRTUAL_DISK, named=root)


def _own_files(folder: Path, stop: Event) -> dict[str, File]:
    """What the manifest says of the template's own files."""
    (folder / MEMORY).chmod(0o444)  # QEMU has another user id; the folder is for its owner alone
    return {
        name: File(fingerprint=Fingerprint.at(folder / name), digest=catalog.digest(folder / name, stop))
        for name in (MEMORY, STATE)
    }


async def _in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run what blocks for long. A caller that is cancelled is back at once, and the work ends soon."""
    stop = Event()
    try:
        return await in_thread(work, *arguments, stop)
    finally:
        stop.set()


def _check_space(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _HEADROOM:
        raise SetupError(
            f"{folder.parent} has {free >> 20} MiB free, and the template may need {(size_bytes + _HEADROOM) >> 20}",
            remedy="make room there, or set UTILITYVM_STATE_DIR to a roomier folder",
        )


@asynccontextmanager
async def _file(path: Path) -> AsyncIterator[int]:
    """A new file, to be written to."""
    fd = await to_the_end(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, late=os.close)
    try:
        yield fd
    finally:
        aside(os.close, fd)
