"""Who may open what: QEMU gets descriptors, and its own rights stay as small as they are."""

from __future__ import annotations

import grp
import os
import tempfile
from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest

from utilityvm.diskimage import blockdev
from utilityvm.errors import AccessDenied, DiskInUse, InvalidRequest, NotSupported, SetupError
from utilityvm.hosts.qemu import QemuHost, acl
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest, VMAccess
from utilityvm.scsi.slot import Slot

T = 20.0
Start = Callable[..., Awaitable[QemuHost]]
Make = Callable[..., Path]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a VM another user, or make a loop device")


def request(path: Path, access: VMAccess = VMAccess.INDIVIDUAL, *, read_only: bool = False) -> DiskRequest:
    return DiskRequest(host_path=str(path), read_only=read_only, access=access, format=DiskFormat.RAW)


def physical(path: Path, *, read_only: bool = False) -> DiskRequest:
    return DiskRequest(host_path=str(path), read_only=read_only, kind=AttachmentType.PASS_THRU)


@as_root
async def test_qemu_cannot_open_the_path_and_attaches_the_disk(vm: QemuHost, image: Make) -> None:
    path = image()
    node = {"driver": "file", "node-name": "x", "filename": str(path)}
    with pytest.raises(Exception, match="No such file or directory"):
        await vm._qmp.execute("blockdev-add", node, timeout_s=T)
    before = path.stat()
    disk = await vm.open(request(path))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


async def test_a_descriptor_for_reading_serves_no_writer(vm: QemuHost, image: Make) -> None:
    disk = await vm.open(request(image(), read_only=True))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    number = vm._numbers["a"]
    node = {"driver": "file", "node-name": "w", "filename": f"/dev/fdset/{number}", "read-only": False}
    with pytest.raises(Exception, match=r"Could not dup FD|Permission denied|Failed to find file descriptor"):
        await vm._qmp.execute("blockdev-add", node, timeout_s=T)


@as_root
async def test_noop_needs_a_right_of_the_vms_own(vm: QemuHost, image: Make, tmp_path: Path) -> None:
    path = image()
    with pytest.raises(AccessDenied, match=f"user {vm.process.uid}"):
        await vm.open(request(path, VMAccess.NOOP))
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o011)
    path.chmod(0o604)
    disk = await vm.open(request(path, VMAccess.NOOP, read_only=True))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    with pytest.raises(AccessDenied):
        await vm.open(request(path, VMAccess.NOOP))


async def test_a_group_that_does_not_exist_is_refused_first(vm: QemuHost, image: Make) -> None:
    vm._access = replace(vm._access, vm_group="no-such-group")
    path = image()
    with pytest.raises(SetupError, match="no group no-such-group") as caught:
        await vm.open(request(path, VMAccess.GROUP))
    assert "groupadd" in (caught.value.remedy or "")


async def test_the_group_gets_the_file(vm: QemuHost, image: Make) -> None:
    group = grp.getgrgid(os.getgid())
    vm._access = replace(vm._access, vm_group=group.gr_name)
    path = image()
    disk = await vm.open(request(path, VMAccess.GROUP))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    fd = os.open(path, os.O_RDONLY)
    attribute = acl._read(fd)
    os.close(fd)
    assert attribute
    assert acl._parse(attribute)[acl._GROUP, group.gr_gid] == acl.READ | acl.WRITE


async def test_a_refused_attach_takes_the_groups_right_back(vm: QemuHost, image: Make) -> None:
    vm._access = replace(vm._access, vm_group=grp.getgrgid(os.getgid()).gr_name)
    first = await vm.open(request(image("first")))
    await vm.attach(Slot(0, 1), first, attachment="first", timeout_s=T)
    first.close()
    path = image("second")
    second = await vm.open(request(path, VMAccess.GROUP))
    with pytest.raises(Exception, match="already used"):
        await vm.attach(Slot(0, 1), second, attachment="second", timeout_s=T)
    second.close()
    fd = os.open(path, os.O_RDONLY)
    assert acl._read(fd) is None
    os.close(fd)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def loop(image: Make) -> Generator[Path]:
    """A block device: the only kind that a test can make. It is no one's while it is not attached."""
    losetup = find_program("losetup", package="mount")
    try:
        device = Path(run([losetup, "--find", "--show", image("behind")]).decode().strip())
    except SetupError as error:
        pytest.skip(f"no loop device: {error}")
    yield device
    run([losetup, "--detach", device])


@as_root
@pytest.mark.parametrize("read_only", [True, False])
async def test_a_physical_disk_is_attached_and_given_back(vm: QemuHost, loop: Path, read_only: bool) -> None:
    disk = await vm.open(physical(loop, read_only=read_only))
    assert disk.identity == f"block:7:{loop.name.removeprefix('loop')}"
    assert disk.size_bytes == 16 << 20
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    (block,) = await vm._qmp.execute("query-block", timeout_s=T)
    assert (block["inserted"]["drv"], block["inserted"]["ro"]) == ("host_device", read_only)
    again = await vm.open(physical(loop, read_only=read_only))
    assert again.identity == disk.identity, "it can be looked at while it is attached"
    again.close()
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    fd = os.open(loop, os.O_RDWR | os.O_EXCL)
    os.close(fd)


@as_root
async def test_a_writable_physical_disk_is_closed_to_the_host_and_to_other_vms(start: Start, loop: Path) -> None:
    one, two = await start("one"), await start("two")
    disk = await one.open(physical(loop))
    await one.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    with pytest.raises(OSError, match="busy"):
        os.close(os.open(loop, os.O_RDWR | os.O_EXCL))
    for read_only in (True, False):
        other = await two.open(physical(loop, read_only=read_only))
        with pytest.raises(DiskInUse):
            await two.attach(Slot(0, 1), other, attachment="b", timeout_s=T)
        other.close()
    assert await two.attachments() == []


@as_root
async def test_readers_share_a_physical_disk(start: Start, loop: Path) -> None:
    for name in ("one", "two"):
        host = await start(name)
        disk = await host.open(physical(loop, read_only=True))
        await host.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
        disk.close()


@as_root
async def test_a_physical_disk_of_large_sectors_keeps_them(vm: QemuHost, image: Make) -> None:
    losetup = find_program("losetup", package="mount")
    device = run([losetup, "--find", "--show", "--sector-size", "4096", image("large")]).decode().strip()
    try:
        disk = await vm.open(physical(Path(device)))
        await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
        path = f"/machine/peripheral/d{vm._numbers['a']}"
        property_ = {"path": path, "property": "logical_block_size"}
        assert await vm._qmp.execute("qom-get", property_, timeout_s=T) == 4096
        disk.close()
        await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    finally:
        run([losetup, "--detach", device])


@as_root
async def test_a_read_only_device_is_not_attached_for_writing(vm: QemuHost, image: Make) -> None:
    losetup = find_program("losetup", package="mount")
    device = run([losetup, "--find", "--show", "--read-only", image("fixed")]).decode().strip()
    try:
        with pytest.raises(NotSupported, match="read-only"):
            await vm.open(physical(Path(device)))
    finally:
        run([losetup, "--detach", device])


@as_root
async def test_a_device_is_no_image_and_an_image_behind_a_device_is_taken(vm: QemuHost, loop: Path) -> None:
    with pytest.raises(InvalidRequest, match="block device"):
        await vm.open(request(loop))
    behind = Path(f"/sys/block/{loop.name}/loop/backing_file").read_text().strip()
    with pytest.raises(DiskInUse, match=f"backs {loop.name}"):
        await vm.open(request(Path(behind)))


@as_root
async def test_a_physical_disk_does_not_grow_by_itself(vm: QemuHost, loop: Path) -> None:
    disk = await vm.open(physical(loop))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    disk.close()
    with pytest.raises(NotSupported, match="host_device"):
        await vm.resize(Slot(0, 1), attachment="a", size_bytes=32 << 20, timeout_s=T)
    assert blockdev.host_users(loop.stat().st_rdev) == []
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)


async def test_a_paused_vm_takes_disks_and_gives_none_back(start: Start, image: Make) -> None:
    vm = await start(paused=True)
    path = image()
    disk = await vm.open(request(path))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    with pytest.raises(Exception, match="the VM is paused") as caught:
        await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert "resume" in (getattr(caught.value, "remedy", "") or "")
    assert await vm.probe(Slot(0, 1), attachment="a", timeout_s=T)
    await vm.resume()
    await vm.detach(Slot(0, 1), attachment="a", timeout_s=T)
    assert str(path) not in {str(file.readlink()) for file in Path(f"/proc/{vm.process.pid}/fd").iterdir()}
    disk.close()


async def test_a_refused_attach_to_a_paused_vm_leaves_no_lock_and_after_it_runs_no_file(
    start: Start, image: Make
) -> None:
    vm, other = await start("one", paused=True), await start("two")
    first = await vm.open(request(image("first")))
    await vm.attach(Slot(0, 1), first, attachment="first", timeout_s=T)
    first.close()
    path = image("second")
    second = await vm.open(request(path))
    with pytest.raises(Exception, match="already used"):
        await vm.attach(Slot(0, 1), second, attachment="second", timeout_s=T)
    await other.attach(Slot(0, 1), second, attachment="second", timeout_s=T)
    second.close()
    await vm.resume()
    assert str(path) not in {str(file.readlink()) for file in Path(f"/proc/{vm.process.pid}/fd").iterdir()}
