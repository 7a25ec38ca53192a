"""A hostile machine: no space, no descriptors, a clock that jumps, images that are swapped or cut, records that lie."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from small import fill, small_filesystem
from utilityvm import (
    InvalidRequest,
    SetupError,
    StoreError,
    UtilityVM,
    UtilityVMError,
    VMNotRunning,
)
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths
from utilityvm.machine.processes import own_start, started_at
from utilityvm.machine.programs import run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store, VMState
from utilityvm.testing.images import ext4_image, read_file

Start = Callable[..., Awaitable[UtilityVM]]
Tmpfs = Callable[[int], AbstractContextManager[Path]]

pytestmark = pytest.mark.real


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


@contextmanager
def full_store(vm: UtilityVM) -> Iterator[None]:
    """SQLite finds no space for the store, as on a full disk."""
    db = vm._store.db
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    db.execute("CREATE TABLE filler (data BLOB)")
    db.execute("INSERT INTO filler VALUES (zeroblob(?))", (free * 1024,))
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    both = (db, vm._store.unwaiting())  # the journal's own connection too
    for each in both:
        each.execute(f"PRAGMA max_page_count = {pages}")
    # What room is left within pages is used up too.
    with suppress(sqlite3.OperationalError):
        while True:
            db.execute(
                "INSERT INTO reservations SELECT vm, hex(randomblob(16)), 'x', NULL, 'x', 1, 'x', 'x', 0"
                " FROM (SELECT id AS vm FROM vms LIMIT 1)"
            )
    try:
        yield
    finally:
        for each in both:
            each.execute("PRAGMA max_page_count = 1000000000")
        db.execute("DELETE FROM reservations WHERE attachment = 'x'")
        db.execute("DROP TABLE filler")


async def test_without_space_for_the_journal_nothing_is_sent(start: Start, disk: Path, tmp_path: Path) -> None:
    vm = await start("full")
    other = ext4_image(tmp_path / "other.raw", {"name": "other"})
    held = await vm.add_scsi(disk, "/held")
    with full_store(vm):
        with pytest.raises(StoreError, match="full") as refused:
            await vm.add_scsi(other, "/other")
        assert "make room" in str(refused.value.remedy)
        assert [str(view.slot) for view in vm.scsi_slots()] == ["0:1"]
        assert len(await vm._host.attachments()) == 1
        assert await output(vm, "cat /held/greeting") == "hello\n"
    async with vm.add_scsi(other, "/other"):
        assert await output(vm, "cat /other/name") == "other"
    await held.release()
    assert vm.scsi_slots() == []


async def test_a_full_or_read_only_state_folder_starts_nothing(
    own_folders: Path, guest_image: GuestImage, tmpfs: Tmpfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tmpfs(512 << 10) as folder:
        monkeypatch.setenv("UTILITYVM_STATE_DIR", str(folder))
        Store.open().close()
        fill(folder)
        with pytest.raises(StoreError, match=r"full|disk I/O error") as refused:
            await UtilityVM.start("nowhere", image=guest_image)
        assert str(folder) in str(refused.value.remedy)
        (folder / "filler").unlink()
        with Store.open() as store:
            assert store.vms() == []
        run(["mount", "-o", "remount,ro", folder])
        with pytest.raises((StoreError, SetupError), match=re.escape(str(folder))):
            await UtilityVM.start("nowhere", image=guest_image)
        monkeypatch.setenv("UTILITYVM_STATE_DIR", str(folder / "new"))
        with pytest.raises(SetupError, match="Read-only") as unusable:
            await UtilityVM.start("nowhere", image=guest_image)
        assert "UTILITYVM_STATE_DIR" in str(unusable.value.remedy)
    assert not (own_folders / "run/vms/nowhere").exists(), "neither a lock nor a socket is left"


async def test_an_image_that_finds_no_space_on_the_host_hurts_its_writer_alone(
    vm_booted: UtilityVM, disk: Path, tmpfs: Tmpfs
) -> None:
    with tmpfs(4 << 20) as folder:
        sparse = ext4_image(folder / "sparse.raw", {"old": "old"}, size_mib=32)
        async with vm_booted.add_scsi(disk, "/data"):
            mount = await vm_booted.add_scsi(sparse, "/sparse")
            failed = await vm_booted.run(["dd", "if=/dev/urandom", "of=/sparse/new", "bs=1M", "count=16", "conv=fsync"])
            assert failed.exit_code != 0
            assert await output(vm_booted, "echo fine > /data/after; cat /data/after") == "fine\n"
            await mount.release(force=True)
            assert [view.host_path for view in vm_booted.scsi_slots()] == [str(disk)]
    assert read_file(disk, "/after", image_format=DiskFormat.RAW) == "fine\n"


async def test_without_a_free_descriptor_it_says_so_and_goes_on_later(vm_booted: UtilityVM, disk: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    fillers: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, hard))
        with suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(SetupError, match="open files") as refused:
            await vm_booted.add_scsi(disk, "/data")
        assert "ulimit" in str(refused.value.remedy)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    assert vm_booted.scsi_slots() == []
    async with vm_booted.add_scsi(disk, "/data"):
        assert await output(vm_booted, "cat /data/greeting") == "hello\n"


async def test_a_clock_that_jumps_moves_no_deadline(
    vm_booted: UtilityVM, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter([2e9, 1e3, 4e9, 0.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    mounts = [await vm_booted.add_scsi(disk, "/data", timeout_s=20.0) for _ in range(3)]
    assert await output(vm_booted, "cat /data/greeting") == "hello\n"
    for mount in mounts:
        await mount.release()


async def test_an_image_that_is_cut_while_it_is_attached_hurts_its_reader_alone(
    vm_booted: UtilityVM, disk: Path, tmp_path: Path
) -> None:
    cut = ext4_image(tmp_path / "cut.raw", {"large": "x" * (6 << 20)})
    async with vm_booted.add_scsi(disk, "/data"):
        doomed = await vm_booted.add_scsi(cut, "/cut", read_only=True)
        os.truncate(cut, 1 << 20)
        failed = await vm_booted.run(["sh", "-c", "cat /cut/large > /dev/null"])
        assert failed.exit_code != 0
        assert await output(vm_booted, "echo fine > /data/after; cat /data/after") == "fine\n"
        await doomed.release(force=True)
        assert [view.host_path for view in vm_booted.scsi_slots()] == [str(disk)]
    assert read_file(disk, "/after", image_format=DiskFormat.RAW) == "fine\n"


async def test_an_image_that_is_pulled_away_stays_until_it_is_released(vm_booted: UtilityVM, disk: Path) -> None:
    async with vm_booted.add_scsi(disk, "/data") as mount:
        disk.unlink()
        assert await output(vm_booted, "cat /data/greeting; echo on > /data/on; cat /data/on") == "hello\non\n"
        with pytest.raises(InvalidRequest, match="No such file"):
            await vm_booted.add_scsi(disk, "/data")
        assert mount.ref_count == 1


async def test_after_a_reboot_every_vm_is_gone_and_its_disks_are_free(
    start: Start, vm_booted: UtilityVM, disk: Path
) -> None:
    """As a store looks from before a reboot: pid and tick may be somebody else's now, but not in that boot."""
    vm = await start("rebooted", keep=True)
    await vm.add_scsi(disk, "/data", holder="job")
    await vm.close()
    with Store.open() as store:
        record = store.get("rebooted")
        assert record.process is not None
        before = dict(record.process)
        ticks = str(before["started"]).partition("@")[0]
        store.set_process(record, {**before, "started": f"{ticks}@another0"})
        assert store.get("rebooted").seen_state is VMState.DEAD
        with pytest.raises(VMNotRunning):
            await UtilityVM.open("rebooted")
        assert store.db.execute("SELECT * FROM reservations WHERE vm = ?", (record.id,)).fetchall() == []
        # The machine did not really boot: end what runs.
        store.set_process(record, before)
    await UtilityVM.remove("rebooted", force=True)
    async with vm_booted.add_scsi(disk, "/data"):
        assert await output(vm_booted, "cat /data/greeting") == "hello\n"


async def test_a_strangers_process_with_the_recorded_pid_is_never_ended(start: Start) -> None:
    vm = await start("lied", keep=True)
    await vm.close()
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with Store.open() as store:
            record = store.get("lied")
            assert record.process is not None
            true = dict(record.process)
            store.set_process(record, {**true, "pid": stranger.pid, "started": started_at(stranger.pid)})
            with pytest.raises(UtilityVMError):
                await UtilityVM.open("lied")
            await UtilityVM.remove("lied", force=True)
            assert stranger.poll() is None, "it is not ours: its command line does not say so"
            assert started_at(int(true["pid"])) is None, "this one is"
    finally:
        stranger.communicate(b"\n")


async def test_a_record_that_we_did_not_write_is_refused(start: Start) -> None:
    vm = await start("forged", keep=True)
    await vm.close()
    with Store.open() as store:
        record = store.get("forged")
        assert record.process is not None
        for forged in ({"pid": os.getpid(), "started": own_start()}, {**record.process, "uuid": "another"}):
            store.set_process(record, forged)
            with pytest.raises(StoreError, match="not one that utilityvm wrote"):
                await UtilityVM.open("forged")
    await UtilityVM.remove("forged")
    assert started_at(vm.process.pid) is None, "its QEMU is known by its UUID, and this process is not it"


async def test_a_runtime_folder_that_others_may_write_to_is_refused(
    guest_folder: Path, monkeypatch: pytest.MonkeyPatch, booted: str
) -> None:
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(guest_folder / "run"))
    (guest_folder / "run").mkdir()
    (guest_folder / "run").chmod(0o777)
    with pytest.raises(SetupError, match="others may write"):
        await UtilityVM.clone(booted, "open")
    (guest_folder / "run").chmod(0o700)
    (guest_folder / "run/vms").mkdir(exist_ok=True)
    (guest_folder / "elsewhere").mkdir()
    (guest_folder / "run/vms/open").symlink_to(guest_folder / "elsewhere")
    with pytest.raises(UtilityVMError):
        await UtilityVM.clone(booted, "open")
    assert list((guest_folder / "elsewhere").iterdir()) == []
    with Store.open() as store:
        assert store.find("open") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("what", ["run", "run/vms", "run/vms/open"])
async def test_a_runtime_folder_of_another_user_is_refused(
    guest_folder: Path, monkeypatch: pytest.MonkeyPatch, booted: str, what: str
) -> None:
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(guest_folder / "run"))
    (guest_folder / "run/vms/open").mkdir(parents=True)
    os.chown(guest_folder / what, 65534, 65534)
    with pytest.raises(SetupError, match=r"belongs to user") as refused:
        await UtilityVM.clone(booted, "open")
    assert refused.value.remedy
    with Store.open() as store:
        assert store.find("open") is None


@pytest.fixture
def guest_folder(own_folders: Path) -> Iterator[Path]:
    """A folder with a short name, as sockets need it."""
    folder = own_folders / "hostile"
    folder.mkdir()
    assert paths.state_dir() == own_folders / "state"
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Tmpfs:
    """Small file systems of so many bytes, in memory, to be filled."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")

    return lambda size_bytes: small_filesystem(tmp_path / "small", size_bytes)
