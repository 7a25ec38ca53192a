from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from contract_vms import FakeVM, HcsVM, QemuVM
from utilityvm import UtilityVM
from utilityvm.testing.contract import ContractVM


@pytest.fixture(params=["fake", "hcs", pytest.param("qemu", marks=pytest.mark.real)])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def booted(kind: str, request: pytest.FixtureRequest) -> UtilityVM | None:
    """The session's real VM, where that is what the test is for."""
    vm: UtilityVM | None = request.getfixturevalue("vm_booted") if kind == "qemu" else None
    return vm


@pytest_asyncio.fixture
async def vm(kind: str, booted: UtilityVM | None, tmp_path: Path) -> AsyncIterator[ContractVM]:
    """A VM without disks, and a test leaves it so."""
    if booted is not None:
        real = QemuVM(booted, tmp_path)
        yield real
        left = await real.left()
        await real.clear()
    else:
        pretended = FakeVM() if kind == "fake" else HcsVM()
        yield pretended
        left = await pretended.left()
    assert not left, "the test left something in the VM"
