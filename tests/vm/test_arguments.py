"""Every parameter of every public call has a rule; a value that breaks it is refused before anything happens."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest

from utilityvm.errors import DeadlineExceeded, InvalidRequest
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.mount_config import MountConfig
from utilityvm.scsi.slot import Slot
from utilityvm.tasks import Deadline
from utilityvm.vm import arguments
from utilityvm.vm.acquiring import is_acquiring
from utilityvm.vm.arguments import LONGEST_S, RULES, rule_of, timed
from utilityvm.vm.config import DiskSpec, VMConfig
from utilityvm.vm.pool import ClonePool
from utilityvm.vm.utility_vm import UtilityVM

SECONDS = [math.nan, math.inf, -math.inf, -1, -0.001, True, "1", b"1", [], LONGEST_S * 2]
FLAGS = [1, 0, "yes", [], b""]
COUNTS = [True, "1", 1.0, b"1", [], math.nan]
TEXTS = [7, b"x", True, ["x"], 1.5]
PATHS = [7, b"/x", True, ["/x"]]
WRONG: dict[str, list[Any]] = {
    **{one.name: FLAGS for one in msgspec.structs.fields(MountConfig) if get_args(one.type)[0] is bool},
    **dict.fromkeys(("timeout_s", "wait_s"), SECONDS),
    **dict.fromkeys(("name", "template", "prefix", "holder", "filesystem", "accelerator"), TEXTS),
    **dict.fromkeys(("keep", "needs_guest", "physical"), FLAGS),
    **dict.fromkeys(
        ("partition", "size", "size_bytes", "sector_size_bytes", "memory_mib", "cpus", "controllers"), COUNTS
    ),
    **dict.fromkeys(("host_path", "guest_path", "cwd"), PATHS),
    "force": [*FLAGS, "guest"],
    "options": ["ro", b"ro", [1], 7],
    "command": ["ls", [], b"ls", [1], 7],
    "env": ["A=1", {"A": 1}, {1: "A"}, []],
    "replace": [[], {"0:1": "x"}, "0:1=x", 7],
    "access": ["everybody", 7, True, b"individual"],
    "format": ["vdi", 7, True, b"raw"],
    "which": ["some", 7, True],
    "on_busy": ["ignore", 7, True],
    "encryption": ["key", b"key", True],
    "verity": ["hash", True],
    "mount": ["ro", {}, True],
    "slot": ["0:1", 7, (0, 1)],
    "stdout": ["x", 7],
    "stderr": ["x", 7],
    "mounts": ["abc", 7],
    "disks": ["abc", 7],
    "reservation": [7, None, b"x"],
    "stdin": ["text", 7, []],
    "terminal": [(0, 80), (24,), [24, 80], (24, 65536), (True, 80), "24x80", 7],
    "src": [7, b"/x", True, ["/x"]],
    "dst": [7, b"/x", True, ["/x"]],
    "links": ["follow", 7, True],
    "data": ["text", 7, []],
    "mode": [-1, 0o10000, True, "644", 1.5],
    "max_bytes": [*COUNTS, -1],
    "user": ["", True, b"root", 1.5],
    "limits": [7, {"pids": 1}, True],
    **dict.fromkeys(("check", "text", "follow", "hold", "live"), FLAGS),
    **dict.fromkeys(("ring_bytes", "max_output_bytes"), COUNTS),
    **{name: [*COUNTS, -1, 1 << 62] for name in ("stdout_offset", "stderr_offset")},
    "number": [True, b"1", 1.5, []],
    "id": TEXTS,
    "config": [7, None, b"x", VMConfig],
    "image": ["x", 7],
    "disk": ["x", 7, None, DiskSpec],
    "state": ["x", 7, None, {}],
}


def public_calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    for kind in (UtilityVM, ClonePool):
        for name, member in inspect.getmembers(kind, callable):
            if not name.startswith("_") and inspect.isroutine(member):
                yield f"{kind.__name__}.{name}", member
    yield "ClonePool", ClonePool


CALLS = dict(public_calls())
PARAMETERS = [
    (call, name) for call, member in CALLS.items() for name in inspect.signature(member).parameters if name != "self"
]
CASES = [(call, name, value) for call, name in PARAMETERS for value in WRONG.get(name, [])]


@pytest.mark.parametrize(("call", "name"), PARAMETERS)
def test_every_parameter_of_a_public_call_has_a_rule(call: str, name: str) -> None:
    assert rule_of(call.rpartition(".")[2], name)
    assert name in WRONG


def test_every_rule_is_tried() -> None:
    assert {name.rpartition(".")[2] for name in RULES} == set(WRONG)


@pytest.mark.parametrize(("call", "values"), [("add_scsi_many", ["x"]), ("remove_scsi_many", [None])])
async def test_every_member_of_a_list_is_looked_at(call: str, values: list[Any]) -> None:
    vm = SimpleNamespace(name="v", _vm=Mock(), _ready=AsyncMock())
    with pytest.raises(InvalidRequest):
        await getattr(UtilityVM, call)(vm, values)


@pytest.mark.parametrize(("call", "name", "value"), CASES)
async def test_a_value_that_cannot_be_is_refused_first(call: str, name: str, value: Any) -> None:
    member = CALLS[call]
    given: dict[str, Any] = {}
    for one, parameter in inspect.signature(member).parameters.items():
        if one == "self":
            given[one] = None  # not reached
        elif one == name:
            given[one] = value
        elif parameter.default is parameter.empty:
            given[one] = right(one)
    with pytest.raises(InvalidRequest, match=name):
        await called(member, given)


async def called(member: Callable[..., Any], given: dict[str, Any]) -> None:
    result = member(**given)
    if inspect.isawaitable(result):
        await result


def right(name: str) -> Any:
    fine = {"name": "x", "template": "x", "host_path": "/x", "size": 1, "size_bytes": 512, "command": ["x"]}
    fine |= {"reservation": "x", "config": "x", "number": 1}
    fine |= {"src": "/x", "dst": "/x", "guest_path": "/x", "data": b""}
    if name in ("disk", "state"):
        return DiskSpec(host_path="/x") if name == "disk" else ScsiState(controllers=1, disks=())
    return fine.get(name, print if name in ("stdout", "stderr") else [])


@pytest.mark.parametrize("field", [one for one in WRONG if one in inspect.signature(DiskSpec).parameters])
def test_a_disk_that_cannot_be_is_refused(field: str) -> None:
    for value in WRONG[field]:
        given = {"host_path": "/x", "guest_path": "/x", field: value}
        with pytest.raises(InvalidRequest, match=field):
            DiskSpec(**given).request()


@pytest.mark.parametrize("field", [one for one in WRONG if one in VMConfig.__dataclass_fields__])
def test_a_vm_that_cannot_be_is_refused(field: str) -> None:
    for value in WRONG[field]:
        with pytest.raises(InvalidRequest, match=field):
            VMConfig(**{"name": "x", field: value}).check()


def test_what_can_be_is_taken() -> None:
    DiskSpec(host_path="/x", guest_path="/x", options=["noatime"], access="group", format="raw").request()
    VMConfig(name="x", accelerator=None).check()
    for value in (0, 0.5, 60, LONGEST_S):
        arguments.check("timeout_s", value)
    arguments.check("timeout_s", None, optional=True)
    arguments.check("slot", Slot(0, 1))
    with pytest.raises(InvalidRequest):
        arguments.check("timeout_s", None)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_waits_has_a_time(call: str) -> None:
    member = CALLS[call]
    if inspect.iscoroutinefunction(member) or is_acquiring(member):
        assert "timeout_s" in inspect.signature(member).parameters


class Face:
    """A VM whose calls hang."""

    name = "v"

    async def _ready(self, deadline: Deadline) -> None:
        return

    @timed
    async def hang(self, *, timeout_s: float | None = 60.0) -> None:
        await asyncio.Event().wait()


async def test_a_call_ends_in_time_whatever_it_waits_for() -> None:
    with pytest.raises(DeadlineExceeded, match=r"hang: not done within 0.01 s") as error:
        await Face().hang(timeout_s=0.01)
    assert error.value.vm == "v"
