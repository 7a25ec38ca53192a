"""What is asked of a disk, and what of its answer is believed. `tests/real` asks real ones."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from descriptors import open_files
from utilityvm.agent import inquiry

DATA = bytes(8) + b"QEMU    " + b"HARDDISK        " + b"v2.5"
Ioctl = Callable[[int, int, inquiry._SgIoHdr], int]


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = tmp_path / "sda"
    path.touch()
    return str(path)


def answering(data: bytes, **fields: int) -> Ioctl:
    """A disk that answers so, if it is asked as SPC-4 says."""

    def ioctl(fd: int, request: int, header: inquiry._SgIoHdr) -> int:
        assert os.fstat(fd).st_size == 0
        assert request == 0x2285
        assert (header.interface_id, header.dxfer_direction) == (ord("S"), -3)
        command = bytes((ctypes.c_ubyte * header.cmd_len).from_address(header.cmdp))
        assert command == bytes([0x12, 0, 0, 0, 36, 0])
        assert header.dxfer_len == 36
        assert 1000 <= header.timeout <= 30_000
        ctypes.memmove(header.dxferp, data, min(len(data), header.dxfer_len))
        for name, value in fields.items():
            setattr(header, name, value)
        return 0

    return ioctl


@pytest.mark.parametrize(
    ("data", "revision"),
    [(DATA, "v2.5"), (DATA[:-4] + b" 17 ", "17"), (DATA[:-4] + b"3\0\0\0", "3"), (DATA[:-4] + b"\xff123", "�123")],
)
def test_the_revision_is_the_last_four_bytes(
    node: str, monkeypatch: pytest.MonkeyPatch, data: bytes, revision: str
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", answering(data))
    assert inquiry.revision(node) == revision


@pytest.mark.parametrize("fields", [{"status": 2}, {"host_status": 1}])
def test_a_disk_that_refuses_tells_none(node: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, int]) -> None:
    monkeypatch.setattr(fcntl, "ioctl", answering(DATA, **fields))
    assert inquiry.revision(node) is None


def test_what_is_no_disk_tells_none_and_no_file_stays_open(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    assert inquiry.revision(node) is None  # a file has no such ioctl
    assert inquiry.revision(f"{node}-not-there") is None
    monkeypatch.setattr(fcntl, "ioctl", answering(DATA))
    inquiry.revision(node)
    assert open_files() <= before


def test_a_disk_that_does_not_answer_tells_none(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "ioctl", fail)
    assert inquiry.revision(node) is None
