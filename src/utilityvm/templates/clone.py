"""Opens what a clone begins with: the template's files, its disks, and an overlay for each that is written to.

Every file is compared with what the template says of it, on the descriptor that QEMU gets, and locked for as long as
QEMU has it: a writer elsewhere is refused while any clone is alive.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from utilityvm.diskimage import blockdev, headers
from utilityvm.errors import DiskInUse, InvalidRequest, TemplateDamaged, TemplateDiffers
from utilityvm.hosts.qemu import accelerator as accelerators
from utilityvm.hosts.qemu import emulator as emulators
from utilityvm.hosts.qemu import sealed
from utilityvm.hosts.qemu.disk import Locked, describe, lock, open_disk
from utilityvm.hosts.qemu.format import FormatMemory
from utilityvm.hosts.qemu.incoming import Incoming, IncomingDisk, Layer, needs_writable_memory
from utilityvm.hosts.qemu.sealed import Sealed
from utilityvm.machine import hostpath, oserrors, paths
from utilityvm.machine.threads import in_thread
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
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.templates import overlay
from utilityvm.templates.catalog import Template, difference_of
from utilityvm.templates.manifest import DiskEntry, Fingerprint, LayerEntry

_CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What QEMU is started with, and what the journal of the clone says then."""

    incoming: Incoming
    records: tuple[Record, ...]
    shared: Sealed | None = None  # to be kept while the clone runs, for those that come after it


async def check_machine(template: Template) -> None:
    """Refuse a template that this machine's QEMU or processor would go on with differently.

    Raises:
        TemplateDiffers: says each difference.
        TemplateDamaged: the guest image's root disk is not what it was.
        SetupError: QEMU is missing.
    """
    manifest = template.manifest
    if (difference := await in_thread(difference_of, manifest.root)) is not None:
        raise TemplateDamaged(difference, remedy="make the template anew")
    program = await emulators.find()
    chosen = await accelerators.choose(program)
    then_and_now = {
        "QEMU": (manifest.qemu_version, program.version),
        "machine": (manifest.machine, program.machine),
        "accelerator": (manifest.accelerator, chosen.name),
        "processor model": (manifest.cpu, chosen.cpu),
        "processor of the host": (manifest.host_cpu, await in_thread(host_cpu, chosen.name)),
    }
    differences = [f"{what}: {then!r} then, {now!r} now" for what, (then, now) in then_and_now.items() if then != now]
    if differences:
        raise TemplateDiffers(
            f"template {template.name} was saved on another machine ({'; '.join(differences)})",
            remedy="start a VM, warm it up, and save it as a new template",
        )


def host_cpu(accelerator: str) -> str:
    """The processor under a VM, where the VM sees it; "" if it is emulated. Source: proc(5), /proc/cpuinfo."""
    if accelerator == "tcg":
        return ""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "microcode")
    fields = dict(line.split("\t:", 1) for line in _first_processor() if "\t:" in line)
    return " ".join(f"{name.strip()}={value.strip()}" for name, value in fields.items() if name.strip() in wanted)


def _first_processor() -> list[str]:
    try:
        return [line.replace("\t\t", "\t") for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines()]
    except OSError:
        return []


@contextmanager
def prepare(
    template: Template,
    folder: Path,
    *,
    holder: Holder,
    replace: Mapping[Slot, DiskRequest],
    memory: FormatMemory | None = None,
) -> Iterator[Prepared]:
    """Everything opened and locked, the overlays made in `folder`; closed at the end of the block.

    If this or the block fails, no overlay and no folder is left.

    Raises:
        TemplateDamaged: a file is not what was saved.
        DiskInUse: somebody writes to a disk of the template, or uses the one that replaces it.
        InvalidRequest: `replace` names a slot without a disk, one that is mounted, or a disk of another size.
        SetupError: no space or no right.
    """
    manifest = template.manifest
    _check_replace(template, replace)
    with ExitStack() as closing:
        ram = _open_own(template.memory, manifest.memory.fingerprint, closing)
        shared = _sealed(ram, template) if needs_writable_memory(manifest.qemu_version) else None
        state = _open_own(template.state, manifest.state.fingerprint, closing)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            disks: list[IncomingDisk] = []
            records: list[Record] = []
            for disk in manifest.disks:
                replacement = replace.get(disk.slot)
                if replacement is not None:
                    incoming, host_path = _replaced(disk, replacement, memory, closing), replacement.host_path
                else:
                    incoming, host_path = _taken_over(disk, folder, closing)
                disks.append(incoming)
                records += _records(disk, incoming, host_path, holder)
            memory_fd = ram if shared is None else shared.fd
            yield Prepared(Incoming(memory=memory_fd, state=state, disks=tuple(disks)), tuple(records), shared)
            undo.pop_all()


def _sealed(ram: int, template: Template) -> Sealed:
    try:
        return sealed.copy_of(ram)
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot copy the memory of template {template.name} for its clones") from error


def _check_replace(template: Template, replace: Mapping[Slot, DiskRequest]) -> None:
    disks = {disk.slot: disk for disk in template.manifest.disks}
    for slot, request in replace.items():
        disk = disks.get(slot)
        if disk is None:
            raise InvalidRequest(
                f"template {template.name} has no disk at {slot}",
                slot=slot,
                remedy=f"it has some at {', '.join(map(str, disks)) or 'no slot'}",
            )
        if disk.mounts:
            raise InvalidRequest(
                f"the disk at {slot} is mounted at {disk.mounts[0].guest_path} in template {template.name}: the guest "
                "would mix what it remembers of that disk with what is on the other",
                slot=slot,
                remedy="replace only disks that are attached without being mounted, and mount them in the clone",
            )
        if request.read_only != disk.read_only:
            mode = "read-only" if disk.read_only else "writable"
            raise InvalidRequest(
                f"the disk at {slot} is {mode} in template {template.name}", slot=slot, remedy=f"give a {mode} one"
            )


def _open_own(path: Path, expected: Fingerprint, closing: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _damaged(path, f"cannot be opened: {error.strerror}") from error
    closing.callback(os.close, fd)
    if not expected.is_unchanged(Fingerprint.of(fd)):
        raise _damaged(path, "is not what was saved")
    return fd


def _taken_over(disk: DiskEntry, folder: Path, closing: ExitStack) -> tuple[IncomingDisk, str]:
    layers = [_open_layer(layer, disk, closing) for layer in disk.layers]
    _check_size(layers[0], disk)
    host_path = disk.host_path
    if not disk.read_only:
        paths.make_folder(folder)
        path = overlay.overlay_path(folder, disk.slot)
        base = disk.layers[0]
        fd = overlay.create(path, size_bytes=disk.size_bytes, base=Path(base.path), base_format=base.format)
        closing.callback(os.close, fd)
        lock(fd, host_path=str(path), read_only=False)
        header = headers.read(fd, name=str(path), expected=DiskFormat.QCOW2)
        top = Layer(fd=fd, path=path, header=header, kind=AttachmentType.VIRTUAL_DISK, locks=True)
        layers = [top, *layers]
        host_path = str(path)
    return _incoming(disk, tuple(layers)), host_path


def _open_layer(layer: LayerEntry, disk: DiskEntry, closing: ExitStack) -> Layer:
    path = Path(layer.path)
    try:
        fd = hostpath.open_file(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _damaged(path, f"cannot be opened: {error.strerror}", slot=disk.slot) from error
    closing.callback(os.close, fd)
    if not layer.fingerprint.is_unchanged(Fingerprint.of(fd)):
        raise _damaged(path, "is not the file that it was, or was written to since", slot=disk.slot)
    if layer.kind is AttachmentType.PASS_THRU:
        blockdev.check_unused(fd, host_path=str(path), exclusive=False)
    locked = lock(fd, host_path=str(path), read_only=True)
    if locked is Locked.BY_ANOTHER:
        raise DiskInUse(
            f"{path}: another VM writes to it, and the template needs it as it was",
            host_path=path,
            slot=disk.slot,
            remedy="detach it there; the template may be damaged by then",
        )
    header = headers.read(fd, name=str(path), expected=layer.format)
    return Layer(fd=fd, path=path, header=header, kind=layer.kind, locks=locked is Locked.OURS)


def _check_size(layer: Layer, disk: DiskEntry) -> None:
    """An overlay has the size that the guest knows whatever is under it, so QEMU would not see the difference."""
    size = layer.header.virtual_size_bytes
    if size != disk.size_bytes:
        raise _damaged(layer.path, f"has {size} bytes, not {disk.size_bytes} as was saved", slot=disk.slot)


def _replaced(disk: DiskEntry, request: DiskRequest, memory: FormatMemory | None, closing: ExitStack) -> IncomingDisk:
    opened = open_disk(request, memory=memory)
    closing.callback(opened.close)
    if opened.size_bytes != disk.size_bytes:
        raise InvalidRequest(
            f"{request.host_path} has {opened.size_bytes} bytes, and the disk at {disk.slot} has {disk.size_bytes}",
            slot=disk.slot,
            host_path=request.host_path,
            remedy="give one of the same size, to the byte",
        )
    sectors = opened.logical_block_bytes or 512
    if sectors != disk.logical_block_bytes:
        raise InvalidRequest(
            f"{request.host_path} has sectors of {sectors} bytes, and the disk at {disk.slot} has"
            f" {disk.logical_block_bytes}",
            slot=disk.slot,
            host_path=request.host_path,
            remedy="give one with the same sectors: sector_size_bytes of an image",
        )
    fd, locked = opened.open_locked()
    closing.callback(os.close, fd)
    layer = Layer(
        fd=fd,
        path=Path(request.host_path),
        header=opened.header,
        kind=request.kind,
        locks=locked is Locked.OURS,
    )
    return _incoming(disk, (layer,))


def _incoming(disk: DiskEntry, layers: tuple[Layer, ...]) -> IncomingDisk:
    return IncomingDisk(
        attachment=disk.attachment,
        slot=disk.slot,
        serial=disk.serial,
        read_only=disk.read_only,
        size_bytes=disk.size_bytes,
        logical_block_bytes=disk.logical_block_bytes,
        layers=layers,
    )


def _records(disk: DiskEntry, incoming: IncomingDisk, host_path: str, holder: Holder) -> Iterator[Record]:
    """The clone's journal: its disks are attached, its mounts mounted, and each has one reservation."""
    now = time.time()
    top = incoming.layers[0]
    yield DiskRecord(
        attachment=disk.attachment,
        slot=disk.slot,
        host_path=host_path,
        identity=describe(Path(f"/proc/self/fd/{top.fd}")),
        kind=top.kind,
        format=top.header.format,
        access=VMAccess.INDIVIDUAL,
        read_only=disk.read_only,
        size_bytes=disk.size_bytes,
        state=DiskState.ATTACHED,
        since=now,
        sector_size_bytes=_given_sectors(top, disk),
    )
    for mount in disk.mounts:
        yield MountRecord(
            mount=mount.mount,
            attachment=disk.attachment,
            guest_path=PurePosixPath(mount.guest_path),
            config=mount.config,
            state=MountState.MOUNTED,
            since=now,
        )
    mounts: list[str | None] = [mount.mount for mount in disk.mounts]
    for name in mounts or [None]:
        yield ReservationRecord(
            reservation=secrets.token_hex(6),
            attachment=disk.attachment,
            mount=name,
            holder=holder,
            state=ReservationState.HELD,
            since=now,
        )


def _given_sectors(top: Layer, disk: DiskEntry) -> int | None:
    """A physical disk has its sectors by itself; an image, also an overlay on such a disk, has those it is given."""
    is_given = top.kind is AttachmentType.VIRTUAL_DISK and disk.logical_block_bytes != 512
    return disk.logical_block_bytes if is_given else None


def _damaged(path: Path, what: str, *, slot: Slot | None = None) -> TemplateDamaged:
    return TemplateDamaged(
        f"{path} {what}",
        slot=slot,
        host_path=path,
        remedy="see all that differs: uvm template verify; then make the template anew",
    )
