"""Each error leaves the client as it was raised in the server."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest

from utilityvm import errors
from utilityvm.scsi.slot import Slot
from utilityvm.server.problems import STATUS, error_of, problem_of, status_of
from utilityvm.server.types import Problem

# `ProgramFailed` is made by its caller, from an exit code; no call of the server raises it.
KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, errors.UtilityVMError) and kind is not errors.ProgramFailed
]


class Words(str):
    """As those of a guest, which are of a class of their own."""

    __slots__ = ()


def made(kind: type[errors.UtilityVMError]) -> errors.UtilityVMError:
    """An error with every field that its class takes."""
    values: dict[str, Any] = {
        "vm": "worker",
        "slot": Slot(0, 3),
        "host_path": "/srv/a.raw",
        "remedy": Words("do that"),
        "holders": ("pid 1", "pid 2"),
        "users": ("clone",),
        "console": ("panic",),
        "owner": "process 7 (uvm exec)",
        "message": "noise",
        "kept": Path("/state.db.damaged"),
    }
    _, *takes = inspect.signature(kind).parameters  # the first is the text
    error = kind("it failed", **{name: value for name, value in values.items() if name in takes})
    if isinstance(error, errors.GuestRefused):
        error.kind = Words("not_found")
    return error


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_on_the_other_side(kind: type[errors.UtilityVMError]) -> None:
    error = made(kind)
    sent = msgspec.json.encode(problem_of(error))
    got = error_of(msgspec.json.decode(sent, type=Problem))
    assert type(got) is kind
    assert str(got) == str(error)
    assert vars(got) == vars(error)


def test_an_error_of_a_later_version_is_an_error() -> None:
    problem = Problem(type="urn:x", title="t", status=409, detail="it failed", kind="NotYetKnown")
    assert type(error_of(problem)) is errors.UtilityVMError
    assert type(error_of(msgspec.structs.replace(problem, kind="Path"))) is errors.UtilityVMError


def test_every_error_has_a_status_of_a_failure() -> None:
    assert all(400 <= status_of(made(kind)) < 600 for kind in KINDS)
    assert {status for _, status in STATUS} <= set(range(400, 600))
