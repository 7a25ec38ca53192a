"""What the kernel is asked when a disk is mounted, and what is told when it refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

import pytest

from utilityvm.agent import btrfs, mounting
from utilityvm.agent.faults import Fault
from utilityvm.agent.mounting import mount, mount_again, words
from utilityvm.bridge.mount_options import MS_NOATIME, MS_RDONLY

NODE = "/dev/sdb"


class Kernel:
    """Takes mounts, and refuses those that `refuses` says with what it then writes to its log."""

    def __init__(self, log: Path) -> None:
        self._log = log
        log.write_bytes(b"")
        self.asked: list[tuple[str, str, str, int, str]] = []
        self.refuses: list[int] = []  # errnos of the next mounts; 0: it is taken
        self.says: list[tuple[int, str]] = []
        self.unmounted: list[str] = []
        self.known: set[bytes] = {b"errors", b"acl"}
        self.configured: list[tuple[object, bytes, object]] = []

    def mount(self, source: bytes, target: bytes, kind: bytes | None, flags: ctypes.c_ulong, data: bytes | None) -> int:
        self.asked.append(
            (source.decode(), target.decode(), (kind or b"").decode(), flags.value, (data or b"").decode())
        )
        number = self.refuses.pop(0) if self.refuses else 0
        ctypes.set_errno(number)
        return -1 if number else 0

    def umount2(self, target: bytes, flags: int) -> int:
        self.unmounted.append(target.decode())
        return 0

    def syscall(self, number: int, *arguments: object) -> int:
        """fsopen(2) and fsconfig(2), of a driver that knows `known`."""
        if number == 430:
            self._context, self._says = os.pipe()
            return self._context
        context, command, name, value, _ = arguments
        assert context == self._context
        assert isinstance(name, bytes)
        self.configured.append((command, name, value))
        if name in self.known:
            return 0
        os.write(self._says, b"e ext4: Unknown parameter '" + name + b"'\n")
        os.close(self._says)
        return -1

    def records(self, _log: int) -> list[tuple[int, str]]:
        return self.says


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path / "kmsg")
    monkeypatch.setattr(mounting, "_libc", kernel)
    monkeypatch.setattr(mounting, "_KERNEL_LOG", str(tmp_path / "kmsg"))
    monkeypatch.setattr(mounting, "_records", kernel.records)
    return kernel


@pytest.mark.parametrize(
    ("filesystem", "options", "read_only", "asked"),
    [
        ("ext4", [], False, "errors=remount-ro"),
        ("ext3", [], False, "errors=remount-ro"),
        ("ext2", [], False, "errors=remount-ro"),
        ("ext4", [], True, "noload,errors=remount-ro"),
        ("ext4", ["data=journal,noatime"], False, "data=journal,errors=remount-ro"),
        ("ext4", ["errors=continue"], False, "errors=continue"),
        ("ext4", ["errors=panic", "noload"], True, "errors=panic,noload"),
        ("ext4", ["noload"], True, "noload,errors=remount-ro"),
        ("ext4", ['context="u:r,errors=panic,t"'], True, 'context="u:r,errors=panic,t",noload,errors=remount-ro'),
        ("xfs", [], False, ""),
        ("xfs", [], True, "norecovery"),
        ("btrfs", ["compress=zstd"], True, "compress=zstd,rescue=nologreplay"),
        ("vfat", [], True, ""),
    ],
)
def test_an_image_hurts_its_reader_alone_and_a_read_only_one_is_not_written_to(
    kernel: Kernel, filesystem: str, options: list[str], read_only: bool, asked: str
) -> None:
    how = words(options, read_only=read_only)
    mount(NODE, "/data", filesystem, how)
    assert kernel.asked == [(NODE, "/data", filesystem, how.flags, asked)]
    assert bool(how.flags & MS_RDONLY) is read_only


def test_options_are_tried_without_a_device(kernel: Kernel) -> None:
    mounting.check_options("ext4", words(["acl", 'context="a,b"', "noatime"], read_only=False))
    assert kernel.configured == [(0, b"acl", None), (1, b"errors", b"remount-ro")]
    with pytest.raises(Fault, match=r"take the mount option bogus=1: ext4: Unknown parameter 'bogus'") as refused:
        mounting.check_options("ext4", words(["bogus=1"], read_only=False))
    assert "nothing was written" in str(refused.value)
    assert refused.value.remedy
    assert kernel.asked == []


def test_the_kernels_worst_lines_are_told_first(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.refuses = [errno.EINVAL]
    kernel.says = [
        (6, "Btrfs loaded, crc32c=crc32c-generic"),
        (6, "BTRFS: device fsid 1234 devid 1 transid 6 /dev/sdb"),
        (6, "BTRFS info (device sdb): using free space tree"),
        (3, "unrelated: the printer is on fire"),
        (4, "BTRFS warning (device sdb): devid 2 uuid 5678 is missing"),
        (3, "BTRFS error (device sdc): another disk's trouble"),
        (3, "BTRFS error (device sdb): open_ctree failed"),
    ]
    monkeypatch.setattr(btrfs, "introduce_fellows", lambda node: False)
    said = (
        "BTRFS error (device sdb): open_ctree failed; BTRFS error (device sdc): another disk's trouble; BTRFS warning"
    )
    with pytest.raises(Fault, match=re.escape(f"Invalid argument ({said} (device sdb): devid 2 uuid 5678 is missing)")):
        mount(NODE, "/data", "btrfs", words([], read_only=False))


def test_of_equally_bad_lines_those_that_name_the_device_come_first(kernel: Kernel) -> None:
    kernel.refuses = [errno.EINVAL]
    kernel.says = [(6, "XFS started"), (3, "XFS (sdc): not this one"), (3, "XFS (sdb): this one"), (2, "XFS: the end")]
    with pytest.raises(Fault, match=r"Invalid argument \(XFS: the end; XFS \(sdb\): this one; XFS \(sdc\)") as caught:
        mount(NODE, "/data", "xfs", words([], read_only=False))
    assert "started" not in caught.value.message
    assert caught.value.remedy is None


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("XFS (sdb): Filesystem has duplicate UUID 1 - can't mount", "nouuid"),
        ("BTRFS error (device sdb): devid 2 uuid 5 is missing", "attach the other disks of this btrfs first"),
        ("XFS (sdb): Offline file system operation in progress!", "ensure_filesystem=True with reformat=True"),
        ("XFS (sdb): Invalid superblock magic number", "it is another file system"),
        ('EXT4-fs (sdb): Unrecognized mount option "x"', "leave it out"),
        ("EXT4-fs (sdb): error loading journal", "mount it read-only"),
    ],
)
def test_a_cause_that_has_a_remedy_is_told_with_it(kernel: Kernel, line: str, remedy: str) -> None:
    kernel.refuses, kernel.says = [errno.EINVAL], [(6, "sdb: filler")] * 5 + [(3, line)]
    with pytest.raises(Fault) as caught:
        mount(NODE, "/data", "xfs", words([], read_only=False))
    assert line in caught.value.message
    assert caught.value.remedy
    assert remedy in caught.value.remedy


def test_a_btrfs_is_tried_again_when_its_other_disks_were_introduced(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    introduced: list[str] = []

    def introduce(node: str) -> bool:
        introduced.append(node)
        return len(introduced) == 1

    monkeypatch.setattr(btrfs, "introduce_fellows", introduce)
    kernel.refuses = [errno.EINVAL, 0, errno.EINVAL]
    mount(NODE, "/data", "btrfs", words([], read_only=False))
    assert len(kernel.asked) == 2
    with pytest.raises(Fault):
        mount(NODE, "/data", "btrfs", words([], read_only=False))
    assert len(kernel.asked) == 3
    assert introduced == [NODE, NODE]
    kernel.refuses = [errno.EINVAL]
    with pytest.raises(Fault):
        mount(NODE, "/data", "ext4", words([], read_only=False))
    assert len(introduced) == 2


def test_a_file_system_that_an_error_made_read_only_is_mounted_again_as_it_is(kernel: Kernel) -> None:
    how = words(["noatime"], read_only=False)
    kernel.refuses = [errno.EBUSY]
    mount_again(NODE, "/data", "xfs", how)
    assert [asked[3] for asked in kernel.asked] == [MS_NOATIME, MS_NOATIME | MS_RDONLY]
    kernel.refuses = [errno.EBUSY]
    with pytest.raises(Fault):
        mount_again(NODE, "/data", "xfs", words([], read_only=True))
    assert len(kernel.asked) == 3


def test_the_kernels_records_are_read_with_their_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [b"30,1,5,-;info of a facility\n KEY=value\n", BrokenPipeError(), b"3,2,6,-;an error\n", b"nonsense\n"]

    def read(_fd: int, _size: int) -> bytes:
        record = records.pop(0) if records else BlockingIOError()
        if isinstance(record, OSError):
            raise record
        assert isinstance(record, bytes)
        return record

    monkeypatch.setattr("os.read", read)
    assert list(mounting._records(0)) == [(6, "info of a facility"), (3, "an error")]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_to_is_mounted_read_only_and_that_is_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kernel.refuses = [number]
    monkeypatch.setattr(mounting, "is_read_only", lambda target: True)
    notes = mount(NODE, "/data", "ext4", words(["noatime"], read_only=False))
    assert [asked[3:] for asked in kernel.asked] == [
        (MS_NOATIME, "errors=remount-ro"),
        (MS_NOATIME | MS_RDONLY, "noload,errors=remount-ro"),  # and its journal is not replayed
    ]
    (note,) = notes
    assert "/data is mounted read-only" in note
    kernel.refuses, kernel.says = [number], [(4, "EXT4-fs (sdb): odd")]
    assert mount(NODE, "/data", "ext4", words([], read_only=False)) == [
        note,
        "the kernel says of the file system at /data: EXT4-fs (sdb): odd",
    ]


def test_a_mount_that_is_read_only_as_asked_is_nothing_to_tell(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "is_read_only", lambda target: True)
    assert mount(NODE, "/data", "iso9660", words(["ro"], read_only=False)) == []
    kernel.refuses = [errno.EACCES]
    with pytest.raises(Fault):
        mount(NODE, "/data", "iso9660", words([], read_only=True))
    assert len(kernel.asked) == 2


@pytest.mark.parametrize("filesystem", ["proc", "sysfs", "tmpfs"])
def test_what_needs_no_disk_is_not_mounted_from_one(kernel: Kernel, filesystem: str) -> None:
    with pytest.raises(Fault, match="is not a file system on a disk") as caught:
        mount(NODE, "/data", filesystem, words([], read_only=False))
    assert caught.value.kind == "invalid"
    assert not kernel.asked


def test_another_refusal_is_not_tried_read_only(kernel: Kernel) -> None:
    kernel.refuses = [errno.EINVAL]
    with pytest.raises(Fault):
        mount(NODE, "/data", "ext4", words([], read_only=False))
    assert len(kernel.asked) == 1


def test_a_file_system_that_the_kernel_does_not_know_is_told_with_where_to_get_it(kernel: Kernel) -> None:
    kernel.refuses = [errno.ENODEV]
    with pytest.raises(Fault, match="as ntfs3: the guest's kernel knows no such file system") as caught:
        mount(NODE, "/data", "ntfs3", words([], read_only=False))
    assert "uvm image build --kernel" in str(caught.value.remedy)


def test_a_btrfs_that_misses_disks_says_which(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    fellows = {"/dev/sdc": btrfs.Member(b"id", 4, 3)}
    monkeypatch.setattr(btrfs, "member", lambda node: btrfs.Member(b"id", 4, 1))
    monkeypatch.setattr(btrfs, "fellows", lambda node: fellows)
    monkeypatch.setattr(btrfs, "introduce_fellows", lambda node: True)
    kernel.refuses = [errno.EINVAL, errno.EINVAL]
    with pytest.raises(Fault, match=re.escape("4 disks: 2 here (devid 1, 3), 2 missing (devid 2, 4)")) as caught:
        mount(NODE, "/data", "btrfs", words([], read_only=False))
    assert "attach the missing disks" in str(caught.value.remedy)


def test_what_the_kernel_says_of_a_file_system_that_it_mounted_is_a_note(kernel: Kernel) -> None:
    kernel.says = [
        (6, "EXT4-fs (sdb): recovery complete"),
        (6, "EXT4-fs (sdb): mounted filesystem with ordered data mode"),
        (4, "EXT4-fs (sdc): warning: mounting fs with errors, running e2fsck is recommended"),
        (4, "EXT4-fs (sdb): warning: maximal mount count reached, running e2fsck is recommended"),
        (5, "XFS (sdb): Ending recovery (logdev: internal)"),
        (5, "XFS (sdb): Ending clean mount"),
        (3, "EXT4-fs (sdb1): another"),
        (3, "EXT4-fs (sdb): too much"),
    ]
    said = "the kernel says of the file system at /data: "
    assert mount(NODE, "/data", "ext4", words([], read_only=False)) == [
        f"{said}EXT4-fs (sdb): recovery complete",
        f"{said}EXT4-fs (sdb): warning: maximal mount count reached, running e2fsck is recommended",
        f"{said}XFS (sdb): Ending recovery (logdev: internal)",
    ]


def test_a_bind_mount_says_nothing(kernel: Kernel) -> None:
    kernel.says = [(3, "sdb is odd")]
    mounting.bind(NODE, "/data")
    assert kernel.asked[0][3] == 4096
