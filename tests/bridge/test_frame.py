from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.bridge.frame import MAX_SIZE, MIN_SIZE, Decoder, Frame, FrameError, encode, guest_json, host_json

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/gcs.json").read_text())
MESSAGES: list[dict[str, Any]] = VECTORS["messages"]

frames = st.builds(
    Frame, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=300) | st.just(bytes(65520))
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` in pieces, as a connection may deliver it."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["name"])
def test_a_recorded_message_is_decoded(message: dict[str, Any]) -> None:
    (frame,) = Decoder().feed(bytes.fromhex(message["hex"]))
    assert frame.kind == int(message["type_hex"], 16)
    assert frame.id == message["id"]
    assert MIN_SIZE + len(frame.payload) == message["size"]
    assert frame.body() == json.loads(message["body"])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["name"])
def test_each_end_writes_a_message_as_it_was_recorded(message: dict[str, Any]) -> None:
    write = host_json if message["direction"] == "host_to_guest" else guest_json
    body = json.loads(message["body"])
    assert encode(int(message["type_hex"], 16), message["id"], write(body)).hex() == message["hex"]


def test_the_host_escapes_what_go_does_without_html() -> None:
    assert host_json({"a": '&<>"\\\n\u2028\u2029é'}) == rb'{"a":"&<>\"\\\n\u2028\u2029' + "é".encode() + b'"}\n'


def test_the_guest_escapes_what_go_does() -> None:
    assert guest_json({"&": "<>\u2028\u2029"}) == rb'{"\u0026":"\u003c\u003e\u2028\u2029"}'


def test_the_guest_can_answer_with_any_text_that_it_was_sent() -> None:
    text = json.loads('"half a pair: \\ud800, a whole one: \\ud83d\\ude00"')
    assert json.loads(guest_json({"a": text}))["a"] == "half a pair: \ufffd, a whole one: \U0001f600"


@pytest.mark.parametrize("value", ["\ud800", float("nan"), float("inf")])
def test_the_host_sends_only_what_json_can_say(value: object) -> None:
    with pytest.raises(FrameError, match="cannot be sent"):
        host_json({"a": value})


@given(json_values)
def test_both_encodings_mean_the_same(value: object) -> None:
    for data in (host_json({"a": value}), guest_json({"a": value})):
        assert Frame(0, 0, data).body() == {"a": value}


@pytest.mark.parametrize(
    "payload",
    [b"", b"abc", b"[]", b"1", b"null", b'{"a":NaN}', b'{"a":', b"\xff\xfe{\0}\0", b"[" * 60000, b"1" * 60000],
    ids=["nothing", "text", "list", "number", "null", "nan", "cut", "utf-16", "deep", "huge"],
)
def test_a_payload_that_is_no_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError, match="0x10100a01"):
        Frame(0x10100A01, 0, payload).body()


@pytest.mark.parametrize("size", [0, 15, MAX_SIZE + 1, 2**32 - 1])
def test_a_size_out_of_bounds_is_refused_at_once(size: int) -> None:
    decoder = Decoder()
    with pytest.raises(FrameError, match=str(size)):
        list(decoder.feed(b"\x01\x0a\x10\x20" + size.to_bytes(4, "little") + bytes(8)))


@pytest.mark.parametrize("size", [MIN_SIZE, MAX_SIZE])
def test_the_bounds_themselves_are_allowed(size: int) -> None:
    data = encode(1, 2, bytes(size - MIN_SIZE))
    assert len(data) == size
    (frame,) = Decoder().feed(data)
    assert frame == Frame(1, 2, bytes(size - MIN_SIZE))


def test_nothing_larger_than_a_frame_is_sent() -> None:
    with pytest.raises(FrameError, match="65537"):
        encode(1, 2, bytes(MAX_SIZE - MIN_SIZE + 1))


def test_the_frames_before_a_broken_one_are_given() -> None:
    good = encode(1, 2, b"{}")
    given = Decoder().feed(good + good + bytes(16) + good)
    assert [next(given), next(given)] == [Frame(1, 2, b"{}")] * 2
    with pytest.raises(FrameError):
        next(given)


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 200), max_size=60))
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent: list[Frame], sizes: list[int]) -> None:
    decoder = Decoder()
    data = b"".join(encode(*frame) for frame in sent)
    got = [frame for piece in cut(data, sizes) for frame in decoder.feed(piece)]
    assert got == sent
    assert decoder.is_between_frames


@pytest.mark.parametrize("size", [1, 15, 16, 17])
def test_an_unfinished_frame_is_seen(size: int) -> None:
    decoder = Decoder()
    assert list(decoder.feed(encode(1, 2, b"{}")[:size])) == []
    assert not decoder.is_between_frames


@given(st.integers(1, 400).filter(lambda size: not 8 <= size <= 12), st.integers(1, 20), st.lists(st.integers(0, 200)))
def test_a_stream_that_begins_anew_is_found_behind_one_that_was_cut_off(size: int, count: int, cuts: list[int]) -> None:
    """However much of it is there at once: what was cut off could seem to be complete with it."""
    cut_off = encode(7, 7, b'{"a":"' + b"x" * 1000)[:size]
    wanted = [Frame(0x10100B01, id, b"{}") for id in range(count)]
    decoder = Decoder(anew_at=0x10100B01)
    data = cut_off + b"".join(encode(*frame) for frame in wanted)
    # A type that is cut in two is found with its second half.
    assert [frame for piece in cut(data, cuts) for frame in decoder.feed(piece)] == wanted


def test_a_stream_begins_anew_behind_a_broken_frame() -> None:
    decoder = Decoder(anew_at=0x10100B01)
    assert list(decoder.feed(bytes(40) + encode(0x10100B01, 3, b"{}"))) == [Frame(0x10100B01, 3, b"{}")]


def test_no_beginning_is_looked_for_in_an_id() -> None:
    decoder = Decoder(anew_at=0x10100B01)
    frame = Frame(7, 0x10100B01, b"{}")
    assert not list(decoder.feed(encode(*frame)[:-1]))
    assert list(decoder.feed(encode(*frame)[-1:] + encode(*frame))) == [frame, frame]


@given(st.lists(st.builds(Frame, st.just(0x10100A01), st.integers(0, 2**64 - 1), st.just(b'{"a":1}\n')), max_size=5))
def test_looking_for_a_beginning_changes_nothing_in_a_whole_stream(sent: list[Frame]) -> None:
    assert list(Decoder(anew_at=0x10100B01).feed(b"".join(encode(*frame) for frame in sent))) == sent


def test_a_broken_stream_stays_broken() -> None:
    decoder = Decoder()
    for data in (bytes(16), encode(1, 2, b"{}")):
        with pytest.raises(FrameError):
            list(decoder.feed(data))


@given(st.lists(st.binary(max_size=400) | frames.map(lambda frame: encode(*frame)), max_size=20))
def test_any_bytes_are_frames_or_an_error_and_little_is_kept(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        try:
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= MAX_SIZE - MIN_SIZE
        except FrameError:
            decoder = Decoder()
        assert len(decoder._pending) < MAX_SIZE


def test_rejected_streams_do_not_end_between_frames_or_hold_no_object() -> None:
    """The recorded streams that the real host refuses, as far as framing can tell."""
    refused = {}
    for stream in VECTORS["host_receives"]:
        decoder = Decoder()
        try:
            for frame in decoder.feed(bytes.fromhex(stream["hex"])):
                frame.body()
            refused[stream["name"]] = not decoder.is_between_frames
        except FrameError:
            refused[stream["name"]] = True
    assert {name for name, is_refused in refused.items() if is_refused} == {
        "size_below_16",
        "close_in_body",
        "response_not_json",
    }
