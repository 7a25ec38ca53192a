"""VMs that several commands use: through the server, or by owning them in turn.

The server owns a VM for any number of commands at the same time. A command goes through it if the extra `[server]` is
installed, unless UTILITYVM_SERVER=off, and starts one for a VM that outlives commands. Otherwise it owns the VM itself
while it runs: it waits for its turn, and says for whom.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from utilityvm.cli.options import run
from utilityvm.cli.output import note, warn

if TYPE_CHECKING:
    from utilityvm import Owner, RemoteVM, UtilityVM
    from utilityvm.client.command import StartingNow

    AnyVM: TypeAlias = "UtilityVM | RemoteVM"

T = TypeVar("T")

_QUIET_S = 1.0  # a wait shorter than this is not worth a word


class Served:
    """The way through the server, for one command."""

    def __init__(self, name: str, *, wait_s: float) -> None:
        from utilityvm.client.command import StartingNow

        self._name = name
        self._wait_s = wait_s
        self._told: Owner | None = None
        self._still_since: float | None = None  # the server stands still
        self.is_blocking = True
        self.starting: StartingNow = StartingNow(on_quiet=self._tell_owner)

    def _tell_owner(self) -> None:
        owner = _in_the_way(self._name, of_server=True)
        if owner is None or not _stands_still(owner):
            self._still_since = None
        elif self._still_since is None:
            self._still_since = time.monotonic()
        elif time.monotonic() - self._still_since >= self._wait_s:
            from utilityvm import VMOwned

            raise VMOwned(
                f"VM {self._name} belongs to {owner}, which stands still",
                vm=self._name,
                remedy=f"let it go on (kill -CONT {owner.pid}) or end it (kill -9 {owner.pid}): the VM runs on",
            )
        if owner is not None and owner != self._told and self._wait_s > _QUIET_S:
            note(_waits(owner, self._name, self._wait_s))
            self._told = owner


_served: Served | None = None  # of the command that runs


def served(name: str, *, wait_s: float) -> Served | None:
    """The way to the VM through the server; None: the command has to own the VM itself.

    A server is worth its start for a VM that runs and outlives its owner. Of any other the library says what is wrong.
    """
    import utilityvm.client.command as command

    if not command.is_wanted():
        return None
    way = Served(name, wait_s=wait_s)
    return way if way.starting.answers() or _is_kept(name) else None


def _is_kept(name: str) -> bool:
    import utilityvm.client.command as command
    from utilityvm import UtilityVMError, get_vm

    try:
        vm = get_vm(name)
        return bool(vm.keep) and vm.pid is not None and command.has_folder(name)
    except UtilityVMError:
        return False


def run_with(way: Served | None, work: Coroutine[Any, Any, T], *, loop: bool = False) -> T:
    """Run work that uses `opened`: through the server without an event loop, unless the work needs a `loop`."""
    global _served
    if way is None:
        return run(work)
    import utilityvm.client.command as command

    way.is_blocking = not loop
    _served = way
    try:
        return run(work) if loop else command.run(work)
    finally:
        _served = None


@asynccontextmanager
async def opened(name: str, *, wait_s: float, needs_guest: bool = True) -> AsyncIterator[UtilityVM]:
    """The VM, owned by the server or by this command; says for whom it waits.

    A VM that the server owns is a `RemoteVM`, which has the calls that commands need; what a `UtilityVM` tells at once
    is asked for there: see `told`.
    """
    if _served is not None:
        async with _through_server(_served, name, wait_s=wait_s, needs_guest=needs_guest) as remote:
            yield cast("UtilityVM", remote)
        return
    from utilityvm import UtilityVM

    async with waiting_for(name, wait_s=wait_s):
        opening = await UtilityVM.open(name, wait_s=wait_s, needs_guest=needs_guest)
    async with opening as vm:
        yield vm


@asynccontextmanager
async def _through_server(way: Served, name: str, *, wait_s: float, needs_guest: bool) -> AsyncIterator[RemoteVM]:
    import utilityvm.client.command as command

    if way.is_blocking:
        async with command.blocking(way.starting, warn) as client:
            yield client.at(name, wait_s=wait_s, needs_guest=needs_guest)
        return
    async with command.waiting(warn) as client:
        async with waiting_for(name, wait_s=wait_s, of_server=True):
            vm = await client.vm(name, wait_s=wait_s)
        for finding in vm.findings:
            warn(finding)
        yield client.at(name, wait_s=wait_s)


async def told(value: T | Awaitable[T]) -> T:
    """What a VM says of itself: at once if this process owns it."""
    return cast("T", await value) if isinstance(value, Awaitable) else value


async def stopped(name: str, *, wait_s: float, force: bool) -> list[str]:
    """End the VM: `UtilityVM.remove`. One that the server owns it ends, whatever uses it there; not with `force`."""
    import asyncio

    import utilityvm.client.command as command
    from utilityvm import SetupError, UtilityVM

    if force:
        return await UtilityVM.remove(name, force=True)
    owner = await asyncio.to_thread(_other_owner, name)
    if owner is not None and owner.shares and command.is_wanted():
        with suppress(SetupError):  # the server has ended meanwhile
            async with command.waiting(warn, start=False) as client, waiting_for(name, wait_s=wait_s, of_server=True):
                return await client.stop(name, wait_s=wait_s)
    async with waiting_for(name, wait_s=wait_s):
        return await UtilityVM.remove(name, wait_s=wait_s)


@asynccontextmanager
async def waiting_for(name: str, *, wait_s: float, of_server: bool = False) -> AsyncIterator[None]:
    """While the block takes long, name the process that has the VM; and the next, if that is another.

    `of_server`: the server does the work, so it is not waited for.
    """
    import asyncio

    async def watch() -> None:
        told = None
        while True:
            await asyncio.sleep(_QUIET_S)
            owner = await asyncio.to_thread(_in_the_way, name, of_server=of_server)
            if owner is not None and owner != told:
                note(_waits(owner, name, wait_s))
                told = owner

    watcher = asyncio.create_task(watch()) if wait_s > _QUIET_S else None
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])


def _waits(owner: Owner, name: str, wait_s: float) -> str:
    return f"waiting up to {wait_s:g} s for {owner}, which uses VM {name}"


def _in_the_way(name: str, *, of_server: bool) -> Owner | None:
    """Whom we wait for. The server does our work, unless it stands still."""
    import utilityvm.client.command as command

    owner = _other_owner(name)
    if owner is None or not of_server or owner.pid != command.server_pid() or _stands_still(owner):
        return owner
    return None


def _stands_still(owner: Owner) -> bool:
    import utilityvm.client.command as command

    return command.is_stopped(owner.pid)


def _other_owner(name: str) -> Owner | None:
    from utilityvm import UtilityVMError, get_vm

    try:
        owner = get_vm(name).owner
    except UtilityVMError:
        return None
    return owner if owner is not None and owner.pid != os.getpid() else None
