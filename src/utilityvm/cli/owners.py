"""VMs that other processes own: a command waits for its turn, and says for whom."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from utilityvm.cli.output import note

if TYPE_CHECKING:
    from utilityvm import Owner, UtilityVM

_QUIET_S = 1.0  # a wait shorter than this is not worth a word


@asynccontextmanager
async def opened(name: str, *, wait_s: float, needs_guest: bool = True) -> AsyncIterator[UtilityVM]:
    """`UtilityVM.open`, which says for whom it waits."""
    from utilityvm import UtilityVM

    async with waiting_for(name, wait_s=wait_s):
        opening = await UtilityVM.open(name, wait_s=wait_s, needs_guest=needs_guest)
    async with opening as vm:
        yield vm


@asynccontextmanager
async def waiting_for(name: str, *, wait_s: float) -> AsyncIterator[None]:
    """While the block takes long, name the process that has the VM; and the next, if that is another."""
    import asyncio

    async def watch() -> None:
        told = None
        while True:
            await asyncio.sleep(_QUIET_S)
            owner = await asyncio.to_thread(_other_owner, name)
            if owner is not None and owner != told:
                note(f"waiting up to {wait_s:g} s for {owner}, which uses VM {name}")
                told = owner

    watcher = asyncio.create_task(watch()) if wait_s > _QUIET_S else None
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])


def _other_owner(name: str) -> Owner | None:
    from utilityvm import UtilityVMError, get_vm

    try:
        owner = get_vm(name).owner
    except UtilityVMError:
        return None
    return owner if owner is not None and owner.pid != os.getpid() else None
