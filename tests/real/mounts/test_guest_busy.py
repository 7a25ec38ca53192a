"""A disk that is used in the guest is not taken away; the error says what uses it, and nothing is half removed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from filesystem_images import blank, filesystem_image, gpt_disk
from in_guest import Running, complaint, mount_at, output
from utilityvm import CallerKey, GuestBusy, SCSIMount, UtilityVM
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

STAY = "exec sleep 1000"
BIND = "import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('/data/socket'); time.sleep(1000)"
ASLEEP = "grep -q nanosleep /proc/$$/wchan"


class User(NamedTuple):
    """Something that uses a disk at /data, or /device: what it does, how it ends, and how it is named."""

    name: str
    holder: str
    program: str = ""  # runs as long as it uses the disk
    begin: str = ""
    end: str = ""


OF_MOUNTS: Final = (
    User("open file", r"process \d+ \(sleep\) has /data/open open", f"exec 3> /data/open; {STAY}"),
    User("deleted file", r"process \d+ \(sleep\) has /data/gone", f"exec 3> /data/gone; rm /data/gone; {STAY}"),
    User("working folder", r"process \d+ \(sleep\) has its working folder there: /data/f", f"cd /data/folder; {STAY}"),
    User("program", "has its program there: /data/folder/sleep", "exec /data/folder/sleep 1000"),
    User(
        "mapped file",
        r"process \d+ \(sleep\) has /data/folder/library in its memory",
        f"export LD_PRELOAD=/data/folder/library; {STAY}",
    ),
    User("socket", "a socket at /data/socket", f'exec python3 -c "{BIND}"'),
    User("mount below", "tmpfs mounted at /data/folder", "", "mount -t tmpfs x /data/folder", "umount /data/folder"),
    User("mount over it", "tmpfs mounted at /data, over it", "", "mount -t tmpfs x /data", "umount /data"),
    User(
        "bind mount", "mounted at /bound", "", "mkdir /bound; mount --bind /data /bound", "umount /bound; rmdir /bound"
    ),
    User(
        "bind mount of a folder",
        "mounted at /bound",
        "",
        "mkdir /bound; mount --bind /data/folder /bound",
        "umount /bound; rmdir /bound",
    ),
    User(
        "overlay",
        "overlay mounted at /over",
        "",
        "mkdir /over; mount -t overlay -o lowerdir=/data/folder:/mnt over /over",
        "umount /over; rmdir /over",
    ),
    User(
        "overlay by relative names",
        "something without a mount, which may be the overlay at /over",
        "",
        "mkdir /over; cd /data; mount -t overlay -o lowerdir=folder:/mnt over /over",
        "umount /over; rmdir /over",
    ),
    User(
        "overlay by a link",
        "overlay mounted at /over",
        "",
        "mkdir /over; ln -s /data/folder /link; mount -t overlay -o lowerdir=/link:/mnt over /over",
        "umount /over; rmdir /over; rm /link",
    ),
    User("namespace", r"at /data in the mount namespace of process \d+ \(sleep\)", f"exec unshare -m sh -c '{STAY}'"),
    User(
        "loop device",
        "loop0, a loop device on a file of it",
        "",
        "truncate -s 1M /data/loop; modprobe loop; losetup /dev/loop0 /data/loop",
        "losetup -d /dev/loop0",
    ),
    User(
        "swap file",
        "swap in /data/swap",
        "",
        "dd if=/dev/zero of=/data/swap bs=64k count=16 2>/dev/null; chmod 600 /data/swap; mkswap -q /data/swap; "
        "swapon /data/swap",
        "swapoff /data/swap",
    ),
    User("open device", r"process \d+ \(sleep\) has /dev/sd\w+ open", f"exec 3< $DEVICE; {STAY}"),
)

OF_DEVICES: Final = (
    User("open device", r"process \d+ \(sleep\) has /device open", f"exec 3< /device; {STAY}"),
    User("open node", r"process \d+ \(sleep\) has /dev/sd\w+ open", f"exec 3< $DEVICE; {STAY}"),
    User("mount", "mounted at /mine", "", "mkdir /mine; mount /device /mine", "umount /mine; rmdir /mine"),
    User(
        "mapping",
        r"dm-\d+ \(on-top\)",
        "",
        "modprobe dm-mod; echo 0 2048 linear $DEVICE 0 | dmsetup create on-top",
        "dmsetup remove on-top",
    ),
    User(
        "loop device",
        "loop0, a loop device on it",
        "",
        "modprobe loop; losetup /dev/loop0 $DEVICE",
        "losetup -d /dev/loop0",
    ),
)


@asynccontextmanager
async def used(vm: UtilityVM, user: User, device: str) -> AsyncIterator[None]:
    """While `user` uses the disk, whose device is `device`."""
    async with AsyncExitStack() as using:
        if user.begin:
            await output(vm, f"DEVICE={device}; {user.begin}")
            using.push_async_callback(output, vm, user.end)
        if user.program:
            await using.enter_async_context(Running(vm, f"export DEVICE={device}; {user.program}", when=ASLEEP))
        yield


async def refused(mount: SCSIMount, user: User) -> None:
    """Releasing it fails, names the user and nobody else, and takes nothing away."""
    vm = mount._vm
    (before,) = vm.scsi_slots()
    with pytest.raises(GuestBusy, match=user.holder) as caught:
        await mount.release()
    assert len(caught.value.holders) == 1, caught.value.holders
    (after,) = vm.scsi_slots()
    assert (after.attachment, after.state, after.guest_paths) == (before.attachment, before.state, before.guest_paths)


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    return ext4_image(tmp_path / "disk.raw", {"greeting": "hello\n", "folder/file": "text\n"})


async def test_what_uses_a_mount_keeps_it(vm: UtilityVM, full_disk: Path) -> None:
    mount = await vm.add_scsi(full_disk, "/data")
    device = (await mount_at(vm, "/data")).device
    await output(vm, "cp /bin/sleep /data/folder/sleep; cp /lib/*-linux-gnu/libm.so.6 /data/folder/library")
    for user in OF_MOUNTS:
        async with used(vm, user, device):
            await refused(mount, user)
    assert await output(vm, "cat /data/greeting") == "hello\n"
    await mount.release()
    assert not vm.scsi_slots()


async def test_what_uses_a_published_device_keeps_it(vm: UtilityVM, full_disk: Path) -> None:
    mount = await vm.add_scsi(full_disk, "/device", block_device=True)
    device = f"/dev{(await mount_at(vm, '/device')).root}"
    for user in OF_DEVICES:
        async with used(vm, user, device):
            await refused(mount, user)
    await output(vm, "head -c 1 /device > /dev/null")
    await mount.release()
    assert not vm.scsi_slots()


async def test_what_uses_an_attached_disk_or_a_part_of_it_keeps_it(vm: UtilityVM, tmp_path: Path) -> None:
    parts = [ext4_image(tmp_path / "1.raw", {"n": "1\n"}), filesystem_image("btrfs", tmp_path / "2.raw", {"n": "2\n"})]
    disk = gpt_disk(tmp_path / "disk.raw", parts)
    before = await output(vm, "ls /sys/block")
    mount = await vm.add_scsi(disk)
    async with vm.add_scsi(disk, "/seen", partition=1):  # the guest has it by then
        (name,) = set((await output(vm, "ls /sys/block")).split()) - set(before.split())
    device = f"/dev/{name}"
    for user in (
        User("", "mounted at /mine", "", "mkdir /mine; mount ${DEVICE}1 /mine", "umount /mine; rmdir /mine"),
        User("", "mounted at /mine", "", "mkdir /mine; mount ${DEVICE}2 /mine", "umount /mine; rmdir /mine"),
        User("", r"\(part\)", "", "echo 0 2048 linear ${DEVICE}2 0 | dmsetup create part", "dmsetup remove part"),
        User("", "loop0, a loop device", "", "modprobe loop; losetup /dev/loop0 ${DEVICE}1", "losetup -d /dev/loop0"),
        User("", r"\(sleep\) has /dev/sd\w2 open", f"exec 3< ${{DEVICE}}2; {STAY}"),
        User("", r"mount namespace of process \d+", f"exec unshare -m sh -c 'mount ${{DEVICE}}1 /mnt; {STAY}'"),
    ):
        async with used(vm, user, device):
            await refused(mount, user)
    assert await output(vm, f"blockdev --getsize64 {device}") == f"{disk.stat().st_size}\n"
    await mount.release()
    assert not vm.scsi_slots()


async def test_one_of_two_mounts_goes_though_the_other_is_used(vm: UtilityVM, full_disk: Path) -> None:
    used, unused = await vm.add_scsi(full_disk, "/data"), await vm.add_scsi(full_disk, "/other")
    async with Running(vm, f"cd /data; {STAY}", when=ASLEEP):
        await unused.release()
        with pytest.raises(GuestBusy, match="working folder"):
            await used.release()
        assert await output(vm, "cat /data/greeting") == "hello\n"
    await used.release()


async def test_a_used_mapping_keeps_its_disk(vm: UtilityVM, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 16)
    mount = await vm.add_scsi(image, "/data", encryption=CallerKey(bytes(range(64))), ensure_filesystem=True)
    user = User("", r"process \d+ \(sleep\) has /dev/dm-\d+ open", f"exec 3< $DEVICE; {STAY}")
    async with used(vm, user, (await mount_at(vm, "/data")).device):
        await refused(mount, user)
    await output(vm, "ls /data/lost+found")
    await mount.release()
    assert not vm.scsi_slots()


# Force.

FORCED: Final = (
    User("open file", "", f"exec 3> /data/open; {STAY}"),
    User("working folder", "", f"cd /data/folder; {STAY}"),
    User("mount below", "", "", "mount -t tmpfs x /data/folder", ":"),
    User("mount over it", "", "", "mount -t tmpfs x /data", ":"),
    User("bind mount", "", "", "mkdir /bound; mount --bind /data /bound", "rmdir /bound"),
    User("namespace", "", f"exec unshare -m sh -c '{STAY}'"),
    User(
        "loop device",
        "",
        "",
        "truncate -s 1M /data/loop; modprobe loop; losetup /dev/loop0 /data/loop",
        "losetup -d /dev/loop0",
    ),
    User("open device", "", f"exec 3< $DEVICE; {STAY}"),
)


@pytest.mark.parametrize("user", FORCED, ids=lambda user: user.name)
async def test_force_takes_it_away_all_the_same(vm: UtilityVM, full_disk: Path, user: User) -> None:
    mount = await vm.add_scsi(full_disk, "/data")
    device = (await mount_at(vm, "/data")).device
    async with used(vm, user, device):
        await mount.release(force=True)
        assert not vm.scsi_slots()
        await complaint(vm, f"test -e {device} || grep ' /data ' /proc/self/mountinfo")
    async with vm.add_scsi(full_disk, "/data"):
        assert await output(vm, "cat /data/greeting") == "hello\n"


async def test_a_mapping_that_is_forced_away_ends_with_its_last_user(vm: UtilityVM, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 16)
    key = CallerKey(bytes(range(64)))
    mount = await vm.add_scsi(image, "/data", encryption=key, ensure_filesystem=True)
    mapping = (await mount_at(vm, "/data")).device
    async with Running(vm, f"exec 3> /data/open; {STAY}", when=ASLEEP):
        await mount.release(force=True)
        assert not vm.scsi_slots()
        await output(vm, f"ls {mapping}")
    await output(vm, f"while [ -e {mapping} ]; do :; done")
    async with vm.add_scsi(image, "/data", encryption=key):
        assert await output(vm, "ls /data") == "lost+found\nopen\n"
