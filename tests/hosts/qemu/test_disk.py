"""Opening what people give us, and the lock that keeps two VMs from one disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from descriptors import open_files
from loops import loop_devices
from utilityvm.errors import (
    AccessDenied,
    ConfigDiffers,
    DiskInUse,
    ImageDamaged,
    InvalidRequest,
    NotSupported,
    UtilityVMError,
)
from utilityvm.hosts.qemu.disk import Locked, QemuDisk, describe, is_locked_by_a_program, open_disk
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def opened(image: Path) -> Generator[Callable[..., QemuDisk]]:
    disks: list[QemuDisk] = []

    def open_it(path: Path = image, *, read_only: bool = False) -> QemuDisk:
        disks.append(open_disk(DiskRequest(host_path=str(path), read_only=read_only, format=DiskFormat.RAW)))
        return disks[-1]

    yield open_it
    for disk in disks:
        disk.close()


def refusal(path: str | Path, kind: AttachmentType = AttachmentType.VIRTUAL_DISK, **changes: object) -> UtilityVMError:
    before = open_files()
    request = DiskRequest(host_path=str(path), read_only=False, kind=kind, **changes)  # type: ignore[arg-type]
    with pytest.raises(UtilityVMError) as caught:
        open_disk(request)
    assert caught.value.remedy, "every refusal says what to do"
    assert open_files() <= before, "a refusal leaves nothing open"
    return caught.value


def test_size_and_format_are_known(opened: Callable[..., QemuDisk]) -> None:
    disk = opened()
    assert (disk.size_bytes, disk.format) == (SIZE, DiskFormat.RAW)


def test_a_disk_is_the_same_however_its_path_is_spelled(
    image: Path, opened: Callable[..., QemuDisk], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    (tmp_path / "folder").mkdir()
    spellings = [image, tmp_path / "link", tmp_path / "hard", tmp_path / "folder" / ".." / "disk.raw"]
    disks = [opened(path) for path in spellings]
    assert len({(disk.identity, disk.serial) for disk in disks}) == 1
    assert describe(image) == disks[0].identity


def test_another_disk_is_another(opened: Callable[..., QemuDisk], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(SIZE))
    one, other = opened(), opened(tmp_path / "other")
    assert one.identity != other.identity
    assert one.serial != other.serial


def test_paths_that_lead_to_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("missing", "loop", "nowhere", "", "a\0b", "x" * 5000):
            assert isinstance(refusal(f"{tmp_path}/{name}" if name else ""), InvalidRequest)
        for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (tmp_path / "socket", "a socket")):
            assert kind in str(refusal(path))
    assert "a character device" in str(refusal("/dev/zero"))


def test_an_empty_file_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert isinstance(refusal(tmp_path / "empty"), ImageDamaged)


def test_a_file_is_not_a_physical_disk(image: Path) -> None:
    assert "add_scsi" in (refusal(image, AttachmentType.PASS_THRU).remedy or "")


def test_a_physical_disk_has_no_format(image: Path) -> None:
    error = refusal(image, AttachmentType.PASS_THRU, format=DiskFormat.QCOW2)
    assert isinstance(error, ConfigDiffers)


def test_extensible_virtual_disks_are_for_windows() -> None:
    assert isinstance(refusal("evd://type/path", AttachmentType.EXTENSIBLE_VIRTUAL_DISK), NotSupported)


def test_another_format_than_asked_for(image: Path) -> None:
    assert isinstance(refusal(image, format=DiskFormat.QCOW2), ConfigDiffers)


def test_a_file_that_this_user_may_not_open(image: Path) -> None:
    image.chmod(0o400)
    if os.geteuid() != 0:
        assert isinstance(refusal(image), AccessDenied)
        return
    os.seteuid(12345)
    try:
        assert isinstance(refusal(image), AccessDenied)
    finally:
        os.seteuid(0)


def test_a_file_that_cannot_be_written_now(tmp_path: Path) -> None:
    program = Path(shutil.copy("/bin/sleep", tmp_path / "sleep"))
    with subprocess.Popen([program, "1000"]) as running:
        error = refusal(program)
        running.kill()
    assert isinstance(error, NotSupported)
    assert error.remedy == "attach it read-only"


def test_readers_share(opened: Callable[..., QemuDisk]) -> None:
    locked = [opened(read_only=True).open_locked()[0] for _ in range(3)]
    for fd in locked:
        os.close(fd)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_writer_is_alone(opened: Callable[..., QemuDisk], first: bool, second: bool) -> None:
    held, _ = opened(read_only=first).open_locked()
    other = opened(read_only=second)
    before = open_files()
    with pytest.raises(DiskInUse, match="the VM called two"):
        other.open_locked(who_uses={other.identity: "the VM called two"}.get)
    assert open_files() <= before
    os.close(held)
    os.close(other.open_locked()[0])


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_there_are_readers_only(
    opened: Callable[..., QemuDisk], reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(reason, os.strerror(reason))

    reader, writer = opened(read_only=True), opened()
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    fd, locked = reader.open_locked()
    os.close(fd)
    assert locked is Locked.NOWHERE
    with pytest.raises(NotSupported, match="cannot lock files"):
        writer.open_locked()


@pytest.mark.parametrize(
    ("byte", "readers", "writers"),
    [
        (100, False, False),
        (101, True, True),
        (103, True, True),
        (200, True, True),
        (201, False, True),
        (299, False, False),
    ],
)
def test_a_lock_of_qemus_forbids_readers_or_writers(image: Path, byte: int, readers: bool, writers: bool) -> None:
    ours, theirs = os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)
    fcntl.fcntl(theirs, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    assert (is_locked_by_a_program(ours, True), is_locked_by_a_program(ours, False)) == (readers, writers)
    assert not is_locked_by_a_program(theirs, False), "one's own lock forbids nothing"
    os.close(ours)
    os.close(theirs)


def test_the_lock_outlives_the_disk_it_was_taken_from(opened: Callable[..., QemuDisk]) -> None:
    disk = opened()
    held, _ = disk.open_locked()
    disk.close()
    copy = os.dup(held)  # as QEMU has one
    os.close(held)
    with pytest.raises(DiskInUse):
        opened().open_locked()
    os.close(copy)
    os.close(opened().open_locked()[0])


def test_the_rights_of_the_descriptor_are_those_asked_for(opened: Callable[..., QemuDisk]) -> None:
    reader, _ = opened(read_only=True).open_locked()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(reader, b"x")
    os.close(reader)


def test_a_path_that_changes_after_the_open_changes_nothing(
    image: Path, opened: Callable[..., QemuDisk], tmp_path: Path
) -> None:
    disk = opened()
    (tmp_path / "other").write_bytes(bytes(SIZE))
    (tmp_path / "other").rename(image)
    fd, _ = disk.open_locked()
    status = os.fstat(fd)
    assert f"file:{status.st_dev}:{status.st_ino}" == disk.identity != describe(image)
    os.close(fd)


def test_closing_twice_is_closing_once(opened: Callable[..., QemuDisk]) -> None:
    disk = opened()
    disk.close()
    disk.close()


def physical(path: str, *, read_only: bool) -> QemuDisk:
    return open_disk(DiskRequest(host_path=path, read_only=read_only, kind=AttachmentType.PASS_THRU))


def test_a_physical_disk_is_only_read_until_it_is_attached(tmp_path: Path) -> None:
    """A close of one that was open for writing makes udev look at it anew."""
    with loop_devices(tmp_path) as loops:
        disk = physical(loops.attach(loops.file()), read_only=False)
        assert disk.logical_block_bytes == 512
        assert fcntl.fcntl(disk.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        taken, _ = disk.open_locked()
        assert fcntl.fcntl(taken, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        with pytest.raises(OSError, match="busy"):  # nor can the host mount it, or another VM have it
            os.open(disk.request.host_path, os.O_RDONLY | os.O_EXCL)
        os.close(taken)
        os.close(disk.fd)


def test_a_physical_disk_that_the_kernel_has_read_only_is_read(tmp_path: Path) -> None:
    with loop_devices(tmp_path) as loops:
        device = loops.attach(loops.file(), "--read-only")
        with pytest.raises(NotSupported, match="the kernel has this device read-only") as caught:
            physical(device, read_only=False)
        assert "read-only" in str(caught.value.remedy)
        disk = physical(device, read_only=True)
        os.close(disk.open_locked()[0])
        os.close(disk.fd)
