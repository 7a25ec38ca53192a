"""How a command uses the server: each call blocks, and no event loop is loaded.

::

    server = Server.find(on_quiet)
    if server.answers():
        mount = drive(server.client().at("worker").add_scsi("data.qcow2", "/data")._add())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from utilityvm.client.api import Api
from utilityvm.client.blocking import OnQuiet, drive
from utilityvm.client.remote import Client
from utilityvm.client.starting import Starting, StartingNow
from utilityvm.client.wire import Wire
from utilityvm.errors import InvalidRequest
from utilityvm.machine import paths

T = TypeVar("T")

VARIABLE: Final = "UTILITYVM_SERVER"
_MODES: Final = ("auto", "off")


def is_wanted() -> bool:
    """Are commands to use the server? Its extra has to be installed.

    Raises:
        InvalidRequest: the variable says something else than `auto` and `off`.
    """
    mode = os.environ.get(VARIABLE) or _MODES[0]
    if mode not in _MODES:
        raise InvalidRequest(f"{VARIABLE}={mode} is neither auto nor off", remedy=f"unset {VARIABLE}")
    return mode == "auto" and all(find_spec(name) is not None for name in ("h11", "uvicorn"))


def has_folder(name: str) -> bool:
    """Does the VM live in this runtime folder?"""
    return paths.vm_dir(name).is_dir()


def server_pid() -> int | None:
    """The process that is the server; None: there is none."""
    from utilityvm.store.ownership import owner_of

    server = owner_of(paths.server_dir())
    return None if server is None else server.pid


def is_stopped(pid: int) -> bool:
    """Does the process stand still, by a signal or a debugger? Source: proc(5), /proc/pid/stat."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")


def blocking(starting: StartingNow, on_finding: Callable[[str], object]) -> Client:
    """A client whose calls block; `drive` runs them."""
    return Client(Api(Wire(starting), on_finding=on_finding))


def waiting(on_finding: Callable[[str], object], *, start: bool = True) -> Client:
    """A client for an event loop."""
    return Client(Api(Wire(Starting(start=start)), on_finding=on_finding))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run work whose calls block. Ctrl-C, SIGTERM and SIGHUP end it by KeyboardInterrupt: what is under way is undone.

    Further ones do nothing: the undoing has an end.
    """
    import signal

    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup(1)
            before[number] = signal.signal(number, interrupt)
    try:
        return drive(work)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = [
    "OnQuiet",
    "StartingNow",
    "blocking",
    "has_folder",
    "is_stopped",
    "is_wanted",
    "run",
    "server_pid",
    "waiting",
]
