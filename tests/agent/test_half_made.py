"""Making file systems that was cut short: it is done again, and nobody else's data is taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from filesystem_devices import MIB, device, digest, make, needs_xfs, soon, write
from utilityvm.agent import content, filesystems, tools
from utilityvm.agent.faults import Fault
from utilityvm.agent.filesystems import is_half_made


@pytest.fixture
def node(tmp_path: Path) -> str:
    """A blank device of 32 MiB."""
    return device(tmp_path / "device")


class Cut(BaseException):
    """The agent is killed, or the power goes."""


def cut_short(node: str, filesystem: str, monkeypatch: pytest.MonkeyPatch, at: int) -> bool:
    """Begin to make it, and end in the write, flush or program with the number `at`. False: it has no such step."""
    left = [at]
    with monkeypatch.context() as patch:
        for owner, name in ((filesystems.os, "pwrite"), (filesystems.os, "fsync"), (tools, "run")):  # type: ignore[attr-defined]
            plain = getattr(owner, name)

            def step(*args: Any, plain: Any = plain) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Cut
                return plain(*args)

            patch.setattr(owner, name, step)
        try:
            make(node, filesystem)
        except Cut:
            return True
    return False


@pytest.mark.parametrize("filesystem", ["ext4"])
def test_a_making_that_was_cut_short_anywhere_is_done_by_the_next_one(
    tmp_path: Path, filesystem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 99):
        node = device(tmp_path / str(at), 320 if filesystem == "xfs" else 32)
        if not cut_short(node, filesystem, monkeypatch, at):
            break
        make(node, filesystem)
        assert content.of(node, soon()).filesystem == filesystem
        assert not is_half_made(node, soon())
        Path(node).unlink()
    assert at > 8


def half_made(node: str, filesystem: str) -> None:
    """As a tool leaves it that was killed when all but its last write was done."""
    make(node, filesystem)
    size = Path(node).stat().st_size
    write(node, *filesystems._mark_of(size))  # type: ignore[misc]
    if filesystem == "ext4":
        write(node, 0, bytes(4096))
    else:
        write(node, 126, b"\1")


@pytest.mark.parametrize("filesystem", ["ext4", pytest.param("xfs", marks=needs_xfs)])
@pytest.mark.parametrize("asked", ["ext4", pytest.param("xfs", marks=needs_xfs)])
def test_what_a_killed_tool_left_is_made_again(tmp_path: Path, filesystem: str, asked: str) -> None:
    node = device(tmp_path / "device", 320)
    half_made(node, filesystem)
    assert is_half_made(node, soon())
    make(node, asked)
    assert content.of(node, soon()).filesystem == asked
    assert not is_half_made(node, soon())


@pytest.mark.parametrize("filesystem", ["ext4", pytest.param("xfs", marks=needs_xfs)])
def test_a_half_made_one_that_is_used_is_not_written_to(tmp_path: Path, filesystem: str) -> None:
    node = device(tmp_path / "device", 320)
    half_made(node, filesystem)
    before = digest(node)
    with pytest.raises(Fault, match="in use"):
        make(node, users=("somebody",))
    assert digest(node) == before


@pytest.mark.parametrize(
    ("offset", "sign"),
    [(0, b"LUKS\xba\xbe"), (536, b"LVM2 001"), (4086, b"SWAPSPACE2"), (65600, b"_BHRfS_M"), (4000, b"x")],
)
def test_what_somebody_made_of_a_half_made_device_is_kept(node: str, offset: int, sign: bytes) -> None:
    half_made(node, "ext4")
    write(node, offset, sign)
    before = digest(node)
    assert not is_half_made(node, soon())
    with pytest.raises(Fault, match="not blank"):
        make(node)
    assert digest(node) == before


def test_a_mark_from_when_the_device_was_smaller_is_none(node: str) -> None:
    half_made(node, "ext4")
    with Path(node).open("r+b") as file:
        file.truncate(64 * MIB)
    with pytest.raises(Fault, match="not blank"):
        make(node)


@pytest.mark.parametrize("used", [False, True])
def test_a_whole_one_whose_mark_was_left_stays_as_it_is_and_loses_the_mark(
    node: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(node)
    before = digest(node)
    place, mark = filesystems._mark_of(32 * MIB) or (0, b"")
    write(node, place, mark)
    if used:
        opened = filesystems.os.open  # type: ignore[attr-defined]

        def busy(path: str, flags: int) -> int:
            if flags & filesystems.os.O_EXCL:  # type: ignore[attr-defined]
                raise OSError(16, "Device or resource busy")
            return int(opened(path, flags))

        monkeypatch.setattr("os.open", busy)
    make(node)
    assert (digest(node) == before) is not used


@needs_xfs
def test_an_xfs_whose_mark_was_left_is_checked_and_is_not_mounted_before(tmp_path: Path) -> None:
    """Its tool writes the superblock before the rest is on the disk for certain."""
    node = device(tmp_path / "device", 320)
    make(node, "xfs")
    filesystems.refuse_unfinished(node, "xfs")
    write(node, *filesystems._mark_of(320 * MIB))  # type: ignore[misc]
    filesystems.refuse_unfinished(node, "ext4")
    with pytest.raises(Fault, match="cut short") as caught:
        filesystems.refuse_unfinished(node, "xfs")
    assert "ensure_filesystem" in str(caught.value.remedy)
    write(node, 512, bytes(4096))  # the first group's own blocks
    before = digest(node)
    with pytest.raises(Fault, match="it is not whole") as caught:
        make(node, "xfs")
    assert digest(node) == before
    assert "reformat" in str(caught.value.remedy)
    make(node, "xfs", reformat=True)
    write(node, *filesystems._mark_of(320 * MIB))  # type: ignore[misc]
    make(node, "xfs")
    filesystems.refuse_unfinished(node, "xfs")


@pytest.mark.parametrize(
    ("filesystem", "mib"),
    [
        *(("ext4", mib) for mib in (2, 9, 33, 128, 257)),
        *(pytest.param("xfs", mib, marks=needs_xfs) for mib in (300, 513)),
    ],
)
@pytest.mark.parametrize("odd_kib", [0, 4, 520])
def test_no_tool_writes_where_the_mark_is(
    tmp_path: Path, filesystem: str, mib: int, odd_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = device(tmp_path / "device", mib)
    with Path(node).open("r+b") as file:
        file.truncate(mib * MIB + odd_kib * 1024)
    found: list[bool] = []
    plain = filesystems._unmark

    def unmark(fd: int) -> None:
        found.append(filesystems._is_marked(fd))
        plain(fd)

    monkeypatch.setattr(filesystems, "_unmark", unmark)
    make(node, filesystem)
    assert found == [True]


def test_a_device_too_small_for_a_mark_is_made_without(tmp_path: Path) -> None:
    node = device(tmp_path / "device", 1)
    make(node)
    assert content.of(node, soon()).filesystem == "ext4"
