"""What is kept of VMs when a test fails: console, QMP transcript and journal, in files that the report names."""

from __future__ import annotations

import logging
import re
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from utilityvm import read_console
from utilityvm.errors import UtilityVMError
from utilityvm.store import SqliteJournal, Store

_LINES: Final = 500  # of each VM's transcript
_WIRE: Final = "utilityvm.hosts.qemu.qmp"


class Transcripts(logging.Filter):
    """The last lines that QEMU and we said to each other, for each VM.

    A filter of the logger that has them, so that no other handler gets more lines than it asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Mapping[str, deque[str]] = defaultdict(lambda: deque(maxlen=_LINES))
        self.heard: set[str] = set()  # the VMs that said something since it was cleared
        self._logger = logging.getLogger(_WIRE)
        self._level = self._logger.level

    def filter(self, record: logging.LogRecord) -> bool:
        vm = str(getattr(record, "fields", {}).get("vm"))
        self.heard.add(vm)
        self.lines[vm].append(f"{record.created:.6f} {record.getMessage()}")
        parent = self._logger.parent
        return parent is None or record.levelno >= parent.getEffectiveLevel()

    def __enter__(self) -> Transcripts:
        self._logger.setLevel(logging.DEBUG)
        self._logger.filters.insert(0, self)  # before one that lets nothing through
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)
        self._logger.setLevel(self._level)


def keep(folder: Path, store: Path, transcripts: Transcripts) -> list[Path]:
    """Write what there is of the store's VMs, and of those that were heard of, into `folder`; gives the files."""
    files: dict[str, str] = {}
    names: set[str] = set()
    try:
        with Store.open(store) as opened:
            for vm in opened.vms():
                names.add(vm.name)
                records = SqliteJournal(opened, vm).read()
                files[f"{vm.name}.journal"] = "\n".join([f"{vm}", *map(str, records)])
                files[f"{vm.name}.console"] = read_console(vm.name)
    except UtilityVMError as error:
        files["store"] = f"cannot be read: {error}"
    told = {name: lines for name, lines in transcripts.lines.items() if name in transcripts.heard or name in names}
    files |= {f"{name}.qmp": "\n".join(lines) for name, lines in told.items()}
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for name, text in files.items():
        path = folder / re.sub(r"[^\w.-]", "_", name)
        path.write_text(f"{text}\n")
        kept.append(path)
    return kept
