"""dm-crypt with a key that nobody knows, and with the caller's."""

from __future__ import annotations

import base64
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest

from filesystem_images import MIB, blank, digest, gpt_disk
from in_guest import Running, mount_at, output
from utilityvm import CallerKey, ConfigDiffers, GuestRefused, InvalidRequest, ScratchKey, UtilityVM
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

TEXT = "nobody may read this line"
WRITE = f"yes '{TEXT}' | head -c 1000000 > /data/secret; sync /data/secret"
KEY = CallerKey(bytes(range(100, 164)))
SHORT = CallerKey(b"k" * 32)
WRONG = CallerKey(bytes(range(64)))
MADE: dict[str, Any] = {"ensure_filesystem": True}


def is_readable(image: Path) -> bool:
    """Does the image show what was written, or any sign of the file system?"""
    data = image.read_bytes()
    return TEXT.encode() in data or data[1080:1082] == b"\x53\xef" or b"secret" in data or data.startswith(b"XFSB")


async def test_a_scratch_disk_is_noise_and_dies_with_its_mount(vm: UtilityVM, tmp_path: Path) -> None:
    images = [blank(tmp_path / f"{n}.raw", 16) for n in range(2)]
    for image in images:
        async with vm.add_scsi(image, "/data", encryption=ScratchKey(), **MADE):
            await output(vm, WRITE)
            assert (await mount_at(vm, "/data")).device.startswith(("/dev/dm-", "/dev/mapper/"))
            assert await output(vm, "head -n 1 /data/secret") == f"{TEXT}\n"
        assert not is_readable(image)
    assert images[0].read_bytes()[1024:2048] != images[1].read_bytes()[1024:2048]  # a key for each
    before = digest(images[0])
    for settings in ({"encryption": ScratchKey(), **MADE}, {"encryption": ScratchKey()}, MADE, {}):
        with pytest.raises(GuestRefused):
            await vm.add_scsi(images[0], "/data", **settings)
    assert digest(images[0]) == before
    async with vm.add_scsi(images[0], "/data", encryption=ScratchKey(), reformat=True, **MADE):
        assert await output(vm, "ls /data") == "lost+found\n"


async def test_the_same_key_reads_it_again_and_no_other(vm: UtilityVM, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 16)
    async with vm.add_scsi(image, "/data", encryption=KEY, **MADE):
        await output(vm, WRITE)
    assert not is_readable(image)
    before = digest(image)
    for settings in (
        {"encryption": WRONG},
        {"encryption": WRONG, **MADE},
        {},
        MADE,
        {"encryption": SHORT},
    ):
        with pytest.raises(GuestRefused):
            await vm.add_scsi(image, "/data", **settings)
        assert not vm.scsi_slots()
    async with vm.add_scsi(image, "/data", encryption=KEY, read_only=True):
        assert await output(vm, "head -n 1 /data/secret; wc -c < /data/secret") == f"{TEXT}\n1000000\n"
    assert digest(image) == before
    async with vm.add_scsi(image, "/data", encryption=KEY, **MADE):  # it is there: it is not made again
        assert await output(vm, "wc -c < /data/secret") == "1000000\n"


async def test_partitions_have_keys_of_their_own(vm: UtilityVM, tmp_path: Path) -> None:
    disk = gpt_disk(tmp_path / "disk.raw", [blank(tmp_path / "1", 20), ext4_image(tmp_path / "2", {"plain": "text\n"})])
    for number in range(2):
        async with (
            await vm.add_scsi(disk, "/data", partition=1, encryption=SHORT, **MADE),
            await vm.add_scsi(disk, "/plain", partition=2),
        ):
            await output(vm, f"echo '{TEXT}' >> /data/secret")
            assert await output(vm, "wc -l < /data/secret; cat /plain/plain") == f"{number + 1}\ntext\n"
            with pytest.raises(ConfigDiffers):
                await vm.add_scsi(disk, "/again", partition=1, encryption=WRONG)
            with pytest.raises(ConfigDiffers):
                await vm.add_scsi(disk, "/again", partition=1)
    assert TEXT.encode() not in disk.read_bytes()


async def test_an_encrypted_device_can_be_published(vm: UtilityVM, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 4)
    for key in (KEY, ScratchKey()):
        async with vm.add_scsi(image, "/device", encryption=key, block_device=True):
            await output(vm, f"echo '{TEXT}' | dd of=/device conv=notrunc,fsync bs=512 seek=8 2>/dev/null")
            assert TEXT in await output(vm, "dd if=/device bs=512 skip=8 count=1 2>/dev/null | head -n 1")
        data = image.read_bytes()
        assert TEXT.encode() not in data
        assert any(data[4096:4608])
        assert len(data) == 4 * MIB


@pytest.mark.parametrize(
    "settings",
    [
        {"encryption": CallerKey(b"")},
        {"encryption": CallerKey(bytes(31))},
        {"encryption": CallerKey(bytes(65))},
        {"encryption": ScratchKey(), "read_only": True},
    ],
    ids=str,
)
async def test_what_is_no_key_is_refused(vm: UtilityVM, disk: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await vm.add_scsi(disk, "/data", **settings)
    assert not vm.scsi_slots()


def contents_of(folder: Path) -> bytes:
    """All that is in the files below `folder`, one after the other.

    Read by another process: to close a file takes from a process all its locks on it, and SQLite holds some.
    """
    command = ["find", str(folder), "-type", "f", "-exec", "cat", "{}", "+"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


async def test_a_key_is_nowhere_to_be_read(
    vm: UtilityVM, tmp_path: Path, own_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    image = blank(tmp_path / "disk.raw", 16)
    key = CallerKey(b"<<this is the key, and it is 64 bytes long, as xts wants it....>>"[:64])
    spellings = [key.key, key.key.hex().encode(), base64.b64encode(key.key), key.key.hex().upper().encode()]
    seen = repr(key) + repr(vm.scsi_slots())
    watch = "echo ready; while [ ! -e /tmp/enough ]; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; done > /tmp/seen"
    async with Running(vm, watch):
        async with vm.add_scsi(image, "/data", encryption=key, holder="job-17", **MADE):
            seen += repr(vm.scsi_mounts()) + repr(vm.scsi_slots()) + repr(vm.scsi_reservations())
            in_guest = await vm.run(["sh", "-c", "cat /run/utilityvm/* /proc/self/mountinfo; dmesg; dmsetup table"])
        with pytest.raises(GuestRefused) as caught:
            await vm.add_scsi(image, "/data", encryption=CallerKey(key.key[::-1]))
        spellings += [key.key[::-1], base64.b64encode(key.key[::-1])]
        seen += str(caught.value) + repr(caught.value.__dict__)
    watched = await vm.run(["sh", "-c", "cat /tmp/seen; rm /tmp/seen"])
    assert b"cat" in watched.stdout
    places = {
        "log": caplog.text.encode(),
        "views and errors": seen.encode(),
        "console": vm.console().encode(),
        "guest": in_guest.stdout + in_guest.stderr,
        "processes": watched.stdout,
        "files": contents_of(own_folders),
    }
    assert b"job-17" in places["files"]  # the store
    assert b"MappedVirtualDisk" in places["log"]
    for name, data in places.items():
        assert not any(spelling in data for spelling in spellings), name
