"""The bus as sysfs shows it, on a made-up sysfs."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from utilityvm.agent import find_disk, inquiry
from utilityvm.agent.faults import Fault
from utilityvm.agent.find_disk import Bus, Device
from utilityvm.hosts.qemu import blockdev

ADDRESS = "0000:00:10.0"


class Sysfs:
    """One controller with a disk at LUN 5, and a device for it.

    Writes to `delete` raise what is in `refuses`, and then the device goes; `next` comes in its place, if there is one.
    """

    def __init__(self, root: Path) -> None:
        self.device = root / "bus/pci/devices" / ADDRESS / "virtio0/host2/target2:0:0/2:0:0:5"
        self.refuses: list[OSError] = []
        self.deleted: list[str] = []  # revisions
        self.next: str | None = None
        self.told: str | None = "u001"  # what the disk says that is on the bus
        self.bus = Bus([ADDRESS], sysfs=str(root), dev="/dev")
        self.come("u001")

    def come(self, revision: str) -> None:
        """The kernel makes a device, of a disk that said that of itself."""
        (self.device / "block/sda").mkdir(parents=True)
        (self.device / "block/sda/dev").write_text("8:0")
        (self.device / "rev").write_text(f"{revision}\n")

    def write(self, path: str, text: str) -> None:
        assert (path, text) == (f"{self.device}/delete", "1")
        if self.refuses:
            raise self.refuses.pop(0)
        self.deleted.append((self.device / "rev").read_text().strip())
        shutil.rmtree(self.device)
        if self.next:
            self.come(self.next)

    def inquire(self, node: str) -> str | None:
        assert node == "/dev/sda"
        return self.told


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    sysfs = Sysfs(tmp_path)
    monkeypatch.setattr(find_disk, "write", sysfs.write)
    monkeypatch.setattr(find_disk, "_opens", lambda disk: True)
    monkeypatch.setattr(inquiry, "revision", sysfs.inquire)
    return sysfs


def soon() -> float:
    return time.monotonic() + 20


def test_a_device_is_deleted_and_one_that_is_not_there_is_so_already(sysfs: Sysfs) -> None:
    sysfs.bus.delete(0, 5, time.monotonic())
    assert sysfs.bus.scsi_device(0, 5) is None
    sysfs.bus.delete(0, 5, time.monotonic())


def test_a_device_that_is_just_coming_or_going_is_waited_for(sysfs: Sysfs) -> None:
    sysfs.refuses = [FileNotFoundError(2, "its files are not there yet"), OSError(19, "it is being removed")]
    sysfs.bus.delete(0, 5, soon())
    assert not sysfs.refuses
    assert sysfs.bus.scsi_device(0, 5) is None


def test_a_device_that_does_not_go_is_a_fault(sysfs: Sysfs) -> None:
    sysfs.refuses = [FileNotFoundError(2, "never")] * 100
    with pytest.raises(Fault, match="did not let go of the disk at 0:5") as caught:
        sysfs.bus.delete(0, 5, time.monotonic())
    assert caught.value.kind == "timeout"


def test_another_error_is_told(sysfs: Sysfs) -> None:
    sysfs.refuses = [PermissionError(13, "no")]
    with pytest.raises(PermissionError):
        sysfs.bus.delete(0, 5, time.monotonic())
    assert sysfs.device.exists()


def test_a_device_of_the_disk_at_the_slot_is_found(sysfs: Sysfs) -> None:
    found = sysfs.bus.wait(0, 5, 0, time.monotonic())
    assert found == Device("sda", "/dev/sda", (8, 0), f"{sysfs.device}/block/sda")
    assert not sysfs.deleted


def test_a_device_of_the_last_disk_at_the_slot_is_never_taken_for_the_next_ones(sysfs: Sysfs) -> None:
    sysfs.told, sysfs.next = "u002", "u002"
    sysfs.bus.wait(0, 5, 0, soon())
    assert sysfs.deleted == ["u001"]


def test_the_next_disks_device_is_waited_for(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the disk up when it comes to the news of it, or when it is told to scan."""
    sysfs.told = "u002"
    scanned = threading.Event()

    def scan(controller: int, lun: int) -> None:
        scanned.set()
        sysfs.come("u002")

    monkeypatch.setattr(sysfs.bus, "scan", scan)
    sysfs.bus.wait(0, 5, 0, soon())
    assert sysfs.deleted == ["u001"]
    assert scanned.is_set()


@pytest.mark.parametrize("told", ["2.5+", "1.0", "", None])
def test_a_disk_that_does_not_say_which_it_is_is_believed_to_be_the_one(sysfs: Sysfs, told: str | None) -> None:
    sysfs.told = told
    sysfs.bus.wait(0, 5, 0, time.monotonic())
    assert not sysfs.deleted


def test_what_is_no_scsi_disk_tells_no_revision(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path("/dev/null")):
        assert inquiry.revision(str(path)) is None


def test_what_our_host_has_disks_say_is_understood() -> None:
    revisions = [blockdev.revision(number) for number in range(2, 2000)]
    assert len(set(revisions)) == len(revisions)
    assert all(len(revision) == 4 and revision.startswith(find_disk._NUMBERED) for revision in revisions)


@pytest.mark.parametrize(
    ("stat", "written"),
    [
        ("   11    2   33   4    0    0    0    0    0   14   18    0    0    0    0    5    9", False),
        ("   11    2   33   4    1    0    0    0    0   14   18    0    0    0    0    5    9", True),
        ("   11    2   33   4    0    1    0    0    0   14   18    0    0    0    0    5    9", True),
        ("   11    2   33   4    0    0    8    0    0   14   18    0    0    0    0    5    9", True),
        ("   11    2   33   4    0    0    0    0    0   14   18    1    0    0    0    5    9", True),
        ("   11    2   33   4    0    0    0    0    0   14   18    0    0    8    0    5    9", True),
    ],
)
def test_a_disk_knows_whether_anything_was_written_or_discarded(sysfs: Sysfs, stat: str, written: bool) -> None:
    (sysfs.device / "block/sda/stat").write_text(f"{stat}\n")
    (sysfs.device / "block/sda/size").write_text("2048\n")
    (sysfs.device / "block/sda/start").write_text("64\n")
    disk = sysfs.bus.wait(0, 5, 0, time.monotonic())
    assert disk.was_written is written
    assert (disk.size_bytes, disk.start_bytes) == (1 << 20, 32768)
