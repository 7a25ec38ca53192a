"""What a template says of itself: a document that is written once, and validated whole before any of it is believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from utilityvm.errors import InvalidRequest, TemplateDamaged
from utilityvm.machine import oserrors
from utilityvm.machine.fileid import FileId, is_same
from utilityvm.scsi.mount_config import MountConfig, decode_hook, encode_hook
from utilityvm.scsi.older import FlatMount
from utilityvm.scsi.ports import AttachmentType, DiskFormat, VMAccess
from utilityvm.scsi.slot import Slot

VERSION: Final = 2
_encoder: Final = msgspec.json.Encoder(enc_hook=encode_hook)


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What tells cheaply that a file is the one that it was, and was not written to since."""

    device: int  # of the boot in which it was looked at
    inode: int
    size_bytes: int
    mtime_ns: int
    lasting: str | None = None  # `FileId.lasting`; also None in a manifest of an earlier version

    @classmethod
    def of(cls, fd: int) -> Fingerprint:
        """Of a block device only which one it is: its size and times are not in its inode."""
        file, status = FileId.of(fd), os.fstat(fd)
        is_block = stat.S_ISBLK(status.st_mode)
        return cls(
            device=file.device,
            inode=file.inode,
            size_bytes=0 if is_block else status.st_size,
            mtime_ns=0 if is_block else status.st_mtime_ns,
            lasting=file.lasting,
        )

    @classmethod
    def at(cls, path: Path) -> Fingerprint:
        """Raises:
        OSError: there is nothing, or its storage fails.
        """
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return cls.of(fd)
        finally:
            os.close(fd)

    def is_file(self, now: Fingerprint) -> bool | None:
        """Is the file that is so now the one of then? None if it cannot be told."""
        if self.lasting is not None and now.lasting is not None:
            return is_same(self.lasting, now.lasting)
        if (self.device, self.inode) == (now.device, now.inode):
            return True
        # Nothing tells a file apart for longer on its file system: then what it has in it does.
        return self.inode != 0 and self._state() == now._state()

    def is_unchanged(self, now: Fingerprint) -> bool:
        """Is it that file for certain, and not written to since?"""
        return self.is_file(now) is True and self._state() == now._state()

    def _state(self) -> tuple[int, int, int]:
        return self.inode, self.size_bytes, self.mtime_ns


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the template's own, with the digest of its content."""

    fingerprint: Fingerprint
    digest: str  # BLAKE2b-256, hexadecimal


class LayerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a disk's chain."""

    path: str
    format: DiskFormat
    kind: AttachmentType
    fingerprint: Fingerprint


class MountEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A mount that lives in the template's memory. Its key, if it has one, is a scratch key."""

    mount: str
    guest_path: str
    config: MountConfig


class _Disk(msgspec.Struct, frozen=True, kw_only=True):
    attachment: str
    controller: int
    lun: int
    serial: str
    host_path: str  # as whoever attached it wrote it
    read_only: bool
    access: VMAccess
    size_bytes: int
    logical_block_bytes: int
    layers: tuple[LayerEntry, ...]  # the top one first

    @property
    def slot(self) -> Slot:
        return Slot(self.controller, self.lun)


class DiskEntry(_Disk, frozen=True, kw_only=True):
    """A disk of the template, at the slot where the guest in it knows it."""

    mounts: tuple[MountEntry, ...]


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The template that the template's VM was a clone of; its disks are under this one's."""

    name: str
    uuid: str


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    name: str
    uuid: str
    vm: str  # the VM that it was
    vm_uuid: str
    created: float  # seconds since the epoch
    memory_mib: int
    cpus: int
    controllers: int
    qemu_version: str
    machine: str
    accelerator: str
    cpu: str  # the model that QEMU was told
    host_cpu: str  # the processor under it, where that shows through; else ""
    root: LayerEntry  # the guest image's root disk
    kernel: str  # the release that runs in it
    memory: File
    state: File
    parent: Parent | None


class Manifest(_Manifest, frozen=True, kw_only=True):
    """All of a template but the two files beside it."""

    disks: tuple[DiskEntry, ...]

    def chain(self) -> list[LayerEntry]:
        """Every file under the template that is not its own."""
        return [self.root, *(layer for disk in self.disks for layer in disk.layers)]


class _OlderDisk(_Disk, frozen=True, kw_only=True):
    """Of version 1, which had the settings of a mount beside its name."""

    mounts: tuple[FlatMount, ...]

    def now(self) -> DiskEntry:
        mounts = tuple(
            MountEntry(mount=one.mount, guest_path=one.guest_path, config=one.config()) for one in self.mounts
        )
        return DiskEntry(**{name: getattr(self, name) for name in _Disk.__struct_fields__}, mounts=mounts)


class _OlderManifest(_Manifest, frozen=True, kw_only=True):
    disks: tuple[_OlderDisk, ...]

    def now(self) -> Manifest:
        fields = {name: getattr(self, name) for name in _Manifest.__struct_fields__}
        return Manifest(**{**fields, "version": VERSION}, disks=tuple(disk.now() for disk in self.disks))


class _Versioned(msgspec.Struct):
    version: int


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(_encoder.encode(manifest), indent=2)


def _decode(data: bytes) -> Manifest:
    version = msgspec.json.decode(data, type=_Versioned).version
    if not 1 <= version <= VERSION:
        raise ValueError(f"it is of version {version}, and this utilityvm knows 1 to {VERSION}")
    if version == 1:
        return msgspec.json.decode(data, type=_OlderManifest).now()
    return msgspec.json.decode(data, type=Manifest, dec_hook=decode_hook)


def read(path: Path) -> Manifest:
    """Raises:
    FileNotFoundError: there is none.
    TemplateDamaged: it is not one, or of a later version; says where it is wrong.
    """
    try:
        data = path.read_bytes()
    except (NotADirectoryError, FileNotFoundError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        if error.errno in oserrors.OURS:
            raise oserrors.as_ours(error, "cannot read a template") from error
        raise TemplateDamaged(f"{path} cannot be read: {error.strerror}", remedy="is it yours?") from error
    return parse(data, where=str(path), name=path.parent.name)


def parse(data: bytes, *, where: str, name: str) -> Manifest:
    """Raises:
    TemplateDamaged: it is not a manifest of the template of that name, or of a later version; says where it is wrong.
    """
    try:
        manifest = _decode(data)
        if manifest.name != name:
            raise ValueError(f"it is of template {manifest.name!r}")
        _check(manifest)
    except (ValueError, InvalidRequest, RecursionError) as error:  # msgspec.DecodeError among them
        raise TemplateDamaged(
            f"{where} is not the manifest of a template: {error}", remedy="remove that folder, and save the VM anew"
        ) from error
    return manifest


def _check(manifest: Manifest) -> None:
    slots = [disk.slot for disk in manifest.disks]
    names = [disk.attachment for disk in manifest.disks]
    if len(set(slots)) != len(slots) or len(set(names)) != len(names):
        raise ValueError("two disks in one slot, or of one name")
    for disk in manifest.disks:
        Slot.checked(*disk.slot)
        if disk.controller >= manifest.controllers or not disk.layers or disk.size_bytes < 0:
            raise ValueError(f"the disk at {disk.slot}: no such controller, no file, or no size")
    paths = [mount.guest_path for disk in manifest.disks for mount in disk.mounts]
    if len(set(paths)) != len(paths) or not all(path.startswith("/") for path in paths):
        raise ValueError("two mounts at one guest path, or a relative one")
