"""Where things are on the host. Everything else asks here.

Each folder has a variable of its own, for tests and for several installations side by side, and follows the XDG base
directory specification otherwise. Asking makes no folder: who first needs one does.
"""

from __future__ import annotations

import os
from pathlib import Path

STORE_FILE = "state.db"
LOCK_FILE = "owner.lock"
RECORD_FILE = "vm.json"
SERVER_SOCKET = "api.sock"


def _folder(own: str, xdg: str, fallback: Path) -> Path:
    if chosen := os.environ.get(own):
        return Path(chosen).absolute()
    base = os.environ.get(xdg)
    # The specification: a relative path in these variables is to be ignored.
    return (Path(base) if base and Path(base).is_absolute() else fallback) / "utilityvm"


def cache_dir() -> Path:
    """Guest images and verdicts: whatever can be made again. UTILITYVM_CACHE_DIR, else XDG_CACHE_HOME."""
    return _folder("UTILITYVM_CACHE_DIR", "XDG_CACHE_HOME", Path.home() / ".cache")


def state_dir() -> Path:
    """The store. UTILITYVM_STATE_DIR, else XDG_STATE_HOME."""
    return _folder("UTILITYVM_STATE_DIR", "XDG_STATE_HOME", Path.home() / ".local/state")


def runtime_dir() -> Path:
    """Sockets and locks of running VMs. UTILITYVM_RUNTIME_DIR, else XDG_RUNTIME_DIR, else below the state folder.

    Root's is /run/utilityvm, unless UTILITYVM_RUNTIME_DIR says otherwise: XDG_RUNTIME_DIR may be another user's, whom
    root is for the moment (sudo). Never one in /tmp, which anybody could make first.
    """
    if chosen := os.environ.get("UTILITYVM_RUNTIME_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/run/utilityvm")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "utilityvm" if base and Path(base).is_absolute() else state_dir() / "run"


def store_file() -> Path:
    """The one database of this user's VMs."""
    return state_dir() / STORE_FILE


def templates_dir() -> Path:
    """The templates, a folder each."""
    return state_dir() / "templates"


def overlays_dir(uuid: str) -> Path:
    """The overlays of the clone that has this UUID."""
    return state_dir() / "overlays" / uuid


def vm_dir(name: str) -> Path:
    """The runtime folder of one VM."""
    return runtime_dir() / "vms" / name


def server_dir() -> Path:
    """The runtime folder of the server for this user, this store and this runtime folder."""
    import hashlib

    return runtime_dir() / "servers" / hashlib.sha256(os.fsencode(state_dir())).hexdigest()[:12]


def make_folder(folder: Path) -> None:
    """The folder is there, and open to nobody else if it is new; what was missing above it is writable to nobody else.

    The umask of many users leaves new folders to their group, in which anybody may be.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in folder.parents if not each.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
