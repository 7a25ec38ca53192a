"""Objects that belong to the event loop that made them: a call from another one, or another thread, would hang."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from utilityvm.scsi.manager import wrong_loop

T = TypeVar("T")

_WAITING: Final = ("__aenter__", "__aexit__", "__anext__")


def of_one_loop(cls: type[T]) -> type[T]:
    """Have every public method of the class raise WrongLoop in another loop or thread than the one that made it.

    Views and properties are not looked at: they wait for nothing.
    """
    made = cls.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **named: Any) -> None:
        self._made_in = _here()
        made(self, *args, **named)

    cls.__init__ = init  # type: ignore[method-assign]
    for name, thing in list(vars(cls).items()):
        if inspect.isfunction(thing) and (not name.startswith("_") or name in _WAITING):
            setattr(cls, name, _checked(thing))
    return cls


def _here() -> object:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return threading.get_ident()


def _check(thing: Any) -> None:
    """Raises:
    WrongLoop: `thing` is another loop's.
    """
    here = _here()
    if isinstance(thing._made_in, asyncio.AbstractEventLoop) and here is not thing._made_in:
        raise wrong_loop(None)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waits(self: Any, *args: Any, **named: Any) -> Any:
            _check(self)
            return await function(self, *args, **named)

        return waits

    @functools.wraps(function)
    def calls(self: Any, *args: Any, **named: Any) -> Any:
        _check(self)
        return function(self, *args, **named)

    return calls
