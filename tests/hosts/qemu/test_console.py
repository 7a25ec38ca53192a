"""The log's writer, for real: a shell and `head` at the end of a pipe."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from utilityvm.hosts.qemu import console
from utilityvm.hosts.qemu.lifetime import Watch

LIMIT = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LIMIT_BYTES", LIMIT)


async def write_all(folder: Path, data: bytes) -> None:
    pid, fd = console.start_writer(folder)
    with os.fdopen(fd, "wb") as pipe:
        pipe.write(data)
    watch = Watch.child(pid)
    assert watch is None or await watch.wait(timeout_s=10), "the writer ends when the pipe does"


@pytest.mark.parametrize("length", [0, 1, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 2 * LIMIT + 1, 100 * LIMIT + 17])
async def test_the_end_is_kept_and_no_more_than_twice_the_limit(tmp_path: Path, length: int) -> None:
    data = bytes(number % 251 for number in range(length))
    await write_all(tmp_path, data)
    kept = console.read(tmp_path)
    assert data.endswith(kept)
    assert len(kept) >= min(length, LIMIT)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * LIMIT


async def test_a_line_is_there_while_the_vm_lives(tmp_path: Path) -> None:
    pid, fd = console.start_writer(tmp_path)
    watch = Watch.child(pid)
    assert watch
    os.write(fd, b"hello\n")
    while not console.read(tmp_path):
        assert not await watch.wait(timeout_s=0)
    assert console.read(tmp_path) == b"hello\n"
    os.close(fd)
    assert await watch.wait(timeout_s=10)


async def test_the_writer_has_no_capability_and_can_gain_no_right(tmp_path: Path) -> None:
    pid, fd = console.start_writer(tmp_path)
    os.write(fd, b"hello\n")
    while not console.read(tmp_path):
        await asyncio.sleep(0)
    status = Path(f"/proc/{pid}/status").read_text()
    os.close(fd)
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert [int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
    assert fields["NoNewPrivs"] == "1"


async def test_a_log_that_cannot_be_written_does_not_hold_up_the_guest(tmp_path: Path) -> None:
    (tmp_path / console.NAME).mkdir()
    await write_all(tmp_path, bytes(1 << 20))


async def test_the_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    await write_all(tmp_path, b"secret")
    assert (tmp_path / console.NAME).stat().st_mode & 0o077 == 0


async def test_removing_leaves_nothing(tmp_path: Path) -> None:
    await write_all(tmp_path, bytes(3 * LIMIT))
    console.remove(tmp_path)
    console.remove(tmp_path)
    assert not list(tmp_path.iterdir())
    assert console.read(tmp_path) == b""
