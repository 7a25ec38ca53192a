"""Which QEMU this machine has, and what was found out about it: kept in the cache until the program changes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from utilityvm.errors import SetupError
from utilityvm.log import logger
from utilityvm.machine import paths
from utilityvm.machine.programs import find_program, run
from utilityvm.machine.threads import in_thread

_VERSION: Final = re.compile(r"version ([0-9]+\.[0-9]+\.[0-9]+)")
_Q35_ALIAS: Final = re.compile(r"^q35 .*\(alias of (pc-q35-[0-9.]+)\)", re.MULTILINE)

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Emulator:
    """A QEMU program. `machine` is the versioned name of its newest q35: the plain one changes under a template."""

    path: Path
    version: str
    machine: str
    is_named: bool = False  # by UTILITYVM_QEMU

    @property
    def key(self) -> str:
        """Another text as soon as the program is another one."""
        status = self.path.stat()
        return f"{self.path}:{status.st_mtime_ns}:{status.st_size}"


async def find() -> Emulator:
    """The QEMU that UTILITYVM_QEMU names, or else the installed one.

    Raises:
        SetupError: there is none, or it is not one that we can use.
    """
    return await in_thread(_find)


def _find() -> Emulator:
    named = os.environ.get("UTILITYVM_QEMU")
    path = Path(named) if named else find_program("qemu-system-x86_64", package="qemu-system-x86")
    if not os.access(path, os.X_OK):
        raise SetupError(f"UTILITYVM_QEMU is {path}, which is no program", remedy="unset it, or correct it")
    path = path.absolute()
    key = Emulator(path, "", "").key
    known = recall(f"emulator {key}")
    if isinstance(known, dict):
        fields = cast(dict[str, Any], known)
        return Emulator(path, str(fields["version"]), str(fields["machine"]), is_named=bool(named))
    version = _VERSION.search(run([path, "--version"], timeout_s=10).decode())
    machine = _Q35_ALIAS.search(run([path, "-machine", "help"], timeout_s=10).decode())
    if not version or not machine:
        raise SetupError(f"{path} is not a QEMU with a q35 machine", remedy="apt-get install qemu-system-x86")
    remember(f"emulator {key}", {"version": version[1], "machine": machine[1]})
    return Emulator(path, version[1], machine[1], is_named=bool(named))


def recall(key: str) -> object:
    """What was remembered under `key`, or None. Blocks, as `remember` does."""
    return _read().get(key)


def remember(key: str, value: object) -> None:
    """Keep `value` in place of all that was known by another key of the same first word.

    A cache that cannot be written is no error: things are found out again next time.
    """
    kept = {name: old for name, old in _read().items() if name.split(" ")[0] != key.split(" ")[0]}
    path = _cache_file()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        paths.make_folder(path.parent)
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({**kept, key: value}))
        temporary.replace(path)
    except OSError as error:
        _log.debug("cannot write %s: %s", path, error)


def boot_id() -> str:
    """What names this boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown boot"


def _read() -> dict[str, object]:
    try:
        document = json.loads(_cache_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, object], document) if isinstance(document, dict) else {}


def _cache_file() -> Path:
    return paths.cache_dir() / "qemu.json"
