"""ClonePool: clones of one template that wait, so that who needs a VM has one at once.

A clone in the pool was started, has run and was made unique; then its processors were stopped. It costs memory and no
processor time. Handing it out lets it run again, and makes it unique once more: its clock stood still meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from types import TracebackType
from typing import Final, Self

from utilityvm.errors import DeadlineExceeded, InvalidRequest, UtilityVMError, VMExists, VMNotRunning
from utilityvm.log import logger
from utilityvm.templates import catalog
from utilityvm.vm.utility_vm import UtilityVM

_LARGEST: Final = 1000
_LONGEST_PAUSE_S: Final = 30.0

_log = logger(__name__)


class ClonePool:
    """Keeps `size` clones of a template waiting. They end with this process, however it ends.

    ::

        async with ClonePool("warm", size=4) as pool:
            async with await pool.acquire() as vm:
                await vm.run(["make", "test"])

    Owned by the event loop, and the thread, that entered it. What was handed out is the caller's to close.
    """

    def __init__(self, template: str, size: int, *, prefix: str | None = None) -> None:
        """`prefix` begins the names of the VMs; by default it is made of the template's name and this process's id.

        Raises:
            InvalidRequest: the size, or a name, cannot be.
        """
        if not 1 <= size <= _LARGEST:
            raise InvalidRequest(f"a pool of {size} clones", remedy=f"give it 1 to {_LARGEST}")
        catalog.check_name(template)
        self.template = template
        self.size = size
        self._prefix = prefix or f"{template}-{os.getpid()}"
        catalog.check_name(f"{self._prefix}-{_LARGEST}")
        self._numbers = itertools.count(1)
        self._ready: deque[UtilityVM] = deque()
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._failure: UtilityVMError | None = None
        self._filler: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def ready(self) -> int:
        """How many clones wait now."""
        return len(self._ready)

    async def __aenter__(self) -> Self:
        """The filling begins; nothing is waited for.

        Raises:
            TemplateNotFound, TemplateDamaged: there is no such template.
        """
        catalog.load(self.template)
        self._filler = asyncio.create_task(self._fill())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def acquire(self, *, timeout_s: float = 60.0) -> UtilityVM:
        """A running clone, which is the caller's from now on. Waits for one if none is ready.

        Raises:
            DeadlineExceeded: none was ready, and answered, within `timeout_s` seconds.
            VMNotRunning: the pool was closed.
            others: what `UtilityVM.clone` raises, if that is why none is ready.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._acquire(timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"no clone of {self.template} was ready within {timeout_s:g} s",
                remedy="make the pool larger, or wait longer",
            ) from error

    async def _acquire(self, timeout_s: float) -> UtilityVM:
        while True:
            vm = await self._take()
            try:
                await vm.wake(timeout_s=timeout_s)
            except UtilityVMError as error:
                _log.warning("a clone that waited is of no use: %s", error, vm=vm.name)
                await vm.stop(timeout_s=0)
            except BaseException:
                await asyncio.shield(vm.stop(timeout_s=0))
                raise
            else:
                return vm

    async def close(self) -> None:
        """End the filling and every clone that waits. Closed before is done."""
        self._closed = True
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.wait([self._filler])
        async with self._changed:
            self._changed.notify_all()
        while self._ready:
            await self._ready.popleft().stop(timeout_s=0)

    async def _take(self) -> UtilityVM:
        async with self._changed:
            self._waiting += 1
            self._failure = None  # asked anew: the cause may be mended
            self._changed.notify_all()
            try:
                await self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            finally:
                self._waiting -= 1
            if self._closed:
                raise VMNotRunning(f"the pool of {self.template} was closed")
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            vm = self._ready.popleft()
            self._changed.notify_all()
            return vm

    async def _fill(self) -> None:
        pause_s = 0.1
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._ready) < max(self.size, self._waiting))
            try:
                vm = await self._make()
            except VMExists:
                continue  # another process uses that name: take the next number
            except UtilityVMError as error:
                _log.warning("no clone of %s for the pool: %s", self.template, error)
                async with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                await self._wait_until_asked(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = 0.1
            async with self._changed:
                self._ready.append(vm)
                self._changed.notify_all()

    async def _make(self) -> UtilityVM:
        vm = await UtilityVM.clone(self.template, f"{self._prefix}-{next(self._numbers)}")
        try:
            await vm.rest()
        except BaseException:
            await asyncio.shield(vm.stop(timeout_s=0))
            raise
        return vm

    async def _wait_until_asked(self, pause_s: float) -> None:
        """A cause that stays is not tried at full speed, unless somebody asks."""
        async with self._changed:
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait_for(lambda: self._failure is None)
            except TimeoutError:
                return
