"""Block devices of this host in real VMs: loop devices, whose kernel side is that of any disk."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from loops import Loops, loop_devices
from utilityvm import DiskInUse, InvalidRequest, NotSupported, UtilityVM
from utilityvm.scsi.ports import AttachmentType, DiskRequest, Holder
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

Start = Callable[..., Awaitable[UtilityVM]]

SECTOR = 512
FIRST, SECOND = 2048, 12288  # sectors where partitions of 4 MiB begin
PARTITION_SECTORS = 8192


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    with loop_devices(tmp_path) as loops:
        yield loops


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, f"{script}: {result.stderr.decode()}"
    return result.stdout.decode()


def filesystem(loops: Loops, name: str = "disk.img") -> str:
    """A device with a file system that has the file `greeting`."""
    return loops.attach(ext4_image(loops.folder / name, {"greeting": "hello\n"}))


def on_the_host(loops: Loops, device: str, file: str) -> str:
    """What the host reads in the device's file system; the VM must have let go of it."""
    point = loops.folder / "look"
    point.mkdir(exist_ok=True)
    loops.run("mount", device, point)
    try:
        return (point / file).read_text()
    finally:
        loops.run("umount", point)


def write_partition_table(disk: str, sector_bytes: int = SECTOR) -> None:
    """An MBR with two partitions of Linux's type. Source: UEFI specification, legacy master boot record."""
    table = bytearray(sector_bytes)
    for number, start in enumerate((FIRST, SECOND)):
        where = [start * SECTOR // sector_bytes, PARTITION_SECTORS * SECTOR // sector_bytes]
        struct.pack_into("<B3sB3sII", table, 446 + 16 * number, 0, b"", 0x83, b"", *where)
    table[510:512] = b"\x55\xaa"
    with Path(disk).open("r+b", buffering=0) as device:
        device.write(table)


async def test_what_the_guest_writes_is_on_the_device_and_the_host_is_kept_out_meanwhile(
    vm_booted: UtilityVM, loops: Loops
) -> None:
    device = filesystem(loops)
    async with vm_booted.add_scsi_physical_disk(device, "/data") as data:
        assert await output(vm_booted, "cat /data/greeting; echo written > /data/out") == "hello\n"
        with pytest.raises(subprocess.CalledProcessError):
            loops.mount(device)
        with pytest.raises(subprocess.CalledProcessError):
            loops.run("mkfs.ext4", "-q", "-F", device)
        assert Path(data.host_path) == Path(device)
    assert on_the_host(loops, device, "out") == "written\n"


async def test_a_read_only_device_is_not_written_and_shared_with_another_node_of_it(
    vm_booted: UtilityVM, loops: Loops
) -> None:
    device = filesystem(loops)
    link = loops.folder / "by-id"
    link.symlink_to(device)
    names = (device, link, loops.node(device))
    mounts = [await vm_booted.add_scsi_physical_disk(path, "/data", read_only=True) for path in names]
    assert len({mount.slot for mount in mounts}) == 1
    assert mounts[0].ref_count == 3
    assert await output(vm_booted, "cat /data/greeting; ! touch /data/x 2>/dev/null; echo $?") == "hello\n0\n"
    for mount in mounts:
        await mount.release()


@pytest.mark.parametrize("size", [512, 4096])
async def test_the_guest_sees_the_devices_own_blocks(vm_booted: UtilityVM, loops: Loops, size: int) -> None:
    device = loops.attach(loops.file(), "--sector-size", str(size))
    async with vm_booted.add_scsi_physical_disk(device, "/data", ensure_filesystem=True):
        name = await output(vm_booted, "basename $(grep ' /data ' /proc/mounts | cut -d' ' -f1)")
        queue = f"/sys/block/{name.strip()}/queue"
        sizes = await output(vm_booted, f"cat {queue}/logical_block_size {queue}/physical_block_size")
        assert sizes == f"{size}\n{size}\n"
        await output(vm_booted, "echo made in the guest > /data/out")
    assert on_the_host(loops, device, "out") == "made in the guest\n"


@pytest.mark.parametrize("size", [512, 4096])
async def test_a_partition_inside_is_mounted_by_its_number(vm_booted: UtilityVM, loops: Loops, size: int) -> None:
    device = loops.attach(loops.file(), "--sector-size", str(size))
    write_partition_table(device, size)
    async with (
        await vm_booted.add_scsi_physical_disk(device, "/1", partition=1, ensure_filesystem=True) as one,
        await vm_booted.add_scsi_physical_disk(device, "/2", partition=2, ensure_filesystem=True) as two,
    ):
        assert one.slot == two.slot
        await output(vm_booted, "echo one > /1/name; echo two > /2/name")
    if size == SECTOR:
        second = loops.partition(device, 2, SECOND)
        assert on_the_host(loops, second, "name") == "two\n"


async def test_a_partition_of_the_host_is_a_disk_and_its_neighbour_stays_the_hosts(
    vm_booted: UtilityVM, loops: Loops
) -> None:
    disk = loops.attach(loops.file(), "--partscan")
    first, second = loops.partition(disk, 1, FIRST), loops.partition(disk, 2, SECOND)
    for partition in (first, second):
        loops.run("mkfs.ext4", "-q", partition)
    point = loops.mount(first)
    async with vm_booted.add_scsi_physical_disk(second, "/data"):
        await output(vm_booted, "echo the guest > /data/who")
        (point / "who").write_text("the host\n")
        for device in (first, disk):
            with pytest.raises(DiskInUse, match=str(point)):
                await vm_booted.add_scsi_physical_disk(device, "/other")
        with pytest.raises(subprocess.CalledProcessError):
            loops.run("mount", second, loops.folder)
    assert on_the_host(loops, second, "who") == "the guest\n"
    assert (point / "who").read_text() == "the host\n"


def mounted(loops: Loops, device: str) -> None:
    loops.run("mkfs.ext4", "-q", device)
    loops.mount(device)


def mounted_elsewhere(loops: Loops, device: str) -> None:
    """In a mount namespace of its own, which sysfs and our /proc do not show."""
    loops.run("mkfs.ext4", "-q", device)
    point = loops.folder / "elsewhere"
    point.mkdir()
    script = f"mount {device} {point} && echo ready && exec cat"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    hold(loops, command)


def swapped(loops: Loops, device: str) -> None:
    loops.swap(device)


def behind_another_loop(loops: Loops, device: str) -> None:
    loops.attach(device)


def opened_exclusively(loops: Loops, device: str) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    loops.callback(os.close, fd)


def under_device_mapper(loops: Loops, device: str) -> None:
    if " device-mapper\n" not in Path("/proc/devices").read_text():
        pytest.skip("this kernel has no device-mapper")
    name = f"utilityvm-test-{Path(device).name}"
    loops.run("dmsetup", "create", name, "--table", f"0 1024 linear {device} 0")
    loops.callback(loops.run, "dmsetup", "remove", name)


def in_an_array(loops: Loops, device: str) -> None:
    if not Path("/proc/mdstat").exists() or shutil.which("mdadm") is None:
        pytest.skip("this kernel has no md, or there is no mdadm")
    array = f"/dev/md/utilityvm-test-{Path(device).name}"
    loops.run("mdadm", "--create", array, "--run", "--level=0", "--force", "--raid-devices=1", device)
    loops.callback(loops.run, "mdadm", "--stop", array)


def hold(loops: Loops, command: list[str]) -> None:
    """Run a program that says when it is ready, and ends when its input does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    loops.callback(process.communicate)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (mounted, "mounted at"),
        (mounted_elsewhere, "sysfs does not show"),
        (swapped, "swap on"),
        (behind_another_loop, "backs loop"),
        (opened_exclusively, "sysfs does not show"),
        (under_device_mapper, "held by dm-"),
        (in_an_array, "held by md"),
    ],
)
async def test_what_the_host_uses_is_refused(
    vm_booted: UtilityVM, loops: Loops, use: Callable[[Loops, str], None], told: str
) -> None:
    device = loops.attach(loops.file())
    use(loops, device)
    for read_only in (True, False):
        with pytest.raises(DiskInUse, match=told) as caught:
            await vm_booted.add_scsi_physical_disk(device, read_only=read_only)
        assert str(caught.value.host_path) == device
        assert caught.value.remedy
    assert not vm_booted.scsi_slots()
    assert not await vm_booted._host.attachments()


async def test_what_is_no_physical_disk_or_not_to_be_written_is_refused(vm_booted: UtilityVM, loops: Loops) -> None:
    file = loops.file()
    read_only = loops.attach(loops.file("read-only"), "--read-only")
    for device, error in ((file, InvalidRequest), ("/dev/null", InvalidRequest), (read_only, NotSupported)):
        with pytest.raises(error):
            await vm_booted.add_scsi_physical_disk(device)
    with pytest.raises(InvalidRequest, match="not an image") as caught:
        await vm_booted.add_scsi(read_only)
    assert "add_scsi_physical_disk" in str(caught.value.remedy)
    async with vm_booted.add_scsi_physical_disk(read_only, read_only=True):
        pass


async def test_an_image_behind_a_device_is_refused_beside_it(vm_booted: UtilityVM, loops: Loops) -> None:
    file = ext4_image(loops.folder / "disk.img", {})
    device = loops.attach(file)
    async with vm_booted.add_scsi_physical_disk(device, "/data"):
        with pytest.raises(DiskInUse, match=f"backs {Path(device).name}"):
            await vm_booted.add_scsi(file, "/image")


async def test_a_physical_disk_is_not_grown_by_us(vm_booted: UtilityVM, loops: Loops) -> None:
    device = filesystem(loops)
    async with vm_booted.add_scsi_physical_disk(device, "/data") as data:
        with pytest.raises(NotSupported, match="cannot grow"):
            await vm_booted._scsi.resize(str(data.host_path), 32 << 20)
        assert await output(vm_booted, "cat /data/greeting") == "hello\n"


async def test_two_vms_have_one_physical_disk_only_to_read(vm_booted: UtilityVM, start: Start, loops: Loops) -> None:
    device = filesystem(loops)
    other = await start("second")
    async with vm_booted.add_scsi_physical_disk(device, "/data"):
        for read_only in (True, False):
            with pytest.raises(DiskInUse, match=vm_booted.name):
                await other.add_scsi_physical_disk(device, "/data", read_only=read_only)
    async with (
        await vm_booted.add_scsi_physical_disk(device, "/data", read_only=True),
        await other.add_scsi_physical_disk(device, "/data", read_only=True),
    ):
        assert await output(vm_booted, "cat /data/greeting") == await output(other, "cat /data/greeting") == "hello\n"
        node = loops.node(device)  # which has locks of its own
        async with await start("third") as third:
            with pytest.raises(DiskInUse):
                await third.add_scsi_physical_disk(node, "/data")
    async with other.add_scsi_physical_disk(device, "/data"):
        assert await output(other, "cat /data/greeting") == "hello\n"
    assert on_the_host(loops, device, "greeting") == "hello\n"


async def test_an_extensible_virtual_disk_is_for_windows_hosts(vm_booted: UtilityVM) -> None:
    request = DiskRequest(host_path="evd://space/mnt", read_only=True, kind=AttachmentType.EXTENSIBLE_VIRTUAL_DISK)
    with pytest.raises(NotSupported, match="no extensible virtual disks") as caught:
        await vm_booted._scsi.add(request, holder=Holder(name="test"))
    assert caught.value.remedy
    assert not vm_booted.scsi_slots()
