"""One owner for each VM: kept by the kernel, first come first served, and gone with its process."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from utilityvm.errors import SetupError, VMOwned
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


def lock(path: Path, byte: int) -> int:
    """Lock a byte of the file, as a process does that stands still; gives the descriptor that holds it."""
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return fd


@pytest.mark.parametrize("byte", [0, 1000])
async def test_a_process_that_stands_still_in_the_queue_holds_up_nobody_for_longer_than_he_waits(
    folder: Path, byte: int
) -> None:
    (await Ownership.acquire(folder, vm="one")).release()
    held = lock(folder / "owner.lock", byte)
    async with asyncio.timeout(20):
        if byte:
            with pytest.raises(VMOwned, match=r"still after 0\.05 s"):
                await Ownership.acquire(folder, vm="one", wait_s=0.05)
        else:
            (await Ownership.acquire(folder, vm="one", wait_s=0.05)).release()
    os.close(held)


async def test_a_fork_of_the_owner_owns_nothing(folder: Path) -> None:
    ownership = await Ownership.acquire(folder, vm="one")
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        theirs.send(b"forked")
        theirs.recv(1)  # lives until the test is over
        os._exit(0)
    theirs.close()
    ours.recv(6)
    ownership.release()
    (await Ownership.acquire(folder, vm="one")).release()
    ours.close()
    os.waitpid(pid, 0)


async def test_an_owner_whose_lock_was_removed_owns_it_as_long_as_it_lives(folder: Path) -> None:
    owner = await Ownership.acquire(folder, vm="one")
    owner.path.unlink()
    other = await Ownership.acquire(folder, vm="one")
    assert other.belongs_to_other(owner.owner)
    assert not other.belongs_to_other(other.owner), "of the same file the lock decides"
    assert not other.belongs_to_other(replace(owner.owner, started="1@00000000")), "that process has ended"
    assert not other.belongs_to_other(None)
    other.release()
    assert owner_of(folder, owner.owner.to_json()) == owner.owner
    assert owner_of(folder, None) is None
    owner.release(remove=True)
    assert not folder.exists(), "what only waited there is nobody's"


async def test_an_owner_removes_nothing_of_the_next_ones_folder(folder: Path) -> None:
    owner = await Ownership.acquire(folder, vm="one")
    shutil.rmtree(folder)
    new = await Ownership.acquire(folder, vm="one")
    (folder / "vm.json").touch()
    owner.release(remove=True)
    assert sorted(file.name for file in folder.iterdir()) == ["owner.lock", "vm.json"]
    new.release()


async def test_a_vm_that_ended_can_be_seized_from_an_owner_that_stands_still(folder: Path) -> None:
    still = await Ownership.acquire(folder, vm="one")
    seized = await Ownership.seize(folder, vm="one")
    with pytest.raises(VMOwned):
        await Ownership.acquire(folder, vm="one")
    still.release(remove=True)
    assert seized.path.exists(), "it goes on, and touches nothing"
    seized.release(remove=True)
    assert not folder.exists()


async def test_an_owner_that_has_no_space_for_its_name_owns_it_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    ownership = await Ownership.acquire(folder, vm="one")
    with pytest.raises(VMOwned, match="has not said its name yet"):
        await Ownership.acquire(folder, vm="one")
    ownership.release()


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOLCK, "local file system"),
    (errno.EOPNOTSUPP, "local file system"),
    (errno.ENOSPC, "make room"),
    (errno.EMFILE, "ulimit -n"),
    (errno.EROFS, "may write to"),
])  # fmt: skip
async def test_what_the_system_refuses_is_told_with_its_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(SetupError) as caught:
            await Ownership.acquire(folder, vm="one")
    assert remedy in (caught.value.remedy or "")
    (await Ownership.acquire(folder, vm="one")).release()


async def test_an_owner_that_shares_is_told_as_such_whatever_the_store_recorded_before(folder: Path) -> None:
    ownership = await Ownership.acquire(folder, vm="one")
    try:
        recorded = ownership.owner.to_json()
        ownership.share()
        for told in (owner_of(folder), owner_of(folder, recorded)):
            assert told is not None
            assert told.shares
    finally:
        ownership.release()
