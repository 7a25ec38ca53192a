"""The end of a VM: stopped by its owner, let go of, or removed by its name. Each is finished once it is begun."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Final

from utilityvm.errors import UtilityVMError, VMNotFound, VMNotRunning
from utilityvm.machine import patience
from utilityvm.machine.threads import entered, in_thread
from utilityvm.store import Store, VMState
from utilityvm.store.recover import open_store
from utilityvm.tasks import Deadline, Undo, finish
from utilityvm.vm import lifecycle
from utilityvm.vm.owned import Claim, OwnedVM, stopped
from utilityvm.vm.state import Event, State

SETTLE_S: Final = 3.0
_GUESTS_PART: Final = 0.75  # of the time: to unmount, and then its power goes
_SHORTEST_QUIT_S: Final = 0.2
_QUIT_S: Final = 2.0  # for QEMU to write out what it holds of images, before it is killed


async def stop(vm: OwnedVM, *, timeout_s: float) -> list[str]:
    """See `UtilityVM.stop`."""
    return await finish(_stop(vm, timeout_s))


async def _stop(vm: OwnedVM, timeout_s: float) -> list[str]:
    quit_s = min(_QUIT_S, timeout_s / 4)  # the last part of the time is QEMU's
    told: list[str] = []
    async with vm.ending:
        if vm.state in (State.REMOVED, State.CLOSED):
            return []
        if vm.state is not State.ENDED:
            if vm.state is not State.STOPPING:
                vm.take(Event.STOP, stopped(vm))
            try:
                with patience.within(quit_s):  # the time is the guest's
                    await vm.store.lane.run(vm.store.set_state, vm.record, VMState.STOPPING)
            except UtilityVMError as error:  # a full disk must not keep a VM running
                vm.log.warning("not written down: %s", error)
            told = await _power_off(vm, timeout_s - quit_s, timeout_s=timeout_s)
            for line in told if timeout_s else ():  # without any time, it was asked for
                vm.log.warning("%s", line)
            if vm.state is State.STOPPING:
                vm.take(Event.DIED, stopped(vm))
        await clear_away(vm, quit_s=max(quit_s, _SHORTEST_QUIT_S))
    vm.log.info("stopped")
    return told


async def _power_off(vm: OwnedVM, guests_s: float, *, timeout_s: float) -> list[str]:
    """Have the guest write out and power off; says what is not so, a line each."""
    told: list[str] = []
    why: object = f"it did not power off within {timeout_s:.3g} s" if timeout_s else "it had no time to power off"
    try:
        async with asyncio.timeout(guests_s):
            told += await vm.guest.shutdown(timeout_s=guests_s * _GUESTS_PART)
            await asyncio.wait([vm.host.gone])
            return told
    except TimeoutError:
        pass
    except UtilityVMError as error:
        why = error
    return [*told, lifecycle.killed(vm.name, why)]


async def clear_away(vm: OwnedVM, *, quit_s: float = _QUIT_S) -> None:
    """Remove all that is left of a VM that has ended, or must end now.

    Raises:
        OutcomeUnknown: the kernel does not let QEMU go; call again.
        StoreError: the store keeps its record; call again.
    """
    await vm.guest.close()
    await vm.host.stop(timeout_s=quit_s)
    await in_thread(lifecycle.remove_overlays, vm.record)
    await in_thread(lifecycle.remove_copy, vm.host.process.folder, vm.record.uuid)
    await vm.store.lane.run(vm.store.remove, vm.record)
    await in_thread(partial(vm.ownership.release, remove=True), always=True)
    await vm.store.lane.run(vm.store.close)
    vm.take(Event.CLEARED)


async def close(vm: OwnedVM, *, timeout_s: float) -> None:
    """See `UtilityVM.close`."""
    if not vm.config.keep or vm.state is State.ENDED:
        await stop(vm, timeout_s=timeout_s)  # logs what is not as it should be
        return
    await finish(_close(vm, min(SETTLE_S, timeout_s)))


async def _close(vm: OwnedVM, settle_s: float) -> None:
    async with vm.ending:
        if vm.state in (State.REMOVED, State.CLOSED):
            return
        if vm.state is State.ENDED:
            await clear_away(vm)
            return
        vm.take(Event.CLOSE, VMNotRunning(f"VM {vm.name} was closed here", vm=vm.name, remedy="open it again"))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(settle_s):
                    await vm.scsi.settle()
            await hang_up(vm)
        finally:
            await in_thread(vm.ownership.release, always=True)
            await vm.store.lane.run(vm.store.close)


async def leave(vm: OwnedVM) -> None:
    """Let go of a VM that has ended by itself. Its record, its disks' names and its last words stay until `remove`."""
    await finish(_leave(vm))


async def _leave(vm: OwnedVM) -> None:
    async with vm.ending:
        if vm.state is not State.ENDED:
            return
        try:
            await hang_up(vm)
        finally:
            await in_thread(vm.ownership.release, always=True)
            await vm.store.lane.run(vm.store.close)


async def hang_up(vm: OwnedVM) -> None:
    """End the connections. What was under way is lost by that at once, and the journal says so."""
    if vm.state is State.STARTING:
        vm.take(Event.CLOSE, VMNotRunning(f"VM {vm.name} was closed here", vm=vm.name))
    await vm.guest.close()
    await vm.host.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            await vm.scsi.settle()


async def remove(name: str, *, wait_s: float, force: bool, timeout_s: float) -> list[str]:
    """See `UtilityVM.remove`."""
    whole = Deadline(wait_s + timeout_s)
    async with Undo(whole) as undo:
        try:
            if force:
                claim = await Claim.seized(undo, name, wait_s=wait_s)
            else:
                claim = await Claim.existing(undo, name, wait_s=wait_s)
        except VMNotFound:
            opened = await in_thread(open_store, late=Store.close)
            async with entered(opened) as store:
                await lifecycle.sweep(store, name)
            raise
        if claim is None:
            return []
        return await finish(_remove(claim, force=force, timeout_s=min(timeout_s, whole.left())))


async def _remove(claim: Claim, *, force: bool, timeout_s: float) -> list[str]:
    told = []
    try:
        if claim.record.is_alive() and not force:
            told += await lifecycle.shut_down(claim.record, timeout_s=timeout_s)
        await lifecycle.clear(claim.record, claim.store)
        await in_thread(partial(claim.ownership.release, remove=True), always=True)
    finally:
        await in_thread(claim.ownership.release, always=True)
        await claim.store.lane.run(claim.store.close)
    return told
