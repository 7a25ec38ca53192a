"""A program as the host sees it, with a guest that lies."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from utilityvm.bridge import messages
from utilityvm.errors import ProtocolError
from utilityvm.guests import program as program_module
from utilityvm.guests.program import GuestProgram, heard

WINDOW = messages.OUTPUT_WINDOW_BYTES


class Program(GuestProgram):
    """Keeps what it said and what it was given."""

    def __init__(self) -> None:
        self.said: list[tuple[int, dict[str, Any]]] = []
        self.got = bytearray()
        super().__init__(
            1, lambda kind, body: self.said.append((kind, body)), stdout=self.got.extend, stderr=self.got.extend
        )

    def hear(self, kind: int, **body: Any) -> None:
        self.take(heard(kind, {"Process": 1, **body}))

    def output(self, data: bytes, stream: str = "out") -> None:
        self.hear(messages.RUN_OUTPUT, Stream=stream, Data=base64.b64encode(data).decode())


async def test_output_is_taken_and_credit_given_back() -> None:
    program = Program()
    program.output(b"ab")
    program.output(b"cd", "err")
    program.hear(messages.RUN_EXIT, ExitCode=-9)
    assert program.has_ended
    assert await program.deliver() == -9
    assert program.got == b"abcd"
    assert program.said == [(messages.RUN_CREDIT, {"Process": 1, "Bytes": 2})] * 2
    assert not program.is_held_back


async def test_a_whole_window_is_kept_and_not_a_byte_more() -> None:
    program = Program()
    program.output(bytes(WINDOW))
    with pytest.raises(ProtocolError, match="more than the 262144 bytes"):
        program.output(b"a")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (messages.RUN_OUTPUT, {}),
        (messages.RUN_OUTPUT, {"Stream": "other", "Data": ""}),
        (messages.RUN_OUTPUT, {"Stream": "out", "Data": "!"}),
        (messages.RUN_OUTPUT, {"Stream": "out", "Data": 7}),
        (messages.RUN_CREDIT, {}),
        (messages.RUN_CREDIT, {"Bytes": "many"}),
        (messages.RUN_EXIT, {"ExitCode": None}),
    ],
)
async def test_what_makes_no_sense_is_a_broken_protocol(kind: int, body: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="makes no sense"):
        Program().hear(kind, **body)


async def test_pieces_that_pile_up_are_joined_and_each_stream_keeps_its_order() -> None:
    program = Program()
    for number in range(1000):
        program.output(b"%d " % number)
        program.output(b"%d " % number, "err")
    assert len(program._output) == program_module._MAX_PIECES
    program.hear(messages.RUN_EXIT, ExitCode=0)
    await program.deliver()
    numbers = [int(word) for word in program.got.split()]
    assert sorted(numbers) == sorted([*range(1000)] * 2)
    assert numbers[:255] == [number for number in range(128) for _ in range(2)][:255]


async def test_no_more_input_is_sent_than_the_guest_allows() -> None:
    program = Program()

    async def endless() -> Any:
        while True:
            yield bytes(100_000)

    feeding = asyncio.create_task(program.feed(endless()))
    await asyncio.sleep(0)

    def sent() -> int:
        return sum(len(base64.b64decode(body["Data"])) for _, body in program.said)

    assert sent() == messages.INPUT_WINDOW_BYTES
    program.hear(messages.RUN_CREDIT, Bytes=10)
    await asyncio.sleep(0)
    assert sent() == messages.INPUT_WINDOW_BYTES + 10
    program.hear(messages.RUN_CREDIT, Bytes=WINDOW)
    program.hear(messages.RUN_CREDIT, Bytes=WINDOW)  # never more than the window, whatever it says
    await asyncio.sleep(0)
    assert sent() == 2 * messages.INPUT_WINDOW_BYTES + 10
    feeding.cancel()
    await asyncio.wait([feeding])


async def test_signals_and_the_end_are_said() -> None:
    program = Program()
    program.signal(15)
    program.cancel()
    assert program.said == [
        (messages.RUN_SIGNAL, {"Process": 1, "Signal": 15}),
        (messages.RUN_CANCEL, {"Process": 1}),
    ]
