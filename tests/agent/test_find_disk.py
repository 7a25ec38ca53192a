"""The bus as sysfs shows it, on a made-up sysfs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from utilityvm.agent import find_disk
from utilityvm.agent.faults import Fault
from utilityvm.agent.find_disk import Bus

ADDRESS = "0000:00:10.0"


class Sysfs:
    """One controller with a device at LUN 5; `refuses` has the errors of writes to `delete`, then the device goes."""

    def __init__(self, root: Path) -> None:
        self.device = root / "bus/pci/devices" / ADDRESS / "virtio0/host2/target2:0:0/2:0:0:5"
        self.device.mkdir(parents=True)
        self.refuses: list[OSError] = []
        self.bus = Bus([ADDRESS], sysfs=str(root))

    def write(self, path: str, text: str) -> None:
        assert (path, text) == (f"{self.device}/delete", "1")
        if self.refuses:
            raise self.refuses.pop(0)
        shutil.rmtree(self.device)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    sysfs = Sysfs(tmp_path)
    monkeypatch.setattr(find_disk, "write", sysfs.write)
    return sysfs


def test_a_device_is_deleted_and_one_that_is_not_there_is_so_already(sysfs: Sysfs) -> None:
    sysfs.bus.delete(0, 5, time.monotonic())
    assert sysfs.bus.scsi_device(0, 5) is None
    sysfs.bus.delete(0, 5, time.monotonic())


def test_a_device_that_is_just_coming_or_going_is_waited_for(sysfs: Sysfs) -> None:
    sysfs.refuses = [FileNotFoundError(2, "its files are not there yet"), OSError(19, "it is being removed")]
    sysfs.bus.delete(0, 5, time.monotonic() + 20)
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
