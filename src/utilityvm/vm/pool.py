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

from utilityvm.errors import DeadlineExceeded, InvalidRequest, SetupError, UtilityVMError, VMExists, VMNotRunning
from utilityvm.log import logger
from utilityvm.machine.oserrors import typed_errors
from utilityvm.machine.threads import in_thread
from utilityvm.tasks import Deadline, finish
from utilityvm.templates import catalog
from utilityvm.vm import rest as resting
from utilityvm.vm.acquiring import acquires
from utilityvm.vm.arguments import checked
from utilityvm.vm.utility_vm import UtilityVM

_LARGEST: Final = 1000
_SHORTEST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0
_REST_S: Final = 10.0
_LARGER: Final = "make the pool larger, or wait longer"

_log = logger(__name__)


@typed_errors
class ClonePool:
    """Keeps `size` clones of a template waiting. They end with this process, however it ends.

    ::

        async with ClonePool("warm", size=4) as pool:
            async with pool.acquire() as vm:
                await vm.run(["make", "test"])

    Owned by the event loop, and the thread, that entered it. What was handed out is the caller's to close.
    """

    @checked
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
        self._failure: UtilityVMError | None = None  # of the last attempt, if nobody has been told of it
        self._last_failure: UtilityVMError | None = None  # of the last attempt
        self._useless: list[UtilityVM] = []  # clones that are to be ended
        self._ending: set[asyncio.Task[None]] = set()
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
        await in_thread(catalog.load, self.template)
        self._filler = asyncio.create_task(self._fill())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @acquires
    @checked
    async def acquire(self, *, timeout_s: float = 60.0) -> UtilityVM:
        """A running clone, which is the caller's from now on. Waits for one if none is ready.

        Raises:
            DeadlineExceeded: none was ready, and answered, within `timeout_s` seconds.
            VMNotRunning: the pool was closed.
            others: what `UtilityVM.clone` raises, if that is why none is ready.
        """
        deadline = Deadline(timeout_s)
        try:
            async with deadline.limit(f"no clone of {self.template} was ready", remedy=_LARGER):
                return await self._acquire(deadline)
        except DeadlineExceeded as error:
            if self._last_failure is None:
                raise
            raise DeadlineExceeded(
                f"{error}; the last attempt to make one failed: {self._last_failure}", remedy=self._last_failure.remedy
            ) from self._last_failure

    async def _acquire(self, deadline: Deadline) -> UtilityVM:
        while True:
            vm = await self._take()
            try:
                await resting.wake(vm._vm, timeout_s=deadline.left())
            except BaseException as error:
                self._end_aside(vm)
                if not isinstance(error, UtilityVMError):
                    raise
                _log.warning("a clone that waited is of no use: %s", error, vm=vm.name)
            else:
                return vm

    @checked
    async def close(self, *, timeout_s: float = 60.0) -> None:
        """End the filling and every clone that waits. Calling it again is no error.

        Every clone is tried, also if one cannot be ended; call again for those that are left.

        Raises:
            OutcomeUnknown, StoreError: what the first that could not be ended said.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
        """
        self._closed = True
        await finish(self._close(), deadline=Deadline(timeout_s))

    async def _close(self) -> None:
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.wait([self._filler])
        async with self._changed:
            self._changed.notify_all()
        if self._ending:
            await asyncio.wait(self._ending)
        self._useless += self._ready
        self._ready.clear()
        ended = await asyncio.gather(*map(self._end, list(self._useless)), return_exceptions=True)
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure

    async def _end(self, vm: UtilityVM) -> None:
        """It is remembered until it is gone."""
        await vm.stop(timeout_s=0)
        self._useless.remove(vm)

    def _end_aside(self, vm: UtilityVM) -> None:
        self._useless.append(vm)
        ending = asyncio.ensure_future(self._end(vm))
        self._ending.add(ending)
        ending.add_done_callback(self._has_ended)

    def _has_ended(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled() and (error := ending.exception()) is not None:
            _log.warning("a clone of no use was not ended: %s", error)

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
        pause_s = _SHORTEST_PAUSE_S
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._ready) < max(self.size, self._waiting))
            try:
                vm = await self._make()
            except VMExists:
                continue  # another process uses that name: take the next number
            except Exception as error:  # whatever it is: a filler that ended would let everybody wait for ever
                failure = error if isinstance(error, UtilityVMError) else _unforeseen(self.template, error)
                _log.warning("no clone of %s for the pool: %s", self.template, error)
                async with self._changed:
                    self._failure = self._last_failure = failure
                    self._changed.notify_all()
                await self._wait_until_asked(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _SHORTEST_PAUSE_S
            async with self._changed:
                self._ready.append(vm)
                self._failure = self._last_failure = None
                self._changed.notify_all()

    async def _make(self) -> UtilityVM:
        vm = await UtilityVM.clone(self.template, f"{self._prefix}-{next(self._numbers)}")
        try:
            await resting.rest(vm._vm, timeout_s=_REST_S)
        except BaseException:
            self._end_aside(vm)
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


def _unforeseen(template: str, error: Exception) -> UtilityVMError:
    failure = SetupError(f"no clone of {template} could be made: {error}")
    failure.__cause__ = error
    return failure
