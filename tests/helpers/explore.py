"""Runs the orders of a set of coroutines' steps, one order a run, none of them twice.

Steps register with the scheduler and wait. When nothing else can run, the scheduler chooses: which step is answered,
and how, or which caller is cancelled. What was chosen in the runs before is kept as a tree. A run goes down that tree
by chance, the same way each time, and takes no branch that was tried to its end; so every run is another order, and a
small tree is tried whole.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeAlias, TypeVar

from utilityvm.testing import Break

_T = TypeVar("_T")
_BREAKS: Final = tuple(Break)
_PLAIN_SHARE: Final = 0.6  # of the choices by which nothing goes wrong

# The branches of one choice: None was not tried, True was tried to its end, a list has the branches of the next choice.
Node: TypeAlias = "list[Node | bool | None]"


class StepLoop(asyncio.AbstractEventLoop):
    """An event loop without time, files or threads: it runs what is ready, and stops."""

    def __init__(self) -> None:
        self._ready: deque[tuple[Callable[..., object], tuple[Any, ...], Context | None]] = deque()
        self._never = asyncio.TimerHandle(0.0, print, (), self)
        self.failures: list[str] = []

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        # Tasks and futures are the only callers, and look at no handle.
        self._ready.append((callback, args, context))
        return self._never

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._never  # no time passes: it never comes

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._never

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name="", context=context)  # a name of its own would cost a number

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
            callback, args, context = ready.popleft()
            if context is None:
                callback(*args)
            else:
                context.run(callback, *args)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let code in the block find this loop as the one that runs."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(before)


class Tree:
    """The choices of all runs so far, and the one that is being made."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._root: list[Node | bool | None] = [None]
        self._path: list[tuple[Node, int]] = []
        self.taken: list[int] = []

    @property
    def is_whole(self) -> bool:
        """Was every order tried?"""
        return self._root[0] is True

    def begin(self) -> None:
        self._path = [(self._root, 0)]
        self.taken = []

    def choose(self, plain: int, count: int) -> int:
        """One of `count` choices that was not tried to its end. By the first `plain` of them nothing goes wrong."""
        parent, branch = self._path[-1]
        node = parent[branch]
        if node is None:
            node = parent[branch] = [None] * count
        assert isinstance(node, list)
        assert len(node) == count, "the same choices led to another place: what was run is not the same each time"
        chance = self._chance
        choice = int(chance.random() * (plain if plain and chance.random() < _PLAIN_SHARE else count))
        if node[choice] is True:
            open_ = [number for number, branch in enumerate(node) if branch is not True]
            choice = open_[int(chance.random() * len(open_))]
        self._path.append((node, choice))
        self.taken.append(choice)
        return choice

    def end(self) -> None:
        """The run came to its end: it is never taken again."""
        while self._path:
            node, branch = self._path.pop()
            node[branch] = True
            if node.count(True) < len(node):
                return


@dataclass
class Budget:
    """What may go wrong in one order: without a bound the tree has no end."""

    faults: int
    cancels: int


class Run:
    """One order, or none in particular: without a `tree` nothing may be left to choose."""

    def __init__(self, budget: Budget, tree: Tree | None = None) -> None:
        self.budget = budget
        self.tree = tree
        self.loop = StepLoop()  # type: ignore[abstract]
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []
        self.breaks: defaultdict[str, list[Break]] = defaultdict(list)

    def gate(self, step: str) -> asyncio.Future[None]:
        """Where a backend's step waits to be chosen."""
        answer = self.loop.create_future()
        self.waiting.append((step, answer))
        return answer

    def play(self, callers: Sequence[asyncio.Task[Any]]) -> None:
        """Take choices until nothing waits any more."""
        waiting, budget, tree = self.waiting, self.budget, self.tree
        assert tree is not None
        self.loop.run_ready()
        while waiting:
            if any(answer.done() for _, answer in waiting):  # who waited for it was cancelled
                waiting[:] = [one for one in waiting if not one[1].done()]
                continue
            count = plain = len(waiting)
            # First each step's plain answer, then the ways each can break, then who can be cancelled.
            breakable = [number for number, (step, _) in enumerate(waiting) if step != "pause"] if budget.faults else ()
            cancellable = [task for task in callers if not task.done()] if budget.cancels else ()
            count += len(breakable) * len(_BREAKS) + len(cancellable)
            choice = tree.choose(plain, count) if count > 1 else 0
            if choice >= count - len(cancellable):
                budget.cancels -= 1
                cancellable[choice - count].cancel()
            else:
                if choice < plain:
                    number = choice
                else:
                    which, way = divmod(choice - plain, len(_BREAKS))
                    number = breakable[which]
                    budget.faults -= 1
                    self.breaks[waiting[number][0].partition(" ")[0]].append(_BREAKS[way])
                waiting.pop(number)[1].set_result(None)
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
