"""Our host end against peers that answer what they like."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, guest_json
from utilityvm.errors import DeadlineExceeded, GuestRefused, InvalidRequest, ProtocolError, UtilityVMError, VMGone
from utilityvm.guests import bridge_client
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.guests.connection import Streams

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/gcs.json").read_text())
BY_NAME: dict[str, dict[str, Any]] = {message["name"]: message for message in VECTORS["messages"]}
NEGOTIATED = messages.success(Version=4, Capabilities={})
ANSWER_KIND = messages.response_to(messages.NEGOTIATE)


class Peer:
    """The other end of a connection, in the test's hands."""

    def __init__(self, streams: Streams) -> None:
        self.reader, self.writer = streams
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self.raw = b""

    async def receive(self) -> Frame:
        while not self._frames:
            data = await self.reader.read(65536)
            assert data, "the host hung up"
            self.raw += data
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def send(self, kind: int, id: int, body: dict[str, Any]) -> None:
        self.writer.write(encode(kind, id, guest_json(body)))

    def answer(self, frame: Frame, body: dict[str, Any]) -> None:
        self.send(messages.response_to(frame.kind), frame.id, body)

    async def negotiate(self) -> None:
        self.answer(await self.receive(), NEGOTIATED)


Pair = Callable[[], Awaitable[tuple[Streams, Peer]]]


@pytest_asyncio.fixture
async def pair() -> AsyncGenerator[Pair]:
    """Make connections with a peer at the other end."""
    writers: list[asyncio.StreamWriter] = []

    async def make() -> tuple[Streams, Peer]:
        ours, theirs = socket.socketpair()
        streams, others = await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)
        writers.extend((streams[1], others[1]))
        return streams, Peer(others)

    yield make
    for writer in writers:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def negotiated(pair: Pair, **options: Any) -> tuple[BridgeClient, Peer]:
    streams, peer = await pair()
    # A negotiate is sent again if no answer comes soon, as on a busy machine; the peer would take it for a request.
    with patch.object(bridge_client, "_NEGOTIATE_AGAIN_S", (3600.0,)):
        client, _ = await asyncio.gather(BridgeClient.over(streams, timeout_s=20, **options), peer.negotiate())
    return client, peer


def modify() -> dict[str, Any]:
    return messages.modify_request("Remove", "SCSIDevice", {"Lun": 1})


# What is recorded.


async def test_what_we_send_is_what_the_real_host_sends(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    frame = await peer.receive()
    recorded = bytes.fromhex(BY_NAME["modify_remove_scsi_device_request"]["hex"])
    assert (
        peer.raw
        == bytes.fromhex(BY_NAME["negotiate_request"]["hex"])
        + recorded[:8]
        + bytes([frame.id])
        + bytes(7)
        + recorded[16:]
    )
    peer.answer(frame, messages.success())
    assert (await asking)["Result"] == 0
    await client.close()


@pytest.mark.parametrize("message", [m for m in VECTORS["messages"] if m["type"] == "Response(ModifySettings)"])
async def test_a_recorded_response_is_understood(pair: Pair, message: dict[str, Any]) -> None:
    client, peer = await negotiated(pair)
    client._next_id = message["id"]
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    assert (await peer.receive()).id == message["id"]
    peer.writer.write(bytes.fromhex(message["hex"]))
    assert await asking == json.loads(message["body"])
    await client.close()


@pytest.mark.parametrize("stream", VECTORS["host_receives"], ids=lambda stream: stream["name"])
async def test_a_recorded_stream_ends_the_connection_and_all_who_wait(pair: Pair, stream: dict[str, Any]) -> None:
    """After it the connection closes. The request outstanding has the recordings' id."""
    client, peer = await negotiated(pair)
    client._next_id = 0
    client._negotiates.clear()
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    other = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    await peer.receive()
    await peer.receive()
    peer.writer.write(bytes.fromhex(stream["hex"]))
    peer.writer.write_eof()
    reason = await client.gone
    assert stream["rejected"]
    outcomes: list[Any] = await asyncio.gather(asking, other, return_exceptions=True)
    first, second = outcomes
    assert type(second) is type(reason)
    if "accepted" in stream["name"]:
        assert first == {"Result": 0}
    else:
        assert type(first) is type(reason)
    assert type(reason) is (ProtocolError if "close" not in stream["name"] and isinstance(first, Exception) else VMGone)
    await client.close()


# The beginning.


async def test_a_negotiate_is_sent_again_until_it_is_answered_and_late_answers_are_dropped(pair: Pair) -> None:
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    frames = [await peer.receive() for _ in range(3)]
    assert [frame.id for frame in frames] == [0, 1, 2]
    for frame in reversed(frames):
        peer.answer(frame, NEGOTIATED)
    client = await connecting
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    while (frame := await peer.receive()).kind == messages.NEGOTIATE:
        peer.answer(frame, NEGOTIATED)
    peer.answer(frame, messages.success())
    assert (await asking)["Result"] == 0
    await client.close()


@pytest.mark.parametrize("junk", [b"x" * 100, b"\x01\x0b\x10\x20", encode(ANSWER_KIND, 77, b"{}"), bytes(200_000)])
async def test_what_was_meant_for_a_host_before_us_is_skipped(pair: Pair, junk: bytes) -> None:
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    frame = await peer.receive()
    peer.writer.write(junk)
    peer.answer(frame, NEGOTIATED)
    peer.send(0x20100A01, 999, {})  # and from there on every byte counts
    client = await connecting
    assert isinstance(await client.gone, ProtocolError)
    await client.close()


OURS = messages.success(Version=4, Capabilities={messages.EXTENSION: {"Agent": 1}})


async def test_answers_for_a_host_before_us_are_not_taken_for_ours(pair: Pair) -> None:
    """It counted its requests from 0 as well."""
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    negotiate = await peer.receive()
    for id in range(5):
        peer.send(ANSWER_KIND, id, OURS)
        peer.send(0x20100A01, id, messages.success())
        peer.send(messages.response_to(messages.PING), id, messages.success())
        peer.send(messages.RUN_EXIT, 0, {"Process": 1, "ExitCode": 0})
    peer.answer(negotiate, OURS)
    while (ping := await peer.receive()).kind != messages.PING:
        pass
    assert not connecting.done()
    peer.answer(ping, messages.success(ping.body()["ActivityId"]))
    client = await connecting
    asking = asyncio.create_task(client.request(messages.PROBE, messages.request(), timeout_s=20))
    peer.answer(await peer.receive(), messages.success(Right=True))
    assert (await asking)["Right"]
    await client.close()


async def test_an_agent_that_is_started_again_meanwhile_is_negotiated_with_again(pair: Pair) -> None:
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    peer.answer(await peer.receive(), OURS)
    ping = await peer.receive()
    refusal = {"Kind": messages.NOT_NEGOTIATED}
    peer.answer(ping, messages.failure(messages.E_NOT_IMPLEMENTED, "no negotiate", extension=refusal))
    again = await peer.receive()
    assert again.kind == messages.NEGOTIATE
    peer.answer(again, OURS)
    ping = await peer.receive()
    peer.answer(ping, messages.success(ping.body()["ActivityId"]))
    await (await connecting).close()


async def test_a_late_answer_to_a_negotiate_is_nobodys(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    frame = await peer.receive()
    peer.send(ANSWER_KIND, 0, NEGOTIATED)
    peer.send(ANSWER_KIND, frame.id, NEGOTIATED)
    with pytest.raises(ProtocolError, match="waits for no answer"):
        await asking
    await client.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (messages.success(Version=3), "version 3"),
        (messages.success(), "version None"),
        (messages.failure(messages.E_UNSUPPORTED_VERSION, "no version 4"), "no version 4"),
    ],
)
async def test_a_guest_that_cannot_be_understood_is_refused(pair: Pair, answer: dict[str, Any], error: str) -> None:
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    peer.answer(await peer.receive(), answer)
    with pytest.raises(ProtocolError, match=error):
        await connecting
    with contextlib.suppress(ConnectionResetError):
        while await peer.reader.read(65536):
            pass  # it hangs up


async def test_a_guest_that_was_negotiated_with_by_another_is_used(pair: Pair) -> None:
    """Behind a port that stays open when its host goes, the real guest refuses every later negotiate."""
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    refusal = messages.failure(messages.E_NOT_IMPLEMENTED, "bridge: function not supported")
    peer.answer(await peer.receive(), refusal)
    client = await connecting
    assert client.was_negotiated_before
    assert not client.is_ours
    await client.close()


async def test_a_guest_that_hangs_up_at_once_is_gone(pair: Pair) -> None:
    streams, peer = await pair()
    peer.writer.close()
    with pytest.raises(VMGone, match=r"hung up|connection broke"):
        await BridgeClient.over(streams, timeout_s=20)


async def test_a_peer_that_speaks_something_else_is_named_so(pair: Pair) -> None:
    streams, peer = await pair()
    peer.writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ProtocolError) as caught:
        await BridgeClient.over(streams, timeout_s=0.1)
    assert caught.value.message == b"HTTP/1.1 400 Bad Request\r\n\r\n"


async def test_a_silent_peer_is_a_deadline(pair: Pair) -> None:
    streams, _ = await pair()
    with pytest.raises(DeadlineExceeded):
        await BridgeClient.over(streams, timeout_s=0.1)


async def test_a_flood_before_the_answer_is_not_kept(pair: Pair) -> None:
    streams, peer = await pair()
    connecting = asyncio.create_task(BridgeClient.over(streams, timeout_s=20))
    frame = await peer.receive()
    for _ in range(100):
        peer.writer.write(bytes(65536))
        await peer.writer.drain()
    peer.answer(frame, NEGOTIATED)
    client = await connecting
    await client.close()


# What a peer may not do.


@pytest.mark.parametrize(
    ("kind", "id", "error"),
    [
        (messages.response_to(messages.MODIFY), 77, "request 77"),
        (messages.MODIFY, 0, "0x10100a01"),
        (0x40100A01, 0, "0x40100a01"),
        (0x30100201, 0, "0x30100201"),
    ],
)
async def test_what_nobody_waits_for_ends_the_connection(pair: Pair, kind: int, id: int, error: str) -> None:
    client, peer = await negotiated(pair)
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=3600))
    await peer.receive()
    peer.send(kind, id, {})
    with pytest.raises(ProtocolError, match=error):
        await asking
    with pytest.raises(ProtocolError, match=error):
        await client.request(messages.MODIFY, modify(), timeout_s=20)
    await client.close()


async def test_a_second_answer_ends_the_connection(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    frame = await peer.receive()
    peer.answer(frame, messages.success())
    await asking
    peer.answer(frame, messages.success())
    assert "waits for no answer" in str(await client.gone)
    await client.close()


async def test_a_late_answer_is_dropped_and_the_connection_lives(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    with pytest.raises(DeadlineExceeded):
        await client.request(messages.MODIFY, modify(), timeout_s=0.01)
    late = await peer.receive()
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    peer.answer(late, messages.success())
    peer.answer(await peer.receive(), messages.success(Now=True))
    assert (await asking)["Now"] is True
    peer.answer(late, messages.success())  # a second time is once too often
    assert isinstance(await client.gone, ProtocolError)
    await client.close()


async def test_answers_may_come_in_any_order(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    asking = [
        asyncio.create_task(client.request(messages.MODIFY, {**modify(), "N": n}, timeout_s=20)) for n in range(50)
    ]
    frames = [await peer.receive() for _ in asking]
    for frame in reversed(frames):
        peer.answer(frame, messages.success(N=frame.body()["N"]))
    assert [answer["N"] for answer in await asyncio.gather(*asking)] == list(range(50))
    await client.close()


async def test_a_notification_that_our_own_code_trips_over_ends_the_connection(pair: Pair) -> None:
    def trip(kind: int, body: dict[str, Any]) -> None:
        raise KeyError("Process")

    client, peer = await negotiated(pair, on_notify=trip)
    peer.send(messages.RUN_EXIT, 0, {})
    assert isinstance(await client.gone, ProtocolError)
    await client.close()


async def test_a_request_that_fits_no_frame_is_not_sent(pair: Pair) -> None:
    client, peer = await negotiated(pair)
    with pytest.raises(InvalidRequest, match="65536"):
        await client.request(messages.MODIFY, {"a": "x" * 70000}, timeout_s=20)
    asking = asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=20))
    peer.answer(await peer.receive(), messages.success())
    assert (await asking)["Result"] == 0
    await client.close()


async def test_a_guest_that_takes_nothing_does_not_fill_our_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_client, "_MAX_UNSENT_BYTES", 1 << 20)
    monkeypatch.setattr(bridge_client, "_FLUSH_S", 0.01)
    client, _ = await negotiated(pair)
    requests = [client.request(messages.MODIFY, {"a": "x" * 60000}, timeout_s=3600) for _ in range(100)]
    asking = [asyncio.create_task(request) for request in requests]
    done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(GuestRefused, match="stopped taking"):
        await next(iter(done))
    assert waiting
    await client.close()
    assert {type(error) for error in await asyncio.gather(*asking, return_exceptions=True)} == {GuestRefused, VMGone}


streams_of_bytes = st.lists(
    st.binary(max_size=80)
    | st.sampled_from([bytes.fromhex(message["hex"]) for message in VECTORS["messages"]])
    | st.sampled_from([bytes.fromhex(message["hex"])[:30] for message in VECTORS["messages"]])
    | st.builds(
        lambda kind, id: encode(kind, id, b'{"Result":0}'),
        st.sampled_from([0x20100A01, 0x30F00701, 0x20F00101]),
        st.integers(0, 4),
    )
    | st.builds(
        lambda size, id: struct.pack("<IIQ", 0x20100A01, size, id) + b"{}",
        st.integers(0, 15) | st.integers(65530, 65540) | st.just(0xFFFFFFFF),
        st.integers(0, 4),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams_of_bytes)
async def test_whatever_a_peer_sends_everyone_gets_an_answer_or_an_error(pair: Pair, pieces: list[bytes]) -> None:
    client, peer = await negotiated(pair, on_notify=lambda kind, body: None)
    asking = [asyncio.create_task(client.request(messages.MODIFY, modify(), timeout_s=3600)) for _ in range(3)]
    for _ in asking:
        await peer.receive()
    for piece in pieces:
        peer.writer.write(piece)
    peer.writer.write_eof()
    for outcome in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(outcome, dict | UtilityVMError)
    assert isinstance(await client.gone, ProtocolError | VMGone)
    await client.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.permutations(range(6)),
    st.lists(st.integers(1, 200), min_size=1, max_size=20),
    st.sampled_from([b"", b"\xff", struct.pack("<IIQ", 0x20100A01, 3, 1), struct.pack("<IIQ", 0x20100A01, 65537, 1)]),
)
async def test_answers_in_any_order_and_cut_anywhere_reach_who_asked(
    pair: Pair, order: list[int], cuts: list[int], tail: bytes
) -> None:
    client, peer = await negotiated(pair)
    asking = [asyncio.create_task(client.request(messages.MODIFY, {"Which": n}, timeout_s=3600)) for n in range(6)]
    frames = [await peer.receive() for _ in asking]
    stream = b"".join(
        encode(messages.response_to(messages.MODIFY), frames[n].id, guest_json({"Result": 0, **frames[n].body()}))
        for n in order
    )
    cut = itertools.cycle(cuts)
    while stream:
        length = next(cut)
        peer.writer.write(stream[:length])
        stream = stream[length:]
        await asyncio.sleep(0)
    peer.writer.write(tail)
    peer.writer.write_eof()

    assert [answer["Which"] for answer in await asyncio.gather(*asking)] == list(range(6))
    assert isinstance(await client.gone, ProtocolError if len(tail) == 16 else VMGone)
    await client.close()


async def test_hanging_up_after_the_rest_was_sent_is_no_fault(pair: Pair) -> None:
    """The rest goes out after close(), and the transport is gone by the time that we look."""
    client, peer = await negotiated(pair)
    peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(30):
        client.notify(messages.RUN_CREDIT, {"Text": "a" * 30_000})
    reading = asyncio.create_task(peer.reader.read())
    await client.close()
    await client.close()
    await reading
