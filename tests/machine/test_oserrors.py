"""What the system refuses is an error of ours, with the remedy."""

from __future__ import annotations

import enum
import errno
import inspect
import os

import pytest

import utilityvm
from utilityvm.errors import SetupError, VMGone
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import HcsHost
from utilityvm.machine.oserrors import is_typed, raises_callers_errors, typed_errors

# They ask nothing of the system: values that are made of others.
PURE = {"Limits", "Acquiring", "Owner", "SavedDisk", "ScsiEvents", "ScsiState", "Slot", "VMConfig", "introduce"}


@typed_errors
class Face:
    def __init__(self, error: Exception) -> None:
        self.error = error

    @classmethod
    async def open(cls, error: Exception) -> None:
        raise error

    async def add_disk(self) -> None:
        raise self.error

    def look(self) -> None:
        raise self.error

    @raises_callers_errors
    async def stream(self) -> None:
        raise self.error


def system(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


async def test_an_error_of_the_system_says_what_was_done_where_and_what_to_do() -> None:
    with pytest.raises(SetupError, match="add disk: /run/x/sock: No space left on device") as caught:
        await Face(system(errno.ENOSPC, "/run/x/sock")).add_disk()
    assert caught.value.remedy == "make room in /run/x: see df"
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(SetupError, match="Too many open files") as caught:
        await Face.open(system(errno.EMFILE))
    assert caught.value.remedy == "raise the limit on open files: ulimit -n"
    with pytest.raises(SetupError, match="look: "):
        Face(system(errno.EIO)).look()
    with pytest.raises(SetupError, match="new thread"):
        Face(RuntimeError("can't start new thread")).look()


@pytest.mark.parametrize("error", [VMGone("gone"), TimeoutError(), RuntimeError("a mistake"), ValueError("x")])
async def test_other_errors_are_as_they_were(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        await Face(error).add_disk()
    assert caught.value is error
    assert caught.value.__cause__ is None


async def test_what_the_callers_own_code_raises_is_the_callers() -> None:
    with pytest.raises(BrokenPipeError):
        await Face(BrokenPipeError(errno.EPIPE, "Broken pipe")).stream()


def public_calls() -> list[tuple[str, object]]:
    """Every public function, and every public method of every public class."""
    public = {name: getattr(utilityvm, name) for name in utilityvm.__all__ if name not in PURE}
    found: list[tuple[str, object]] = []
    for name, thing in {**public, "HcsHost": HcsHost, "HcsGuest": HcsGuest}.items():
        if not inspect.isclass(thing):
            found += [(name, thing)] if inspect.isroutine(thing) else []
            continue
        if issubclass(thing, (BaseException, enum.Enum)):
            continue
        for method, member in vars(thing).items():
            function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if inspect.isroutine(function) and (method[0] != "_" or method in ("__aenter__", "__aexit__")):
                found.append((f"{name}.{method}", function))
    return found


def test_every_public_call_tells_the_systems_errors_as_ours() -> None:
    calls = public_calls()
    assert {"list_vms", "UtilityVM.start", "Template.verify", "HcsHost.attach"} <= {name for name, _ in calls}
    assert [name for name, function in calls if not is_typed(function)] == []
