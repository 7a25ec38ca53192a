"""Opens the store; makes it anew where it is damaged or gone, from what the running VMs have beside their sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from utilityvm.errors import SetupError, StoreDamaged
from utilityvm.log import logger
from utilityvm.machine import paths, runtime
from utilityvm.machine.processes import Life, life_of
from utilityvm.store.catalog import Store

_log = logger(__name__)


def open_store(path: Path | None = None) -> Store:
    """The store. A damaged one is kept beside it under another name, and a new one takes its place.

    VMs that run and are not in it, because it was damaged or removed, are entered again. Which disks they have is not
    known then: those are found when the VM is opened.

    Raises:
        StoreError: it is another program's, a later version's, or cannot be read.
        SetupError: its folder cannot be used.
    """
    try:
        store = Store.open(path)
    except StoreDamaged as error:
        _log.warning("%s", error)
        store = Store.open(path)
    try:
        _restore(store)
    except BaseException:
        store.close()
        raise
    return store


def copy_of(folder: Path, store: Path) -> Mapping[str, Any] | None:
    """The copy of its record in a VM's runtime folder. None: there is none that can be read, or of another store."""
    path = folder / paths.RECORD_FILE
    try:
        record = cast(dict[str, Any], json.loads(runtime.record(folder, paths.RECORD_FILE)))
        is_ours = record["name"] == folder.name and record["store"] == str(store)
        return record if is_ours and {"uuid", "created", "config", "process"} <= record.keys() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SetupError) as error:
        _log.warning("%s cannot be read: %s", path, error)
        return None


def is_running_copy(record: Mapping[str, Any]) -> bool:
    """May the QEMU run that the copy names? Also true if that cannot be told."""
    try:
        return life_of(int(record["process"]["pid"]), str(record["process"]["started"])) is not Life.ENDED
    except (ValueError, KeyError, TypeError):
        return False


def _restore(store: Store) -> None:
    known = {vm.name: vm for vm in store.vms()}
    try:
        folders = runtime.vm_folders(paths.runtime_dir() / "vms")
    except (SetupError, OSError) as error:
        _log.warning("VMs that the store does not know are not looked for: %s", error)
        return
    for folder in folders:
        vm = known.get(folder.name)
        if vm is not None and vm.damage is None:
            continue
        record = copy_of(folder, store.path)
        if record is None or not is_running_copy(record):
            continue
        if vm is not None:
            store.heal(vm, record)
            _log.warning(
                "the store's record of VM %s was damaged, and was replaced by its copy: %s", vm.name, vm.damage
            )
        elif store.restore(record):
            _log.warning("VM %s was found running", record["name"])
