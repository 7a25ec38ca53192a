"""Acquiring: what a call returns that gives something which must be given back. Await it, or enter it.

::

    vm = await UtilityVM.start("worker")         # yours to stop or close
    async with UtilityVM.start("worker") as vm:  # closed when the block ends

asyncpg's `pool.acquire()` and aiohttp's requests work the same way, and for the same reason: nobody has to remember
which calls want `await`, `async with`, or both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from utilityvm.machine.oserrors import typed

P = ParamSpec("P")
T = TypeVar("T", bound=AbstractAsyncContextManager[Any])
T_co = TypeVar("T_co", bound=AbstractAsyncContextManager[Any], covariant=True)


class Acquiring(Coroutine[Any, Any, T_co], AbstractAsyncContextManager[T_co]):
    """A call that was made and has not begun. `await` it for its result, or enter it with `async with`.

    Nothing happens before that. If the call fails or is cancelled, the block is not entered and the call has undone
    what it did. When the block ends, the result is given back as its own `async with` does it. It is a coroutine, so
    `asyncio.create_task` and `asyncio.run` take it. Use it once, as every coroutine.
    """

    def __init__(self, call: Coroutine[Any, Any, T_co]) -> None:
        """Returned by `UtilityVM.start`, `UtilityVM.add_scsi` and others."""
        self._call = call
        self._result: T_co | None = None
        named = cast(Any, call)
        self.__name__, self.__qualname__ = named.__name__, named.__qualname__  # for what asyncio prints of tasks

    async def __aenter__(self) -> T_co:
        # No await stands between the result and the block: a cancellation comes before the result, or in the block.
        self._result = result = await self._call
        return result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._result is not None
        return await self._result.__aexit__(kind, error, trace)

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._call.__await__()

    def send(self, value: Any) -> Any:
        return self._call.send(value)

    def throw(self, *arguments: Any) -> Any:
        return self._call.throw(*arguments)

    def close(self) -> None:
        self._call.close()


def acquires(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Acquiring[T]]:
    """The async function, whose result can be entered without being awaited first."""
    coroutine = typed(function)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> Acquiring[T]:
        return Acquiring(coroutine(*arguments, **named))

    given = f"Acquiring[{signature.return_annotation}]"
    cast(Any, call).__signature__ = signature.replace(return_annotation=given)
    return call


def is_acquiring(function: Callable[..., Any]) -> bool:
    """Was it made by `acquires`?"""
    return str(inspect.signature(function).return_annotation).startswith("Acquiring[")
