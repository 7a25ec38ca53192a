"""The one way out of the event loop for work that may block.

Storage hangs: a file server that is away, another program's lease, a FUSE program that stopped, a locked store. Such a
call must cost its own thread and delay nobody else, so asyncio's pool (a few threads that all calls share, and that
are waited for when the program ends) is not used anywhere. Here:

* Each piece of work has a thread to itself. A thread that is done waits a few seconds for other work, because starting
  one costs more than the work; work that hangs keeps its thread, and the next piece of work gets another one.
* A caller that is cancelled, or out of time, is back at once. What comes after it has gone is given to `late`, in a
  thread: whoever opens something says how it is closed.
* The threads never keep the program from ending.
* A thread outlives its caller, so it never uses a descriptor of the caller's: it is lent a duplicate (`lent`).

::

    disk = await in_thread(open_disk, request, late=QemuDisk.close)
    size = await in_thread(lent(fd, measure))
    aside(os.close, fd)                     # closing flushes, which blocks as well
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, ParamSpec, TypeVar

from utilityvm.errors import SetupError
from utilityvm.log import logger

P = ParamSpec("P")
T = TypeVar("T")

LIMIT: Final = 1024  # threads; each that hangs keeps a stack of some 50 KiB
BEGIN_S: Final = 10.0  # how long work waits for a thread when there are as many as that
_IDLE_S: Final = 5.0

_log = logger(__name__)


async def in_thread(
    work: Callable[..., T], *arguments: Any, late: Callable[[T], object] | None = None, always: bool = False
) -> T:
    """Do `work(*arguments)` in a thread, and give what it returned or raise what it raised.

    If this is cancelled it raises at once, and the work goes on: it cannot be interrupted. What it returns then is
    given to `late`, in a thread as well. Work that had not begun is left out, unless it is to be done `always`: undoing
    and closing are.

    Raises:
        SetupError: `LIMIT` pieces of work hang, and none ended within `BEGIN_S` seconds; or the system has no thread
            left. The work was not begun.
    """
    call = _Call(partial(work, *arguments), late, always=always)
    try:
        _threads.put(call)
    except SetupError:
        if not always:
            raise
        call.work_off()  # rather here than not at all
    return await call.outcome()


async def to_the_end(work: Callable[..., T], *arguments: Any, late: Callable[[T], object] | None = None) -> T:
    """As `in_thread`, but a caller that is cancelled is told only when the work, and `late`, has ended.

    For quick work that changes what others find, such as files with names: the caller's undoing has to come after it.
    """
    working = asyncio.ensure_future(in_thread(work, *arguments, late=late))
    cancelled = await _wait_whatever(working)
    if cancelled is None:
        return working.result()
    if not working.cancelled() and working.exception() is None and late is not None:
        await _wait_whatever(asyncio.ensure_future(in_thread(late, working.result(), always=True)))
    raise cancelled


async def _wait_whatever(working: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until it is done, also when we are cancelled; says whether we were."""
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def aside(work: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
    """Do the work in a thread, and do not wait for it. What it raises is logged, and told to nobody."""
    piece = _Aside(partial(work, *arguments, **named))
    try:
        _threads.put(piece)
    except SetupError:
        piece.work_off()  # rather here than not at all


def lent(fd: int, work: Callable[..., T]) -> Callable[..., T]:
    """`work` with a duplicate of `fd` as its first argument; it can be done once, and closes the duplicate in any case.

    The number `fd` may mean another file by the time that a thread uses it; the duplicate means this one.
    """
    copy = _Lent(os.dup(fd))

    def owned(*arguments: Any) -> T:
        mine = copy.take()
        try:
            return work(mine, *arguments)
        finally:
            os.close(mine)

    return owned


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncGenerator[T]:
    """Enter a context manager, and leave it, in threads. One that is entered too late is left with an error at once."""

    def leave(_: object) -> None:
        with suppress(asyncio.CancelledError):
            error = asyncio.CancelledError()
            manager.__exit__(type(error), error, None)

    thing = await in_thread(manager.__enter__, late=leave)
    try:
        yield thing
    except BaseException as error:
        if not await in_thread(manager.__exit__, type(error), error, error.__traceback__, always=True):
            raise
    else:
        await in_thread(manager.__exit__, None, None, None, always=True)


class Lane:
    """Work that is done in its order, one piece at a time: what uses one connection of SQLite, for example.

    A piece that hangs holds up those behind it, and nothing else. Each of their callers can stop waiting at any time;
    a piece that had not begun by then is left out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Any] | _Aside] = deque()
        self._is_busy = False

    async def run(self, work: Callable[..., T], *arguments: Any, late: Callable[[T], object] | None = None) -> T:
        """As `in_thread`, after all that was asked for before."""
        call = _Call(partial(work, *arguments), late)
        with self._lock:
            self._waiting.append(call)
            begins, self._is_busy = not self._is_busy, True
        if begins:
            try:
                _threads.put(_Aside(self._work_off))
            except BaseException:
                with self._lock:
                    self._waiting.remove(call)
                    self._is_busy = False
                raise
        return await call.outcome()

    def aside(self, work: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        """As the function `aside`, after all that was asked for before."""
        with self._lock:
            self._waiting.append(_Aside(partial(work, *arguments, **named)))
            begins, self._is_busy = not self._is_busy, True
        if begins:
            aside(self._work_off)

    def _work_off(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_busy = False
                    return
                work = self._waiting.popleft()
            work.work_off()


class _Lent:
    """A descriptor that is closed once: by the work, or because the work was left out."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take(self) -> int:
        fd, self.fd = self.fd, -1
        return fd

    def __del__(self) -> None:
        if (fd := self.take()) >= 0:
            aside(os.close, fd)


class _Aside:
    """Work that nobody waits for."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def work_off(self) -> None:
        try:
            self._work()
        except Exception as error:  # there is nobody to raise it to
            _log.warning("%s: %s", type(error).__name__, error)


class _Call(Generic[T]):
    """Work that a coroutine waits for.

    Exactly one side has the result in the end: the caller, or `late` if the caller had gone by then. The lock decides.
    """

    def __init__(self, work: Callable[[], T], late: Callable[[T], object] | None, *, always: bool = False) -> None:
        self._always = always
        self._work: Callable[[], T] | None = partial(contextvars.copy_context().run, work)
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_given_up = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    async def outcome(self) -> T:
        hurry = self._loop.call_later(BEGIN_S, self._give_up_waiting)
        try:
            await self._woken
        except BaseException:
            self._give_up()
            raise
        finally:
            hurry.cancel()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return self._result.pop()

    def work_off(self) -> None:
        with self._lock:
            work, self._work = self._work, None
            if work is None:
                return  # left out
            self._has_begun = True
        result: list[T] = []
        error: BaseException | None = None
        try:
            result.append(work())
        except BaseException as raised:  # the caller's to deal with, whatever it is
            error = raised
        del work  # and what it holds: the caller may go on before this thread forgets it
        with self._lock:
            is_late: bool = self._is_given_up
            if not is_late:
                self._result, self._error = result, error
                try:
                    self._loop.call_soon_threadsafe(self._wake)
                except RuntimeError:  # the loop was closed
                    is_late = True
        if is_late and result and self._late is not None:
            _Aside(partial(self._late, result.pop())).work_off()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def _give_up(self) -> None:
        """The caller has gone."""
        with self._lock:
            self._is_given_up = True
            if not self._always:
                self._work = None
            result, self._result, self._error = self._result, [], None
        if result and self._late is not None:
            aside(self._late, result.pop())

    def _give_up_waiting(self) -> None:
        """The time to begin is up; a lane's time is its callers'."""
        with self._lock:
            if self._has_begun or not _threads.is_full:
                return
            self._is_given_up = True
            if not self._always:
                self._work = None
            self._error = _all_hang()
        self._wake()


class _Threads:
    """Threads that wait for work, and as many more as there is work for."""

    def __init__(self) -> None:
        self._forget()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forget)  # the child has none of them

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Call[Any] | _Aside] = SimpleQueue()
        self._count = 0
        self._idle = 0  # those that wait, less the work that waits for them

    @property
    def is_full(self) -> bool:
        return self._count >= LIMIT

    def put(self, work: _Call[Any] | _Aside) -> None:
        with self._lock:
            is_new = self._idle <= 0 and self._count < LIMIT
            if is_new:
                self._count += 1
            else:
                self._idle -= 1
        if is_new:
            try:
                threading.Thread(target=self._serve, args=(work,), name="utilityvm", daemon=True).start()
            except RuntimeError as error:  # "can't start new thread"
                with self._lock:
                    self._count -= 1
                raise SetupError(
                    "no thread can be started: this user, or the system, has as many as it may have",
                    remedy="raise the limit: ulimit -u, or TasksMax of the service",
                ) from error
        else:
            self._queue.put(work)

    def _serve(self, work: _Call[Any] | _Aside | None) -> None:
        queue = self._queue
        while work is not None:
            work.work_off()
            work = None  # an idle thread holds nothing
            with self._lock:
                self._idle += 1
            try:
                work = queue.get(timeout=_IDLE_S)
            except Empty:
                work = self._retire(queue)

    def _retire(self, queue: SimpleQueue[_Call[Any] | _Aside]) -> _Call[Any] | _Aside | None:
        """None: this thread ends; work that came in the last moment was given to it."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
                self._count -= 1
                return None
        return queue.get()  # its `put` counted on this thread


def _all_hang() -> SetupError:
    return SetupError(
        f"{LIMIT} calls to this host's storage have not returned, and none did within {BEGIN_S:g} s",
        remedy="see which storage hangs: `dmesg`, `findmnt`; then detach its disks, or stop the VMs that use it",
    )


_threads = _Threads()
