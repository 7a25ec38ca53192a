"""The contract by itself: it holds for the fakes, needs no test framework, and names the rule that a backend breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from contract_vms import FakeVM
from utilityvm.scsi.slot import Slot
from utilityvm.testing import FakeGuest, FakeHost
from utilityvm.testing.contract import GUEST_RULES, HOST_RULES, ContractVM, check_guest_backend, check_host_backend


@asynccontextmanager
async def fake() -> AsyncIterator[ContractVM]:
    yield FakeVM()


async def test_every_rule_holds_for_the_fakes_and_is_tried() -> None:
    assert await check_host_backend(fake) == []
    assert await check_guest_backend(fake) == []


def test_no_rule_was_lost() -> None:
    assert len(HOST_RULES) > 20
    assert len(GUEST_RULES) > 20


async def test_a_host_that_breaks_a_rule_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(self: FakeHost, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        return True

    monkeypatch.setattr(FakeHost, "probe", probe)
    with pytest.raises(AssertionError) as raised:
        await check_host_backend(fake)
    assert any(note.startswith("rule: ") for note in raised.value.__notes__)


async def test_a_guest_that_leaves_something_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unmount(self: FakeGuest, *_: object, **__: object) -> None:
        return

    monkeypatch.setattr(FakeGuest, "unmount", unmount)
    with pytest.raises(Exception) as raised:
        await check_guest_backend(fake)
    assert raised.value.__notes__


def test_it_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import utilityvm.testing.contract"
    subprocess.run([sys.executable, "-c", code], check=True)
