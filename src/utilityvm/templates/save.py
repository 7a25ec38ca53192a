"""Writes a template: what is in the folder when the VM has been paused, and what must be so before that.

The template is there from the moment its folder has its name; until then the VM can go on. See `UtilityVM`, which
quiesces the guest before this and ends the VM after it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from utilityvm.errors import DeadlineExceeded, NotSupported, SetupError, WrongState
from utilityvm.hosts.qemu import QemuHost, memory
from utilityvm.hosts.qemu.accelerator import CPU
from utilityvm.hosts.qemu.host import ShownDevice
from utilityvm.machine import paths
from utilityvm.scsi.ports import AttachmentType, CallerKey, DiskFormat, DiskRecord, MountRecord, Record
from utilityvm.scsi.transitions import DiskState, MountState
from utilityvm.templates import catalog
from utilityvm.templates.catalog import DISKS, MANIFEST, MEMORY, STATE, Template
from utilityvm.templates.clone import host_cpu, memory_mode
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


def check_settled(records: Sequence[Record], *, vm: str) -> None:
    """Refuse what cannot be in a template.

    Raises:
        WrongState: a disk or a mount is half-way; says which.
        NotSupported: a mount has a caller's key, which would be stored with the guest's memory.
    """
    for record in records:
        if isinstance(record, DiskRecord) and record.state != DiskState.ATTACHED:
            raise WrongState(
                f"{record.host_path} at {record.slot} is {record.state}",
                vm=vm,
                remedy=f"uvm repair {vm}, or release it",
            )
        if isinstance(record, MountRecord):
            if record.state != MountState.MOUNTED:
                raise WrongState(f"{record.guest_path} is {record.state}", vm=vm, remedy=f"uvm repair {vm}")
            if isinstance(record.config.encryption, CallerKey):
                raise NotSupported(
                    f"{record.guest_path} is encrypted with your key, which would be stored with the guest's memory",
                    vm=vm,
                    remedy="release that mount first, and add it to each clone",
                )


async def write(
    name: str,
    *,
    host: QemuHost,
    config: Shape,
    root: Path,
    kernel: str,
    records: Sequence[Record],
    parent: Template | None,
    timeout_s: float,
) -> Template:
    """Pause the VM and write the template `name` of it. True on return: it is there, whole, and the VM stays paused.

    If this fails no template is left, and `host.resume` lets the VM go on.

    Raises:
        TemplateExists: the name is taken.
        SetupError: no space, or no right to read the VM's memory.
        HostRefused, OutcomeUnknown, VMGone: QEMU did not save its state.
    """
    process = host.process
    size_bytes = config.memory_mib << 20
    with catalog.new(name) as folder:
        _check_space(folder, size_bytes)
        with _file(folder / STATE, os.O_WRONLY) as state:
            await host.save(state, timeout_s=timeout_s)
        shown = await host.shown_devices(timeout_s=timeout_s)
        disks = _disks(host.process.uuid, records, shown, folder, final=paths.templates_dir() / name, parent=parent)
        with _file(folder / MEMORY, os.O_WRONLY) as target:
            await _in_thread(memory.copy, process, target, size_bytes=size_bytes, timeout_s=timeout_s)
        (folder / MEMORY).chmod(memory_mode(process.qemu_version, process))
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
            host_cpu=host_cpu(process.accelerator),
            root=_layer(root, DiskFormat.RAW, AttachmentType.VIRTUAL_DISK, named=root),
            kernel=kernel,
            memory=await _own(folder / MEMORY, timeout_s=timeout_s),
            state=await _own(folder / STATE, timeout_s=timeout_s),
            parent=Parent(name=parent.name, uuid=parent.uuid) if parent else None,
            disks=tuple(disks),
        )
        (folder / MANIFEST).write_bytes(encode(manifest))
    return catalog.load(name)


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
            # The clone's own overlay goes with the template; it lies on what its template has there.
            (folder / DISKS).mkdir(mode=0o700, exist_ok=True)
            named = final / DISKS / f"{record.attachment}.qcow2"
            path = folder / DISKS / named.name
            os.link(record.host_path, path)
            below = inherited[record.attachment]
        top = _layer(path, record.format, record.kind, named=named)
        if top.identity != record.identity:
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
                    MountEntry.of(mount.mount, mount.guest_path, mount.config)
                    for mount in mounts
                    if mount.attachment == record.attachment
                ),
            )
        )
    return entries


def _layer(path: Path, image_format: DiskFormat, kind: AttachmentType, *, named: Path) -> LayerEntry:
    return LayerEntry(path=str(named), format=image_format, kind=kind, fingerprint=Fingerprint.of(path.stat()))


async def _own(path: Path, *, timeout_s: float) -> File:
    return await _in_thread(_digested, path, timeout_s=timeout_s)


def _digested(path: Path) -> File:
    return File(fingerprint=Fingerprint.of(path.stat()), digest=catalog.digest(path))


async def _in_thread(work: Callable[..., T], *arguments: Any, timeout_s: float, **named: Any) -> T:
    """Run what blocks. It cannot be interrupted: out of time it is waited for, and its result is not used."""
    begun = time.monotonic()
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        result = await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])  # it writes to a file that is about to be removed
        raise
    if time.monotonic() - begun > timeout_s:
        raise DeadlineExceeded(f"writing the template took longer than {timeout_s:g} s")
    return result


def _check_space(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _HEADROOM:
        raise SetupError(
            f"{folder.parent} has {free >> 20} MiB free, and the template may need {(size_bytes + _HEADROOM) >> 20}",
            remedy="make room there, or set UTILITYVM_STATE_DIR to a roomier folder",
        )


@contextmanager
def _file(path: Path, mode: int) -> Iterator[int]:
    fd = os.open(path, mode | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
