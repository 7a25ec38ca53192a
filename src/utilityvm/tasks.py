"""What asyncio leaves to its users: deadlines that add up, and work that is finished whoever is cancelled.

asyncio cancels by raising in whatever awaits, also in an `except` branch that is taking something back; and at the end
of `asyncio.run`, as after a second Ctrl-C, it cancels every task there is. So what must not stop half-way is neither
awaited in the open nor trusted to one task: it is handed to `Undo` or `finish`, which go on through both.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from utilityvm.errors import DeadlineExceeded, UtilityVMError
from utilityvm.log import BoundLogger, logger

T = TypeVar("T")

GRACE_S: Final = 0.4  # what a call may take beyond its time, to take back what it did
STEP_S: Final = 15.0  # for one step of an undo
_LAST_S: Final = 5.0  # for one that is begun again
_TRIES: Final = 5  # of a step that is cancelled from outside: each end of an event loop does so once

_log = logger(__name__)
_unfinished: set[asyncio.Task[Any]] = set()  # the event loop itself keeps only weak references


class Deadline:
    """The time of one call, which everything in it shares."""

    def __init__(self, timeout_s: float | None) -> None:
        """None: as long as it takes."""
        self.timeout_s = timeout_s
        self._ends = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def left(self) -> float:
        """The seconds that are left, for the next step; never less than a millisecond, so that it may still fail."""
        return max(self._ends - time.monotonic(), 0.001)

    def left_to_undo(self) -> float:
        """The same, and what a call may take beyond its time."""
        return max(self._ends + GRACE_S - time.monotonic(), 0.001)

    def limit(self, what: str, *, vm: str | None = None, remedy: str | None = None, later_s: float = 0.0) -> _Limit:
        """The block under this ends with DeadlineExceeded when the time is up: "`what` within N s".

        `later_s` after that, if the steps in it keep the time themselves, and say better what was not done.
        """
        return _Limit(self, what, vm, remedy, later_s)


class _Limit:
    def __init__(self, deadline: Deadline, what: str, vm: str | None, remedy: str | None, later_s: float) -> None:
        self._deadline, self._what, self._vm, self._remedy, self._later_s = deadline, what, vm, remedy, later_s

    @property
    def is_over(self) -> bool:
        return self._timeout.expired()

    async def __aenter__(self) -> None:
        left = self._deadline.left() + self._later_s
        self._timeout = asyncio.timeout(None if left == math.inf else left)
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            within = f"within {self._deadline.timeout_s:g} s"
            raise DeadlineExceeded(f"{self._what} {within}", vm=self._vm, remedy=self._remedy) from None


async def finish(work: Coroutine[Any, Any, T], *, deadline: Deadline | None = None) -> T:
    """The result of `work`, which goes on to its end whatever becomes of the caller.

    A caller that is cancelled waits for the end as well, and is cancelled then. With `deadline` it waits no longer than
    that and a bit; the work goes on in the background, and its error is logged.

    Raises:
        DeadlineExceeded: it goes on.
    """
    task = asyncio.ensure_future(work)
    cancelled = await wait_for(task, deadline)
    if not task.done():
        task.add_done_callback(_log_failure)
    if cancelled is not None:
        if task.done():
            _log_failure(task)
        raise cancelled
    if not task.done():
        raise DeadlineExceeded("it goes on in the background")
    return task.result()


@dataclass(frozen=True, slots=True)
class _Step:
    act: Callable[[], object]
    what: str
    within_s: float


class Undo:
    """Steps that take back what the block did, if it fails: the last first, each to its end.

    They are one task of their own. Cancelling the caller does not stop it, nor does the end of the event loop: a step
    that is cancelled itself is begun again, so a step must be one that may be taken twice. A step that fails, or takes
    too long, is logged, and the next is taken. The caller waits for all of them, but not beyond `deadline`: what is
    left of them goes on in the background.
    """

    def __init__(self, deadline: Deadline | None = None, *, log: BoundLogger = _log) -> None:
        self._deadline = deadline
        self._log = log
        self._steps: list[_Step] = []

    def add(self, act: Callable[..., object], *arguments: Any, within_s: float = STEP_S, **named: Any) -> None:
        """`act` is called with the rest, and awaited if it gives something to await."""
        what = getattr(act, "__qualname__", repr(act)).lstrip("_")
        self._steps.append(_Step(lambda: act(*arguments, **named), what, within_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        steps, self._steps = self._steps, []
        if error is None or not steps:
            return
        task = asyncio.ensure_future(self._take_back(steps))
        cancelled = await wait_for(task, self._deadline)
        if cancelled is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled from error

    async def _take_back(self, steps: list[_Step]) -> None:
        for step in reversed(steps):
            try:
                await to_the_end(step.act, within_s=step.within_s)
            except TimeoutError:
                self._log.warning("%s was not done within %g s", step.what, step.within_s)
            except UtilityVMError as error:
                self._log.warning("%s: %s", step.what, error)
            except Exception as error:
                self._log.error("%s: %r", step.what, error)


async def to_the_end(act: Callable[[], object], *, within_s: float) -> None:
    """Call `act`, and await what it gives; begin again if this task is cancelled. For tasks that nobody waits for.

    The time is short after that: who ends the event loop waits for it.

    Raises:
        TimeoutError: not done within `within_s` seconds.
    """
    task = asyncio.current_task()
    assert task is not None
    for _ in range(_TRIES):
        try:
            async with asyncio.timeout(within_s):
                done = act()
                if inspect.isawaitable(done):
                    await done
                return
        except (asyncio.CancelledError, KeyboardInterrupt):
            within_s = min(within_s, _LAST_S)
            while task.cancelling():
                task.uncancel()


async def wait_for(task: asyncio.Task[Any], deadline: Deadline | None) -> BaseException | None:
    """Wait for the task, however often that is cancelled; give the first cancellation."""
    _unfinished.add(task)
    task.add_done_callback(_unfinished.discard)
    cancelled: BaseException | None = None
    ends = time.monotonic() + (math.inf if deadline is None else deadline.left_to_undo())
    while not task.done() and (left := ends - time.monotonic()) > 0:
        try:
            await asyncio.wait([task], timeout=None if left == math.inf else left)
        except (asyncio.CancelledError, KeyboardInterrupt) as error:
            cancelled = cancelled or error
    return cancelled


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("in the background: %s", error if isinstance(error, UtilityVMError) else repr(error))
