"""The end of a program's output: what is held, in which order, and what is told of the rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from utilityvm.agent.ring import PIECE_COST, STREAMS, Cursor, Ring

WRITES = st.lists(st.tuples(st.sampled_from(STREAMS), st.binary(min_size=1, max_size=3000)), max_size=60)


def read(ring: Ring, cursor: Cursor, at_most: int = 1 << 20) -> list[tuple[str, int, bytes]]:
    """All that there is for a reader, next pieces of a stream joined."""
    found: list[tuple[str, int, bytes]] = []
    while (next_one := ring.next(cursor, at_most)) is not None:
        stream, offset, data = next_one[0]
        if found and found[-1][0] == stream and found[-1][1] + len(found[-1][2]) == offset:
            found[-1] = stream, found[-1][1], found[-1][2] + data
        else:
            found.append((stream, offset, data))
    return found


def test_both_streams_come_in_the_order_in_which_they_were_written() -> None:
    ring = Ring(4096)
    for stream, data in (("out", b"ab"), ("err", b"c"), ("out", b"d")):
        ring.add(stream, data)
    assert read(ring, Cursor({})) == [("out", 0, b"ab"), ("err", 0, b"c"), ("out", 2, b"d")]


def test_a_reader_goes_on_at_its_offsets() -> None:
    ring = Ring(4096)
    for stream, data in (("out", b"abc"), ("err", b"de"), ("out", b"fg")):
        ring.add(stream, data)
    assert read(ring, Cursor({"out": 4, "err": 1})) == [("err", 1, b"e"), ("out", 4, b"g")]
    assert read(ring, Cursor({"out": 5, "err": 2})) == []


def test_a_piece_that_grows_after_it_was_read_gives_what_is_new() -> None:
    ring, cursor = Ring(4096), Cursor({})
    ring.add("out", b"ab")
    assert read(ring, cursor) == [("out", 0, b"ab")]
    ring.add("out", b"cd")
    ring.add("err", b"e")
    assert read(ring, cursor) == [("out", 2, b"cd"), ("err", 0, b"e")]


def test_what_a_reader_has_not_taken_is_kept_beyond_the_size() -> None:
    ring, cursor = Ring(4096), Cursor({})
    ring.add("out", bytes(2000))
    taken = ring.place_of(cursor)
    ring.add("out", bytes(3000), [taken, ring.end_place])
    assert ring.begins["out"] == 0
    assert ring.room([taken]) == 0
    ring.add("out", b"a")
    assert ring.begins["out"] > 0


@given(WRITES, st.integers(1, 500))
def test_what_is_held_is_the_end_and_no_more_than_its_size(writes: list[tuple[str, bytes]], at_most: int) -> None:
    ring = Ring(8192)
    whole = dict.fromkeys(STREAMS, b"")
    for stream, data in writes:
        ring.add(stream, data)
        whole[stream] += data
    got = dict.fromkeys(STREAMS, b"")
    begins = ring.begins
    for stream, offset, data in read(ring, Cursor({}), at_most):
        assert offset == begins[stream] + len(got[stream])
        got[stream] += data
    for stream in STREAMS:
        assert got[stream] == whole[stream][begins[stream] :]
        assert ring.ends[stream] == len(whole[stream])
    assert sum(map(len, got.values())) <= ring.size
    if sum(map(len, whole.values())) + PIECE_COST * len(writes) <= ring.size // 2:
        assert got == whole


@given(WRITES, st.integers(0, 60))
def test_as_much_as_there_is_room_for_drops_nothing_that_a_reader_lacks(
    writes: list[tuple[str, bytes]], reads_until: int
) -> None:
    ring, cursor = Ring(8192), Cursor({})
    whole, got = dict.fromkeys(STREAMS, b""), dict.fromkeys(STREAMS, b"")
    place = 0
    for number, (stream, data) in enumerate(writes):
        data = data[: ring.room([place])]
        ring.add(stream, data)
        whole[stream] += data
        if number < reads_until and (found := ring.next(cursor, 700)):
            (name, offset, piece), place = found
            assert offset == len(got[name])
            got[name] += piece
    for name, offset, piece in read(ring, cursor):
        assert offset == len(got[name])
        got[name] += piece
    assert got == whole


def test_a_switch_of_streams_with_each_byte_does_not_make_it_large() -> None:
    ring = Ring(8192)
    for _ in range(10_000):
        ring.add("out", b"a")
        ring.add("err", b"b")
    assert len(ring._pieces) <= ring.size // PIECE_COST + 1
