"""What a VM says of itself to whoever asked its guest."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from utilityvm.errors import VMGone
from utilityvm.vm import owned
from utilityvm.vm.owned import OwnedVM


def vm_whose_host(gone: asyncio.Future[VMGone]) -> OwnedVM:
    vm = object.__new__(OwnedVM)
    vm._reason = None
    vm.host = SimpleNamespace(gone=gone)  # type: ignore[assignment]
    gone.add_done_callback(lambda ended: setattr(vm, "_reason", ended.result()))
    return vm


async def test_a_call_whose_connection_ends_just_before_its_vm_tells_of_the_vms_end() -> None:
    gone: asyncio.Future[VMGone] = asyncio.get_running_loop().create_future()
    vm = vm_whose_host(gone)
    asyncio.get_running_loop().call_soon(gone.set_result, VMGone("QEMU hung up"))
    with pytest.raises(VMGone, match="QEMU hung up") as caught:
        async with vm.ends_told():
            raise VMGone("the connection broke")
    assert str(caught.value.__cause__) == "the connection broke"
    assert caught.value is not gone.result(), "each call raises one of its own"


async def test_a_call_whose_connection_alone_ends_tells_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned, "_END_SHOWS_S", 0.01)
    vm = vm_whose_host(asyncio.get_running_loop().create_future())
    with pytest.raises(VMGone, match="the connection broke"):
        async with vm.ends_told():
            raise VMGone("the connection broke")
