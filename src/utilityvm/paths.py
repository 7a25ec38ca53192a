"""Where things are on the host. Everything else asks here."""

from __future__ import annotations

import os
from pathlib import Path


def _folder(own: str, xdg: str, fallback: Path) -> Path:
    if chosen := os.environ.get(own):
        return Path(chosen)
    base = os.environ.get(xdg)
    return (Path(base) if base else fallback) / "utilityvm"


def cache_dir() -> Path:
    """Guest images and verdicts: whatever can be made again. UTILITYVM_CACHE_DIR, else XDG_CACHE_HOME."""
    return _folder("UTILITYVM_CACHE_DIR", "XDG_CACHE_HOME", Path.home() / ".cache")


def state_dir() -> Path:
    """The store. UTILITYVM_STATE_DIR, else XDG_STATE_HOME."""
    return _folder("UTILITYVM_STATE_DIR", "XDG_STATE_HOME", Path.home() / ".local/state")


def runtime_dir() -> Path:
    """Sockets and locks of running VMs, gone after a reboot. UTILITYVM_RUNTIME_DIR, else XDG_RUNTIME_DIR."""
    if os.geteuid() == 0 and "UTILITYVM_RUNTIME_DIR" not in os.environ:
        return Path("/run/utilityvm")
    return _folder("UTILITYVM_RUNTIME_DIR", "XDG_RUNTIME_DIR", Path(f"/tmp/utilityvm-{os.geteuid()}"))


def vm_dir(name: str) -> Path:
    """The runtime folder of one VM."""
    return runtime_dir() / "vms" / name
