"""POSIX access lists, judged by the kernel: it checks, and shows as a mode, what we wrote."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator
from pathlib import Path

import pytest

from utilityvm.hosts.qemu import acl

GROUP, OTHER_GROUP = 4242, 4343


@pytest.fixture
def fd(tmp_path: Path) -> Generator[int]:
    path = tmp_path / "disk"
    path.touch()
    path.chmod(0o640)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        acl.restore(
            descriptor, acl.Before(b"\2\0\0\0" + bytes.fromhex("01000600ffffffff04000400ffffffff20000000ffffffff"), 0)
        )
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODATA):
            pytest.skip("this file system keeps no access lists")
        raise
    yield descriptor
    os.close(descriptor)


def entries(fd: int) -> dict[tuple[int, int], int]:
    attribute = acl._read(fd)
    assert attribute is not None
    return acl._parse(attribute)


def mode(fd: int) -> int:
    return stat.S_IMODE(os.fstat(fd).st_mode)


def test_the_group_gets_the_right_and_nobody_else_more(fd: int) -> None:
    assert acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    found = entries(fd)
    assert found[acl._GROUP, GROUP] == acl.READ | acl.WRITE
    assert found[acl._OWNING_GROUP, acl._NO_ID] == acl.READ
    assert found[acl._OTHER, acl._NO_ID] == 0
    assert mode(fd) == 0o660  # the middle digit is the mask now


def test_the_mask_is_of_those_that_it_caps_and_not_of_the_owner_and_of_others(fd: int) -> None:
    os.fchmod(fd, 0o417)
    assert acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    assert mode(fd) == 0o477, "the owning group's x, and what was granted"
    assert entries(fd)[acl._MASK, acl._NO_ID] == 7
    os.fchmod(fd, 0o407)
    assert acl.grant(fd, OTHER_GROUP, acl.READ)
    assert entries(fd)[acl._MASK, acl._NO_ID] == acl.READ, "of what it held back nothing is given"


def test_what_is_restored_is_as_before(fd: int) -> None:
    before = acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    assert before
    acl.restore(fd, before)
    assert acl._read(fd) is None
    assert mode(fd) == 0o640


def test_restoring_keeps_the_entries_of_others(fd: int) -> None:
    acl.grant(fd, OTHER_GROUP, acl.READ)
    kept = entries(fd)
    before = acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    assert before
    acl.restore(fd, before)
    assert entries(fd) == kept


def test_a_right_that_is_there_is_not_written_again(fd: int) -> None:
    acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    assert acl.grant(fd, GROUP, acl.READ) is None


def test_a_wider_mask_gives_others_nothing_that_it_held_back(fd: int) -> None:
    acl.grant(fd, OTHER_GROUP, acl.READ | acl.WRITE)
    os.fchmod(fd, 0o640)  # the mask is r-- now: the other group cannot write
    acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    found = entries(fd)
    assert found[acl._GROUP, OTHER_GROUP] == acl.READ
    assert found[acl._GROUP, GROUP] == acl.READ | acl.WRITE
    assert found[acl._MASK, acl._NO_ID] == acl.READ | acl.WRITE


def test_a_right_that_the_mask_holds_back_is_given(fd: int) -> None:
    acl.grant(fd, GROUP, acl.READ | acl.WRITE)
    os.fchmod(fd, 0o640)
    assert acl.grant(fd, GROUP, acl.WRITE)
    assert entries(fd)[acl._MASK, acl._NO_ID] & acl.WRITE


def test_a_list_of_an_unknown_version_is_not_touched() -> None:
    with pytest.raises(OSError, match="version 3"):
        acl._parse(b"\3\0\0\0")
