"""What the system refuses is an error of ours, with the remedy."""

from __future__ import annotations

import errno
import os

import pytest

from utilityvm.errors import SetupError, VMGone
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors


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
