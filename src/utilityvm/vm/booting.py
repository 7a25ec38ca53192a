"""What starting and cloning have in common: a VM comes up within its time, or says why it did not."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Final

from utilityvm.errors import (
    DeadlineExceeded,
    ProtocolError,
    StartFailed,
    VMGone,
)
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost
from utilityvm.machine.threads import in_thread
from utilityvm.tasks import Deadline

_LATER_S: Final = 0.1  # than the steps of a start, which say better why they are out of time
_CONSOLE_LINES: Final = 20
_SEED_BYTES: Final = 64
_TELLING: Final = ("utilityvm:", "Kernel panic", "error", "Error")  # what a line has in it that says why


@asynccontextmanager
async def coming_up(name: str, deadline: Deadline) -> AsyncIterator[None]:
    """A start that is out of time is one that failed: nothing is left of it, so nothing is unknown.

    Raises:
        StartFailed: says what was not done.
    """
    try:
        async with deadline.limit("the start was not finished", vm=name, later_s=_LATER_S):
            yield
    except DeadlineExceeded as error:
        raise StartFailed(
            f"VM {name} did not come up within {deadline.timeout_s:g} s ({error})", vm=name, remedy="give it more time"
        ) from error


async def boot(host: QemuHost, name: str, *, deadline: Deadline) -> BridgeGuest:
    """Wait until the guest's agent answers.

    Raises:
        StartFailed: it did not, or QEMU ended; says what the console says.
    """
    connecting = BridgeGuest.connect(host.process.agent, timeout_s=deadline.left(), vm=name)
    return await _answered(host, name, connecting, deadline)


async def _answered(host: QemuHost, name: str, connecting: Awaitable[BridgeGuest], deadline: Deadline) -> BridgeGuest:
    begun = time.monotonic()
    try:
        return await connecting
    except (DeadlineExceeded, ProtocolError, VMGone) as error:
        text = (await in_thread(host.console)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        told = [line for mark in _TELLING for line in reversed(lines) if mark in line]
        said = f'its console says "{(told or lines[-1:])[0]}"' if lines else "its console is empty"
        match error:
            case VMGone():
                ran_s = time.monotonic() - begun
                what = f"VM {name} ended {ran_s:.1f} s after it began to run, before its agent answered"
            case DeadlineExceeded():
                what = f"VM {name} did not come up within {deadline.timeout_s:g} s: its agent did not answer"
            case _:
                what = f"VM {name} did not come up: {error}"
        raise StartFailed(
            f"{what}; {said}",
            console=lines[-_CONSOLE_LINES:],
            vm=name,
            remedy="give it more memory or time; `uvm doctor` tells whether this machine can run VMs",
        ) from error


def new_identity(name: str) -> dict[str, Any]:
    """What a clone is given to be itself: arguments of `BridgeGuest.awaken` and `make_unique`."""
    return {"seed": os.urandom(_SEED_BYTES), "hostname": name, "machine_id": uuid.uuid4().hex}


async def wake(host: QemuHost, name: str, *, deadline: Deadline) -> BridgeGuest:
    """Let a clone run, and be itself. What we say is there before it runs, so it is heard at once.

    Raises:
        StartFailed: the agent did not answer, or QEMU ended.
        GuestRefused: it could not be made unique; it must not be used.
    """
    awakening = BridgeGuest.awaken(host.process.agent, **new_identity(name), timeout_s=deadline.left(), vm=name)
    connecting = asyncio.ensure_future(_answered(host, name, awakening, deadline))
    try:
        await host.resume(timeout_s=deadline.left())
        return await connecting
    except BaseException:
        connecting.cancel()
        await asyncio.wait([connecting])
        if not connecting.cancelled() and connecting.exception() is None:
            await connecting.result().close()
        raise
