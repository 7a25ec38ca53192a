"""The thread in which the event loop of all synchronous calls runs.

There is one for each process, started by the first call. VMs without `keep` belong to it, so they end with the process
and not with the thread that called. A fork gets a new one when it first needs it, and none of its parent's VMs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, TypeVar

from utilityvm.errors import WrongLoop

_NOTHING: Final = object()


class Synchronous:
    """A synchronous face of an asynchronous object; two faces of one object are equal."""

    _async: Any

    @classmethod
    def _of(cls, thing: Any) -> Any:
        face = object.__new__(cls)
        face._async = thing
        return face

    def _get(self, name: str) -> Any:
        return call(getattr, self._async, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Synchronous) and self._async is other._async

    def __hash__(self) -> int:
        return hash(self._async)

    def __repr__(self) -> str:
        return repr(self._async)


_faces: dict[type, type[Synchronous]] = {}  # by the class of what they stand for


F = TypeVar("F", bound=type[Synchronous])


def stands_for(kind: type) -> Callable[[F], F]:
    """Have what calls give of this kind come as the decorated class."""

    def mark(face: F) -> F:
        _faces[kind] = face
        return face

    return mark


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call the function in the loop's thread, wait for its result there if it is to be awaited, and give it.

    Ctrl-C cancels the call, and is raised when the call has taken back what it did.

    Raises:
        WrongLoop: this is the loop's own thread, which would wait for itself.
    """
    loop = _the_loop()
    if threading.get_ident() == loop.thread.ident:
        raise WrongLoop("a synchronous call in the thread of the event loop would wait for itself")
    return _faced(loop.run(function, [_bare(one) for one in arguments], {k: _bare(v) for k, v in named.items()}))


def sink(given: Any) -> Any:
    """A caller's function, called in a thread of its own: it may block, and may make calls. A path stays one."""
    if not callable(given):
        return given

    async def take(data: bytes) -> None:
        await _aside(given, data)

    return take


def feed(given: Any) -> Any:
    """A caller's iterable, which is read in a thread of its own: it may block. A path stays one."""
    if given is None or isinstance(given, (str, bytes, os.PathLike)):
        return given

    async def read(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
        iterator = iter(pieces)
        while (piece := await _aside(next, iterator, _NOTHING)) is not _NOTHING:
            yield piece

    return read(given)


class _Loop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, name="utilityvm.sync", daemon=True)
        self.thread.start()

    def run(self, function: Callable[..., Any], arguments: list[Any], named: dict[str, Any]) -> Any:
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        context = contextvars.copy_context()
        tasks: list[asyncio.Task[Any]] = []

        async def work() -> Any:
            result = function(*arguments, **named)
            return await result if inspect.isawaitable(result) else result

        def begin() -> None:
            if done.done():  # interrupted before it began
                return
            task = self._loop.create_task(work(), context=context)
            tasks.append(task)
            task.add_done_callback(end)

        def end(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                done.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        def cancel() -> None:
            for task in tasks:
                task.cancel()
            if not tasks and not done.done():
                done.set_exception(asyncio.CancelledError())

        next_step: Callable[[], None] | None = begin
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                if next_step is not None:
                    self._loop.call_soon_threadsafe(next_step)
                    next_step = None
                concurrent.futures.wait([done])
                break
            except KeyboardInterrupt as error:  # in this thread: the call goes on in the loop's
                interrupt, next_step = error, cancel
        if interrupt is not None:
            raise interrupt
        return done.result()


_lock = threading.Lock()
_loop: _Loop | None = None


def _the_loop() -> _Loop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = _Loop()
        return _loop


def _forget() -> None:
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)


async def _aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a thread that nobody waits for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:
            failure = error
        loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name="utilityvm.sync caller", daemon=True).start()
    return await future


def _faced(value: Any) -> Any:
    if (face := _faces.get(type(value))) is not None:
        return face._of(value)
    return [_faced(one) for one in value] if type(value) is list else value


def _bare(value: Any) -> Any:
    if isinstance(value, Synchronous):
        return value._async
    return [_bare(one) for one in value] if type(value) in (list, tuple) else value
