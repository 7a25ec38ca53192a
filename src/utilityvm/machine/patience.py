"""How long the caller waits for whom we work, for what may block deep below its call, in whatever thread that is.

A public call says when it must be back (`vm.arguments`). What it starts inherits that: tasks and threads copy the
context that they are started in. When the call returns, what still works in its name is not bound any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

SHORTEST_S: Final = 0.1  # what others hold in the ordinary course is waited for, also by a caller who is out of time


class _Call:
    def __init__(self, ends: float) -> None:
        self.ends = ends


_call: ContextVar[_Call | None] = ContextVar("utilityvm_call", default=None)


def left_s(at_most: float) -> float:
    """How long something may take that is to take `at_most` seconds; never nothing."""
    call = _call.get()
    return at_most if call is None else max(min(at_most, call.ends - time.monotonic()), SHORTEST_S)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What the block waits for ends within that time, and within that of the call that it is a part of."""
    outer = _call.get()
    call = _Call(min(time.monotonic() + seconds, math.inf if outer is None else outer.ends))
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        call.ends = math.inf
