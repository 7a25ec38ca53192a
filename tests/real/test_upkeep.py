"""`uvm repair` and `uvm gc` on real VMs."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from subprocess import CompletedProcess

import pytest

from utilityvm import DeadlineExceeded, GuestBusy, UtilityVM, VMNotRunning, VMOwned
from utilityvm.guestimage import build
from utilityvm.hosts.qemu import Attachment
from utilityvm.hosts.qemu.disk import Locked, lock
from utilityvm.machine import paths
from utilityvm.scsi import steps
from utilityvm.scsi.ports import (
    AttachmentType,
    DiskFormat,
    DiskRecord,
    Holder,
    MountConfig,
    MountRecord,
    ReservationRecord,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.steps import StepTimeouts
from utilityvm.scsi.transitions import DiskState, MountState, ReservationState
from utilityvm.store import Store
from utilityvm.templates import catalog
from utilityvm.upkeep import leftovers, repair
from utilityvm.vm import lifecycle

Start = Callable[..., Awaitable[UtilityVM]]
Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real

OF_THE_MACHINE = (
    leftovers.LeftoverKind.IMAGE,
    leftovers.LeftoverKind.BUILD,
)  # its cache is not the test's: what is old there stays

DISK = DiskRecord(
    attachment="a1",
    slot=Slot(0, 1),
    host_path="/disk",
    identity="file:1:1",
    kind=AttachmentType.VIRTUAL_DISK,
    format=DiskFormat.RAW,
    access=VMAccess.INDIVIDUAL,
    read_only=False,
    size_bytes=512,
    state=DiskState.ATTACHED,
    since=0.0,
)
MOUNT = MountRecord(
    mount="m1",
    attachment="a1",
    guest_path=PurePosixPath("/data"),
    config=MountConfig(),
    state=MountState.MOUNTED,
    since=0.0,
)
DEAD = ReservationRecord(
    reservation="r1",
    attachment="a1",
    mount="m1",
    holder=Holder(name="gone", pid=1, started="no start time of process 1"),
    state=ReservationState.HELD,
    since=0.0,
)
ON_BUS = Attachment(attachment="a1", slot=Slot(0, 1), whole=True)
IN_GUEST = {"MountPath": "/data", "Controller": 0, "Lun": 1}


@pytest.mark.parametrize(
    ("records", "on_bus", "in_guest", "expected"),
    [
        ([DISK, MOUNT], [ON_BUS], [IN_GUEST], []),
        ([DISK, MOUNT], [], [IN_GUEST], ["/disk is not on the bus"]),
        ([DISK, MOUNT], [ON_BUS], [], ["/data is not mounted in the guest"]),
        ([DISK, MOUNT], [ON_BUS], [{**IN_GUEST, "Lun": 2}], ["/data is not mounted in the guest"]),
        ([], [ON_BUS], [], ["a disk that no journal knows"]),
        ([], [], [IN_GUEST], ["/data is mounted, and no journal knows it"]),
        ([DISK, MOUNT, DEAD], [ON_BUS], [IN_GUEST], ["reservation r1 is held by gone, which is dead"]),
    ],
)
def test_each_difference_is_told(
    records: list[DiskRecord | MountRecord | ReservationRecord],
    on_bus: list[Attachment],
    in_guest: list[dict[str, object]],
    expected: list[str],
) -> None:
    assert [one.what for one in repair.compare(records, on_bus, in_guest)] == expected


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def test_what_vanished_is_put_back(start: Start, disk: Path, uvm: Uvm) -> None:
    vm = await start("torn", keep=True)
    try:
        await vm.add_scsi(disk, "/data", holder="job")
        with pytest.raises(VMOwned):
            await repair.examine_vm("torn")
        await vm._guest.unmount(
            Slot(0, 1), MountConfig(), guest_path=PurePosixPath("/data"), timeout_s=20.0, force=False
        )
        await vm._guest.eject(Slot(0, 1), timeout_s=20.0, force=False)
        [view] = vm.scsi_slots()
        await vm._host.detach(Slot(0, 1), attachment=view.attachment, timeout_s=20.0)
        await vm.close()

        found = json.loads(uvm("repair", "torn", "--json").stdout)
        assert [one["what"] for one in found["differences"]] == [
            "/data is not mounted in the guest",
            f"{disk} is not on the bus",
        ]
        assert found["done"] == []
        again = json.loads(uvm("repair", "torn", "--json").stdout)
        assert again == found, "looking changes nothing"

        assert uvm("repair", "torn", "--apply").returncode == 0
        assert await repair.examine_vm("torn") == []
        vm = await UtilityVM.open("torn")
        assert await output(vm, "cat /data/greeting") == "hello\n"
        assert [mount.holder for mount in vm.scsi_reservations()] == ["job"]
    finally:
        await UtilityVM.remove("torn", force=True) if not vm.is_running else await vm.stop()


async def test_what_no_journal_knows_is_taken_out_unless_it_is_in_use(start: Start, disk: Path) -> None:
    vm = await start("lost", keep=True)
    try:
        await vm.add_scsi(disk, "/data", holder="job")
        await vm.close()
        with Store.open() as store:
            store.set_dead(store.get("lost"))  # as if another store had been lost: its journal is empty
        assert [one.what for one in await repair.examine_vm("lost")] == [
            "/data is mounted, and no journal knows it",
            "a disk that no journal knows",
        ]
        vm = await UtilityVM.open("lost")
        await output(vm, "sleep 1000 < /data/greeting > /dev/null 2>&1 &")
        await vm.close()
        with pytest.raises(GuestBusy, match="sleep"):
            await repair.repair_vm("lost")
        assert len(await repair.examine_vm("lost")) == 2, "nothing is half removed"
        vm = await UtilityVM.open("lost")
        await output(vm, "pkill sleep; while pgrep sleep; do :; done")
        await vm.close()
        assert len(await repair.repair_vm("lost")) >= 2
        assert await repair.examine_vm("lost") == []
        vm = await UtilityVM.open("lost")
        async with vm.add_scsi(disk, "/data") as mount:
            assert mount.slot == Slot(0, 1), "the slot is free again"
    finally:
        await UtilityVM.remove("lost", force=True) if not vm.is_running else await vm.stop()


async def test_what_is_left_over_is_found_and_removed(start: Start, disk: Path, booted: str, uvm: Uvm) -> None:
    alive = await UtilityVM.clone(booted, "alive")
    dead = await start("dead", keep=True)
    try:
        await alive.add_scsi(disk, "/data")
        await dead.close()
        os.kill(dead.process.pid, 9)
        with pytest.raises(VMNotRunning):
            await UtilityVM.open("dead")
        overlays = paths.overlays_dir("00000000-0000-4000-8000-000000000000")
        overlays.mkdir(parents=True)
        (overlays / "0-1.qcow2").write_bytes(bytes(4096))
        half_made = paths.templates_dir() / ".new-half"
        half_made.mkdir()
        folder = paths.vm_dir("nobody")
        folder.mkdir()
        before = sorted(paths.templates_dir().glob("[!.]*/*"))

        told = json.loads(uvm("gc", "--json").stdout)
        ours = {(one["kind"], one["name"]) for one in told if one["kind"] not in OF_THE_MACHINE}
        assert ours == {
            ("VM", "dead"),
            ("runtime folder", "nobody"),
            ("overlays", overlays.name),
            ("template", ".new-half"),
        }
        assert overlays.exists(), "looking removes nothing"
        with Store.open() as store:
            for one in leftovers.found_in(store):
                if one.kind not in OF_THE_MACHINE:
                    assert await leftovers.remove(one, store)
                    assert not await leftovers.remove(one, store), "removed before is done"
        assert [path for path in (overlays, half_made, folder, paths.vm_dir("dead")) if path.exists()] == []
        assert disk.exists()
        assert sorted(paths.templates_dir().glob("[!.]*/*")) == before
        assert await output(alive, "cat /data/greeting") == "hello\n"
    finally:
        await alive.stop()


async def test_guest_images_in_use_are_no_leftovers(booted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = build.find()
    assert current is not None
    template = catalog.load(booted)
    assert template.root == current.root
    with Store.open() as store, monkeypatch.context() as patch:
        other = next((image for image in build.catalog() if image != current), None)
        patch.setattr(build, "find", lambda: other)
        names = {one.name for one in leftovers.found_in(store) if one.kind is leftovers.LeftoverKind.IMAGE}
    assert current.key not in names, "the template is made of it"


async def test_a_guest_whose_agent_stands_still_keeps_no_disk(
    start: Start, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await start("still", keep=True)
    await vm.add_scsi(disk, "/data", holder="test")
    with pytest.raises(DeadlineExceeded):
        await vm.run(["sh", "-c", "kill -STOP $PPID"], timeout_s=1.0)
    await vm.close()
    monkeypatch.setattr(lifecycle, "CONNECT_S", 1.0)
    monkeypatch.setattr(repair, "CONNECT_S", 1.0)
    monkeypatch.setattr(steps, "_LAST_WORD_S", 0.5)
    (told,) = await repair.examine_vm("still")  # what the host has is shown, and differs in nothing
    assert "the guest does not tell" in told.what
    async with await UtilityVM.open("still", needs_guest=False) as vm:
        assert "does not answer" in vm.findings[0]
        vm._scsi._steps._timeouts = StepTimeouts(overrule=1.0)
        assert await vm.remove_scsi(disk, force="host") is not None
        assert vm.scsi_slots() == []
    with disk.open("rb+") as file:
        assert lock(file.fileno(), host_path=str(disk), read_only=False) is Locked.OURS
    await UtilityVM.remove("still", force=True)
