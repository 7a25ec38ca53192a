"""dm-verity: what does not hash up to the caller's root hash is not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from filesystem_images import MIB, add_hash_tree, blank, digest, filesystem_image, flip_byte, gpt_disk
from in_guest import complaint, output
from utilityvm import GuestRefused, InvalidRequest, UtilityVM, Verity
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

GREAT = "".join(f"line {number} of the great file\n" for number in range(20000))
FILES = {"small": "small\n", "great": GREAT}


def place_of(image: Path, text: str) -> int:
    """Where the image holds a text."""
    found = image.read_bytes().find(text.encode())
    assert found >= 0
    return found


SMALL_BLOCKS = ("--data-block-size", "1024", "--hash-block-size", "1024")  # those of a small ext4


@pytest.mark.parametrize(("kind", "options"), [("ext4", SMALL_BLOCKS), ("erofs", ())])
async def test_a_whole_disk_is_read_and_a_flipped_byte_is_an_io_error(
    vm: UtilityVM, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    image = filesystem_image(kind, tmp_path / "disk.raw", FILES)
    root_hash, offset = add_hash_tree(image, *options)
    verity = Verity(root_hash=root_hash, hash_offset_bytes=offset)
    before = digest(image)
    async with vm.add_scsi(image, "/data", read_only=True, verity=verity):
        assert await output(vm, "cat /data/small /data/great") == f"small\n{GREAT}"
        await complaint(vm, "echo x > /data/small")
    assert digest(image) == before
    flip_byte(image, place_of(image, "line 10000 of the great file"))
    async with vm.add_scsi(image, "/data", read_only=True, verity=verity):
        assert await output(vm, "cat /data/small") == "small\n"
        assert "Input/output error" in await complaint(vm, "cat /data/great")
    async with vm.add_scsi(image, "/data", read_only=True):  # without the tree nobody notices
        await output(vm, "cat /data/great > /dev/null")


async def test_another_root_hash_is_refused(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    root_hash, offset = add_hash_tree(image)
    other = bytes([root_hash[0] ^ 1]) + root_hash[1:]
    for wrong in (other, bytes(32), root_hash[:16]):
        with pytest.raises(GuestRefused):
            await vm.add_scsi(image, "/data", read_only=True, verity=Verity(root_hash=wrong, hash_offset_bytes=offset))
        assert not vm.scsi_slots()
    flip_byte(image, offset + 4096 + 7)  # in the tree's first block, which is under the root hash
    with pytest.raises(GuestRefused, match="does not hash up"):
        await vm.add_scsi(image, "/data", read_only=True, verity=Verity(root_hash=root_hash, hash_offset_bytes=offset))


async def test_a_tree_without_a_superblock_is_described_by_the_caller(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    salt = bytes(range(32))
    root_hash, offset = add_hash_tree(image, "--no-superblock", "--salt", salt.hex(), "--hash", "sha512", *SMALL_BLOCKS)
    verity = Verity(
        root_hash=root_hash,
        hash_offset_bytes=offset,
        data_blocks=offset // 1024,
        salt=salt,
        algorithm="sha512",
        block_size_bytes=1024,
    )
    async with vm.add_scsi(image, "/data", read_only=True, verity=verity):
        assert await output(vm, "cat /data/small") == "small\n"
    for wrong in (
        replace(verity, salt=salt[::-1]),
        replace(verity, algorithm="sha256"),
        replace(verity, algorithm="nohash"),
        replace(verity, data_blocks=offset // 1024 + 1),
        replace(verity, data_blocks=offset // 1024 // 200),
        replace(verity, block_size_bytes=4096),
        replace(verity, block_size_bytes=1000),
        replace(verity, salt=None),
        Verity(root_hash=root_hash, hash_offset_bytes=offset),
    ):
        with pytest.raises((GuestRefused, InvalidRequest)):
            await vm.add_scsi(image, "/data", read_only=True, verity=wrong)
        assert not vm.scsi_slots()


async def test_a_partition_has_its_own_tree_and_can_be_published(vm: UtilityVM, tmp_path: Path) -> None:
    part = filesystem_image("squashfs", tmp_path / "part.raw", FILES)
    with part.open("r+b") as file:
        file.truncate(-(-part.stat().st_size // MIB) * MIB)
    root_hash, offset = add_hash_tree(part)
    disk = gpt_disk(tmp_path / "disk.raw", [blank(tmp_path / "first.raw", 3), part])
    verity = Verity(root_hash=root_hash, hash_offset_bytes=offset)
    async with vm.add_scsi(disk, "/data", partition=2, read_only=True, verity=verity):
        assert await output(vm, "cat /data/small") == "small\n"
    async with vm.add_scsi(disk, "/device", partition=2, read_only=True, verity=verity, block_device=True):
        assert await output(vm, "head -c 4 /device") == "hsqs"
        assert await output(vm, "blockdev --getsize64 /device") == f"{offset}\n"  # the tree itself is not shown
    with pytest.raises((GuestRefused, InvalidRequest)):
        await vm.add_scsi(disk, "/data", partition=1, read_only=True, verity=verity)


async def test_a_tree_that_cannot_be_is_refused_before_anything_is_attached(vm: UtilityVM, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk.raw", FILES)
    root_hash, offset = add_hash_tree(image)
    verity = Verity(root_hash=root_hash, hash_offset_bytes=offset)
    for wrong in (
        replace(verity, root_hash=b""),
        replace(verity, hash_offset_bytes=0),
        replace(verity, hash_offset_bytes=-512),
        replace(verity, hash_offset_bytes=513),
    ):
        with pytest.raises(InvalidRequest):
            await vm.add_scsi(image, "/data", read_only=True, verity=wrong)
    with pytest.raises(InvalidRequest):
        await vm.add_scsi(image, "/data", verity=verity)
    for past in (image.stat().st_size, image.stat().st_size * 1000, offset + 4096):
        with pytest.raises((GuestRefused, InvalidRequest)):
            await vm.add_scsi(image, "/data", read_only=True, verity=replace(verity, hash_offset_bytes=past))
    assert not vm.scsi_slots()
