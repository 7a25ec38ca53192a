"""The server's process: the only one for its user and store, from the lock to its end.

A kernel lock decides which process is the server (store/ownership.py has the lock). Its holder may replace the socket;
so a socket that a killed server left behind is in nobody's way.

It ends when it has owned VMs and owns none any more, or when nobody wanted one for a while. Nothing is lost by that,
nor by `kill -9`: the next command that needs a server starts one, and that takes over what runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final

from utilityvm.errors import UtilityVMError, VMOwned
from utilityvm.log import logger
from utilityvm.machine import oserrors, paths, runtime
from utilityvm.machine.oserrors import typed
from utilityvm.machine.processes import introduce
from utilityvm.machine.threads import in_thread
from utilityvm.server import listening
from utilityvm.server.app import App
from utilityvm.server.keeper import Keeper
from utilityvm.server.programs import Programs
from utilityvm.server.routes import Service, info_of
from utilityvm.store.ownership import Ownership

FIRST_S: Final = 10.0  # without a VM, before the first one
EMPTY_S: Final = 0.5  # without a VM, after the last one
_LOOK_S: Final = 0.2
_TAKE_S: Final = 10.0  # for a server that ends just now to be gone

_log = logger(__name__)


@typed
def serve(*, forever: bool = False, ready: Callable[[], object] | None = None) -> bool:
    """Be the server until it ends. False: another process is it, and answers.

    `forever`: stay without VMs as well. `ready` is called once connections are taken.

    Raises:
        SetupError: the runtime folder cannot be used, or the extra is missing.
    """
    listening.check_installed()
    introduce("uvm serve")
    folder = paths.server_dir()
    try:
        runtime.make(folder)
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot make the server's folder {folder}") from error
    return asyncio.run(_serve(folder, forever=forever, ready=ready or (lambda: None)))


async def _serve(folder: Path, *, forever: bool, ready: Callable[[], object]) -> bool:
    ownership = await _only_one(folder)
    if ownership is None:
        return False
    path = folder / paths.SERVER_SOCKET
    try:
        listener = await in_thread(_listen, path)
        keeper = Keeper()
        programs = Programs(keeper)
        number = version("utilityvm")
        service = Service(keeper, programs, lambda: info_of(keeper, version=number, pid=os.getpid()))
        app = App(service, version=number)
        adopting = asyncio.create_task(keeper.adopt(), name="adopt")
        inode = await in_thread(_inode, path)

        async def until_unneeded() -> None:
            """Return when no VM is owned, nor asked for, any more; or nobody can reach us any more."""
            had_one, empty_since, reachable = False, time.monotonic(), True
            while True:
                await asyncio.sleep(_LOOK_S)
                reachable = reachable and inode == await in_thread(_inode, path)
                if app.in_flight or not programs.is_idle or (keeper.names and reachable):
                    had_one = had_one or bool(keeper.names)
                    empty_since = time.monotonic()
                elif not reachable or (
                    not forever and time.monotonic() - empty_since > (EMPTY_S if had_one else FIRST_S)
                ):
                    return

        ready()
        _log.info("the server answers at %s", path)
        try:
            await listening.serve(app, listener, until=until_unneeded)
        finally:
            adopting.cancel()
            await asyncio.wait([adopting])
            await in_thread(_unlink, path, inode)
            await keeper.close()
    finally:
        await in_thread(ownership.release, always=True)
    _log.info("the server has ended")
    return True


async def _only_one(folder: Path) -> Ownership | None:
    """The lock that makes this process the server; None: another one is, and takes connections."""
    until = time.monotonic() + _TAKE_S
    while True:
        try:
            return await Ownership.acquire(folder, vm="(the server's)")
        except VMOwned:
            if await in_thread(_answers, folder / paths.SERVER_SOCKET) or time.monotonic() > until:
                return None
        await asyncio.sleep(_LOOK_S)


def _answers(path: Path) -> bool:
    try:
        with runtime.socket_in(path) as here, socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(os.fspath(here))
    except (OSError, UtilityVMError):
        return False
    return True


def _listen(path: Path) -> socket.socket:
    """Listen at the socket, for this user alone. Ours is the lock, so whatever is there is nobody's."""
    with runtime.entered(path.parent) as here:
        (here / path.name).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            before = os.umask(0o177)
            try:
                listener.bind(os.fspath(here / path.name))
            finally:
                os.umask(before)
            listener.listen(listening.BACKLOG)
        except OSError as error:
            listener.close()
            raise oserrors.as_ours(error, f"cannot listen at {path}") from error
        return listener


def _inode(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_ino
    return None


def _unlink(path: Path, inode: int | None) -> None:
    if inode is not None and inode == _inode(path):
        path.unlink(missing_ok=True)


def log_to_stderr() -> None:
    """What the server does, and what is odd, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("utilityvm")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO)


def detach() -> None:
    """Go on as a process of nobody's: no terminal, no parent that waits, no signals of the one that started us."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main() -> None:
    """`python -m utilityvm.server READY`: detached, for a client that waits at the other end of the pipe READY.

    A line `ready` goes there, or a problem document; and its end, in any case.
    """
    detach()
    pipe = int(sys.argv[1])
    os.set_inheritable(pipe, False)

    def tell(text: bytes) -> None:
        with suppress(OSError):
            os.write(pipe, text)
        os.close(pipe)

    log_to_stderr()
    try:
        if not serve(ready=lambda: tell(b"ready\n")):
            tell(b"ready\n")  # another process is the server
    except UtilityVMError as error:
        import msgspec

        from utilityvm.server.problems import problem_of

        _log.error("%s", error)
        tell(msgspec.json.encode(problem_of(error)))
        sys.exit(1)
