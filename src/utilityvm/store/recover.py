"""Opens the store; makes it anew where it is damaged, from what the running VMs have beside their sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from utilityvm import paths
from utilityvm.errors import StoreDamaged
from utilityvm.log import logger
from utilityvm.pids import is_running
from utilityvm.store.catalog import Store

_log = logger(__name__)


def open_store(path: Path | None = None) -> Store:
    """The store. A damaged one is kept beside it under another name, and the VMs that run are entered into a new one.

    Which disks those have is not known then: they are found when the VM is opened.

    Raises:
        StoreError: it is another program's, a later version's, or cannot be read.
        SetupError: its folder cannot be used.
    """
    try:
        return Store.open(path)
    except StoreDamaged as error:
        _log.warning("%s", error)
        store = Store.open(path)
        for record in _running():
            if store.restore(record):
                _log.warning("VM %s was found running", record["name"])
        return store


def _running() -> Iterator[Mapping[str, Any]]:
    for path in sorted((paths.runtime_dir() / "vms").glob(f"*/{paths.RECORD_FILE}")):
        try:
            record = cast(dict[str, Any], json.loads(path.read_text()))
            process = record["process"]
            if record["name"] == path.parent.name and is_running(int(process["pid"]), str(process["started"])):
                yield record
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s cannot be read: %s", path, error)
