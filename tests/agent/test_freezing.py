from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from fake_mounts import FakeMounts
from guest_end import FakeFilesystems
from utilityvm.agent import freezing
from utilityvm.agent.faults import Fault
from utilityvm.agent.freezing import Filesystem, Freezer, KernelFilesystems

_TYPES_ON_DISKS = freezing.types_on_disks


def soon() -> float:
    return time.monotonic() + 20


@pytest.fixture
def filesystems() -> FakeFilesystems:
    """One on a disk, and one in a file of it."""
    filesystems = FakeFilesystems("/data", "/data/inner", "/more")
    filesystems.inside["/data/inner"] = "/data"
    return filesystems


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "run/frozen"


@pytest.fixture
def freezer(filesystems: FakeFilesystems, mark: Path) -> Freezer:
    return Freezer(filesystems, mark=mark)


def test_all_are_frozen_and_thawed_and_one_in_a_file_of_another_never_hangs(
    freezer: Freezer, filesystems: FakeFilesystems
) -> None:
    assert freezer.freeze(soon()) == []
    assert sorted(filesystems.frozen) == ["/data", "/data/inner", "/more"]
    freezer.thaw()
    assert not filesystems.frozen
    assert not filesystems.open_count


def test_what_is_held_back_for_a_device_is_written_out_too(freezer: Freezer, filesystems: FakeFilesystems) -> None:
    freezer.freeze(soon())
    assert filesystems.flushed == ["/data", "/data/inner", "/more"]


def test_one_that_knows_no_freezing_is_written_out_and_told(freezer: Freezer, filesystems: FakeFilesystems) -> None:
    filesystems.cannot_freeze["/more"] = errno.EOPNOTSUPP
    assert freezer.freeze(soon()) == ["/more"]
    assert filesystems.flushed.count("/more") == 2
    freezer.thaw()
    assert not filesystems.frozen


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EIO, "/data cannot be frozen: Input/output error"), (errno.EBUSY, "/data is frozen already, by somebody")],
)
def test_if_one_cannot_be_frozen_none_is(
    freezer: Freezer, filesystems: FakeFilesystems, number: int, said: str
) -> None:
    filesystems.cannot_freeze["/data"] = number
    with pytest.raises(Fault, match=said):
        freezer.freeze(soon())
    assert not filesystems.frozen
    assert not filesystems.open_count


def test_if_it_takes_too_long_none_is_frozen(freezer: Freezer, filesystems: FakeFilesystems) -> None:
    with pytest.raises(Fault, match="/more was the last") as caught:
        freezer.freeze(time.monotonic())
    assert caught.value.kind == "timeout"
    assert not filesystems.frozen


def test_one_that_stays_frozen_is_named_after_the_others_were_thawed(
    freezer: Freezer, filesystems: FakeFilesystems
) -> None:
    freezer.freeze(soon())
    filesystems.cannot_thaw["/data/inner"] = errno.EIO
    with pytest.raises(Fault, match="/data/inner cannot be thawed"):
        freezer.thaw()
    assert filesystems.frozen == ["/data/inner"]
    filesystems.cannot_thaw.clear()
    freezer.thaw()
    assert not filesystems.frozen
    assert not filesystems.open_count


def test_one_that_somebody_else_has_thawed_is_no_fault(freezer: Freezer, filesystems: FakeFilesystems) -> None:
    freezer.freeze(soon())
    filesystems.frozen.remove("/more")
    freezer.thaw()
    assert not filesystems.frozen


def test_an_agent_that_is_started_again_thaws_what_the_one_before_had_frozen(
    freezer: Freezer, filesystems: FakeFilesystems, mark: Path
) -> None:
    freezer.freeze(soon())
    Freezer(filesystems, mark=mark)
    assert not filesystems.frozen


def test_an_agent_that_is_started_leaves_alone_what_somebody_else_has_frozen(
    freezer: Freezer, filesystems: FakeFilesystems, mark: Path
) -> None:
    freezer.freeze(soon())
    freezer.thaw()
    filesystems.frozen.append("/more")
    Freezer(filesystems, mark=mark)
    assert filesystems.frozen == ["/more"]


def test_of_this_machine_those_in_memory_are_never_frozen() -> None:
    paths = [path for filesystem in KernelFilesystems().written() for path in filesystem.paths]
    assert not {"/proc", "/sys", "/dev", "/dev/shm"} & set(paths)


# The kernel's side, on a table of mounts that is imitated.


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMounts:
    kernel = FakeMounts(tmp_path).install(monkeypatch)
    for number, name in enumerate(("sdb", "sdc", "sdd", "sde")):
        kernel.device(name, (8, 16 * number))
    return kernel


def test_what_can_be_written_to_on_a_disk_is_found_once_with_all_its_paths(kernel: FakeMounts) -> None:
    kernel.add("/b", "ext4", "sdb")
    kernel.add("/c", "xfs", "sdc")
    kernel.add("/d", "squashfs", "sdd")
    kernel.add("/e", "vfat", "sde", read_only=True)
    kernel.add("/b2", "ext4", "sdb")
    assert KernelFilesystems().written() == [Filesystem((8, 0), ("/b", "/b2")), Filesystem((8, 16), ("/c",))]


@pytest.fixture
def here(kernel: FakeMounts, tmp_path: Path) -> tuple[int, int]:
    """The number of the file system of this test's folder, in the imitated table."""
    fd = os.open(tmp_path, os.O_RDONLY)
    words = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    os.close(fd)
    kernel.add("/here", "ext4", "sdb").id = int(words[words.index("mnt_id:") + 1])
    kernel._write()
    return 8, 0


def test_a_file_system_is_opened_where_it_is_seen(here: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "locked").symlink_to("locked")
    filesystem = Filesystem(here, (str(tmp_path / "locked"), "/proc", str(tmp_path)))
    before = len([*Path("/proc/self/fd").iterdir()])
    fd = KernelFilesystems().open(filesystem)
    assert os.path.samestat(os.fstat(fd), tmp_path.stat())
    KernelFilesystems().close(fd)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_one_that_other_mounts_hide_is_not_frozen_in_its_place(here: tuple[int, int], tmp_path: Path) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(Fault, match="/none is hidden by another mount"):
        KernelFilesystems().open(Filesystem((8, 16), ("/none", str(tmp_path), "/proc")))
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_the_kernel_is_asked_by_its_own_numbers(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr("fcntl.ioctl", lambda *words: asked.append(words))
    KernelFilesystems().freeze(5)
    KernelFilesystems().thaw(6)
    assert asked == [(5, 0xC0045877, 0), (6, 0xC0045878, 0)]  # _IOWR('X', 119, int) and 120


def test_one_and_all_are_written_out(kernel: FakeMounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelFilesystems().flush(str(tmp_path))
    assert kernel.asked == [f"sync {tmp_path}"]
    monkeypatch.setattr("os.sync", lambda: kernel.asked.append("sync all"))
    KernelFilesystems().flush_all()
    assert kernel.asked[-1] == "sync all"


def test_the_file_systems_of_disks_are_those_that_need_a_device(tmp_path: Path) -> None:
    (tmp_path / "known").write_text("nodev\tsysfs\nnodev\ttmpfs\n\text4\n\tvfat\n")
    assert _TYPES_ON_DISKS(str(tmp_path / "known")) == {"ext4", "vfat"}


# What an agent that died left.


def test_an_agent_thaws_what_it_can_when_it_starts_and_one_hidden_keeps_it_from_nothing(
    freezer: Freezer, filesystems: FakeFilesystems, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystems.inside.clear()
    freezer.freeze(soon())
    opened, count = filesystems.open, filesystems.open_count

    def hidden(filesystem: Filesystem) -> int:
        if filesystem.paths == ("/data",):
            raise Fault("hidden")
        return opened(filesystem)

    monkeypatch.setattr(filesystems, "open", hidden)
    filesystems.cannot_thaw["/data/inner"] = errno.EIO
    Freezer(filesystems, mark=mark)
    assert sorted(filesystems.frozen) == ["/data", "/data/inner"]
    assert filesystems.open_count == count
    assert mark.read_bytes() == b"0"


def test_what_cannot_be_written_out_is_told_and_nothing_stays_frozen(
    freezer: Freezer, filesystems: FakeFilesystems, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    filesystems.cannot_freeze["/data"] = errno.ENOTTY
    monkeypatch.setattr(filesystems, "flush", broken)
    with pytest.raises(Fault, match="what was written to /data does not reach the disk: Input/output error"):
        freezer.freeze(soon())
    assert not filesystems.frozen
    assert not filesystems.open_count


def test_the_mark_says_what_is_so_at_each_moment(freezer: Freezer, filesystems: FakeFilesystems, mark: Path) -> None:
    freezer.freeze(soon())
    assert mark.read_bytes() == b"1"
    assert mark.stat().st_mode & 0o777 == 0o600
    filesystems.cannot_thaw["/more"] = errno.EIO
    with pytest.raises(Fault, match=r"/more cannot be thawed: Input/output error$"):
        freezer.thaw()
    assert mark.read_bytes() == b"1"
    filesystems.cannot_thaw.clear()
    freezer.thaw()
    assert mark.read_bytes() == b"0"
