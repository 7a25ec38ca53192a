"""Manifests of templates that could be."""

from __future__ import annotations

from pathlib import Path

from utilityvm.scsi.mount_config import MountConfig, ScratchKey, Verity
from utilityvm.scsi.ports import AttachmentType, DiskFormat, VMAccess
from utilityvm.templates.manifest import (
    VERSION,
    DiskEntry,
    File,
    Fingerprint,
    LayerEntry,
    Manifest,
    MountEntry,
)


def layer(path: Path | str, *, inode: int = 1) -> LayerEntry:
    return LayerEntry(
        path=str(path),
        format=DiskFormat.RAW,
        kind=AttachmentType.VIRTUAL_DISK,
        fingerprint=Fingerprint(device=1, inode=inode, size_bytes=512, mtime_ns=1),
    )


def mount(name: str, path: str) -> MountEntry:
    return MountEntry(
        mount=name,
        guest_path=path,
        config=MountConfig(
            partition=1,
            read_only=True,
            options=("noatime",),
            filesystem="ext4",
            encryption=ScratchKey(),
            verity=Verity(root_hash=b"\x00\xff", hash_offset_bytes=4096),
        ),
    )


def manifest(name: str = "warm", **changes: object) -> Manifest:
    file = File(fingerprint=Fingerprint(device=1, inode=2, size_bytes=3, mtime_ns=4), digest="00")
    disk = DiskEntry(
        attachment="a1",
        controller=1,
        lun=2,
        serial="0123456789abcdef",
        host_path="/images/a.raw",
        read_only=False,
        access=VMAccess.INDIVIDUAL,
        size_bytes=512,
        logical_block_bytes=512,
        layers=(layer("/images/a.raw", inode=7),),
        mounts=(mount("m1", "/data"), mount("m2", "/more")),
    )
    values: dict[str, object] = {
        "version": VERSION,
        "name": name,
        "uuid": "11111111-1111-4111-8111-111111111111",
        "vm": "warmed",
        "vm_uuid": "22222222-2222-4222-8222-222222222222",
        "created": 1.5,
        "memory_mib": 256,
        "cpus": 1,
        "controllers": 4,
        "qemu_version": "7.2.0",
        "machine": "pc-q35-7.2",
        "accelerator": "tcg",
        "cpu": "max",
        "host_cpu": "",
        "root": layer("/cache/root.img", inode=9),
        "kernel": "6.1.0",
        "memory": file,
        "state": file,
        "parent": None,
        "disks": (disk,),
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]
