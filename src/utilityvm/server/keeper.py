"""The VMs that the server owns: taken over when they are asked for, and let go of when another process wants them.

The server shares (store/ownership.py): it lets go of a VM as soon as another process waits for it, unless a request
uses it just then. So a program with the library, which has to own a VM, gets it as it would from any command.

Whoever uses a VM does so inside `use`. There are three ends of that: the user is done; the VM dies, which the VM's own
calls tell; or a client has the VM stopped, which ends every use with `VMNotRunning`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from utilityvm.errors import UtilityVMError, VMNotFound, VMNotRunning, VMOwned
from utilityvm.log import logger
from utilityvm.machine import paths
from utilityvm.machine.threads import in_thread
from utilityvm.store import StoredVM
from utilityvm.store.ownership import owned_by, owner_of
from utilityvm.store.recover import open_store
from utilityvm.vm import end
from utilityvm.vm.utility_vm import UtilityVM

_LOOK_S: Final = 0.1  # how often an idle VM is looked at: does another process wait for it?
_LEAST_WAIT_S: Final = 5.0  # for others here to take it over, or to end it: that is not another process's use of it
_USES_END_S: Final = 5.0

_log = logger(__name__)


class Held:
    """A VM that the server owns."""

    def __init__(self, vm: UtilityVM) -> None:
        self.vm = vm
        self.untold = list(vm.findings)  # what was found half done when it was taken over, and no client knows yet
        self.uses: set[asyncio.Task[object]] = set()
        self.stopped: UtilityVMError | None = None  # why its uses are ended
        self.watch: asyncio.Task[None] | None = None


class Keeper:
    """For one event loop."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._gates: dict[str, asyncio.Lock] = {}  # who takes over, lets go of or ends the VM of a name has its gate
        self.let_go = asyncio.Event()  # a VM was let go of

    @property
    def names(self) -> list[str]:
        """The VMs that are owned at the moment."""
        return sorted(self._held)

    def told(self, name: str) -> list[str]:
        """What was found half done when the VM was taken over, for the first who asks."""
        held = self._held.get(name)
        if held is None:
            return []
        told, held.untold = held.untold, []
        return told

    @asynccontextmanager
    async def use(self, name: str, *, wait_s: float, needs_guest: bool = True) -> AsyncIterator[UtilityVM]:
        """Have the VM for as long as the block lasts. See `UtilityVM.open` for `needs_guest`.

        Raises:
            VMNotFound, VMNotRunning, VMOwned, DeadlineExceeded: as `UtilityVM.open`.
            VMNotRunning: a client had it stopped meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        held = self._held.get(name)
        if held is None or not held.vm.is_running:
            held = await self._take(name, wait_s, task, needs_guest=needs_guest)
        held.uses.add(task)
        try:
            yield held.vm
        except asyncio.CancelledError:
            if held.stopped is not None and not task.uncancel():
                raise held.stopped from None
            raise
        finally:
            held.uses.discard(task)

    async def _take(self, name: str, wait_s: float, task: asyncio.Task[object], *, needs_guest: bool) -> Held:
        until = time.monotonic() + wait_s
        async with self._gate(name, wait_s):
            held = self._held.get(name)
            if held is not None and not held.vm.is_running:
                await self._let_go(name, held)
                held = None
            if held is None:
                vm = await UtilityVM.open(name, wait_s=max(until - time.monotonic(), 0.0), needs_guest=needs_guest)
                vm._vm.ownership.share()
                held = self._held[name] = Held(vm)
                held.watch = asyncio.create_task(self._watch(name, held), name=f"watch {name}")
            held.uses.add(task)  # while nobody else decides about it
            return held

    @asynccontextmanager
    async def _gate(self, name: str, wait_s: float) -> AsyncIterator[None]:
        gate = self._gates.setdefault(name, asyncio.Lock())
        try:
            async with asyncio.timeout(max(wait_s, _LEAST_WAIT_S)):
                await gate.acquire()
        except TimeoutError:
            raise await self._owned(name, wait_s) from None
        try:
            yield
        finally:
            gate.release()
            if name not in self._held and not gate.locked() and self._gates.get(name) is gate:
                del self._gates[name]

    async def _owned(self, name: str, wait_s: float) -> VMOwned:
        folder = paths.vm_dir(name)
        return owned_by(await in_thread(owner_of, folder), folder / paths.LOCK_FILE, name, wait_s=wait_s)

    async def _watch(self, name: str, held: Held) -> None:
        """Let go of the VM when it has ended by itself, and when another process waits for it and nobody uses it."""
        gone = asyncio.ensure_future(held.vm.wait())
        try:
            while not gone.done():
                await asyncio.wait([gone], timeout=_LOOK_S)
                if not gone.done() and (held.uses or not held.vm._vm.ownership.is_wanted()):
                    continue
                async with self._gate(name, _LEAST_WAIT_S):
                    if self._held.get(name) is held and (gone.done() or not held.uses):
                        await self._let_go(name, held)
                        return
        finally:
            gone.cancel()

    async def _let_go(self, name: str, held: Held) -> None:
        """Through its gate. The VM runs on; of one that has ended, what is left is for `uvm log` and `uvm stop`."""
        del self._held[name]
        if held.watch is not None and held.watch is not asyncio.current_task():
            held.watch.cancel()
        try:
            if held.vm.is_running:
                await held.vm.close()
            else:
                await end.leave(held.vm._vm)
        except UtilityVMError as error:
            _log.warning("VM %s was not let go of in order: %s", name, error)
        finally:
            self.let_go.set()

    async def stop(self, name: str, *, wait_s: float, force: bool, timeout_s: float) -> list[str]:
        """End a VM, whatever uses it here; as `UtilityVM.remove`."""
        if force:  # it goes through nobody's gate: the watch here sees it end
            return await UtilityVM.remove(name, wait_s=wait_s, force=True, timeout_s=timeout_s)
        until = time.monotonic() + wait_s
        async with self._gate(name, wait_s):
            held = self._held.get(name)
            if held is not None:
                held.stopped = VMNotRunning(f"VM {name} was stopped", vm=name)
                for use in held.uses:
                    use.cancel()
                if held.uses:
                    await asyncio.wait(held.uses, timeout=_USES_END_S)
                await self._let_go(name, held)
            try:
                return await UtilityVM.remove(name, wait_s=max(until - time.monotonic(), 0.0), timeout_s=timeout_s)
            except VMNotFound:
                if held is None:
                    raise
                return []  # it had ended by itself, and was cleared away by that

    async def adopt(self) -> None:
        """Take over every VM that outlived its owner: what that one left half done is finished or undone now."""
        for vm in await in_thread(_without_owner):
            try:
                async with self.use(vm.name, wait_s=0.0):
                    pass
            except UtilityVMError as error:
                _log.info("VM %s is left alone: %s", vm.name, error)

    async def close(self) -> None:
        """Let go of all of them: they run on."""
        for name, held in list(self._held.items()):
            for use in held.uses:
                use.cancel()
            if held.uses:
                await asyncio.wait(held.uses, timeout=_USES_END_S)
            async with self._gate(name, _LEAST_WAIT_S):
                if self._held.get(name) is held:
                    await self._let_go(name, held)


def stored() -> list[StoredVM]:
    """Every VM of the store."""
    with open_store() as store:
        return store.vms()


def _without_owner() -> list[StoredVM]:
    return [
        vm
        for vm in stored()
        if vm.damage is None
        and vm.config.get("keep")
        and vm.is_alive()
        and owner_of(paths.vm_dir(vm.name), vm.owner) is None
    ]
