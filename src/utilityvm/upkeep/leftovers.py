"""What is left of things that are gone: found by `find_leftovers`, removed by `remove_leftover`. Never a disk of the
user's.

Everything here was made by utilityvm, in its own folders, and is something that nobody refers to any more: no VM of the
store, no template, no process. What somebody owns or works on at this moment is left alone, and a clock is not asked.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

from utilityvm.errors import UtilityVMError, VMNotFound, VMOwned
from utilityvm.guestimage import build, cache
from utilityvm.log import logger
from utilityvm.machine import paths, runtime
from utilityvm.machine.oserrors import as_ours, typed
from utilityvm.machine.processes import values_of
from utilityvm.machine.threads import in_thread
from utilityvm.store import Store, StoredVM, recover
from utilityvm.store.ownership import owner_of
from utilityvm.tasks import Deadline
from utilityvm.templates import catalog
from utilityvm.vm import lifecycle
from utilityvm.vm.arguments import checked

REMOVE_S: Final = 60.0  # a template, or the overlays of a clone, may be large
_AT_ONCE: Final = 8  # VMs: most of the time of each is waiting for threads

_log = logger(__name__)


class LeftoverKind(StrEnum):
    """What was left over."""

    VM = "VM"  # dead: its record, sockets, log and overlays
    FOLDER = "runtime folder"  # of a VM without a record
    OVERLAYS = "overlays"  # of a clone without a record
    TEMPLATE = "template"  # whose saving or removing was cut short
    IMAGE = "guest image"  # that neither new VMs, nor one that runs, nor a template uses
    BUILD = "guest image build"  # one that was cut short, or the base of images that are not built any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that nobody refers to."""

    kind: LeftoverKind
    name: str
    path: Path
    size_bytes: int  # on the storage


@typed
def find_leftovers() -> list[Leftover]:
    """All that can go, in the order in which to remove it. Nothing is changed. It reads folders, so it blocks.

    Raises:
        StoreError, SetupError: the store cannot be read.
    """
    with recover.open_store() as store:
        return found_in(store)


@typed
@checked
async def remove_leftover(leftover: Leftover, *, timeout_s: float = REMOVE_S) -> bool:
    """Remove it, if it is still one. False: another process took it up meanwhile, or it is gone.

    Raises:
        UtilityVMError: it cannot be removed; the others can all the same.
        DeadlineExceeded: not done within `timeout_s` seconds; call again.
    """
    limit = Deadline(timeout_s).limit(f"the {leftover.kind} {leftover.name} was not removed")
    async with limit, _opened() as store:
        return await remove(leftover, store)


@typed
async def remove_leftovers(leftovers: Iterable[Leftover]) -> list[bool | UtilityVMError]:
    """As `remove_leftover` each, and quick for many; instead of one that cannot be removed its error is in the list.

    Dead VMs are removed some at a time, and the rest after them, in the order of the list. Cancelled, those that were
    removed are gone, and the others can be removed by another call.
    """
    ordered = list(enumerate(leftovers))
    results: dict[int, bool | UtilityVMError] = {}
    async with _opened() as store:

        async def work(queue: Iterator[tuple[int, Leftover]]) -> None:
            for number, one in queue:
                try:
                    async with Deadline(REMOVE_S).limit(f"the {one.kind} {one.name} was not removed"):
                        results[number] = await remove(one, store)
                except UtilityVMError as error:
                    results[number] = error
                except OSError as error:
                    results[number] = as_ours(error, f"removing the {one.kind} {one.name}")

        vms = iter([item for item in ordered if item[1].kind is LeftoverKind.VM])
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work(vms))
        await work(iter([item for item in ordered if item[1].kind is not LeftoverKind.VM]))
    return [results[number] for number, _ in ordered]


@asynccontextmanager
async def _opened() -> AsyncIterator[Store]:
    store = await in_thread(recover.open_store, late=Store.close)
    try:
        yield store
    finally:  # behind the piece of work that a cancelled caller has left
        await store.lane.run(store.close)


def found_in(store: Store) -> list[Leftover]:
    """As `find_leftovers`, of a store that is open."""
    # The folders first: those of a VM that starts meanwhile are not looked at then.
    folders, overlays = runtime.vm_folders(paths.runtime_dir() / "vms"), _entries(paths.overlays_dir("-").parent)
    vms = store.vms()
    names, uuids = {vm.name for vm in vms}, {vm.uuid for vm in vms}
    folders = [one for one in folders if one.name not in names and _is_nobodys(one, store)]
    overlays = [one for one in overlays if one.name not in uuids]
    # One that is in no store may run all the same: the store was lost, and the copy of its record too.
    running = values_of("-uuid") if overlays else set()
    return [
        *(_leftover(LeftoverKind.VM, vm.name, paths.vm_dir(vm.name)) for vm in vms if _is_left(vm)),
        *(_leftover(LeftoverKind.FOLDER, one.name, one) for one in folders),
        *(_leftover(LeftoverKind.OVERLAYS, one.name, one) for one in overlays if one.name not in running),
        *(_leftover(LeftoverKind.TEMPLATE, path.name, path) for path in catalog.leftovers()),
        *_images(vms),
    ]


async def remove(leftover: Leftover, store: Store) -> bool:
    """As `remove_leftover`, in a store that is open."""
    match leftover.kind:
        case LeftoverKind.VM:
            if (is_done := await store.lane.run(_remove_dead, leftover.name, store)) is not None:
                return is_done
            try:
                record, ownership = await lifecycle.own(store, leftover.name, wait_s=0.0)
            except (VMOwned, VMNotFound):
                return False
            try:
                if not _is_dead(record):
                    return False
                await lifecycle.clear(record, store)
                await in_thread(partial(ownership.release, remove=True), always=True)
            finally:
                await in_thread(ownership.release, always=True)
        case LeftoverKind.FOLDER:
            if not await in_thread(_is_still_nobodys, leftover.path, store):
                return False
            await lifecycle.sweep(store, leftover.name)
        case _:
            if not await store.lane.run(_remove_files, leftover, store):
                return False
    _log.info("removed the %s %s", leftover.kind, leftover.name)
    return not await in_thread(leftover.path.exists)


def _remove_dead(name: str, store: Store) -> bool | None:
    """Remove a dead VM in one go, for there may be thousands. None: of this one more has to be found out."""
    found = store.find(name)
    if found is None or not _is_left(found):
        return False
    return lifecycle.clear_at_once(found, store) or None


def _is_still_nobodys(folder: Path, store: Store) -> bool:
    return folder.is_dir() and _is_nobodys(folder, store)


def _remove_files(leftover: Leftover, store: Store) -> bool:
    """Remove what no VM has to be owned for. False: somebody took it up meanwhile, or it is gone."""
    if not leftover.path.exists():
        return False
    match leftover.kind:
        case LeftoverKind.TEMPLATE:
            if leftover.path not in catalog.leftovers():
                return False
            catalog.remove_leftover(leftover.path)
        case LeftoverKind.OVERLAYS:
            # A new clone has a new UUID, so this cannot be taken up; only a lost store could have found its VM again.
            if store.has_uuid(leftover.name) or leftover.name in values_of("-uuid"):
                return False
            _remove_tree(leftover.path)
        case _:
            if leftover not in _images(store.vms()):
                return False
            with cache.no_builder(_builders_lock()) as is_held:
                if not is_held:
                    return False
                _remove_tree(leftover.path)
    return True


def _is_left(vm: StoredVM) -> bool:
    return _is_dead(vm) and owner_of(paths.vm_dir(vm.name), vm.owner) is None


def _is_dead(vm: StoredVM) -> bool:
    """Also of one whose starter died before its QEMU was written down: `clear` looks for that one by its UUID.

    A damaged record says nothing about its VM: that one is left for `uvm stop`.
    """
    return vm.damage is None and not vm.is_alive()


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _is_nobodys(folder: Path, store: Store) -> bool:
    """True if no starting VM, no other store's VM and no running VM uses the folder."""
    if owner_of(folder) is not None:
        return False
    if not (folder / paths.RECORD_FILE).exists():
        return True
    copy = recover.copy_of(folder, store.path)
    return copy is not None and not recover.is_running_copy(copy)


def _images(vms: list[StoredVM]) -> list[Leftover]:
    """Old guest images, and what their builds left. All stay if somebody builds, or if it is unclear what is used."""
    if (used := _roots_in_use(vms)) is None:
        return []
    with cache.no_builder(_builders_lock()) as is_held:
        if not is_held:
            return []
        images, bases = paths.cache_dir() / "images", paths.cache_dir() / "bases"
        found = [_leftover(LeftoverKind.BUILD, path.name, path) for path in cache.unfinished(images, bases)]
        if (current := build.find()) is None:
            return found
        # An image of a user's own recipe stays until its user removes it: nobody else knows whether it is wanted.
        kept = {current.key, *(image.key for image in build.catalog() if image.recipe is not None)}
        old = [
            _leftover(LeftoverKind.IMAGE, path.name, path)
            for path in cache.whole_folders(images)
            if path.name not in kept and path not in used
        ]
        made_of = {image.base for image in build.catalog() if image.key in kept}
        found += [
            _leftover(LeftoverKind.BUILD, path.name, path)
            for path in cache.whole_folders(bases)
            if path.name not in made_of
        ]
        return found + old


def users_of_image(store: Store, folder: Path) -> list[str]:
    """The VMs and templates that the image in `folder` is of, as a message names them."""
    vms = [f"VM {vm.name}" for vm in store.vms() if not _is_left(vm) and _is_in(vm.config.get("root"), folder)]
    templates = [f"template {name}" for name in catalog.names() if _is_in(catalog.load(name).root, folder)]
    return vms + templates


def _is_in(root: object, folder: Path) -> bool:
    return root is not None and Path(str(root)).parent == folder


def _roots_in_use(vms: list[StoredVM]) -> set[Path] | None:
    """The folders of the images that VMs and templates use; None: one of them does not say which."""
    roots = [vm.config.get("root") for vm in vms if not _is_left(vm)]
    try:
        roots += [catalog.load(name).root for name in catalog.names()]
    except UtilityVMError as error:
        _log.warning("the guest images stay: %s", error)
        return None
    return None if None in roots else {Path(str(root)).parent for root in roots}


def _builders_lock() -> Path:
    return paths.cache_dir() / "images/.lock"


def _entries(parent: Path) -> list[Path]:
    return sorted(parent.iterdir()) if parent.is_dir() else []


def _leftover(kind: LeftoverKind, name: str, path: Path) -> Leftover:
    files = [entry.lstat() for entry in path.rglob("*")] if path.is_dir() else []
    return Leftover(kind=kind, name=name, path=path, size_bytes=sum(status.st_blocks * 512 for status in files))
