"""A disk grows while it is mounted: the image, the device, the mapping and the file system."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from filesystem_images import MIB, add_hash_tree, blank, filesystem_image, mbr_disk
from in_guest import mount_at, output
from utilityvm import CallerKey, GuestRefused, InvalidRequest, NotAttached, NotSupported, UtilityVM, Verity
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat, DiskRequest, Holder, MountConfig
from utilityvm.testing.images import convert, ext4_image

pytestmark = pytest.mark.real

FILES = {"greeting": "hello\n"}


async def sizes(vm: UtilityVM, path: str) -> tuple[int, int]:
    """The bytes of the device that is mounted at `path`, and of its file system."""
    device = (await mount_at(vm, path)).device
    said = await output(vm, f"blockdev --getsize64 {device}; stat -f -c '%b %S' {path}")
    of_device, blocks, block = map(int, said.split())
    return of_device, blocks * block


@pytest.mark.parametrize(("kind", "to_mib"), [("ext4", 64), ("xfs", 400), ("btrfs", 300)])
async def test_a_mounted_file_system_grows_with_its_disk(vm: UtilityVM, tmp_path: Path, kind: str, to_mib: int) -> None:
    image = filesystem_image(kind, tmp_path / "disk.raw", FILES)
    async with vm.add_scsi(image, "/data"), vm.add_scsi(image, "/also", options=["noatime"]):
        small = await sizes(vm, "/data")
        before = small[0]
        await output(vm, "exec 3> /data/open; echo kept >&3")
        await vm.resize_scsi(image, to_mib * MIB)
        device, filesystem = await sizes(vm, "/data")
        assert image.stat().st_size == device == to_mib * MIB
        assert filesystem > small[1] + (device - before) * 0.8
        assert await sizes(vm, "/also") == (device, filesystem)
        (slot,) = vm.scsi_slots()
        assert slot.size_bytes == device
        await vm.resize_scsi(image, device)  # it is so large already
        for wrong in (device - 512, before, 0, -1, device + 1):
            with pytest.raises(InvalidRequest):
                await vm.resize_scsi(image, wrong)
        assert await sizes(vm, "/data") == (device, filesystem)
        await output(vm, f"fallocate -l {before + 4 * MIB} /data/large; sync /data/large")  # more than went before
    async with vm.add_scsi(image, "/data", read_only=True):
        assert await sizes(vm, "/data") == (device, filesystem)
        assert await output(vm, "cat /data/greeting /data/open") == "hello\nkept\n"


async def test_a_qcow2_image_grows(vm: UtilityVM, tmp_path: Path) -> None:
    raw = ext4_image(tmp_path / "disk.raw", FILES)
    image = tmp_path / "disk.qcow2"
    convert(raw, image, source_format=DiskFormat.RAW, image_format=DiskFormat.QCOW2)
    async with vm.add_scsi(image, "/data"):
        await vm.resize_scsi(image, 1 << 30)
        device, filesystem = await sizes(vm, "/data")
        assert device == 1 << 30
        assert filesystem > 900 * MIB
    said = run([find_program("qemu-img", package="qemu-utils"), "info", "-f", "qcow2", image]).decode()
    assert "1 GiB" in said


async def test_an_encrypted_disk_grows(vm: UtilityVM, tmp_path: Path) -> None:
    encryption = CallerKey(bytes(range(64)))
    image = blank(tmp_path / "disk.raw", 16)
    async with vm.add_scsi(image, "/data", encryption=encryption, ensure_filesystem=True):
        await output(vm, "echo before > /data/file")
        await vm.resize_scsi(image, 40 * MIB)
        device, filesystem = await sizes(vm, "/data")
        assert device == 40 * MIB
        assert filesystem > 30 * MIB
        await output(vm, f"fallocate -l {20 * MIB} /data/large; sync /data/large")
        assert await output(vm, "cat /data/file") == "before\n"
    async with vm.add_scsi(image, "/data", encryption=encryption, read_only=True):
        assert await output(vm, "cat /data/file; stat -c %s /data/large") == f"before\n{20 * MIB}\n"


async def test_what_is_not_the_whole_disk_stays_as_it_was(vm: UtilityVM, tmp_path: Path) -> None:
    part = ext4_image(tmp_path / "part.raw", FILES)
    disk = mbr_disk(tmp_path / "disk.raw", [part])
    async with vm.add_scsi(disk, "/device", block_device=True), vm.add_scsi(disk, "/data", partition=1):
        before = await sizes(vm, "/data")
        await vm.resize_scsi(disk, 64 * MIB)
        assert await output(vm, "blockdev --getsize64 /device") == f"{64 * MIB}\n"
        assert await sizes(vm, "/data") == before
        assert await output(vm, "cat /data/greeting") == "hello\n"


async def test_a_read_only_mount_of_a_writable_disk_is_not_written_to(vm: UtilityVM, disk: Path) -> None:
    before = disk.read_bytes()
    async with vm.add_scsi(disk, "/data", options=["ro"]):
        of_filesystem = (await sizes(vm, "/data"))[1]
        await vm.resize_scsi(disk, 32 * MIB)
        assert await sizes(vm, "/data") == (32 * MIB, of_filesystem)
    assert disk.read_bytes() == before + bytes(16 * MIB)


async def test_what_cannot_grow_says_so(vm: UtilityVM, tmp_path: Path, disk: Path) -> None:
    with pytest.raises(NotAttached):
        await vm.resize_scsi(disk, 64 * MIB)
    async with vm.add_scsi(disk, "/data", read_only=True):
        with pytest.raises((NotAttached, NotSupported)):
            await vm.resize_scsi(disk, 64 * MIB)
    fat = filesystem_image("vfat", tmp_path / "fat.raw", {})
    async with vm.add_scsi(fat, "/data"):
        before = fat.stat().st_size, await sizes(vm, "/data")
        with pytest.raises(GuestRefused, match="vfat") as caught:
            await vm.resize_scsi(fat, 8 * MIB)
        assert caught.value.remedy
        assert (fat.stat().st_size, await sizes(vm, "/data")) == before
        await output(vm, "echo x > /data/file")


async def test_a_verity_mount_keeps_its_size_and_hinders_nobody(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    root_hash, offset = add_hash_tree(image, "--data-block-size", "1024", "--hash-block-size", "1024")
    verity = Verity(root_hash=root_hash, hash_offset_bytes=offset)
    key = CallerKey(bytes(range(64)))
    async with vm.add_scsi(image):
        request = DiskRequest(host_path=str(image), read_only=False)
        config = MountConfig(read_only=True, verity=verity)
        where = PurePosixPath("/verity")
        mounted = await vm._scsi.add(request, mount=config, guest_path=where, holder=Holder(name="h"))
        before = await sizes(vm, "/verity")
        await vm.resize_scsi(image, 64 * MIB)
        assert image.stat().st_size == 64 * MIB
        assert await sizes(vm, "/verity") == before
        assert await output(vm, "cat /verity/greeting") == "hello\n"
        await vm._scsi.release(mounted)
    other = blank(tmp_path / "other.raw", 16)
    async with vm.add_scsi(other, "/data", encryption=key, ensure_filesystem=True, options=["ro"]):
        node = (await mount_at(vm, "/data")).device
        await vm.resize_scsi(other, 32 * MIB)
        assert await output(vm, f"blockdev --getsize64 {node}") == f"{32 * MIB}\n"
