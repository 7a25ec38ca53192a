"""One owner for each VM: kept by the kernel, first come first served, and gone with its process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utilityvm.errors import VMOwned
from utilityvm.machine.processes import own_start
from utilityvm.store.ownership import Ownership, owner_of

OWN_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from utilityvm.store.ownership import Ownership
async def main():
    await Ownership.acquire(Path(sys.argv[1]), vm="one")
    print("owned", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vms" / "one"


async def test_a_second_owner_is_refused_and_told_who_the_first_is(folder: Path) -> None:
    first = await Ownership.acquire(folder, vm="one")
    with pytest.raises(VMOwned, match=f"process {os.getpid()} ") as caught:
        await Ownership.acquire(folder, vm="one")
    assert caught.value.owner.startswith(f"process {os.getpid()} (")
    first.release()


async def test_released_it_can_be_owned_again(folder: Path) -> None:
    for _ in range(2):
        ownership = await Ownership.acquire(folder, vm="one")
        owner = owner_of(folder)
        assert owner is not None
        assert (owner.pid, owner.started) == (os.getpid(), own_start())
        ownership.release()
        assert owner_of(folder) is None


async def test_removed_nothing_of_it_is_left(folder: Path) -> None:
    ownership = await Ownership.acquire(folder, vm="one")
    ownership.release(remove=True)
    ownership.release(remove=True)
    assert not folder.exists()


async def test_removed_what_others_put_into_the_folder_stays(folder: Path) -> None:
    ownership = await Ownership.acquire(folder, vm="one")
    (folder / "console.log").touch()
    ownership.release(remove=True)
    assert [file.name for file in folder.iterdir()] == ["console.log"]


async def test_a_dead_owner_owns_nothing(folder: Path) -> None:
    command = [sys.executable, "-c", OWN_AND_WAIT, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owned\n"
        owner = owner_of(folder)
        assert owner is not None
        assert owner.pid == process.pid
        with pytest.raises(VMOwned, match=str(process.pid)):
            await Ownership.acquire(folder, vm="one")
        process.kill()
    assert owner_of(folder) is None
    (await Ownership.acquire(folder, vm="one")).release()


async def test_who_waits_gets_it_when_the_owner_lets_go(folder: Path) -> None:
    first = await Ownership.acquire(folder, vm="one")
    waiting = asyncio.ensure_future(Ownership.acquire(folder, vm="one", wait_s=60))
    await asyncio.sleep(0)
    assert not waiting.done()
    first.release()
    (await waiting).release()


async def test_first_come_first_served(folder: Path) -> None:
    order: list[int] = []
    first = await Ownership.acquire(folder, vm="one")

    async def wait(number: int) -> None:
        ownership = await Ownership.acquire(folder, vm="one", wait_s=60)
        order.append(number)
        ownership.release()

    tasks = []
    for number in range(6):
        tasks.append(asyncio.ensure_future(wait(number)))
        await asyncio.sleep(0)  # it draws its ticket
    first.release()
    with pytest.raises(VMOwned, match="waited for it before us"):
        await Ownership.acquire(folder, vm="one")  # free, but promised
    await asyncio.gather(*tasks)
    assert order == list(range(6))


async def test_who_gives_up_waiting_holds_up_nobody(folder: Path) -> None:
    first = await Ownership.acquire(folder, vm="one")
    patient = asyncio.ensure_future(Ownership.acquire(folder, vm="one", wait_s=60))
    await asyncio.sleep(0)
    cancelled = asyncio.ensure_future(Ownership.acquire(folder, vm="one", wait_s=60))
    last = asyncio.ensure_future(Ownership.acquire(folder, vm="one", wait_s=60))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(VMOwned, match=r"still after 0\.01 s"):
        await Ownership.acquire(folder, vm="one", wait_s=0.01)
    first.release()
    (await patient).release()
    (await last).release()


async def test_who_waits_for_a_vm_that_ends_gets_the_next_of_its_name(folder: Path) -> None:
    first = await Ownership.acquire(folder, vm="one")
    waiting = asyncio.ensure_future(Ownership.acquire(folder, vm="one", wait_s=60))
    await asyncio.sleep(0)
    first.release(remove=True)
    second = await waiting
    assert second.path.exists()
    with pytest.raises(VMOwned):
        await Ownership.acquire(folder, vm="one")
    second.release(remove=True)
    assert not folder.exists()
