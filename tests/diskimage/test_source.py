"""The bytes of an image when its storage does not keep its word."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from utilityvm.diskimage.source import Source
from utilityvm.errors import ImageDamaged


def source(pread: Callable[[int, int], bytes], size: int = 100) -> Source:
    return Source(pread, size_bytes=size, name="image")


def test_short_reads_are_put_together() -> None:
    data = bytes(range(100))
    assert source(lambda length, offset: data[offset : offset + min(length, 7)]).read(5, 60, what="it") == data[5:65]


def test_what_lies_behind_the_end_is_not_asked_for() -> None:
    def pread(length: int, offset: int) -> bytes:
        raise AssertionError("read")

    with pytest.raises(ImageDamaged, match="cut short: the table is at 90 to 101, and the file ends at 100"):
        source(pread).read(90, 11, what="the table")
    assert source(pread).read_up_to(100, 10) == b""
    assert source(pread).read_up_to(50, 0) == b""


def test_a_file_that_becomes_shorter_is_damaged() -> None:
    with pytest.raises(ImageDamaged, match="became shorter while the table was read"):
        source(lambda length, offset: b"x" if offset == 90 else b"").read(90, 10, what="the table")


@pytest.mark.parametrize(("size", "end"), [(1, 512), (512, 512), (513, 1024)])
def test_the_end_is_counted_in_whole_sectors(size: int, end: int) -> None:
    assert source(lambda length, offset: b"", size).sectors_end == end
