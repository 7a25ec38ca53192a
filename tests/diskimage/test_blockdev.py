"""How the host uses a disk: on a made-up sysfs for what this machine lacks, and on real loop devices."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loops import Loops, loop_devices
from unused_disk import open_unused
from utilityvm.diskimage import blockdev, headers
from utilityvm.errors import DiskInUse, InvalidRequest, NotSupported, SetupError
from utilityvm.scsi.ports import DiskFormat


class FakeHost:
    """sysfs and /proc as Linux lays them out, for block devices that are not there."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.proc = root / "sys", root / "proc"
        for folder in ("dev/block", "block", "class/block", "fs/btrfs"):
            (self.sysfs / folder).mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        self._mounts: list[str] = []
        (self.proc / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n")
        self._write_mounts()

    def disk(self, name: str, major: int, minor: int) -> Path:
        return self._device(self.sysfs / "devices/pci0000:00" / name, major, minor)

    def partition(self, disk: Path, number: int, major: int, minor: int) -> Path:
        folder = self._device(disk / f"{disk.name}{number}", major, minor)
        (folder / "partition").write_text(f"{number}\n")
        return folder

    def _device(self, folder: Path, major: int, minor: int) -> Path:
        (folder / "holders").mkdir(parents=True)
        (folder / "dev").write_text(f"{major}:{minor}\n")
        (self.sysfs / "dev/block" / f"{major}:{minor}").symlink_to(folder)
        (self.sysfs / "class/block" / folder.name).symlink_to(folder)
        if not (folder.parent / "dev").exists():
            (self.sysfs / "block" / folder.name).symlink_to(folder)
        return folder

    def hold(self, below: Path, above: Path, **attributes: str) -> None:
        (below / "holders" / above.name).symlink_to(above)
        for path, text in attributes.items():
            file = above.joinpath(*path.split("_"))
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{text}\n")

    def mount(self, number: str, mount_point: str, source: str, kind: str = "ext4") -> None:
        self._mounts.append(f"36 35 {number} / {mount_point} rw,noatime shared:1 master:2 - {kind} {source} rw")
        self._write_mounts()

    def _write_mounts(self) -> None:
        text = "".join(f"{line}\n" for line in ["21 20 0:20 / /proc rw - proc proc rw", *self._mounts])
        (self.proc / "self/mountinfo").write_text(text)

    def swap(self, path: str) -> None:
        with (self.proc / "swaps").open("a") as file:
            file.write(f"{path}\tpartition\t65532\t0\t-2\n")

    def back_loop(self, number: int, path: str) -> None:
        loop = self.disk(f"loop{number}", 7, number)
        (loop / "loop").mkdir()
        (loop / "loop/backing_file").write_text(f"{path}\n")

    def users(self, major: int, minor: int) -> list[str]:
        return blockdev.host_users(os.makedev(major, minor), sysfs=self.sysfs, proc=self.proc)


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def sda(fake: FakeHost) -> Path:
    disk = fake.disk("sda", 8, 0)
    fake.partition(disk, 1, 8, 1)
    fake.partition(disk, 2, 8, 2)
    fake.disk("sdb", 8, 16)
    return disk


def test_an_unused_disk_has_no_users(fake: FakeHost, sda: Path) -> None:
    fake.mount("8:16", "/", "/dev/sdb")
    assert fake.users(8, 0) == fake.users(8, 1) == []


def test_a_disk_that_sysfs_does_not_know_is_an_error_and_not_unused(fake: FakeHost) -> None:
    with pytest.raises(SetupError, match="no block device 8:77"):
        fake.users(8, 77)


def test_a_mount_uses_the_partition_and_its_disk_but_no_other_partition(fake: FakeHost, sda: Path) -> None:
    fake.mount("8:1", "/srv/my\\040data", "/dev/sda1")
    assert fake.users(8, 1) == ["mounted at /srv/my data"]
    assert fake.users(8, 0) == ["partition sda1: mounted at /srv/my data"]
    assert fake.users(8, 2) == []


def test_a_mount_of_the_whole_disk_uses_its_partitions(fake: FakeHost, sda: Path) -> None:
    fake.mount("8:0", "/mnt", "/dev/sda")
    assert fake.users(8, 2) == ["disk sda: mounted at /mnt"]


def test_swap_is_a_use(fake: FakeHost, sda: Path) -> None:
    fake.swap("/dev/sda2")
    assert fake.users(8, 0) == ["partition sda2: swap on /dev/sda2"]


def test_a_holder_is_named_with_what_uses_it(fake: FakeHost, sda: Path) -> None:
    mapping = fake.disk("dm-0", 253, 0)
    fake.hold(sda / "sda1", mapping, dm_name="cryptroot")
    fake.mount("253:0", "/", "/dev/mapper/cryptroot")
    assert fake.users(8, 1) == ["held by dm-0 (cryptroot) (mounted at /)"]
    assert fake.users(8, 0) == ["partition sda1: held by dm-0 (cryptroot) (mounted at /)"]


def test_a_partition_of_a_holder_is_followed(fake: FakeHost, sda: Path) -> None:
    array = fake.disk("md0", 9, 0)
    fake.hold(sda, array, md_level="raid1")
    fake.hold(array, fake.disk("bcache0", 252, 0))
    assert fake.users(8, 0) == ["held by md0 (raid1) (held by bcache0)"]
    assert fake.users(8, 2) == ["disk sda: held by md0 (raid1) (held by bcache0)"]


def test_a_loop_device_over_it_is_a_use(fake: FakeHost, sda: Path) -> None:
    fake.back_loop(3, "/dev/sda2")
    assert fake.users(8, 2) == ["backs loop3"]
    assert fake.users(7, 3) == []


def test_a_device_of_a_btrfs_is_used_though_the_mount_names_another(fake: FakeHost, sda: Path) -> None:
    devices = fake.sysfs / "fs/btrfs/1234-5678/devices"
    devices.mkdir(parents=True)
    for name in ("sda2", "sdb"):
        (devices / name).symlink_to(fake.sysfs / "class/block" / name)
    fake.mount("0:44", "/data", "/dev/sdb", "btrfs")
    assert fake.users(8, 2) == ["a device of the btrfs 1234-5678, which is mounted", "mounted at /data"]
    assert fake.users(8, 1) == []


def test_lines_and_devices_that_are_not_whole_are_passed_over(fake: FakeHost, sda: Path) -> None:
    """A device may go while we look."""
    fake.hold(sda, fake.disk("dm-0", 253, 0))
    (fake.sysfs / "class/block/dm-0/dev").unlink()
    with (fake.proc / "self/mountinfo").open("a") as file:
        file.write("36 35 8:0\n\n36 35 8:0 / /x rw - -\n")
    assert fake.users(8, 0) == ["held by dm-0"]


def test_holders_in_a_circle_come_to_an_end(fake: FakeHost, sda: Path) -> None:
    mapping = fake.disk("dm-0", 253, 0)
    fake.hold(sda, mapping)
    fake.hold(mapping, sda)
    assert len(fake.users(8, 0)) == 1


# Real devices.


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    with loop_devices(tmp_path) as loops:
        yield loops


def open_and_close(device: str, *, read_only: bool) -> None:
    os.close(open_unused(device, read_only=read_only))


def test_sizes_of_a_device(loops: Loops) -> None:
    device = loops.attach(loops.file(size=5 << 20), "--sector-size", "4096")
    fd = os.open(device, os.O_RDONLY)
    try:
        assert blockdev.size_bytes(fd) == 5 << 20
        assert blockdev.logical_block_size(fd) == 4096
        assert not blockdev.is_read_only(fd)
        header = headers.read(fd, name=device)
        assert (header.format, header.virtual_size_bytes) == (DiskFormat.RAW, 5 << 20)
        assert header.file_size_bytes == 5 << 20
    finally:
        os.close(fd)


@pytest.mark.parametrize("read_only", [True, False])
def test_an_unused_device_is_opened_with_just_those_rights(loops: Loops, read_only: bool) -> None:
    link = loops.folder / "by-id"
    link.symlink_to(loops.attach(loops.file()))
    fd = open_unused(str(link), read_only=read_only)
    try:
        assert os.get_inheritable(fd) is False
        if read_only:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
        else:
            assert os.pwrite(fd, bytes(512), 0) == 512
    finally:
        os.close(fd)


def test_a_writable_attachment_keeps_host_and_other_vms_out(loops: Loops) -> None:
    device = loops.attach(loops.file())
    loops.run("mkfs.ext4", "-q", device)
    fd = open_unused(device, read_only=False)
    copy = os.dup(fd)  # as QEMU has it
    os.close(fd)
    try:
        for read_only in (True, False):
            with pytest.raises(DiskInUse, match="another VM"):
                open_and_close(device, read_only=read_only)
        with pytest.raises(subprocess.CalledProcessError):
            loops.mount(device)
    finally:
        os.close(copy)
    open_and_close(device, read_only=False)


def test_vms_share_a_read_only_device(loops: Loops) -> None:
    device = loops.attach(loops.file())
    first = open_unused(device, read_only=True)
    second = open_unused(device, read_only=True)
    os.close(first)
    os.close(second)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_mounted_device_is_refused(loops: Loops, read_only: bool) -> None:
    device = loops.attach(loops.file())
    loops.run("mkfs.ext4", "-q", device)
    point = loops.mount(device)
    with pytest.raises(DiskInUse, match=f"the host uses this disk: mounted at {point}") as refused:
        open_and_close(device, read_only=read_only)
    assert refused.value.remedy


def test_a_mounted_btrfs_is_refused(loops: Loops) -> None:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no mkfs.btrfs")
    first, second = (loops.attach(loops.file(name, 128 << 20)) for name in ("a", "b"))
    loops.run("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", first, second)
    loops.run("btrfs", "device", "scan", first, second)
    point = loops.mount(first)
    for device in (first, second):
        with pytest.raises(DiskInUse, match=f"a device of the btrfs .*, which is mounted; mounted at {point}"):
            open_and_close(device, read_only=True)


def test_swap_is_refused(loops: Loops) -> None:
    device = loops.attach(loops.file())
    loops.swap(device)
    with pytest.raises(DiskInUse, match=f"swap on {device}"):
        open_and_close(device, read_only=False)


def test_a_disk_with_a_mounted_partition_is_refused_and_its_other_partition_is_not(loops: Loops) -> None:
    disk = loops.attach(loops.file(), "--partscan")
    first, second = loops.partition(disk, 1, 2048), loops.partition(disk, 2, 12288)
    loops.run("mkfs.ext4", "-q", first)
    point = loops.mount(first)

    for read_only in (True, False):
        with pytest.raises(DiskInUse, match=f"partition {Path(first).name}: mounted at {point}"):
            open_and_close(disk, read_only=read_only)
    with pytest.raises(DiskInUse, match=f"mounted at {point}"):
        open_and_close(first, read_only=True)
    open_and_close(second, read_only=False)


def test_a_device_behind_a_loop_device_is_refused_though_the_kernel_would_allow_it(loops: Loops) -> None:
    below = loops.attach(loops.file())
    above = loops.attach(below)
    with pytest.raises(DiskInUse, match=f"backs {Path(above).name}"):
        open_and_close(below, read_only=False)
    open_and_close(above, read_only=False)


def test_an_image_file_behind_a_loop_device_is_seen(loops: Loops) -> None:
    path = loops.file()
    link = loops.folder / "hard link"
    link.hardlink_to(path)
    with link.open("rb") as file:
        assert blockdev.file_users(file.fileno()) == []
        device = loops.attach(path)
        assert blockdev.file_users(file.fileno()) == [f"backs {Path(device).name}"]


def test_a_device_that_the_kernel_has_read_only_is_not_attached_writable(loops: Loops) -> None:
    device = loops.attach(loops.file(), "--read-only")
    open_and_close(device, read_only=True)
    with pytest.raises((NotSupported, InvalidRequest), match=r"read-only|Permission denied|Read-only"):
        open_and_close(device, read_only=False)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.touch(), os.mkfifo])
def test_what_is_no_block_device_is_refused_without_being_opened(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(InvalidRequest, match="is not a block device"):
        open_and_close(str(path), read_only=False)


def test_a_missing_device_is_an_invalid_request(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be opened: No such file or directory"):
        open_and_close(str(tmp_path / "none"), read_only=True)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_file_is_no_block_device(tmp_path: Path, exclusive: bool) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file, pytest.raises(InvalidRequest, match="is not a block device"):
        blockdev.check_unused(file.fileno(), host_path=str(path), exclusive=exclusive)


def test_the_main_node_of_a_device_is_the_kernels(loops: Loops) -> None:
    device = loops.attach(loops.file())
    for node in (Path(device), loops.node(device)):
        assert blockdev.main_node(node.stat().st_rdev) == Path(device)
    assert blockdev.main_node(os.makedev(8, 77)) is None
