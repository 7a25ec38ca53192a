"""What there is on this host, for readers that own nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import utilityvm
from utilityvm import (
    DiskFormat,
    DiskInUse,
    GuestImage,
    Holder,
    InvalidRequest,
    Leftover,
    LeftoverKind,
    MountConfig,
    SetupError,
    Slot,
    TemplateNotFound,
    VMAccess,
    VMNotFound,
    VMNotRunning,
    VMState,
    find_image,
    find_leftovers,
    get_image,
    get_template,
    get_vm,
    list_disks,
    list_images,
    list_templates,
    list_vms,
    read_console,
    remove_images,
    remove_leftover,
)
from utilityvm.machine import paths
from utilityvm.machine.processes import own_start
from utilityvm.scsi.ports import AttachmentType, DiskRecord, MountRecord, ReservationRecord
from utilityvm.store import SqliteJournal, Store


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for what in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"UTILITYVM_{what}_DIR", str(tmp_path / what.lower()))
    return tmp_path


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open() as store:
        yield store


@pytest.fixture
async def worker(store: Store) -> None:
    """A VM whose QEMU is this process, with one disk that two callers hold; and one that died."""
    vm = store.add("worker", uuid="u-1", config={"memory_mib": 256, "cpus": 2, "keep": True})
    store.set_state(vm, VMState.RUNNING)
    walls = {"walls": ["no network"], "without": {"no core dumps": "it was turned off"}}
    store.set_process(vm, {"pid": os.getpid(), "started": own_start(), "accelerator": "tcg", **walls})
    disk = DiskRecord(
        attachment="a-1",
        slot=Slot(0, 1),
        host_path="/srv/data.qcow2",
        identity="id-1",
        kind=AttachmentType.VIRTUAL_DISK,
        format=DiskFormat.QCOW2,
        access=VMAccess.INDIVIDUAL,
        read_only=True,
        size_bytes=1 << 20,
        state="attached",
        since=1.0,
    )
    mount = MountRecord(
        mount="m-1",
        attachment="a-1",
        guest_path=PurePosixPath("/data"),
        config=MountConfig(read_only=True),
        state="mounted",
        since=2.0,
    )
    held = [
        ReservationRecord(
            reservation=name, attachment="a-1", mount=one, holder=Holder(name="cli"), state="held", since=3.0
        )
        for name, one in (("r-1", "m-1"), ("r-2", None))
    ]
    await SqliteJournal(store, vm).write([disk, mount, *held])
    dead = store.add("dead", uuid="u-2", config={"clone": {"template": "warm", "template_uuid": "t-1"}})
    store.set_state(dead, VMState.RUNNING)
    store.set_process(dead, {"pid": os.getpid(), "started": "another@00000000"})


@pytest.mark.usefixtures("worker")
async def test_vms_are_values() -> None:
    dead, vm = list_vms()
    assert (vm.name, vm.state, vm.pid, vm.memory_mib, vm.cpus) == ("worker", VMState.RUNNING, os.getpid(), 256, 2)
    assert (vm.keep, vm.accelerator, vm.template, vm.owner) == (True, "tcg", None, None)
    assert (vm.walls, vm.without) == (("no network",), {"no core dumps": "it was turned off"})
    assert (dead.walls, dead.without) == ((), {})
    assert (dead.name, dead.state, dead.pid, dead.template, dead.disks) == ("dead", VMState.DEAD, None, "warm", ())
    assert get_vm("worker") == vm


@pytest.mark.usefixtures("worker")
async def test_disks_are_values_with_their_reservations() -> None:
    [disk] = list_disks("worker")
    assert get_vm("worker").disks == (disk,)
    assert (disk.slot, disk.host_path, disk.format, disk.read_only) == (Slot(0, 1), "/srv/data.qcow2", "qcow2", True)
    assert disk.guest_paths == (PurePosixPath("/data"),)
    assert [(one.id, one.holder, one.guest_path) for one in disk.reservations] == [
        ("r-1", "cli", PurePosixPath("/data")),
        ("r-2", "cli", None),
    ]
    assert (disk.references, disk.holders) == (2, ("cli", "cli"))


@pytest.mark.usefixtures("worker")
async def test_what_is_not_there_is_named() -> None:
    with pytest.raises(VMNotRunning, match="dead"):
        list_disks("dead")
    for function in (get_vm, list_disks, read_console):
        with pytest.raises(VMNotFound, match="nobody"):
            function("nobody")
    with pytest.raises(TemplateNotFound, match="none"):
        get_template("none")
    with pytest.raises(SetupError, match="guest image"):
        get_image("none")


@pytest.mark.parametrize(
    "function", [get_vm, list_disks, read_console, get_template, get_image], ids=lambda function: function.__name__
)
@pytest.mark.parametrize("value", [None, 3, b"name"])
def test_a_name_is_text(function: Any, value: object) -> None:
    with pytest.raises(InvalidRequest, match="is not a text"):
        function(value)


@pytest.mark.parametrize("name", ["examine_vm", "repair_vm"])
async def test_a_vm_to_repair_is_named_by_text(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a text"):
        await getattr(utilityvm, name)(3)


def test_an_empty_host_has_nothing() -> None:
    assert (list_vms(), list_templates(), list_images(), find_image(), find_leftovers()) == ([], [], [], None, [])


def test_what_a_dead_vm_printed_can_be_read(store: Store) -> None:
    store.add("dead", uuid="u", config={})
    paths.vm_dir("dead").mkdir(parents=True)
    (paths.vm_dir("dead") / "console.log").write_bytes(b"Linux \xff\n")
    assert read_console("dead") == "Linux \N{REPLACEMENT CHARACTER}\n"


async def test_a_leftover_is_found_and_removed() -> None:
    overlays = paths.overlays_dir("00000000-0000-4000-8000-000000000002")
    overlays.mkdir(parents=True)
    [left] = find_leftovers()
    assert left == Leftover(kind=LeftoverKind.OVERLAYS, name=overlays.name, path=overlays, size_bytes=0)
    assert await remove_leftover(left)
    assert not await remove_leftover(left), "removed before"
    assert find_leftovers() == []


def image_in(folder: Path) -> GuestImage:
    folder.mkdir(parents=True)
    return GuestImage(
        key=folder.name,
        kernel=folder / "kernel",
        initramfs=folder / "initramfs",
        root=folder / "root",
        arch="amd64",
        cmdline="",
        suite="bookworm",
        packages=0,
        built_at=0.0,
        size_bytes=0,
    )


def test_images_are_removed_all_or_none(store: Store, folders: Path) -> None:
    free, used = (image_in(folders / "cache/images" / name) for name in ("free", "used"))
    vm = store.add("worker", uuid="u", config={"root": str(used.root)})
    store.set_state(vm, VMState.RUNNING)
    store.set_process(vm, {"pid": os.getpid(), "started": own_start()})
    with pytest.raises(DiskInUse, match="used by VM worker"):
        remove_images([free, used])
    assert free.folder.exists()
    remove_images([free])
    assert (free.folder.exists(), used.folder.exists()) == (False, True)
    remove_images([free])
