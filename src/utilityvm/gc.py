"""What is left of things that are gone: found by `leftovers`, removed by `remove`. Never a disk of the user's.

Everything here was made by utilityvm, in its own folders, and is something that nobody refers to any more: no VM of the
store, no template, no process. What somebody owns or works on at this moment is left alone, and a clock is not asked.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from utilityvm import lifecycle, paths
from utilityvm.errors import UtilityVMError, VMNotFound, VMOwned
from utilityvm.guestimage import build
from utilityvm.log import logger
from utilityvm.store import Store, StoredVM
from utilityvm.store.ownership import owner_of
from utilityvm.templates import catalog

_log = logger(__name__)


class Kind(StrEnum):
    VM = "VM"  # dead: its record, sockets, log and overlays
    FOLDER = "runtime folder"  # of a VM without a record
    OVERLAYS = "overlays"  # of a clone without a record
    TEMPLATE = "template"  # whose saving or removing was cut short
    IMAGE = "guest image"  # that neither new VMs, nor one that runs, nor a template uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that nobody refers to."""

    kind: Kind
    name: str
    path: Path
    size_bytes: int  # on the storage


def leftovers(store: Store) -> list[Leftover]:
    """All that can go, in the order in which it is removed. Nothing is changed."""
    vms = store.vms()
    return [
        *(_leftover(Kind.VM, vm.name, paths.vm_dir(vm.name)) for vm in vms if _is_left(vm)),
        *_folders(vms),
        *_overlays(vms),
        *(_leftover(Kind.TEMPLATE, path.name, path) for path in catalog.leftovers()),
        *_images(vms),
    ]


async def remove(leftover: Leftover, store: Store) -> bool:
    """Remove it, if it is still one. False: somebody took it up meanwhile, or it is gone.

    Raises:
        UtilityVMError: it cannot be removed; says why.
    """
    if leftover not in leftovers(store):
        return False
    match leftover.kind:
        case Kind.VM:
            try:
                record, ownership = await lifecycle.own(store, leftover.name, wait_s=0.0)
            except (VMOwned, VMNotFound):
                return False
            try:
                if not _is_dead(record):
                    return False
                await lifecycle.clear(record, store)
                ownership.release(remove=True)
            finally:
                ownership.release()
        case Kind.FOLDER:
            await lifecycle.sweep(store, leftover.name)
        case Kind.TEMPLATE:
            catalog.remove_leftover(leftover.path)
        case Kind.OVERLAYS | Kind.IMAGE:
            shutil.rmtree(leftover.path, ignore_errors=True)
    _log.info("removed the %s %s", leftover.kind, leftover.name)
    return not leftover.path.exists()


def _is_left(vm: StoredVM) -> bool:
    return _is_dead(vm) and owner_of(paths.vm_dir(vm.name)) is None


def _is_dead(vm: StoredVM) -> bool:
    """Also of one whose starter died before its QEMU was written down: `clear` looks for that one by its UUID."""
    return not vm.is_alive()


def _folders(vms: list[StoredVM]) -> list[Leftover]:
    known = {vm.name for vm in vms}
    parent = paths.runtime_dir() / "vms"
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [
        _leftover(Kind.FOLDER, folder.name, folder)
        for folder in folders
        if folder.name not in known and owner_of(folder) is None and not (folder / paths.RECORD_FILE).exists()
    ]


def _overlays(vms: list[StoredVM]) -> list[Leftover]:
    known = {vm.uuid for vm in vms}
    parent = paths.overlays_dir("-").parent
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [_leftover(Kind.OVERLAYS, folder.name, folder) for folder in folders if folder.name not in known]


def _images(vms: list[StoredVM]) -> list[Leftover]:
    """Old guest images. If a VM runs and does not say from which image, all stay; so does a damaged template's."""
    current = build.find()
    running = [vm for vm in vms if vm.is_alive()]
    used = {str(root) for vm in running if (root := vm.config.get("root"))}
    try:
        used |= {str(catalog.load(name).root) for name in catalog.names()}
    except UtilityVMError as error:
        _log.warning("the guest images stay: %s", error)
        return []
    if current is None or any("root" not in vm.config and "clone" not in vm.config for vm in running):
        return []
    return [
        _leftover(Kind.IMAGE, image.key, image.root.parent)
        for image in build.catalog()
        if image.key != current.key and str(image.root) not in used
    ]


def _leftover(kind: Kind, name: str, path: Path) -> Leftover:
    files = [entry.lstat() for entry in path.rglob("*")] if path.is_dir() else []
    return Leftover(kind=kind, name=name, path=path, size_bytes=sum(status.st_blocks * 512 for status in files))
