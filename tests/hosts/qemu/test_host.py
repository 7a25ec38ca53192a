"""What QemuHost makes of the end of its QEMU, by a process and a connection alone; with QEMU: tests/real/qemu."""

from __future__ import annotations

import asyncio
import subprocess
from types import SimpleNamespace
from typing import Any

from utilityvm.errors import UtilityVMError, VMGone
from utilityvm.hosts.qemu import host as hosts
from utilityvm.hosts.qemu.host import QemuHost
from utilityvm.hosts.qemu.lifetime import Watch


async def ended() -> tuple[QemuHost, asyncio.Future[UtilityVMError]]:
    """The host of a QEMU whose process has ended, and the end of its connection, which is still to come."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[UtilityVMError] = loop.create_future()

    def close() -> None:
        if not gone.done():
            gone.set_result(VMGone("hung up"))

    qmp: Any = SimpleNamespace(gone=gone, on_event=None, close=close)
    child = subprocess.Popen(["sleep", "1000"])
    watch = Watch.child(child.pid)
    assert watch is not None
    process: Any = SimpleNamespace(name="one", uid=0)
    host = QemuHost(process, qmp, watch, who_uses=None, frozen_by=None, memory=None, vm_group="utilityvm")
    watch.kill()
    assert await watch.wait(timeout_s=20)
    child.returncode = 0  # it was waited for
    return host, gone


async def test_what_qemu_said_last_is_why_it_ended() -> None:
    """Its process is seen to end before the rest of what it said is read."""
    host, gone = await ended()
    await asyncio.sleep(0)
    assert not host.gone.done()
    gone.set_result(VMGone("the guest has reset"))
    assert str(await host.gone) == "the guest has reset"
    await host.close()


async def test_a_connection_that_does_not_end_with_qemu_holds_nobody_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(hosts, "_LAST_WORDS_S", 0.0)
    host, _ = await ended()
    assert str(await host.gone) == "QEMU of VM one ended"
    await host.close()
