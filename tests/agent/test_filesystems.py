"""Where the agent looks before it calls a device blank."""

from __future__ import annotations

import itertools

import pytest

from utilityvm.agent.filesystems import places_to_read

GIB = 1 << 30


@pytest.mark.parametrize("size", [512, 4096, (1 << 20) - 512, (1 << 20) + 512, 300 << 20, 4 * GIB])
def test_a_device_up_to_4_gib_is_read_whole(size: int) -> None:
    end = 0
    for offset, length in places_to_read(size):
        assert offset == end
        end += length
    assert end == size


@pytest.mark.parametrize("size", [4 * GIB + 512, 5 * GIB, 64 * GIB + 7 * 512, 10 << 40])
def test_of_a_larger_one_both_ends_and_places_between_are(size: int) -> None:
    places = list(places_to_read(size))
    gaps = [after - (offset + length) for (offset, length), (after, _) in itertools.pairwise(places)]
    assert min(gaps) >= 0
    assert max(gaps) <= size // 4096
    assert all(gap == 0 for gap in gaps[:1023] + gaps[-1023:])
    assert sum(places[-1]) == size
    assert sum(length for _, length in places) < 3 * GIB
    assert all(offset % 512 == length % 512 == 0 for offset, length in places)
