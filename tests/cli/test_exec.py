"""What `uvm exec` ends with, and what a command says while it waits for a VM. The VM is imitated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.cli import owners, vm
from utilityvm.errors import DeadlineExceeded, GuestBusy, GuestRefused, UtilityVMError, VMGone

from .conftest import Uvm


def refused(kind: str) -> GuestRefused:
    error = GuestRefused("cannot run job: no")
    error.kind = kind
    return error


def ends_with(
    monkeypatch: pytest.MonkeyPatch, outcome: int | Exception, *, when_opened: Exception | None = None
) -> None:
    async def run_streaming(*_: Any, **__: Any) -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @asynccontextmanager
    async def opened(name: str, **_: object) -> AsyncIterator[Any]:
        if when_opened:
            raise when_opened
        yield SimpleNamespace(run_streaming=run_streaming)

    monkeypatch.setattr(vm, "opened", opened)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0),
        (3, 3),
        (-9, 137),
        (DeadlineExceeded("job did not end within 1 s and was killed"), 124),
        (refused("refused"), 126),
        (refused("not_found"), 127),
        (refused("invalid"), 125),
        (GuestBusy("busy"), 125),
        (VMGone("QEMU hung up"), 125),
    ],
)
def test_the_exit_code_is_the_programs_or_one_that_is_documented(
    uvm: Uvm, monkeypatch: pytest.MonkeyPatch, outcome: int | Exception, code: int
) -> None:
    ends_with(monkeypatch, outcome)
    done = uvm("exec", "v", "--timeout", "1", "-n", "job")
    assert done.exit_code == code
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == ([f"error: {outcome}"] if isinstance(outcome, Exception) else [])


def test_only_the_programs_own_time_is_told_as_124(uvm: Uvm, monkeypatch: pytest.MonkeyPatch) -> None:
    late = DeadlineExceeded("no answer in time")
    ends_with(monkeypatch, late)
    assert uvm("exec", "v", "-n", "job").exit_code == 125
    ends_with(monkeypatch, 0, when_opened=late)
    assert uvm("exec", "v", "--timeout", "1", "-n", "job").exit_code == 125


def test_a_wait_names_the_process_that_has_the_vm_and_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owners, "_QUIET_S", 0.001)
    has_it = ["process 7 (uvm exec)", "process 7 (uvm exec)", None, "process 8 (job)"]
    monkeypatch.setattr(owners, "_other_owner", lambda name: has_it.pop(0) if has_it else None)

    async def main() -> None:
        async with asyncio.timeout(20), owners.waiting_for("v", wait_s=30):
            while has_it:
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert capsys.readouterr().err.splitlines() == [
        "waiting up to 30 s for process 7 (uvm exec), which uses VM v",
        "waiting up to 30 s for process 8 (job), which uses VM v",
    ]


def test_a_short_wait_is_not_worth_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(owners, "_other_owner", lambda name: "process 7")

    async def main() -> None:
        with pytest.raises(UtilityVMError, match="theirs"):
            async with owners.waiting_for("v", wait_s=1):
                raise UtilityVMError("theirs")

    asyncio.run(main())
    assert not capsys.readouterr().err
