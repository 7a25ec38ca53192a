"""The owner dies at each of its writes; the next one finishes or undoes what was half done, and goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from utilityvm import UtilityVM
from utilityvm import paths as places
from utilityvm.guestimage.build import GuestImage
from utilityvm.store import Store
from utilityvm.testing.images import ext4_image

Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real

# Opens the VM and works on two disks; killed by itself after its Nth write to the journal, or before it with "before".
OWNER = """
import asyncio, os, sys
from utilityvm import UtilityVM
from utilityvm.store import SqliteJournal

name, image, other, count, when = sys.argv[1:]
left = int(count)
plain_write = SqliteJournal.write

def write(self, put, drop=()):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), 9)
    plain_write(self, put, drop)
    if left == 0:
        os.kill(os.getpid(), 9)

async def main():
    vm = await UtilityVM.open(name)
    SqliteJournal.write = write
    named = await vm.add_scsi(image, "/named", holder="job-17")
    own = await vm.add_scsi(image, "/own")
    attached = await vm.add_scsi(other, read_only=True)
    await attached.release()
    await own.release()
    await named.release()
    SqliteJournal.write = plain_write
    await vm.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def worker(own_folders: Path, guest_image: GuestImage) -> Iterator[str]:
    command = [sys.executable, "-c", "from utilityvm.cli import main; main()"]
    subprocess.run([*command, "start", "adopted"], check=True, capture_output=True)
    yield "adopted"
    subprocess.run([*command, "stop", "adopted", "--force"], check=True, capture_output=True)
    assert not places.vm_dir("adopted").exists()


def own_and_die(worker: str, images: tuple[Path, Path], count: int, when: str) -> bool:
    """Did the owner die, and not come to its end before?"""
    command = [sys.executable, "-c", OWNER, worker, *map(str, images), str(count), when]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    return ext4_image(tmp_path / "one.raw", {"greeting": "hello\n"}), ext4_image(tmp_path / "two.raw", {})


async def check_and_release(worker: str, images: tuple[Path, Path]) -> None:
    """Journal, QEMU and guest agree; only the named holder's reservation is left, and works; then it is given back."""
    vm = await UtilityVM.open(worker)
    try:
        slots = vm.scsi_slots()
        assert [slot.state for slot in slots] == ["attached"] * len(slots)
        held = vm.scsi_reservations()
        assert {mount.holder for mount in held} <= {"job-17"}
        assert len(held) == len(slots) <= 1
        on_the_bus = await vm._host.attachments()
        assert [(one.slot, one.whole) for one in on_the_bus] == [(slot.slot, True) for slot in slots]
        mounts = (await vm.run(["cat", "/proc/mounts"])).stdout.decode()
        assert ("/named" in mounts, "/own" in mounts) == (bool(held), False)
        if held:
            greeting = await vm.run(["cat", "/named/greeting"])
            assert greeting.stdout == b"hello\n"
        async with await vm.add_scsi(images[0], "/again"), await vm.add_scsi(images[1], "/too"):
            assert len(vm.scsi_slots()) == 2
        for mount in held:
            await mount.release()
        assert not vm.scsi_slots()
    finally:
        await vm.close()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_each_write_nothing_is_lost(
    worker: str, images: tuple[Path, Path], when: str, record_property: Callable[[str, object], None]
) -> None:
    count = 1
    while own_and_die(worker, images, count, when):
        await check_and_release(worker, images)
        count += 1
    assert count > 12, "the owner's work has that many writes at least"
    record_property("writes killed at, all of which came right", count - 1)


async def test_what_no_journal_knows_keeps_its_slot(worker: str, images: tuple[Path, Path], uvm: Uvm) -> None:
    assert uvm("attach", worker, f"{images[0]}:/data").returncode == 0
    with Store.open() as store:
        store.db.execute("DELETE FROM disks")
        store.db.execute("DELETE FROM mounts")
        store.db.execute("DELETE FROM reservations")
    vm = await UtilityVM.open(worker)
    assert vm.findings == ("slot 0:1 has a disk that is in no journal: it stays taken",)
    async with await vm.add_scsi(images[1], "/other") as other:
        assert str(other.slot) == "0:2"
    await vm.close()
    assert uvm("stop", worker).returncode == 0
    assert uvm("start", worker).returncode == 0


async def test_a_lost_store_finds_the_vm_again(worker: str, uvm: Uvm) -> None:
    with Store.open() as store:
        path, before = store.path, store.get(worker)
    path.write_bytes(b"\xff" * 5000)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    done = uvm("ps")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr
    with Store.open() as store:
        after = store.get(worker)
    assert (after.uuid, after.process, after.config) == (before.uuid, before.process, before.config)
    assert uvm("exec", worker, "--", "true").returncode == 0
