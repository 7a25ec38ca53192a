"""QEMU's own Python client judges ours: both are told the same by the same QEMU, a quarter of a megabyte among it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from utilityvm.hosts.qemu.qmp import Qmp, QmpRefused

T = 60.0


@pytest.fixture
def judge() -> Any:
    return pytest.importorskip("qemu.qmp")


async def listening(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.01)


async def test_both_clients_are_told_the_same(judge: Any, tmp_path: Path) -> None:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("qemu-system-x86_64 is missing")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    monitors = [word for path in (ours, theirs) for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    qemu = await asyncio.create_subprocess_exec(program, "-M", "none", "-display", "none", "-S", *monitors)
    try:
        async with asyncio.timeout(T):
            await asyncio.gather(listening(ours), listening(theirs))
            client = await Qmp.connect(ours, vm="judged", timeout_s=T)
            other = judge.QMPClient("judge")
            await other.connect(str(theirs))
            for command in ("query-version", "query-status", "query-qmp-schema"):
                assert await client.execute(command, timeout_s=T) == await other.execute(command)
            with pytest.raises(QmpRefused) as refused:
                await client.execute("device_del", {"id": "none"}, timeout_s=T)
            with pytest.raises(judge.ExecuteError) as also:
                await other.execute("device_del", {"id": "none"})
            assert str(also.value) in str(refused.value)
            await other.disconnect()
            client.close()
    finally:
        qemu.kill()
        await qemu.wait()
