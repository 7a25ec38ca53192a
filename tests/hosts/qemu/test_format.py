"""The format of an image is decided once: whatever its guest writes, and whoever opens it next."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from utilityvm.errors import ConfigDiffers, ImageDamaged, InvalidRequest
from utilityvm.hosts.qemu.disk import open_disk
from utilityvm.hosts.qemu.format import FormatMemory
from utilityvm.machine.fileid import FileId
from utilityvm.scsi.ports import DiskFormat, DiskRequest
from utilityvm.store import Store

SIZE = 1 << 20

Opener = Callable[..., DiskFormat]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[FormatMemory]:
    with Store.open(tmp_path / "state/state.db") as store:
        yield store.formats


@pytest.fixture
def opened(memory: FormatMemory) -> Opener:
    def open_it(path: Path, format: DiskFormat | None = None, *, read_only: bool = False) -> DiskFormat:
        request = DiskRequest(host_path=str(path), read_only=read_only, format=format)
        disk = open_disk(request, memory=memory)
        disk.close()
        return disk.format

    return open_it


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def qcow2(path: Path, size: str = "1T") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
    return path


def write_as_guest(image: Path, data: bytes) -> None:
    with image.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("first", [{}, {"format": DiskFormat.RAW}, {"read_only": True}])
def test_a_raw_disk_stays_raw_whatever_its_guest_writes(
    opened: Opener, image: Path, tmp_path: Path, first: dict[str, object]
) -> None:
    """CVE-2008-2004."""
    assert opened(image, **first) is DiskFormat.RAW
    write_as_guest(image, qcow2(tmp_path / "evil").read_bytes())
    assert opened(image) is DiskFormat.RAW
    assert opened(image, read_only=True) is DiskFormat.RAW


def test_a_guest_cannot_make_its_disk_an_archive(opened: Opener, image: Path) -> None:
    opened(image)
    write_as_guest(image, b"\x1f\x8b\x08")
    assert opened(image) is DiskFormat.RAW


def test_a_guest_cannot_make_its_raw_disk_a_fixed_vhd(opened: Opener, image: Path, tmp_path: Path) -> None:
    opened(image)
    vhd = tmp_path / "whole.vhd"
    words = ["-f", "vpc", "-o", "subformat=fixed,force_size", str(vhd), str(SIZE - 512)]
    subprocess.run(["qemu-img", "create", "-q", *words], check=True)
    write_as_guest(image, vhd.read_bytes())
    assert opened(image) is DiskFormat.RAW


def test_a_guest_cannot_make_its_fixed_vhd_another_image(opened: Opener, tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size", path, "1M"], check=True
    )
    assert opened(path) is DiskFormat.VHD
    for head in (qcow2(tmp_path / "evil").read_bytes()[:512], b"conectix", b"KDMV", b"vhdxfile"):
        write_as_guest(path, head)
        assert opened(path) is DiskFormat.VHD


def test_another_name_is_the_same_disk(opened: Opener, image: Path, tmp_path: Path) -> None:
    opened(image)
    write_as_guest(image, qcow2(tmp_path / "evil").read_bytes())
    assert opened(image.rename(tmp_path / "renamed")) is DiskFormat.RAW


def test_a_disk_that_grew_is_the_same_disk(opened: Opener, image: Path, tmp_path: Path) -> None:
    opened(image)
    os.truncate(image, 2 * SIZE)
    assert opened(image) is DiskFormat.RAW
    write_as_guest(image, qcow2(tmp_path / "evil").read_bytes())
    assert opened(image) is DiskFormat.RAW


def test_the_next_file_of_that_name_is_decided_anew(opened: Opener, image: Path) -> None:
    opened(image)
    image.unlink()
    assert opened(qcow2(image)) is DiskFormat.QCOW2


def test_the_caller_decides_and_corrects(opened: Opener, image: Path, tmp_path: Path) -> None:
    opened(image)
    write_as_guest(image, qcow2(tmp_path / "other", "1M").read_bytes())
    assert opened(image, DiskFormat.QCOW2) is DiskFormat.QCOW2
    assert opened(image) is DiskFormat.QCOW2


def test_another_image_in_the_same_file_is_refused_with_both(opened: Opener, image: Path) -> None:
    """qemu-img writes into the file that is there. A guest cannot change its size, so this was no guest."""
    opened(image)
    qcow2(image)
    with pytest.raises(
        ConfigDiffers, match="it was raw when it was opened before, and its bytes say qcow2 now"
    ) as refused:
        opened(image)
    assert "give the format" in (refused.value.remedy or "")
    assert opened(image, DiskFormat.QCOW2) is DiskFormat.QCOW2


def test_a_raw_disk_in_the_place_of_another_image_is_refused_with_both(opened: Opener, tmp_path: Path) -> None:
    path = qcow2(tmp_path / "disk.img", "1M")
    opened(path)
    path.write_bytes(bytes(SIZE))
    with pytest.raises(ConfigDiffers, match="it was qcow2 when it was opened before, and its bytes say raw now"):
        opened(path)


def test_where_files_have_no_birth_bytes_that_differ_are_refused(
    opened: Opener, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next file may have the inode of one that was removed, so neither memory nor bytes are believed."""
    monkeypatch.setattr("utilityvm.machine.fileid._birth_ns", lambda fd: None)
    monkeypatch.setattr("utilityvm.machine.fileid._handle", lambda fd: None)
    assert opened(image) is opened(image) is DiskFormat.RAW
    write_as_guest(image, qcow2(tmp_path / "evil").read_bytes())
    with pytest.raises(ConfigDiffers, match=r"it was raw .*, and its bytes say qcow2 now"):
        opened(image)
    assert opened(image, DiskFormat.RAW) is DiskFormat.RAW


def test_what_is_refused_is_not_remembered(opened: Opener, image: Path, memory: FormatMemory) -> None:
    write_as_guest(image, b"\x1f\x8b\x08")
    with pytest.raises(ImageDamaged):
        opened(image)
    fd = os.open(image, os.O_RDONLY)
    try:
        assert memory.recall(FileId.of(fd)) is None
    finally:
        os.close(fd)


def gpt(image: Path, sector: int) -> None:
    import struct
    import zlib

    header = bytearray(struct.pack("<8sIIIIQ", b"EFI PART", 0x10000, 92, 0, 0, 1).ljust(92, b"\0"))
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    with image.open("r+b") as file:
        file.seek(sector)
        file.write(header)


def test_a_partition_table_of_4096_byte_sectors_is_named_with_its_remedy(image: Path) -> None:
    gpt(image, 4096)
    with pytest.raises(InvalidRequest, match="counts in sectors of 4096 bytes") as refused:
        open_disk(DiskRequest(host_path=str(image), read_only=True))
    assert "--sector-size 4096" in (refused.value.remedy or "")
    for size in (512, 4096):
        disk = open_disk(DiskRequest(host_path=str(image), read_only=True, sector_size_bytes=size))
        disk.close()
        assert disk.logical_block_bytes == size


def test_a_table_of_512_byte_sectors_counts_where_there_are_both(image: Path) -> None:
    for sector in (512, 4096):
        gpt(image, sector)
    disk = open_disk(DiskRequest(host_path=str(image), read_only=True))
    disk.close()
    assert disk.logical_block_bytes is None


@pytest.mark.parametrize("damage", [4096, 4096 + 24, 4096 + 91])
def test_what_is_no_header_of_a_table_is_data(image: Path, damage: int) -> None:
    gpt(image, 4096)
    with image.open("r+b") as file:
        file.seek(damage)
        file.write(b"x")
    open_disk(DiskRequest(host_path=str(image), read_only=True)).close()


def test_an_image_of_half_a_sector_is_refused_with_its_size(image: Path) -> None:
    os.truncate(image, SIZE + 512)
    with pytest.raises(InvalidRequest, match=f"has {SIZE + 512} bytes, which are not whole sectors of 4096"):
        open_disk(DiskRequest(host_path=str(image), read_only=True, sector_size_bytes=4096))


@pytest.mark.parametrize("size", [0, 1, 513, 1024, 8192, -512])
def test_other_sectors_than_disks_have_are_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match="a disk has 512 or 4096"):
        DiskRequest(host_path="a", read_only=True, sector_size_bytes=size)
