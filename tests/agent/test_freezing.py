from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from guest_end import FakeFilesystems
from utilityvm.agent.faults import Fault
from utilityvm.agent.freezing import Freezer, KernelFilesystems


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
