"""File systems, partitions, guest paths, options: every way to mount a disk, on a real VM."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from filesystem_images import MIB, blank, copy_sparse, digest, filesystem_image, gpt_disk, mbr_disk
from in_guest import complaint, mount_at, output
from utilityvm import GENERATED, ConfigDiffers, GuestPathInUse, GuestRefused, InvalidRequest, UtilityVM
from utilityvm.machine.programs import find_program, run
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

FILES = {"greeting": "hello\n", "folder/deep": "deep\n"}
JOURNALLED = ("ext4", "xfs", "btrfs")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "erofs", "squashfs", "vfat"])
async def test_a_file_system_is_found_and_read_and_never_written_when_read_only(
    vm: UtilityVM, tmp_path: Path, kind: str
) -> None:
    image = filesystem_image(kind, tmp_path / "disk.raw", FILES)
    if kind == "vfat":
        async with vm.add_scsi(image, "/data"):
            await output(vm, "mkdir /data/folder; echo hello > /data/greeting; echo deep > /data/folder/deep")
    before = digest(image)
    async with vm.add_scsi(image, "/data", read_only=True):
        assert await output(vm, "cat /data/greeting /data/folder/deep") == "hello\ndeep\n"
        device, _, filesystem, options, _ = await mount_at(vm, "/data")
        assert filesystem == kind
        assert "ro" in options
        said = await complaint(
            vm, f"cat /sys/class/block/{Path(device).name}/ro >&2; echo x > {device} || mount -o remount,rw /data"
        )
        assert said.startswith("1\n")
        assert "Read-only file system" in await complaint(vm, "echo x > /data/greeting")
    assert digest(image) == before


def is_dirty(kind: str, image: Path) -> bool:
    """Has the journal something in it that a mount would write to the image?"""
    match kind:
        case "ext4":
            said = run([find_program("dumpe2fs", package="e2fsprogs"), "-h", image]).decode()
            return "needs_recovery" in said
        case "xfs":
            said = run([find_program("xfs_logprint", package="xfsprogs"), "-t", image]).decode()
            return "<DIRTY>" in said
        case _:
            said = run([find_program("btrfs", package="btrfs-progs"), "inspect", "dump-super", image]).decode()
            return not any(line.split() == ["log_root", "0"] for line in said.splitlines())


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_a_journal_is_not_replayed_by_a_read_only_mount(vm: UtilityVM, tmp_path: Path, kind: str) -> None:
    image = filesystem_image(kind, tmp_path / "disk.raw", FILES)
    async with vm.add_scsi(image, "/data"):
        await output(vm, "echo more > /data/new && sync /data/new")
        crashed = copy_sparse(image, tmp_path / "crashed.raw")
    assert is_dirty(kind, crashed)
    before = digest(crashed)
    for settings in ({"read_only": True}, {"options": ["ro"]}):  # of the disk; of the mount of a writable disk
        async with vm.add_scsi(crashed, "/data", **settings):
            assert await output(vm, "cat /data/greeting /data/folder/deep") == "hello\ndeep\n"
        assert digest(crashed) == before
    async with vm.add_scsi(crashed, "/data"):
        assert await output(vm, "cat /data/new") == "more\n"
    assert not is_dirty(kind, crashed)


# Partitions.


@pytest.mark.parametrize("make_disk", [mbr_disk, gpt_disk])
async def test_partitions_are_mounted_by_their_number(vm: UtilityVM, tmp_path: Path, make_disk: Any) -> None:
    kinds = ("ext4", "squashfs", "erofs", "ext4")
    parts = [
        filesystem_image(kind, tmp_path / f"{n}.raw", {"n": f"{n} {kind}\n"}) for n, kind in enumerate(kinds, start=1)
    ]
    disk = make_disk(tmp_path / "disk.raw", parts)
    before = digest(disk)
    mounts = [await vm.add_scsi(disk, f"/parts/{n}", partition=n, read_only=True) for n in (3, 1, 4, 2)]
    assert len({mount.slot for mount in mounts}) == 1
    assert await output(vm, "cat /parts/*/n") == "1 ext4\n2 squashfs\n3 erofs\n4 ext4\n"
    with pytest.raises(GuestRefused, match=r"no partition 5: it has 1, 2, 3, 4"):
        await vm.add_scsi(disk, "/parts/5", partition=5, read_only=True)
    with pytest.raises(GuestRefused, match="no file system") as caught:
        await vm.add_scsi(disk, "/parts/0", read_only=True)
    assert "one of its partitions" in str(caught.value.remedy)
    assert mounts[0].ref_count == 4
    await mounts.pop(1).release()
    assert await output(vm, "ls /parts; cat /parts/*/n") == "2\n3\n4\n2 squashfs\n3 erofs\n4 ext4\n"
    for mount in mounts:
        await mount.release()
    assert not vm.scsi_slots()
    assert digest(disk) == before


async def test_a_partition_that_is_not_there_is_refused_at_once(vm: UtilityVM, tmp_path: Path) -> None:
    whole = ext4_image(tmp_path / "whole.raw", FILES)
    disk = gpt_disk(tmp_path / "disk.raw", [whole])
    for image, partition, why in ((whole, 1, "no partition table"), (disk, 2, "it has 1"), (disk, 200, "it has 1")):
        with pytest.raises(GuestRefused, match=why):
            await vm.add_scsi(image, "/data", partition=partition)
        assert not vm.scsi_slots()
    for partition in (-1, 256):
        with pytest.raises(InvalidRequest):
            await vm.add_scsi(disk, "/data", partition=partition)
    await complaint(vm, "ls /data")


async def test_what_one_partition_gets_the_others_keep(vm: UtilityVM, tmp_path: Path) -> None:
    parts = [ext4_image(tmp_path / f"{n}.raw", {"n": f"{n}\n"}) for n in (1, 2)]
    disk = mbr_disk(tmp_path / "disk.raw", [*parts, blank(tmp_path / "3.raw", 16)])
    async with (
        await vm.add_scsi(disk, "/one", partition=1),
        await vm.add_scsi(disk, "/two", partition=2, options=["ro"]),
        await vm.add_scsi(disk, "/three", partition=3, ensure_filesystem=True),
    ):
        await output(vm, "echo new > /one/n; echo fresh > /three/n")
        assert await output(vm, "cat /one/n /two/n /three/n") == "new\n2\nfresh\n"
    data = disk.read_bytes()
    assert data[17 * MIB : 33 * MIB] == parts[1].read_bytes()
    assert data[:440] == bytes(440)


# Guest paths.


async def test_a_disk_is_at_several_guest_paths_at_once(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    first = await vm.add_scsi(image, "/first/place")
    second = await vm.add_scsi(image, "/second place with 'odd' \\ signs/é")
    made_up = await vm.add_scsi(image, GENERATED)
    assert made_up.guest_path == first.guest_path  # it is mounted in the same way already
    assert first.slot == second.slot
    await output(vm, "echo by the first > /first/place/log")
    same = await vm.run(["cat", f"{second.guest_path}/log"])
    assert same.stdout == b"by the first\n"
    other = ext4_image(tmp_path / "other.raw", {})
    with pytest.raises(GuestPathInUse):
        await vm.add_scsi(other, "/first/place/")
    with pytest.raises(GuestPathInUse, match="mounted otherwise than with options=noexec"):
        await vm.add_scsi(image, "/first/place", options=["noexec"])
    with pytest.raises(ConfigDiffers):
        await vm.add_scsi(image, "/third", filesystem="ext4")
    await made_up.release()
    await first.release()
    assert (await vm.run(["cat", f"{second.guest_path}/log"])).stdout == b"by the first\n"
    await complaint(vm, "ls /first")  # we made it, so it went with its mount
    await second.release()
    assert "second" not in await output(vm, "ls /")


async def test_what_is_at_a_guest_path_stays_as_it_was(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    await output(
        vm, "mkdir -p /old/empty /old/full; echo mine > /old/full/file; ln -s /old/full /old/link; > /old/file"
    )
    try:
        for path in ("/old/empty", "/old/full"):
            async with vm.add_scsi(image, path):
                assert await output(vm, f"cat {path}/greeting") == "hello\n"
        for path in ("/old/link", "/old/link/below", "/old/file", "/old/file/below"):
            with pytest.raises((GuestRefused, InvalidRequest)):
                await vm.add_scsi(image, path)
        with pytest.raises((GuestRefused, InvalidRequest)):
            await vm.add_scsi(image, "/old/full", block_device=True)
        assert await output(vm, "cat /old/full/file; ls /old") == "mine\nempty\nfile\nfull\nlink\n"
        # A mount of the guest's own at the path is not covered; a folder of that name elsewhere is no such mount.
        await output(vm, "mount --bind /old/full /old/empty")
        with pytest.raises(GuestPathInUse):
            await vm.add_scsi(image, "/old/empty")
        async with vm.add_scsi(image, "/old/full"):
            pass
    finally:
        await output(vm, "umount /old/empty; rm -r /old")


# Options.


OPTIONS: tuple[tuple[list[str], set[str], set[str]], ...] = (
    # As asked, what is so, and what is not.
    (["ro", "noexec", "nosuid", "nodev", "noatime"], {"ro", "noexec", "nosuid", "nodev", "noatime"}, {"rw"}),
    (["nosuid,nodev", "strictatime"], {"rw", "nosuid", "nodev"}, {"noexec", "relatime"}),
    (["ro", "rw", "noexec", "exec", "sync"], {"rw", "sync"}, {"ro", "noexec"}),
    (["defaults", "relatime"], {"rw", "relatime", "shared"}, {"noexec"}),
    (["data=journal", "lazytime"], {"rw", "data=journal", "lazytime"}, set()),
    (["rprivate", "noexec"], {"noexec"}, {"shared"}),
    (["private", "shared"], {"shared"}, set()),
    (["nofail,_netdev,x-systemd.automount,comment=a", "nosymfollow"], {"rw", "nosymfollow"}, {"nofail"}),
    (["user,exec"], {"nosuid", "nodev"}, {"noexec"}),
    (["unbindable"], {"unbindable"}, {"shared"}),
)


async def test_options_are_those_of_the_mount(vm: UtilityVM, disk: Path) -> None:
    async with vm.add_scsi(disk):
        for options, is_so, is_not in OPTIONS:
            async with vm.add_scsi(disk, "/data", options=options):
                mounted = await mount_at(vm, "/data")
            assert is_so <= mounted.options | mounted.propagation, options
            assert not is_not & (mounted.options | mounted.propagation), options


async def test_a_slave_is_told_and_does_not_tell(vm: UtilityVM, disk: Path) -> None:
    await output(vm, "mkdir /near /far; mount -t tmpfs near /near; mount --bind /near /far")
    try:
        async with vm.add_scsi(disk, "/near/data", options=["rslave"]):
            assert (await mount_at(vm, "/near/data")).propagation == {"master"}
            assert await output(vm, "cat /far/data/greeting") == "hello\n"
            await output(vm, "mkdir /far/data/told /near/data/untold; mount -t tmpfs told /far/data/told")
            assert (await mount_at(vm, "/near/data/told")).device == "told"
            await output(vm, "umount /far/data/told; mount -t tmpfs untold /near/data/untold")
            await complaint(vm, "grep /far/data/untold /proc/self/mountinfo")
            await output(vm, "umount /near/data/untold")
        # The copy that the kernel made at /far went with the mount: it kept nothing busy.
    finally:
        await output(vm, "umount /near /far; rmdir /near /far")


IMPOSSIBLE: tuple[tuple[type[Exception], dict[str, Any]], ...] = (
    (GuestRefused, {"options": ["nosuchoption"]}),
    (GuestRefused, {"options": ["data=nonsense"]}),
    (GuestRefused, {"filesystem": "xfs"}),
    (GuestRefused, {"filesystem": "squashfs"}),
    (GuestRefused, {"filesystem": "nosuchfs"}),
    (InvalidRequest, {"options": ["bind"]}),
    (InvalidRequest, {"options": ["remount,rw"]}),
    (InvalidRequest, {"options": ['context="a,b']}),
    (InvalidRequest, {"options": ["loop"]}),
    (GuestRefused, {"options": ['nosuchoption="a,ro,b"']}),
    (InvalidRequest, {"options": ["rw"], "read_only": True}),
    (InvalidRequest, {"options": [""]}),
    (InvalidRequest, {"options": ["a\nb"]}),
    (InvalidRequest, {"options": "noexec"}),
    (InvalidRequest, {"filesystem": "ext4 -o x"}),
    (InvalidRequest, {"filesystem": "ext4", "block_device": True}),
    (InvalidRequest, {"options": ["ro"], "block_device": True}),
)


async def test_what_cannot_be_mounted_so_is_refused_and_leaves_nothing(vm: UtilityVM, disk: Path) -> None:
    before = digest(disk)
    for error, settings in IMPOSSIBLE:
        with pytest.raises(error):
            await vm.add_scsi(disk, "/data", **settings)
        assert not vm.scsi_slots(), settings
    await complaint(vm, "ls -d /data")
    assert digest(disk) == before


async def test_the_file_system_can_be_said(vm: UtilityVM, tmp_path: Path) -> None:
    image = filesystem_image("vfat", tmp_path / "disk.raw", {})
    async with vm.add_scsi(image, "/data", filesystem="msdos"):
        assert (await mount_at(vm, "/data")).filesystem == "msdos"


# Making file systems.


@pytest.mark.parametrize(("kind", "size_mib"), [("ext4", 32), ("xfs", 300)])
async def test_a_blank_disk_gets_a_file_system_once(vm: UtilityVM, tmp_path: Path, kind: str, size_mib: int) -> None:
    image = blank(tmp_path / "disk.raw", size_mib)
    for number in range(2):
        async with vm.add_scsi(image, "/data", ensure_filesystem=True, filesystem=kind):
            assert (await mount_at(vm, "/data")).filesystem == kind
            await output(vm, f"echo {number} >> /data/log")
    async with vm.add_scsi(image, "/data", read_only=True):
        assert await output(vm, "cat /data/log") == "0\n1\n"


def few_bytes(path: Path, offset: int, data: bytes, size_mib: int = 32) -> Path:
    with blank(path, size_mib).open("r+b") as image:
        image.seek(offset)
        image.write(data)
    return path


def swap(path: Path) -> Path:
    run([find_program("mkswap", package="util-linux"), blank(path, 32)])
    return path


FOREIGN: dict[str, Any] = {
    "a vfat file system": lambda path: filesystem_image("vfat", path, {}),
    "a squashfs file system": lambda path: filesystem_image("squashfs", path, FILES),
    r"a partition table \(GPT\)": lambda path: gpt_disk(path, [ext4_image(path.with_name("part"), {})]),
    r"a partition table \(MBR\)": lambda path: mbr_disk(path, [ext4_image(path.with_name("part"), {})]),
    "a LUKS volume": lambda path: few_bytes(path, 0, b"LUKS\xba\xbe\0\2"),
    "swap space": swap,
    "something that we do not know": lambda path: few_bytes(path, 17 * MIB + 12345, b"\1"),
}


@pytest.mark.parametrize("what", FOREIGN)
async def test_only_a_blank_disk_is_formatted_unless_that_is_said(vm: UtilityVM, tmp_path: Path, what: str) -> None:
    image = FOREIGN[what](tmp_path / "disk.raw")
    if image.stat().st_size < 32 * MIB:
        with image.open("r+b") as file:
            file.truncate(32 * MIB)
    before = digest(image)
    with pytest.raises(GuestRefused, match=f"not blank: it holds {what}"):
        await vm.add_scsi(image, "/data", ensure_filesystem=True)
    assert digest(image) == before
    async with vm.add_scsi(image, "/data", ensure_filesystem=True, reformat=True):
        await output(vm, "echo new > /data/file")
    async with vm.add_scsi(image, "/data", read_only=True):  # found by itself: nothing old speaks first
        assert await output(vm, "cat /data/file") == "new\n"
        assert (await mount_at(vm, "/data")).filesystem == "ext4"


async def test_the_last_bytes_of_a_disk_count(vm: UtilityVM, tmp_path: Path) -> None:
    image = few_bytes(tmp_path / "disk.raw", 20 * MIB + 511, b"\1", size_mib=20)
    with pytest.raises(GuestRefused, match="not blank"):
        await vm.add_scsi(image, "/data", ensure_filesystem=True)


async def test_a_file_system_of_one_kind_is_not_made_another(vm: UtilityVM, disk: Path) -> None:
    before = digest(disk)
    with pytest.raises(GuestRefused, match="holds an ext4"):
        await vm.add_scsi(disk, "/data", ensure_filesystem=True, filesystem="xfs")
    for settings in (
        {"filesystem": "vfat", "ensure_filesystem": True},
        {"read_only": True, "ensure_filesystem": True},
        {"reformat": True},
        {"ensure_filesystem": True, "block_device": True},
    ):
        with pytest.raises(InvalidRequest):
            await vm.add_scsi(disk, "/data", **settings)
    assert digest(disk) == before


# Published devices.


async def test_a_device_can_be_published_instead_of_mounted(vm: UtilityVM, tmp_path: Path) -> None:
    part = ext4_image(tmp_path / "part.raw", FILES)
    disk = gpt_disk(tmp_path / "disk.raw", [part])
    async with (
        await vm.add_scsi(disk, "/devices/whole", block_device=True),
        await vm.add_scsi(disk, "/devices/part", block_device=True, partition=1),
    ):
        assert await output(vm, "stat -c %F /devices/whole /devices/part") == "block special file\n" * 2
        assert await output(vm, "dd if=/devices/whole bs=512 skip=1 count=1 2>/dev/null | head -c 8") == "EFI PART"
        await output(vm, "mkdir /mine; mount /devices/part /mine; echo new > /mine/greeting; umount /mine; rmdir /mine")
    await complaint(vm, "ls -d /devices")
    async with vm.add_scsi(disk, "/data", partition=1, read_only=True):
        assert await output(vm, "cat /data/greeting") == "new\n"
    async with vm.add_scsi(disk, "/device", block_device=True, read_only=True):
        await complaint(vm, "dd if=/dev/zero of=/device bs=512 count=1 conv=notrunc,fsync")
        assert await output(vm, "blockdev --getro /device") == "1\n"


async def test_a_published_device_can_be_blank(vm: UtilityVM, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 2)
    async with vm.add_scsi(image, "/device", block_device=True):
        await output(vm, "printf written | dd of=/device bs=512 seek=3 conv=notrunc,fsync 2>/dev/null")
    assert image.read_bytes()[1536:1543] == b"written"


async def test_kinds_come_and_go_together_and_leave_nothing(vm: UtilityVM, tmp_path: Path) -> None:
    images = [
        filesystem_image(kind, tmp_path / f"{kind}.raw", FILES) for kind in ("ext4", "erofs", "squashfs", "btrfs")
    ]
    ways: list[dict[str, Any]] = [{}, {"read_only": True}, {"read_only": True}, {"options": ["noatime"]}]
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 13):
        mounts = [await vm.add_scsi(images[n], f"/mixed/{n}", **ways[n]) for n in order]
        assert await output(vm, "cat /mixed/*/greeting") == "hello\n" * 4
        assert await vm.remove_scsi_many(mounts) == [None] * 4
    assert not vm.scsi_slots()
