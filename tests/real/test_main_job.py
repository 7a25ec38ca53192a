"""The main job, through the library, on a real VM."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from subprocess import CompletedProcess

import pytest

from utilityvm import (
    GENERATED,
    AlreadyReleased,
    ConfigDiffers,
    DeadlineExceeded,
    DiskInUse,
    DiskSpec,
    GuestBusy,
    GuestPathInUse,
    InvalidRequest,
    NotAttached,
    SCSIMount,
    UtilityVM,
    UtilityVMError,
    VMConfig,
    VMExists,
    VMGone,
    VMNotFound,
    VMNotRunning,
    VMOwned,
)
from utilityvm.guestimage.build import GuestImage
from utilityvm.hosts.qemu import QemuHost
from utilityvm.machine import paths as places
from utilityvm.scsi.ports import DiskFormat
from utilityvm.scsi.slot import Slot
from utilityvm.store import Store, VMState
from utilityvm.testing.images import ext4_image, read_file

Start = Callable[..., Awaitable[UtilityVM]]
Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def kill(pid: int) -> None:
    """Kill a process that is not a child of ours, and see it end."""
    watch = os.pidfd_open(pid)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(watch, ended.set_result, None)
    os.kill(pid, signal.SIGKILL)
    await ended
    asyncio.get_running_loop().remove_reader(watch)
    os.close(watch)


async def test_what_the_guest_writes_is_in_the_image(vm_booted: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "data.qcow2", {"in": "7\n"}, image_format=DiskFormat.QCOW2)
    async with vm_booted.add_scsi(image, "/data") as data:
        assert data.slot == Slot(0, 1)
        assert await output(vm_booted, "cat /data/in; echo 49 > /data/out") == "7\n"
    assert read_file(image, "/out", image_format=DiskFormat.QCOW2) == "49\n"


async def test_a_disk_is_attached_once_however_its_path_is_spelled(vm_booted: UtilityVM, disk: Path) -> None:
    link = disk.with_name("link")
    link.symlink_to(disk)
    hard = disk.with_name("hard")
    os.link(disk, hard)
    spelled = f"{disk.parent}/../{disk.parent.name}/{disk.name}"
    mounts = [await vm_booted.add_scsi(path, "/data") for path in (disk, link, hard, spelled)]
    assert {mount.slot for mount in mounts} == {Slot(0, 1)}
    assert [mount.ref_count for mount in mounts] == [4, 4, 4, 4]
    assert vm_booted.scsi_guest_path(hard) == PurePosixPath("/data")
    for mount in mounts[:-1]:
        await mount.release()
    assert await output(vm_booted, "cat /data/greeting") == "hello\n"
    await vm_booted.remove_scsi(link)
    assert not vm_booted.scsi_slots()


async def test_another_file_under_the_same_name_is_another_disk(vm_booted: UtilityVM, disk: Path) -> None:
    await vm_booted.add_scsi(disk, "/old")
    disk.rename(disk.with_name("moved"))
    ext4_image(disk, {"greeting": "new\n"})
    await vm_booted.add_scsi(disk, "/new")
    assert await output(vm_booted, "cat /old/greeting /new/greeting") == "hello\nnew\n"
    assert vm_booted.scsi_guest_path(disk) == PurePosixPath("/new")
    await vm_booted.remove_scsi(disk)
    assert [str(mount.guest_path) for mount in vm_booted.scsi_mounts()] == ["/old"]
    await vm_booted.remove_scsi(disk)  # nothing attached is that file now: the one that was attached by this name
    assert not vm_booted.scsi_slots()


async def test_without_a_guest_path_it_is_attached_only(vm_booted: UtilityVM, disk: Path) -> None:
    async with vm_booted.add_scsi(disk) as attached:
        assert attached.guest_path is None
        assert vm_booted.scsi_guest_path(disk) is None
        assert not vm_booted.scsi_mounts()
        (slot,) = vm_booted.scsi_slots()
        assert (slot.references, slot.state) == (1, "attached")


async def test_a_path_can_be_made_up(vm_booted: UtilityVM, disk: Path) -> None:
    async with vm_booted.add_scsi(disk, GENERATED) as first, vm_booted.add_scsi(disk, GENERATED) as second:
        assert first.guest_path == second.guest_path
        assert await output(vm_booted, f"cat {first.guest_path}/greeting") == "hello\n"


async def test_a_reservation_is_given_back_once(vm_with_disk: SCSIMount) -> None:
    await vm_with_disk.release()
    with pytest.raises(AlreadyReleased):
        await vm_with_disk.release()
    assert vm_with_disk.ref_count == 0


async def test_a_disk_in_use_inside_is_not_taken_away(vm_booted: UtilityVM, vm_with_disk: SCSIMount) -> None:
    user = asyncio.create_task(vm_booted.run(["sleep", "1000"], cwd="/data"))
    while "sleep" not in await output(vm_booted, "ps -e -o args="):
        pass
    with pytest.raises(GuestBusy) as caught:
        await vm_with_disk.release()
    assert any("sleep" in holder for holder in caught.value.holders)
    assert vm_with_disk.ref_count == 1, "it is held as before"
    assert await output(vm_booted, "cat /data/greeting") == "hello\n"
    user.cancel()
    await asyncio.wait([user])
    await vm_with_disk.release()


async def test_refusals_change_nothing(vm_booted: UtilityVM, vm_with_disk: SCSIMount, disk: Path) -> None:
    other = ext4_image(disk.with_name("other.raw"), {})
    before = vm_booted.scsi_slots()
    for error, host_path, guest_path, settings in (
        (ConfigDiffers, disk, "/data", {"read_only": True}),
        (GuestPathInUse, other, "/data", {}),
        (InvalidRequest, other, "data", {}),
        (InvalidRequest, other, "/a/../b", {}),
        (InvalidRequest, other, "/", {}),
        (InvalidRequest, other, "/proc/x", {}),
        (InvalidRequest, disk.with_name("none"), "/x", {}),
        (InvalidRequest, disk.parent, "/x", {}),
        (ConfigDiffers, other, "/x", {"format": "qcow2"}),
        (InvalidRequest, other, "/x", {"format": "floppy"}),
        (InvalidRequest, other, None, {"partition": 1}),
    ):
        with pytest.raises(error):
            await vm_booted.add_scsi(host_path, guest_path, **settings)
    with pytest.raises(NotAttached):
        await vm_booted.remove_scsi(other)
    assert vm_booted.scsi_slots() == before


async def test_several_disks_come_and_go_together(vm_booted: UtilityVM, tmp_path: Path) -> None:
    images = [ext4_image(tmp_path / f"{n}.raw", {"n": f"{n}\n"}) for n in range(6)]
    specs = [DiskSpec(host_path=image, guest_path=f"/mnt/{n}") for n, image in enumerate(images)]
    mounts = await vm_booted.add_scsi_many(specs)
    assert await output(vm_booted, "cat /mnt/[0-5]/n") == "0\n1\n2\n3\n4\n5\n"
    bad = [DiskSpec(host_path=tmp_path / "none", guest_path="/mnt/9")]
    results = await vm_booted.add_scsi_many([*specs[:1], *bad], which="each")
    assert isinstance(results[0], SCSIMount)
    assert isinstance(results[1], InvalidRequest)
    with pytest.raises(InvalidRequest):
        await vm_booted.add_scsi_many([*specs, *bad])
    counts = {Path(slot.host_path): slot.references for slot in vm_booted.scsi_slots()}
    assert [counts[image] for image in images] == [2, 1, 1, 1, 1, 1]
    held = [mount for mount in (*mounts, results[0]) if isinstance(mount, SCSIMount)]
    assert await vm_booted.remove_scsi_many(held) == [None] * 7
    assert not vm_booted.scsi_slots()


async def test_events_tell_what_happens(vm_booted: UtilityVM, disk: Path) -> None:
    events = vm_booted.scsi_events()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    async with vm_booted.add_scsi(disk, "/data"):
        assert (await first).host_path == str(disk)


async def test_a_name_is_given_once(vm_booted: UtilityVM, guest_image: GuestImage) -> None:
    with pytest.raises(VMExists):
        await UtilityVM.start(VMConfig(name=vm_booted.name), image=guest_image)
    with pytest.raises(VMOwned, match=str(os.getpid())):
        await UtilityVM.open(vm_booted.name)
    with pytest.raises(VMNotFound):
        await UtilityVM.open("nobody")
    await vm_booted.ping()


async def test_a_killed_vm_frees_its_disks_and_tells_everybody(start: Start, disk: Path) -> None:
    vm = await start("killed")
    await output(vm, "echo last words > /dev/console")
    waiting = asyncio.create_task(vm.run(["sleep", "1000"]))
    mount = await vm.add_scsi(disk, "/data")
    os.kill(vm.process.pid, signal.SIGKILL)
    await vm.wait()
    with pytest.raises(VMGone):
        await waiting
    for call in (mount.release(), vm.add_scsi(disk, "/data"), vm.ping()):
        with pytest.raises(VMGone):
            await call
    with Store.open() as store:
        assert store.get("killed").state is VMState.DEAD
    assert "last words" in vm.console()
    await vm.close()
    assert not places.vm_dir("killed").exists()


async def test_a_dead_vm_can_be_replaced(uvm: Uvm, start: Start) -> None:
    assert uvm("start", "again").returncode == 0
    with Store.open() as store:
        pid = store.get("again").pid
    assert pid is not None
    await kill(pid)
    with pytest.raises(VMNotRunning):
        await UtilityVM.open("again")
    second = await start("again")
    assert second.process.pid != pid


async def test_a_kept_vm_is_opened_by_the_next(start: Start, disk: Path) -> None:
    async with await start("kept", keep=True) as first:
        named = await first.add_scsi(disk, "/data", holder="job-17")
        own = await first.add_scsi(disk, "/data")
        assert named.ref_count == own.ref_count == 2
    second = await UtilityVM.open("kept")
    assert await output(second, "cat /data/greeting") == "hello\n"
    assert {mount.id for mount in second.scsi_reservations()} == {named.id, own.id}  # its process lives
    for mount in second.scsi_reservations():
        await mount.release()
    assert not second.scsi_slots()
    await second.stop()
    await second.stop()
    with Store.open() as store:
        assert store.find("kept") is None


async def test_a_writable_disk_is_in_one_vm_at_a_time(
    vm_booted: UtilityVM, vm_with_disk: SCSIMount, start: Start, disk: Path
) -> None:
    other = await start("other")
    with pytest.raises(DiskInUse, match=vm_booted.name):
        await other.add_scsi(disk, "/data")
    with pytest.raises(DiskInUse):
        await other.add_scsi(disk, "/data", read_only=True)
    await vm_with_disk.release()
    async with (
        await other.add_scsi(disk, "/data", read_only=True) as there,
        await vm_booted.add_scsi(disk, "/data", read_only=True) as here,
    ):
        assert there.read_only
        assert here.read_only


async def test_a_guest_that_hangs_costs_its_caller_alone(
    vm_booted: UtilityVM, start: Start, disk: Path, tmp_path: Path
) -> None:
    other_disk = ext4_image(tmp_path / "other.raw", {"greeting": "still here\n"})
    other = await start("lively")
    await vm_booted._host.pause()
    try:
        with pytest.raises(DeadlineExceeded):
            await vm_booted.add_scsi(disk, "/data", timeout_s=0.3)
        with pytest.raises(DeadlineExceeded):
            await vm_booted.run(["true"], timeout_s=0.3)
        attached = await vm_booted.add_scsi(other_disk, read_only=True)  # the host needs no guest for that
        async with other.add_scsi(other_disk, "/data", read_only=True):
            assert await output(other, "cat /data/greeting") == "still here\n"
    finally:
        await vm_booted._host.resume()
    await attached.release()
    await vm_booted._scsi.settle()
    assert not vm_booted.scsi_slots()


async def test_closed_in_the_middle_of_work_the_next_owner_ends_it(
    start: Start, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utilityvm.vm.end.SETTLE_S", 0.1)
    first = await start("handed", keep=True)
    await first._host.pause()
    adding = asyncio.create_task(first.add_scsi(disk, "/data"))
    while not first.scsi_slots():
        await asyncio.sleep(0)
    await first.close()
    with pytest.raises(UtilityVMError):
        await adding
    host = await QemuHost.connect(first.process)
    await host.resume()
    await host.close()
    second = await UtilityVM.open("handed")
    assert not second.scsi_slots()
    await second.stop()
