"""Templates as hcsshim keeps them, and the disks of a clone.

A template is a saved VM and a list of its disks, in slot order, which travels by gob to the process that clones. A
clone gets the same disks at the same slots: a read-only one is shared, a writable one copied into the clone's scratch
folder (the VM's own scratch disk, at 0:0, under its name; any other into a folder of its own,
`clone-mount-<controller>-<lun>` and a random part).

What the seed gets wrong here, ours does not: the clone's read-only disks stay read-only and it is given the right to
them; a disk without a type is a virtual disk; nothing is attached over a disk that the document has; a physical disk
that is written to cannot be copied, and is refused; and if anything fails, the copies, the folders and the rights are
gone again and the document is as it was. `seed_compatible=True` builds the document that the seed builds.

Source: hcsshim internal/uvm/scsi.go (SCSIMount.Clone), internal/uvm/template.go and internal/clone/registry.go, 2021.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from utilityvm.errors import AlreadyAttached, HostRefused, InvalidRequest, NotSupported, ProtocolError, UtilityVMError
from utilityvm.hosts.hcs import gob, winpath
from utilityvm.hosts.hcs.documents import Attachment, Schema, controller_name
from utilityvm.hosts.hcs.gob import SCSIMount
from utilityvm.log import logger
from utilityvm.scsi.ports import AttachmentType, DiskRecord, MountConfig, MountRecord, Record
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState

__all__ = [
    "TEMPLATE_VERSION",
    "Clone",
    "CloneFiles",
    "Document",
    "LocalFiles",
    "SCSIMount",
    "TemplateConfig",
    "clone_disks",
    "load",
    "mounts_of",
    "save",
    "template_config",
]

TEMPLATE_VERSION: Final = 1

# All that hcsshim's template has. Another name is a damaged one, and its disks would be left out of a clone.
# Source: hcsshim internal/clone/registry.go, TemplateConfig and the types that it registers.
_FIELDS: Final[frozenset[str]] = frozenset(
    {
        "SerialVersionID",
        "TemplateUVMID",
        "TemplateUVMResources",
        "TemplateUVMCreateOpts",
        "TemplateContainerID",
        "TemplateContainerSpec",
    }
)
_OTHER_RESOURCES: Final = frozenset({"*uvm.VSMBShare"})

_COPY_CHUNK_BYTES: Final = 4 << 20

Document: TypeAlias = dict[str, Any]  # a compute-system document as plain JSON, its members in their order

_log = logger(__name__)


# The template.


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateConfig:
    """What hcsshim's `TemplateConfig` says that is ours to use. Its options and container spec stay Go's."""

    vm_id: str
    mounts: tuple[SCSIMount, ...]  # in slot order
    container_id: str = ""
    others: tuple[str, ...] = ()  # resources of other kinds, by their registered names, such as *uvm.VSMBShare


def template_config(vm_id: str, mounts: Iterable[SCSIMount], *, container_id: str = "") -> TemplateConfig:
    """The template of a VM with these disks: the seed's `GenerateTemplateConfig`.

    Raises:
        InvalidRequest: a slot does not exist.
        AlreadyAttached: two disks have the same slot.
    """
    by_slot: dict[Slot, SCSIMount] = {}
    for mount in mounts:
        if mount.slot in by_slot:
            raise _occupied(mount, by_slot[mount.slot].host_path)
        by_slot[mount.slot] = mount
    return TemplateConfig(
        vm_id=vm_id, mounts=tuple(by_slot[slot] for slot in sorted(by_slot)), container_id=container_id
    )


def mounts_of(records: Iterable[Record]) -> list[SCSIMount]:
    """The disks of a VM as a template keeps them, from its journal: each with the first guest path it is mounted at.

    Raises:
        NotSupported: a disk is not simply attached, or has a mount that a template of hcsshim's cannot say.
    """
    disks: dict[str, DiskRecord] = {}
    mounts: dict[str, MountRecord] = {}
    for record in records:
        if isinstance(record, DiskRecord):
            if record.state != DiskState.ATTACHED:
                raise NotSupported(f"{record.host_path} is {record.state}", slot=record.slot, remedy="wait until it is")
            disks[record.attachment] = record
        elif isinstance(record, MountRecord):
            if record.state != MountState.MOUNTED or record.attachment in mounts:
                raise NotSupported(
                    f"a template has one mount of a disk, and no {record.state} one", remedy="release the others"
                )
            if record.config != MountConfig(read_only=record.config.read_only, options=record.config.options):
                raise NotSupported(
                    f"the mount at {record.guest_path} has settings that a template cannot say",
                    remedy="use plain mounts of whole disks",
                )
            mounts[record.attachment] = record
    return [
        SCSIMount(
            host_path=disk.host_path,
            uvm_path=str(mounts[name].guest_path) if name in mounts else "",
            controller=disk.slot.controller,
            lun=disk.slot.lun,
            read_only=disk.read_only,
            attachment_type=disk.kind.value,
        )
        for name, disk in disks.items()
    ]


def save(config: TemplateConfig) -> bytes:
    """The template as hcsshim's `FetchTemplateConfig` reads it.

    Raises:
        InvalidRequest: it has resources of other kinds, which we cannot write; or as `gob.encode`.
    """
    if config.others:
        raise InvalidRequest(f"template {config.vm_id} has {', '.join(config.others)}, which only hcsshim can write")
    return gob.encode_outer(
        gob.Form.STRUCT_WITH_INTERFACE_SLICE,
        config.mounts,
        name="TemplateConfig",
        fields={
            "SerialVersionID": TEMPLATE_VERSION,
            "TemplateUVMID": config.vm_id,
            "TemplateUVMResources": config.mounts,
            "TemplateContainerID": config.container_id,
        },
    )


def load(data: bytes) -> TemplateConfig:
    """The template that `save`, or hcsshim's `SaveTemplateConfig`, wrote.

    Raises:
        ProtocolError: it is none, is of another version, has two disks at one slot, a disk that cannot be, or a field
            or a resource that hcsshim's templates do not have.
    """
    value = gob.decode_value(data)
    if not isinstance(value, dict):
        raise ProtocolError("not a template: its gob holds no struct")
    if unknown := value.keys() - _FIELDS:
        raise ProtocolError(f"not a template: hcsshim's have no field {min(unknown)[:100]!a}")
    version, vm_id, container_id = (
        value.get(name, default)
        for name, default in (("SerialVersionID", 0), ("TemplateUVMID", ""), ("TemplateContainerID", ""))
    )
    if version != TEMPLATE_VERSION:
        raise ProtocolError(f"a template of version {version!r}, and version {TEMPLATE_VERSION} is known")
    resources = value.get("TemplateUVMResources", [])
    if not isinstance(vm_id, str) or not isinstance(container_id, str) or not isinstance(resources, list):
        raise ProtocolError("not a template: its fields are of other types")
    mounts: list[SCSIMount] = []
    others: list[str] = []
    for resource in resources:
        if isinstance(resource, gob.Boxed) and resource.name in _OTHER_RESOURCES:
            others.append(resource.name)
        else:
            mounts.append(gob.as_mount(resource))
    try:
        config = template_config(vm_id, mounts, container_id=container_id)
    except AlreadyAttached as error:
        raise ProtocolError(f"not a template: {error}") from error
    return dataclasses.replace(config, others=tuple(others))


# The clone.


class CloneFiles(Protocol):
    """What cloning asks of the host's files. Paths are Windows paths; each call may raise OSError or HostRefused."""

    def make_folder(self, parent: str, prefix: str) -> str:
        """Make a new folder below `parent`, its name `prefix` and a random part; its path."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy a file. If that fails there is no more at `target` than before; nothing is copied over a file."""
        ...

    def grant(self, vm_id: str, path: str) -> None:
        """Give the VM of that id the right to the file."""
        ...

    def revoke(self, vm_id: str, path: str) -> None:
        """Take it back."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file. None there is done."""
        ...

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder. None there is done."""
        ...


class LocalFiles:
    """The files of this machine; `grant` and `revoke` change who may open them, as `computecore` does on Windows."""

    def __init__(self, grant: Callable[[str, str], None], revoke: Callable[[str, str], None]) -> None:
        self.grant = grant
        self.revoke = revoke

    def make_folder(self, parent: str, prefix: str) -> str:
        return tempfile.mkdtemp(prefix=prefix, dir=parent)

    def copy(self, source: str, target: str) -> None:
        with open(source, "rb") as original:  # noqa: PTH123 - Path would take a Windows path apart elsewhere
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            try:
                with os.fdopen(descriptor, "wb") as copied:
                    shutil.copyfileobj(original, copied, _COPY_CHUNK_BYTES)
                    copied.flush()
                    os.fsync(copied.fileno())
            except BaseException:
                os.unlink(target)  # noqa: PTH108
                raise

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108

    def remove_folder(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)  # noqa: PTH106


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A clone's disks: the document to create it from, what it has, and what belongs to it alone."""

    document: Document
    mounts: tuple[SCSIMount, ...]  # each with one reference
    copies: tuple[str, ...]  # files, to be removed with the clone
    folders: tuple[str, ...]  # likewise
    granted: tuple[str, ...]  # paths that the clone was given the right to


def clone_disks(
    mounts: Iterable[SCSIMount],
    *,
    document: Document,
    scratch_folder: str,
    clone_id: str,
    files: CloneFiles,
    schema: Schema = Schema.SEED,
    seed_compatible: bool = False,
) -> Clone:
    """Copy and share the template's disks for the clone, and add them to its compute-system `document`.

    The given document is not changed; the clone's is a new one. On failure nothing is left of what was made; what
    cannot be cleaned up is logged. Blocks for as long as copying takes: call it from a thread.

    `seed_compatible`: the attachments have only type and path, as the seed's; a disk in the document is replaced; the
    clone is given no right to what it shares.

    Raises:
        InvalidRequest: a slot does not exist; or the scratch folder is not absolute.
        AlreadyAttached: a slot is taken, in the document or by another of the disks.
        NotSupported: a physical disk that is written to.
        HostRefused: a copy, a folder or a grant failed.
    """
    mounts = tuple(mounts)
    _check(mounts, document, schema, scratch_folder, seed_compatible=seed_compatible)
    with ExitStack() as undo:
        work = _Work(files, clone_id, scratch_folder, undo)
        cloned = tuple(work.clone(mount, seed_compatible=seed_compatible) for mount in mounts)
        new = _with_disks(document, cloned, schema, seed_compatible=seed_compatible)
        undo.pop_all()
    return Clone(
        document=new,
        mounts=cloned,
        copies=tuple(work.copies),
        folders=tuple(work.folders),
        granted=tuple(work.granted),
    )


class _Work:
    """What is done for one clone, and how it is undone."""

    def __init__(self, files: CloneFiles, clone_id: str, scratch_folder: str, undo: ExitStack) -> None:
        self._files = files
        self._id = clone_id
        self._scratch = scratch_folder
        self._undo = undo
        self.copies: list[str] = []
        self.folders: list[str] = []
        self.granted: list[str] = []

    def clone(self, mount: SCSIMount, *, seed_compatible: bool) -> SCSIMount:
        path = mount.host_path if mount.read_only else self._copy(mount)
        shares_with_rights = mount.read_only and not seed_compatible and not _is_extensible(mount)
        if not mount.read_only or shares_with_rights:
            self._grant(path)
        kind = mount.attachment_type
        if not seed_compatible:
            kind = kind or AttachmentType.VIRTUAL_DISK.value
        return dataclasses.replace(mount, host_path=path, attachment_type=kind)

    def _copy(self, mount: SCSIMount) -> str:
        folder = self._scratch
        try:
            if mount.slot != (0, 0):
                folder = self._files.make_folder(self._scratch, f"clone-mount-{mount.controller}-{mount.lun}")
                self.folders.append(folder)
                self._undo.callback(_quietly, self._files.remove_folder, folder)
            target = winpath.join(folder, winpath.base(mount.host_path))
            self._files.copy(mount.host_path, target)
            self.copies.append(target)
            self._undo.callback(_quietly, self._files.remove, target)
        except OSError as error:
            raise HostRefused(
                f"clone {self._id}: copy {mount.host_path}: {error.strerror or error}", host_path=mount.host_path
            ) from error
        return target

    def _grant(self, path: str) -> None:
        try:
            self._files.grant(self._id, path)
        except OSError as error:
            raise HostRefused(
                f"clone {self._id}: grant the right to {path}: {error.strerror or error}", host_path=path
            ) from error
        self.granted.append(path)
        self._undo.callback(_quietly, self._files.revoke, self._id, path)


def _quietly(undo: Any, *arguments: str) -> None:
    try:
        undo(*arguments)
    except (OSError, UtilityVMError) as error:
        _log.warning("a failed clone leaves %s behind: %s", arguments[-1], error)


def _check(
    mounts: tuple[SCSIMount, ...], document: Document, schema: Schema, scratch_folder: str, *, seed_compatible: bool
) -> None:
    section = _section(document)
    taken: dict[Slot, str] = {}
    if not seed_compatible and not winpath.is_absolute(scratch_folder):
        raise InvalidRequest(f"the scratch folder {scratch_folder!r} is not absolute", remedy="give its whole path")
    for mount in mounts:
        slot = mount.slot
        there = _attachments(section, slot, schema).get(str(slot.lun))
        if seed_compatible:
            continue
        if slot in taken:
            raise _occupied(mount, taken[slot])
        if there is not None:
            raise _occupied(mount, str(there.get("Path", "")) if isinstance(there, dict) else "")
        taken[slot] = mount.host_path
        if not mount.read_only and (mount.attachment_type == AttachmentType.PASS_THRU or _is_extensible(mount)):
            raise NotSupported(
                f"{mount.host_path} is a {mount.attachment_type} disk and written to: it cannot be copied for a clone",
                slot=slot,
                host_path=mount.host_path,
                remedy="attach it read-only in the template, or after cloning",
            )


def _section(document: Document) -> Document:
    section = document
    for name in ("VirtualMachine", "Devices", "Scsi"):
        section = section.get(name) or {}
        if not isinstance(section, dict):
            raise InvalidRequest(f"{name} of the compute-system document is no object")
    return section


def _attachments(section: Document, slot: Slot, schema: Schema) -> Document:
    scsi = section.get(controller_name(slot.controller, schema)) or {}
    attachments = scsi.get("Attachments") or {} if isinstance(scsi, dict) else None
    if not isinstance(attachments, dict):
        raise InvalidRequest(f"controller {slot.controller} of the compute-system document is no controller")
    return attachments


def _with_disks(
    document: Document, mounts: tuple[SCSIMount, ...], schema: Schema, *, seed_compatible: bool
) -> Document:
    """A copy of the document with the disks in it, its SCSI part in Go's order."""
    section = _section(document)
    controllers: dict[str, Document] = {
        name: {lun: _canonical(disk) for lun, disk in (controller.get("Attachments") or {}).items()}
        for name, controller in section.items()
    }
    for mount in mounts:
        disks = controllers.setdefault(controller_name(mount.controller, schema), {})
        disks[str(mount.lun)] = msgspec.to_builtins(_attachment(mount, seed_compatible=seed_compatible))
    scsi = {
        name: {**section.get(name, {}), "Attachments": dict(sorted(disks.items()))}
        for name, disks in sorted(controllers.items())
    }
    machine = dict(document.get("VirtualMachine") or {})
    devices = dict(machine.get("Devices") or {})
    if scsi:
        devices = _placed(devices, scsi)
    return {**document, "VirtualMachine": {**machine, "Devices": devices}}


def _placed(devices: dict[str, Any], scsi: dict[str, Any]) -> dict[str, Any]:
    """The devices with `Scsi` where Go writes it: behind ComPorts and VirtioSerial, before all others."""
    if "Scsi" in devices:
        return {**devices, "Scsi": scsi}
    first = {name: devices[name] for name in devices if name in ("ComPorts", "VirtioSerial")}
    return {**first, "Scsi": scsi, **{name: value for name, value in devices.items() if name not in first}}


def _canonical(disk: Any) -> Any:
    """An attachment as Go writes it, if it has no member that we do not know."""
    known = {field.encode_name for field in msgspec.structs.fields(Attachment)}
    if not isinstance(disk, dict) or not known.issuperset(disk):
        return disk
    try:
        return msgspec.to_builtins(msgspec.convert(disk, Attachment))
    except msgspec.ValidationError:
        return disk


def _attachment(mount: SCSIMount, *, seed_compatible: bool) -> Attachment:
    if seed_compatible:
        return Attachment(type=mount.attachment_type, path=mount.host_path)
    return Attachment(type=mount.attachment_type, path=mount.host_path, read_only=mount.read_only)


def _is_extensible(mount: SCSIMount) -> bool:
    return mount.attachment_type == AttachmentType.EXTENSIBLE_VIRTUAL_DISK


def _occupied(mount: SCSIMount, by: str) -> AlreadyAttached:
    return AlreadyAttached(
        f"{mount.host_path} cannot be at {mount.slot}: {by or 'another disk'} is",
        slot=mount.slot,
        host_path=mount.host_path,
    )
