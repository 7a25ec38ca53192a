"""The session's VM, for tests that try kinds of mounts: each has to leave the guest as it found it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from in_guest import traces
from utilityvm import UtilityVM


@pytest.fixture(scope="session")
def found() -> dict[str, str]:
    """What was in each VM before the first of these tests."""
    return {}


@pytest_asyncio.fixture
async def vm(vm_booted: UtilityVM, found: dict[str, str]) -> AsyncIterator[UtilityVM]:
    """The shared VM. After the test no device, mapping, loop, swap or mount is left in it that was not there before."""
    if vm_booted.uuid not in found:
        found[vm_booted.uuid] = await traces(vm_booted)
    yield vm_booted
    if vm_booted.scsi_slots():
        left = vm_booted.scsi_slots()
        await vm_booted.stop()  # the next test gets another one
        pytest.fail(f"the test left disks in the VM: {left}")
    before, found[vm_booted.uuid] = found[vm_booted.uuid], await traces(vm_booted)
    assert found[vm_booted.uuid] == before
