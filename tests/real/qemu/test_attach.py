"""Disks on the bus of a real QEMU and off it again, and what of them is left: nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from descriptors import open_files, until_closed
from lockless import lockless
from utilityvm.errors import (
    AlreadyAttached,
    DeadlineExceeded,
    DiskInUse,
    HostRefused,
    ImageError,
    ImageUnsafe,
    InvalidRequest,
    NotAttached,
    NotSupported,
)
from utilityvm.hosts.qemu import QemuHost
from utilityvm.hosts.qemu.qmp import QmpRefused
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest
from utilityvm.scsi.slot import Slot

T = 20.0
Start = Callable[..., Awaitable[QemuHost]]
Make = Callable[..., Path]


def request(path: Path, *, read_only: bool = False, format: DiskFormat | None = None) -> DiskRequest:
    return DiskRequest(host_path=str(path), read_only=read_only, format=format)


async def attach(host: QemuHost, path: Path, slot: Slot, name: str, *, read_only: bool = False) -> None:
    disk = await host.open(request(path, read_only=read_only))
    try:
        await host.attach(slot, disk, attachment=name, timeout_s=T)
    finally:
        disk.close()


def files(host: QemuHost) -> list[str]:
    """The files that QEMU has open; its eventfds come and go with what the guest does."""
    opened: list[str] = []
    for link in Path(f"/proc/{host.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            opened.append(str(link.readlink()))
    return sorted(name for name in opened if name.startswith("/"))


def holds(host: QemuHost, path: Path) -> bool:
    """Has QEMU the file open? Asked of the kernel."""
    return str(path.resolve()) in files(host)


async def traces(host: QemuHost) -> list[object]:
    """What QEMU has of attachments: devices, nodes, fdsets."""
    devices = await host._qmp.execute("qom-list", {"path": "/machine/peripheral"}, timeout_s=T)
    nodes = await host._qmp.execute("query-named-block-nodes", {"flat": True}, timeout_s=T)
    sets = await host._qmp.execute("query-fdsets", timeout_s=T)
    return [
        *(entry["name"] for entry in devices if entry["type"].startswith("child<scsi-hd")),
        *(node["node-name"] for node in nodes),
        *(one for one in sets if one["fds"][0].get("opaque") != "log"),
    ]


@pytest.mark.parametrize("image_format", list(DiskFormat))
@pytest.mark.parametrize("read_only", [True, False])
async def test_every_format_is_attached_as_asked_and_leaves_nothing(
    vm: QemuHost, image: Make, image_format: DiskFormat, read_only: bool
) -> None:
    path = image(image_format=image_format)
    before = files(vm)
    await attach(vm, path, Slot(1, 5), "a", read_only=read_only)
    assert holds(vm, path)
    (block,) = await vm._qmp.execute("query-block", timeout_s=T)
    assert block["inserted"]["ro"] is read_only
    assert block["inserted"]["image"]["virtual-size"] == 16 << 20
    nodes = await vm._qmp.execute("query-named-block-nodes", {"flat": True}, timeout_s=T)
    assert all(node["ro"] is read_only for node in nodes), "the file's layer as well"
    await vm.detach(Slot(1, 5), attachment="a", timeout_s=T)
    assert not holds(vm, path)
    assert await traces(vm) == []
    assert files(vm) == before


async def test_the_device_is_at_its_slot_with_its_serial(vm: QemuHost, image: Make) -> None:
    disk = await vm.open(request(image()))
    await vm.attach(Slot(3, 63), disk, attachment="a", timeout_s=T)
    disk.close()
    found = {}
    for name in ("lun", "scsi-id", "channel", "serial", "parent_bus"):
        path = f"/machine/peripheral/d{vm._numbers['a']}"
        found[name] = await vm._qmp.execute("qom-get", {"path": path, "property": name}, timeout_s=T)
    assert (found["lun"], found["scsi-id"], found["channel"]) == (63, 0, 0)
    assert "scsi3" in found["parent_bus"]
    assert found["serial"] == disk.serial  # type: ignore[attr-defined]


async def test_fifty_rounds_leave_no_descriptor_on_either_side(vm: QemuHost, image: Make) -> None:
    path = image(image_format=DiskFormat.QCOW2)
    ours, theirs = open_files(), files(vm)
    for number in range(50):
        await attach(vm, path, Slot(0, 1), f"round{number}", read_only=number % 2 == 0)
        if number % 10:
            await asyncio.gather(vm.detach(Slot(0, 1), attachment=f"round{number}", timeout_s=T))
        else:
            await vm.detach(Slot(0, 1), attachment=f"round{number}", timeout_s=T)
    assert files(vm) == theirs
    await until_closed(ours)
    assert await traces(vm) == []


async def test_a_full_vm(vm: QemuHost, image: Make) -> None:
    path = image()
    disk = await vm.open(request(path, read_only=True))
    before = files(vm)
    slots = [Slot(controller, lun) for controller in range(4) for lun in range(64)]
    await asyncio.gather(*(vm.attach(slot, disk, attachment=str(slot), timeout_s=T) for slot in slots))
    disk.close()
    assert {(one.slot, one.whole) for one in await vm.attachments()} == {(slot, True) for slot in slots}
    await asyncio.gather(*(vm.detach(slot, attachment=str(slot), timeout_s=T) for slot in slots))
    assert await traces(vm) == []
    assert files(vm) == before


async def test_an_open_that_is_cancelled_leaves_nothing_open(vm: QemuHost, image: Make) -> None:
    before = open_files()
    path = image()
    for _ in range(10):
        opening = asyncio.create_task(vm.open(request(path)))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    disk = await vm.open(request(path))
    disk.close()
    await until_closed(before)


async def test_a_slot_that_is_taken_is_refused_and_leaves_nothing(vm: QemuHost, image: Make) -> None:
    await attach(vm, image("first"), Slot(0, 1), "first")
    before = await traces(vm)
    ours, theirs = open_files(), files(vm)
    with pytest.raises(AlreadyAttached, match="already used"):
        await attach(vm, image("second"), Slot(0, 1), "second")
    assert await traces(vm) == before
    assert files(vm) == theirs
    await until_closed(ours)
    await attach(vm, image("second"), Slot(0, 2), "second")


async def test_a_name_is_used_once(vm: QemuHost, image: Make) -> None:
    await attach(vm, image("first"), Slot(0, 1), "name")
    with pytest.raises(AlreadyAttached):
        await attach(vm, image("second"), Slot(0, 2), "name")


async def test_a_slot_on_a_controller_that_the_vm_lacks(start: Start, image: Make) -> None:
    vm = await start(controllers=1)
    with pytest.raises(InvalidRequest, match="the VM has 1 SCSI controllers"):
        await attach(vm, image(), Slot(1, 0), "a")
    with pytest.raises(InvalidRequest, match="does not exist"):
        await attach(vm, image(), Slot(0, 64), "a")


async def test_detaching_what_is_not_there_is_done(vm: QemuHost, image: Make) -> None:
    await vm.detach(Slot(0, 1), attachment="never", timeout_s=T)
    await attach(vm, image(), Slot(0, 1), "a")
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert not await vm.probe(Slot(0, 1), attachment="a", timeout_s=T)


async def test_a_detach_without_time_is_finished_by_the_next(vm: QemuHost, image: Make) -> None:
    path = image()
    await attach(vm, path, Slot(0, 1), "a")
    with pytest.raises(DeadlineExceeded):
        await vm.detach(Slot(0, 1), attachment="a", timeout_s=0.001)
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert not holds(vm, path)
    assert await traces(vm) == []


async def test_two_detaches_of_one_disk_both_end_when_it_is_gone(vm: QemuHost, image: Make) -> None:
    await attach(vm, image(), Slot(0, 1), "a")
    await asyncio.gather(*(vm.detach(Slot(0, 1), attachment="a", timeout_s=T) for _ in range(3)))
    assert await traces(vm) == []


async def test_a_detach_goes_on_from_each_step(vm: QemuHost, image: Make) -> None:
    for steps in range(4):
        await attach(vm, image(), Slot(0, 1), f"a{steps}")
        number = vm._numbers[f"a{steps}"]
        if steps > 0:
            with vm._qmp.expecting("DEVICE_DELETED", device=f"d{number}") as event:
                await vm._qmp.execute("device_del", {"id": f"d{number}"}, timeout_s=T)
                await event
        if steps > 1:
            await vm._qmp.execute("blockdev-del", {"node-name": f"n{number}"}, timeout_s=T)
        if steps > 2:
            await vm._qmp.execute("remove-fd", {"fdset-id": number}, timeout_s=T)
        await vm.detach(Slot(0, 1), attachment=f"a{steps}", timeout_s=T)
        assert await traces(vm) == []


async def test_a_probe_knows_what_is_there_and_finishes_off_what_is_half_there(vm: QemuHost, image: Make) -> None:
    await attach(vm, image(), Slot(0, 1), "whole")
    assert await vm.probe(Slot(0, 1), attachment="whole", timeout_s=T)
    await attach(vm, image("half"), Slot(0, 2), "half")
    await vm._qmp.execute("device_del", {"id": f"d{vm._numbers['half']}"}, timeout_s=T)
    assert not await vm.probe(Slot(0, 2), attachment="half", timeout_s=T)
    assert [one.attachment for one in await vm.attachments()] == ["whole"]


async def test_an_attach_whose_outcome_is_unknown_is_found_by_the_probe(vm: QemuHost, image: Make) -> None:
    disk = await vm.open(request(image()))
    with pytest.raises(DeadlineExceeded):
        await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=0.0001)
    disk.close()
    if await vm.probe(Slot(0, 1), attachment="a", timeout_s=T):
        await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert await traces(vm) == []


async def test_an_attach_that_is_cancelled_before_it_is_sent_leaves_nothing(vm: QemuHost, image: Make) -> None:
    disk = await vm.open(request(image()))
    task = asyncio.create_task(vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await vm.probe(Slot(0, 1), attachment="a", timeout_s=T)
    async with asyncio.timeout(T):
        while True:  # what its thread had locked is free as soon as that has ended
            with suppress(DiskInUse):
                await vm.attach(Slot(0, 1), disk, attachment="b", timeout_s=T)
                break
    disk.close()


async def test_an_attach_that_is_cancelled_is_found_by_the_probe(vm: QemuHost, image: Make) -> None:
    disk = await vm.open(request(image()))
    task = asyncio.create_task(vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T))
    while not vm._numbers:  # opened and locked; from then on it is sent
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    disk.close()
    assert await vm.probe(Slot(0, 1), attachment="a", timeout_s=T), "it was sent before the cancel"
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert await traces(vm) == []


async def test_each_of_many_disks_gets_its_own_file(vm: QemuHost, tmp_path: Path) -> None:
    """Sizes tell the disks apart: with descriptors mixed up, QEMU would see other ones."""
    sizes = {number: (number + 1) << 20 for number in range(40)}
    for number, size in sizes.items():
        (tmp_path / str(number)).touch()
        os.truncate(tmp_path / str(number), size)
    disks = [await vm.open(request(tmp_path / str(number), format=DiskFormat.RAW)) for number in sizes]
    await asyncio.gather(
        *(vm.attach(Slot(0, number), disk, attachment=str(number), timeout_s=T) for number, disk in enumerate(disks))
    )
    for disk in disks:
        disk.close()
    nodes = await vm._qmp.execute("query-named-block-nodes", {"flat": True}, timeout_s=T)
    found = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
    assert found == {f"n{vm._numbers[str(number)]}": size for number, size in sizes.items()}


@pytest.mark.parametrize("image_format", [DiskFormat.RAW, DiskFormat.QCOW2])
async def test_a_disk_grows_while_it_is_attached(vm: QemuHost, image: Make, image_format: DiskFormat) -> None:
    path = image(image_format=image_format)
    await attach(vm, path, Slot(0, 1), "a")
    await vm.resize(Slot(0, 1), attachment="a", size_bytes=32 << 20, timeout_s=T)
    (block,) = await vm._qmp.execute("query-block", timeout_s=T)
    assert block["inserted"]["image"]["virtual-size"] == 32 << 20
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    disk = await vm.open(request(path, format=image_format))
    assert disk.size_bytes == 32 << 20
    disk.close()


@pytest.mark.parametrize("image_format", [DiskFormat.VHD, DiskFormat.VHDX, DiskFormat.VMDK])
async def test_what_cannot_grow_says_so(vm: QemuHost, image: Make, image_format: DiskFormat) -> None:
    await attach(vm, image(image_format=image_format), Slot(0, 1), "a")
    with pytest.raises(NotSupported, match="cannot grow"):
        await vm.resize(Slot(0, 1), attachment="a", size_bytes=32 << 20, timeout_s=T)


async def test_a_resize_that_makes_no_sense(vm: QemuHost, image: Make) -> None:
    await attach(vm, image(), Slot(0, 1), "a", read_only=True)
    with pytest.raises(InvalidRequest, match="whole sectors"):
        await vm.resize(Slot(0, 1), attachment="a", size_bytes=1000, timeout_s=T)
    with pytest.raises(NotSupported, match="read-only"):
        await vm.resize(Slot(0, 1), attachment="a", size_bytes=32 << 20, timeout_s=T)
    with pytest.raises(NotAttached):
        await vm.resize(Slot(0, 2), attachment="b", size_bytes=32 << 20, timeout_s=T)


async def test_qemu_refuses_what_it_cannot_grow_to(vm: QemuHost, image: Make) -> None:
    await attach(vm, image(), Slot(0, 1), "a")
    with pytest.raises(HostRefused):
        await vm.resize(Slot(0, 1), attachment="a", size_bytes=(1 << 63) - 512, timeout_s=T)


async def test_an_image_over_another_file_is_refused_and_that_file_never_opened(
    vm: QemuHost, image: Make, tmp_path: Path
) -> None:
    secret = image("secret")
    overlay = tmp_path / "overlay.qcow2"
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", overlay])
    with pytest.raises(ImageError):
        await vm.open(request(overlay))
    assert await traces(vm) == []


async def test_a_raw_disk_whose_guest_wrote_a_qcow2_header_stays_raw(vm: QemuHost, image: Make) -> None:
    secret = image("secret")
    raw = image("raw")
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", raw])
    os.truncate(raw, 16 << 20)
    disk = await vm.open(request(raw, format=DiskFormat.RAW))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    assert holds(vm, raw)
    assert not holds(vm, secret)


async def test_an_image_that_changes_between_our_look_and_qemus_opens_nothing_else(vm: QemuHost, image: Make) -> None:
    """Even if the header names a backing file by then: QEMU is told that there is none."""
    secret, path = image("secret"), image("disk", DiskFormat.QCOW2)
    disk = await vm.open(request(path))
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", path])
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    assert holds(vm, path)
    assert not holds(vm, secret)


async def test_an_image_that_qemu_finds_broken_is_refused_and_leaves_nothing(vm: QemuHost, image: Make) -> None:
    path = image(image_format=DiskFormat.QCOW2)
    disk = await vm.open(request(path))
    path.write_bytes(b"no longer an image" * 1000)
    theirs = files(vm)
    with pytest.raises(HostRefused, match="blockdev-add") as caught:
        await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    assert caught.value.host_path == path
    disk.close()
    assert await traces(vm) == []
    assert files(vm) == theirs


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
async def test_two_vms_and_one_image(start: Start, image: Make, first: bool, second: bool, allowed: bool) -> None:
    path = image()
    one, two = await start("one"), await start("two")
    await attach(one, path, Slot(0, 1), "a", read_only=first)
    if allowed:
        await attach(two, path, Slot(0, 1), "a", read_only=second)
        return
    two._access = replace(two._access, who_uses=lambda identity: "VM one" if identity.startswith("file:") else None)
    with pytest.raises(DiskInUse, match="VM one"):
        await attach(two, path, Slot(0, 1), "a", read_only=second)
    assert await traces(two) == []
    await one.detach(Slot(0, 1), attachment="a", timeout_s=T)
    await attach(two, path, Slot(0, 1), "a", read_only=second)


async def test_a_disk_is_free_when_its_vm_is_killed(start: Start, image: Make) -> None:
    path = image()
    one, two = await start("one"), await start("two")
    await attach(one, path, Slot(0, 1), "a")
    await one.stop()
    await attach(two, path, Slot(0, 1), "a")


async def test_a_program_that_has_locked_the_image_is_respected(vm: QemuHost, image: Make, tmp_path: Path) -> None:
    """qemu-io knows nothing of our lock; QEMU's own one is taken last, when the device comes."""
    path = image(image_format=DiskFormat.QCOW2)
    qemu_io = find_program("qemu-io", package="qemu-utils")
    other = await asyncio.create_subprocess_exec(
        qemu_io, "-f", "qcow2", path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert other.stdin
    assert other.stdout
    other.stdin.write(b"length\n")
    await other.stdout.readline()
    theirs = files(vm)
    with pytest.raises(DiskInUse, match="a program outside utilityvm"):
        await attach(vm, path, Slot(0, 1), "a")
    assert await traces(vm) == []
    assert files(vm) == theirs
    other.stdin.close()
    await other.wait()
    await attach(vm, path, Slot(0, 1), "a")


@pytest.mark.parametrize("image_format", [DiskFormat.RAW, DiskFormat.QCOW2])
async def test_an_image_on_a_file_system_without_locks_is_attached_read_only_as_the_refusal_says(
    start: Start, image: Make, tmp_path: Path, image_format: DiskFormat
) -> None:
    try:
        with lockless(tmp_path / "mounted", image(image_format=image_format)) as path:
            one, two = await start("one"), await start("two")
            with pytest.raises(NotSupported, match="cannot lock files") as refusal:
                await attach(one, path, Slot(0, 1), "a")
            assert "attach it read-only" in (refusal.value.remedy or "")
            for host in (one, two):
                await attach(host, path, Slot(0, 1), "a", read_only=True)
                assert holds(host, path)
                await host.detach(Slot(0, 1), attachment="a", timeout_s=T)
                assert not holds(host, path)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")


async def test_why_qemu_refused_is_decided_by_what_is_so_and_not_by_its_words(
    vm: QemuHost, image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "Failed to lock byte 100, already used by 'd2'"

    async def refuse(commands: list[tuple[str, dict[str, object]]], **_: object) -> list[object]:
        return [QmpRefused(command, "GenericError", words) for command, _ in commands]

    async def nothing(*_: object, **__: object) -> None:
        pass

    monkeypatch.setattr(vm._qmp, "execute_all", refuse)
    monkeypatch.setattr(vm, "_undo", nothing)
    monkeypatch.setattr(vm, "attachments", attachments := AsyncMock(return_value=[]))
    with pytest.raises(HostRefused, match="QEMU refused"):
        await attach(vm, image(), Slot(0, 1), "a")
    attachments.assert_awaited_once()


async def test_a_disk_opened_elsewhere_is_refused(vm: QemuHost) -> None:
    class Foreign:
        identity, format, size_bytes = "x", DiskFormat.RAW, 1

        def close(self) -> None: ...

    with pytest.raises(InvalidRequest, match="was not opened by this host"):
        await vm.attach(Slot(0, 1), Foreign(), attachment="a", timeout_s=T)


async def test_a_file_is_no_physical_disk(vm: QemuHost, image: Make) -> None:
    with pytest.raises(InvalidRequest):
        await vm.open(DiskRequest(host_path=str(image()), read_only=True, kind=AttachmentType.PASS_THRU))


async def test_a_second_device_del_while_the_first_is_under_way(vm: QemuHost, image: Make) -> None:
    await attach(vm, image(), Slot(0, 1), "a")
    number = vm._numbers["a"]
    await vm._qmp.execute("device_del", {"id": f"d{number}"}, timeout_s=T)
    with pytest.raises(QmpRefused) as caught:
        await vm._qmp.execute("device_del", {"id": f"d{number}"}, timeout_s=T)
    assert caught.value.kind == "DeviceNotFound"
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert await traces(vm) == []


def with_data_elsewhere(secret: Path) -> bytes:
    """The head of a qcow2 image whose data is in that file, which everybody may read and write."""
    made = secret.with_name("made.qcow2")
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", made, "16M"])
    secret.chmod(0o666)
    for folder in list(secret.parents)[:-2]:
        folder.chmod(folder.stat().st_mode | 0o111)
    return made.read_bytes()[:65536]


@pytest.mark.parametrize("confinement", ["off", "auto"])
async def test_a_header_that_changes_after_it_was_checked_opens_nothing(
    start: Start, image: Make, confinement: str
) -> None:
    vm = await start(confinement=confinement)
    path, bystander = image(image_format=DiskFormat.QCOW2), image("bystander")
    secret = path.with_name("secret")
    await attach(vm, bystander, Slot(0, 1), "b")
    before = await traces(vm)
    plain = path.read_bytes()[:65536]
    unsafe = with_data_elsewhere(secret)
    disk = await vm.open(request(path))
    with path.open("r+b") as file:
        file.write(unsafe)
    with pytest.raises((ImageUnsafe, HostRefused)) as refused:
        await vm.attach(Slot(1, 1), disk, attachment="a", timeout_s=T)
    assert isinstance(refused.value, ImageUnsafe) or vm.process.walls, "QEMU opened it, and nobody saw"
    if confinement == "off":
        assert isinstance(refused.value, ImageUnsafe)
    assert not holds(vm, secret)
    assert await traces(vm) == before
    with path.open("r+b") as file:
        file.write(plain)
    await vm.attach(Slot(1, 1), disk, attachment="c", timeout_s=T)
    disk.close()
