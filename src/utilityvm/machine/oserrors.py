"""Errors of the operating system as errors of ours: one place that says what is missing, and what to do about it.

Any call may fail for a lack of descriptors, space or memory. Where the code has something of its own to say about
that, it does; everything else reaches the public face as an `OSError`, and is translated there by `typed_errors`.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from utilityvm.errors import SetupError, UtilityVMError

T = TypeVar("T")

_NO_THREAD: Final = "can't start new thread"
OURS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))  # they say nothing about the file
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES: Final = {
    errno.EMFILE: "raise the limit on open files: ulimit -n",
    errno.ENFILE: "this machine has too many files open: see /proc/sys/fs/file-nr, and raise fs.file-max",
    errno.ENOMEM: "free some memory of this machine",
    errno.EAGAIN: "raise the limit on processes and threads: ulimit -u",
    errno.ENOLCK: "use a file system that can lock files, such as a local one",
}


def remedy_of(error: OSError) -> str:
    """What to do about it."""
    if error.errno in _NO_SPACE:
        where = Path(os.fsdecode(error.filename)).parent if error.filename else "the file system"
        return f"make room in {where}: see df"
    return _REMEDIES.get(error.errno or 0, "see dmesg: is the storage of this machine in order?")


def as_ours(error: OSError, doing: str, *, vm: str | None = None) -> SetupError:
    """The error to raise from `error`, which stopped us while we were `doing` something."""
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return SetupError(f"{doing}: {where}{error.strerror or error}", vm=vm, remedy=remedy_of(error))


def has_descriptors() -> bool:
    """Can this process open one more file?"""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def typed_errors(cls: type[T]) -> type[T]:
    """Have every public method of the class raise SetupError where the system fails one of its calls.

    Methods that call back into the caller's code (`run_streaming`, whose sinks may raise what they like) are marked
    with `raises_callers_errors` and left alone.

    Errors of ours leave them filled in with what the object knows of where it is: its `_where`, if it has one.
    """
    for name, thing in list(vars(cls).items()):
        if name.startswith("_") and name not in ("__aenter__", "__aexit__"):
            continue
        if isinstance(thing, (classmethod, staticmethod)):
            setattr(cls, name, type(thing)(typed(thing.__func__)))
        elif inspect.isfunction(thing):
            setattr(cls, name, typed(thing))
    return cls


def raises_callers_errors(function: Callable[..., T]) -> Callable[..., T]:
    """Mark a method that passes on errors of its caller's own code."""
    function.__dict__["raises_callers_errors"] = True
    return function


F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """The function, raising SetupError where the system fails one of its calls."""
    if getattr(function, "raises_callers_errors", False) or inspect.isasyncgenfunction(function):
        return function
    doing = function.__name__.strip("_").replace("_", " ")

    if inspect.iscoroutinefunction(function):
        coroutine = cast(Callable[..., Coroutine[Any, Any, Any]], function)

        @functools.wraps(function)
        async def waits(*args: Any, **named: Any) -> Any:
            try:
                return await coroutine(*args, **named)
            except UtilityVMError as error:
                error.fill(**_where(args))
                raise
            except (OSError, RuntimeError) as error:
                if (ours := _translated(error, doing)) is None:
                    raise
                raise ours.fill(**_where(args)) from error

        waits.__dict__["is_typed"] = True
        return cast(F, waits)

    @functools.wraps(function)
    def calls(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except UtilityVMError as error:
            error.fill(**_where(args))
            raise
        except (OSError, RuntimeError) as error:
            if (ours := _translated(error, doing)) is None:
                raise
            raise ours.fill(**_where(args)) from error

    calls.__dict__["is_typed"] = True
    return cast(F, calls)


def _where(args: tuple[Any, ...]) -> dict[str, Any]:
    """Where the object is whose method was called: of which VM, and of which disk of it."""
    found = getattr(args[0], "_where", None) if args else None
    return found if isinstance(found, dict) else {}


def is_typed(function: object) -> bool:
    """Are the system's errors in the function told as errors of ours, or is it marked as one that passes errors on?"""
    marks = getattr(function, "__dict__", {})
    return bool(marks.get("is_typed") or marks.get("raises_callers_errors"))


def _translated(error: OSError | RuntimeError, doing: str) -> SetupError | None:
    if isinstance(error, TimeoutError):
        return None  # Python makes it an OSError; it is not the system's
    if isinstance(error, OSError):
        return as_ours(error, doing)
    if _NO_THREAD in str(error):
        return SetupError(f"{doing}: {error}", remedy=_REMEDIES[errno.EAGAIN])
    return None
