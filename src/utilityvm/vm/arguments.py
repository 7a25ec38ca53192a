"""What callers may pass, by the name of the parameter: one rule for each name, for every public call and value.

`checked` looks at all arguments before anything else happens, so that a wrong one is `InvalidRequest`, names the value,
and has changed nothing. What may block below the call is told how long the caller waits. `timed` ends a call when its
time is up, whatever it waits for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast, get_args

from msgspec.structs import fields

from utilityvm.errors import InvalidRequest
from utilityvm.guests.program import Limits
from utilityvm.machine import patience
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.mount_config import CallerKey, Encryption, MountConfig, ScratchKey, Verity
from utilityvm.scsi.ports import DiskFormat, VMAccess
from utilityvm.scsi.slot import Slot
from utilityvm.tasks import GRACE_S, Deadline

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_S: Final = 1e8  # three years; what has no end is None
_TIMES: Final = ("wait_s", "timeout_s")  # a call may take both, one after the other
_MOST_ROWS: Final = 65535  # or columns, of a terminal: the kernel keeps 16 bits
_LATER_S: Final = 0.2  # than the steps of a call, which say better what was not done in time


class Rule(Protocol):
    """Refuses a value by saying what it should be; None: it is fine."""

    def __call__(self, value: Any) -> str | None: ...


def _seconds(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST_S:
        return f"a number of seconds, from 0 to {LONGEST_S:.0f}"
    return None


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _count(value: Any) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"


def _offset(value: Any) -> str | None:
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
    return None if is_one else "an offset in bytes, 0 or more"


def _user(value: Any) -> str | None:
    is_one = isinstance(value, (int, str)) and not isinstance(value, bool) and value not in ("",)
    return None if is_one else "the name or the number of a user in the guest"


def _program(value: Any) -> str | None:
    is_one = isinstance(value, (int, str)) and not isinstance(value, bool)
    return None if is_one else "the number, the name or the id of a program"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a text"


def _path(value: Any) -> str | None:
    return None if isinstance(value, (str, os.PathLike)) else "a path: a text or a Path"


def _source(value: Any) -> str | None:
    is_one = isinstance(value, (str, os.PathLike)) or hasattr(value, "__aiter__")
    return None if is_one else "a path, or an asynchronous iterator of bytes"


def _destination(value: Any) -> str | None:
    return (
        None if isinstance(value, (str, os.PathLike)) or callable(value) else "a path, or a function that takes bytes"
    )


def _terminal(value: Any) -> str | None:
    is_size = isinstance(value, tuple) and len(value) == 2 and all(_rows(one) for one in value)
    return None if is_size else "the rows and columns of a terminal, such as (24, 80)"


def _rows(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_ROWS


def _mode(value: Any) -> str | None:
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0o7777
    return None if is_one else "the mode of a file, such as 0o644"


def _guest_path(value: Any) -> str | None:
    is_path = isinstance(value, (str, PurePosixPath)) or (isinstance(value, Enum) and value.name == "GENERATED")
    return None if is_path else "a path in the guest: a text, a PurePosixPath, or GENERATED"


def _force(value: Any) -> str | None:
    return None if value is True or value is False or value == "host" else 'True, False or "host"'


def _words(value: Any) -> str | None:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    return None if is_list and all(isinstance(word, str) for word in value) else "a list of words"


def _command(value: Any) -> str | None:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)) and value
    is_command = is_list and all(isinstance(word, (str, os.PathLike)) for word in value)
    return None if is_command else 'a list of words, such as ["sh", "-c", "ls /data"]'


def _variables(value: Any) -> str | None:
    is_env = isinstance(value, Mapping) and all(isinstance(one, str) for pair in value.items() for one in pair)
    return None if is_env else "a mapping of texts to texts"


def _replacements(value: Any) -> str | None:
    is_fine = isinstance(value, Mapping) and all(isinstance(slot, tuple) and len(slot) == 2 for slot in value)
    return None if is_fine else "a mapping of slots to disks"


def _called(value: Any) -> str | None:
    return None if callable(value) else "a function that takes the output"


def _several(value: Any) -> str | None:
    return None if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) else "a list"


def _reservation(value: Any) -> str | None:
    is_one = isinstance(value, str) or isinstance(getattr(value, "id", None), str)
    return None if is_one else "a reservation, or its id"


def _one_of(kind: type[Enum]) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, kind) or (isinstance(value, str) and value in {one.value for one in kind}):
            return None
        return f"one of {', '.join(str(one.value) for one in kind)}"

    return rule


def _word_of(*words: str) -> Rule:
    return lambda value: None if isinstance(value, str) and value in words else f"one of {', '.join(words)}"


def _made_of(*kinds: type, what: str) -> Rule:
    return lambda value: None if isinstance(value, kinds) else what


def _having(member: str, *, what: str, or_text: bool = False) -> Rule:
    """An object with that member: its class is of a module that imports this one."""

    def rule(value: Any) -> str | None:
        is_one = hasattr(value, member) and not isinstance(value, type)
        return None if is_one or (or_text and isinstance(value, str)) else what

    return rule


# The settings of a mount, by the type that `MountConfig` declares.
_RULES_OF_TYPES: Final[Mapping[Any, Rule]] = {
    bool: _flag,
    int: _count,
    str | None: _text,
    tuple[str, ...]: _words,
    Encryption | None: _made_of(ScratchKey, CallerKey, what="a ScratchKey or a CallerKey"),
    Verity | None: _made_of(Verity, what="a Verity"),
}

RULES: Final[Mapping[str, Rule]] = {
    **{setting.name: _RULES_OF_TYPES[get_args(setting.type)[0]] for setting in fields(MountConfig)},
    "timeout_s": _seconds,
    "wait_s": _seconds,
    "name": _text,
    "template": _text,
    "prefix": _text,
    "holder": _text,
    "accelerator": _text,
    "force": _force,
    "needs_guest": _flag,
    "keep": _flag,
    "physical": _flag,
    "size": _count,
    "size_bytes": _count,
    "sector_size_bytes": _count,
    "memory_mib": _count,
    "cpus": _count,
    "controllers": _count,
    "host_path": _path,
    "cwd": _path,
    "guest_path": _guest_path,
    "command": _command,
    "env": _variables,
    "replace": _replacements,
    "access": _one_of(VMAccess),
    "format": _one_of(DiskFormat),
    "which": _word_of("all", "each"),
    "on_busy": _word_of("raise", "force"),
    "mount": _made_of(MountConfig, what="a MountConfig"),
    "user": _user,
    "limits": _made_of(Limits, what="Limits"),
    "check": _flag,
    "text": _flag,
    "follow": _flag,
    "hold": _flag,
    "live": _flag,
    "ring_bytes": _count,
    "max_output_bytes": _count,
    "stdout_offset": _offset,
    "stderr_offset": _offset,
    "number": _program,
    "id": _text,
    "slot": _made_of(Slot, what="a Slot"),
    "stdout": _called,
    "stderr": _called,
    "mounts": _several,
    "disks": _several,
    "reservation": _reservation,
    "terminal": _terminal,
    "src": _source,
    "dst": _destination,
    "put.guest_path": _path,
    "get.guest_path": _path,
    "read_bytes.guest_path": _path,
    "write_bytes.guest_path": _path,
    "links": _word_of("refuse", "skip", "keep"),
    "max_bytes": _offset,
    "mode": _mode,
    "data": _made_of(bytes, bytearray, memoryview, what="bytes"),
    "start_program.stdin": _flag,
    "run.stdin": _made_of(bytes, bytearray, memoryview, what="bytes"),
    "run_streaming.stdin": _having("__aiter__", what="an asynchronous iterator of bytes"),
    "config": _having("for_qemu", what="a VMConfig, or the name of a VM", or_text=True),
    "image": _having("initramfs", what="a GuestImage"),
    "disk": _having("request", what="a DiskSpec"),
    "state": _made_of(ScsiState, what="a ScsiState"),
}
"""A rule that holds for one call alone has its name, as in `run.stdin`."""


def rule_of(function: str, name: str) -> Rule | None:
    """The rule for a parameter of that function."""
    return RULES.get(f"{function}.{name}") or RULES.get(name)


def each(name: str, values: Iterable[R]) -> list[R]:
    """The values, each of which can be that of a parameter of this name.

    Raises:
        InvalidRequest: as `check`.
    """
    checked_values = list(values)
    for value in checked_values:
        check(name, value)
    return checked_values


def check(name: str, value: object, *, of: str = "", optional: bool = False) -> None:
    """Raises:
    InvalidRequest: the value cannot be that of a parameter of this name, `of` a function; says what it should be.
    """
    rule = rule_of(of, name)  # that each name has one is for a test to say
    if rule is None or (optional and value is None):
        return
    wanted = rule(value)
    if wanted is not None:
        raise InvalidRequest(f"{name} {value!r} is not {wanted}", remedy=f"give {wanted}")


def check_fields(value: Any) -> None:
    """Every field of a dataclass, by its name; None if that is its default.

    Raises:
        InvalidRequest: as `check`.
    """
    parameters = inspect.signature(type(value)).parameters
    for field in dataclasses.fields(value):
        check(field.name, getattr(value, field.name), optional=parameters[field.name].default is None)


def check_settings(settings: Mapping[str, object]) -> None:
    """Every setting of a mount, by its name; None if that is its default.

    Raises:
        InvalidRequest: as `check`.
    """
    for name, value in settings.items():
        check(name, value, optional=getattr(_PLAIN, name) is None)


_PLAIN: Final = MountConfig()


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which looks at its arguments first. None is taken where it is the default.

    Raises:
        InvalidRequest: as `check`.
    """
    signature = inspect.signature(function)
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
    looked_at = [name for name in signature.parameters if rule_of(function.__name__, name)]
    times = {name: signature.parameters[name].default for name in _TIMES if name in signature.parameters}

    def look(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = signature.bind(*arguments, **named).arguments
        for name in looked_at:
            if name in given:
                check(name, given[name], of=function.__name__, optional=name in optional)

    if not inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        def plain(*arguments: P.args, **named: P.kwargs) -> R:
            look(arguments, named)
            return function(*arguments, **named)

        return plain

    @functools.wraps(function)
    async def awaited(*arguments: P.args, **named: P.kwargs) -> Any:
        look(arguments, named)
        seconds = [named.get(name, default) for name, default in times.items()]
        if not seconds or None in seconds:
            return await cast(Awaitable[Any], function(*arguments, **named))
        with patience.within(sum(cast("list[float]", seconds)) + GRACE_S):
            return await cast(Awaitable[Any], function(*arguments, **named))

    return cast(Callable[P, R], awaited)


class _Face(Protocol):
    """What `timed` needs of a VM."""

    @property
    def name(self) -> str: ...

    async def _ready(self, deadline: Deadline) -> None: ...


def timed(function: Callable[P, R]) -> Callable[P, R]:
    """A method of a VM that is `checked`, waits until the VM takes calls, and ends when its `timeout_s` is up.

    Raises:
        DeadlineExceeded: names the call.
        VMNotRunning, VMGone: the VM takes no calls.
    """
    signature = inspect.signature(function)
    default = signature.parameters["timeout_s"].default

    @functools.wraps(function)
    async def awaited(*arguments: P.args, **named: P.kwargs) -> Any:
        face = cast(_Face, arguments[0])
        timeout_s = named.get("timeout_s", default)
        deadline = Deadline(None if timeout_s is None else cast(float, timeout_s))
        await face._ready(deadline)
        async with deadline.limit(f"{function.__name__}: not done", vm=face.name, later_s=_LATER_S):
            return await cast(Awaitable[Any], function(*arguments, **named))

    return checked(cast(Callable[P, R], awaited))
