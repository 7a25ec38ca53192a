"""Runs every order of a set of coroutines' steps, one order a run, the same each time.

Steps register with the scheduler and wait. When nothing else can run, the scheduler chooses: which step is answered,
and how, or which caller is cancelled. A run follows a list of choices and takes the first one beyond its end; the next
run differs from it in the last choice that has another left. So the tree of all orders is walked depth first, without
keeping it.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, TypeVar

from utilityvm.testing import Break

_T = TypeVar("_T")
_BREAKS: Final = tuple(Break)


class StepLoop(asyncio.AbstractEventLoop):
    """An event loop without time, files or threads: it runs what is ready, and stops."""

    def __init__(self) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self.failures: list[str] = []

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        # Tasks are the only callers.
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return asyncio.TimerHandle(when, callback, args, self, context)  # no time passes: it never comes

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, context=context)

    def time(self) -> float:
        return 0.0

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    def run_ready(self) -> None:
        """Run until everything waits."""
        ready = self._ready
        while ready:
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let code in the block find this loop as the one that runs."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(before)


@dataclass
class Budget:
    """What may go wrong in one order: without a bound the tree has no end."""

    faults: int
    cancels: int


@dataclass
class Run:
    """One order: `follow` are the choices to take, `taken` those that were, `options` how many there were of each."""

    follow: list[int]
    budget: Budget
    loop: StepLoop = field(default_factory=StepLoop)
    taken: list[int] = field(default_factory=list)
    options: list[int] = field(default_factory=list)
    waiting: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)
    breaks: defaultdict[str, list[Break]] = field(default_factory=lambda: defaultdict(list))
    chance: Random | None = None  # chooses, beyond the end of `follow`

    async def gate(self, step: str) -> None:
        """Where a backend's step waits to be chosen."""
        answer = self.loop.create_future()
        self.waiting.append((step, answer))
        await answer

    def choose(self, count: int, plain: Sequence[int] = ()) -> int:
        """`plain`: the choices by which nothing goes wrong. By chance they are taken more often than not."""
        position = len(self.taken)
        if position < len(self.follow):
            choice = self.follow[position]
        else:
            chance = self.chance
            if chance is None:
                choice = 0
            else:
                choice = chance.choice(plain) if plain and chance.random() < 0.6 else chance.randrange(count)
        self.taken.append(choice)
        self.options.append(count)
        return choice

    def play(self, callers: Sequence[asyncio.Task[Any]]) -> None:
        """Take choices until nothing waits any more."""
        self.loop.run_ready()
        while self.waiting:
            ways: list[tuple[int, Break | None]] = []
            for number, (step, _) in enumerate(self.waiting):
                ways.append((number, None))
                if self.budget.faults and step != "pause":
                    ways += [(number, how) for how in _BREAKS]
            cancellable = [task for task in callers if not task.done()] if self.budget.cancels else []
            plain = [place for place, (_, how) in enumerate(ways) if how is None] if self.chance else ()
            choice = self.choose(len(ways) + len(cancellable), plain)
            if choice >= len(ways):
                self.budget.cancels -= 1
                cancellable[choice - len(ways)].cancel()
            else:
                number, how = ways[choice]
                step, answer = self.waiting.pop(number)
                if how is not None:
                    self.budget.faults -= 1
                    self.breaks[step.partition(" ")[0]].append(how)
                if not answer.done():  # its caller was cancelled
                    answer.set_result(None)
            self.loop.run_ready()

    def drive(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run to its end what waits for no choice."""
        task: asyncio.Task[_T] = self.loop.create_task(coro)
        self.loop.run_ready()
        return task.result()

    def finish(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run to its end what may not go wrong any more."""
        task: asyncio.Task[_T] = self.loop.create_task(coro)
        self.budget = Budget(0, 0)
        self.loop.run_ready()
        while not task.done():
            assert self.waiting, "it waits for something that nobody will do"
            _, answer = self.waiting.pop(0)
            if not answer.done():
                answer.set_result(None)
            self.loop.run_ready()
        return task.result()


def next_order(run: Run) -> list[int] | None:
    """The choices of the next order after `run`; None when all were taken."""
    for position in range(len(run.taken) - 1, -1, -1):
        if run.taken[position] + 1 < run.options[position]:
            return [*run.taken[:position], run.taken[position] + 1]
    return None
