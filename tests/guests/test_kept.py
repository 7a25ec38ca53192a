"""Kept programs as the host has them: our real agent, the bridge between, and connections and owners that break."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from guest_end import FakeSerialPort
from utilityvm.agent import serve
from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    ProgramNotFound,
    ProtocolError,
    VMGone,
    WrongState,
)
from utilityvm.guests import answers, streams
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.guests.follow import Following
from utilityvm.guests.kept import Program
from utilityvm.guests.program import Limits
from utilityvm.guests.streams import ProgramInput, ProgramOutput

from .conftest import StartAgent

PATIENCE_S = 20.0
COUNTED = b"".join(b"%07d\n" % number for number in range(60_000))  # 480,000 bytes: more than a window


async def start(guest: BridgeGuest, *command: str, **settings: Any) -> Program:
    return await guest.kept.start(
        command,
        **{
            "stdin": False, "env": None, "cwd": None, "user": None, "limits": None, "name": None, "id": None,
            "follow": True, "ring_bytes": 1 << 20, "timeout_s": PATIENCE_S, **settings,
        },
    )  # fmt: skip


async def get(guest: BridgeGuest, number: int | str, **settings: Any) -> Program:
    return await guest.kept.get(
        number, **{"stdout": 0, "stderr": 0, "follow": True, "timeout_s": PATIENCE_S, **settings}
    )


@pytest_asyncio.fixture
async def guest(port: FakeSerialPort, start_agent: StartAgent) -> AsyncGenerator[BridgeGuest]:
    """Our host end, connected to our agent; what it keeps is ended."""
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S, vm="one")
    yield guest
    await guest.close()
    last = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    for info in await last.kept.list():
        await last.kept.kill(info.number, timeout_s=PATIENCE_S)
    await last.close()


async def test_a_program_is_used_like_one_of_asyncio(guest: BridgeGuest) -> None:
    program = await start(guest, "sh", "-c", "echo out; echo err >&2; read line; echo got $line; exit 3", stdin=True)
    assert (program.number, program.returncode) == (1, None)
    assert await program.stdout.readline() == b"out\n"
    assert program.stdin is not None
    program.stdin.write(b"a line\n")
    await program.stdin.drain()
    assert [line async for line in program.stdout] == [b"got a line\n"]
    assert await program.stderr.read() == b"err\n"
    assert await program.wait() == 3
    assert program.returncode == 3
    assert program.stdout.at_eof()
    assert (program.stdout.offset, program.stdout.lost) == (15, 0)


async def test_communicate_gives_all_input_and_takes_all_output(guest: BridgeGuest) -> None:
    """More than any window or ring, both ways."""
    data = os.urandom(3 << 20)
    program = await start(guest, "cat", stdin=True)
    assert await program.communicate(data, timeout_s=PATIENCE_S) == (data, b"")
    assert program.returncode == 0


async def test_an_owner_that_died_is_followed_without_a_byte_lost_or_repeated(
    guest: BridgeGuest, port: FakeSerialPort, tmp_path: Path
) -> None:
    script = "seq -f %07.0f 0 29999; until [ -e go ]; do sleep 0.01; done; seq -f %07.0f 30000 59999"
    program = await start(guest, "sh", "-c", script, cwd=str(tmp_path))
    first = await program.stdout.readexactly(100_000)
    await guest.close()  # as when the process is killed: nothing is said to the guest
    with pytest.raises(VMGone):
        await program.stdout.read()  # what had come to it, and then the error
    (tmp_path / "go").touch()
    other = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    found = await get(other, program.number, stdout=len(first))
    rest = await found.stdout.read()
    assert first + rest == COUNTED
    assert (await found.wait(), found.stdout.lost) == (0, 0)
    await other.close()


async def test_after_a_connection_that_broke_both_directions_go_on_by_themselves(
    guest: BridgeGuest, port: FakeSerialPort
) -> None:
    data = os.urandom(700_000)
    program = await start(guest, "cat", stdin=True)
    assert program.stdin is not None
    program.stdin.write(data)
    got = bytearray()
    for place in range(50_000, len(data), 50_000):
        got += await program.stdout.readexactly(place - len(got))
        if place % 200_000 == 0:
            await guest.hang_up()
    program.stdin.close()
    got += await program.stdout.read()
    assert bytes(got) == data
    assert await program.wait() == 0


async def test_the_next_owner_goes_on_with_the_input(guest: BridgeGuest, port: FakeSerialPort) -> None:
    program = await start(guest, "cat", stdin=True)
    assert program.stdin is not None
    program.stdin.write(b"one ")
    assert await program.stdout.readexactly(4) == b"one "
    await guest.close()
    other = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    found = await get(other, program.number, stdout=4)
    assert await found.communicate(b"two") == (b"two", b"")
    await other.close()


async def test_a_second_handle_reads_as_well_and_does_not_write(guest: BridgeGuest) -> None:
    program = await start(guest, "cat", stdin=True)
    other = await get(guest, program.number)
    assert program.stdin is not None
    assert other.stdin is not None
    with pytest.raises(GuestBusy, match="another handle"):
        other.stdin.write(b"no")
    await program.communicate(b"both")
    assert await other.stdout.read() == b"both"


async def test_wait_needs_nobody_to_read_and_nobody_to_follow(guest: BridgeGuest) -> None:
    read = await start(guest, "sh", "-c", "seq 1 50000; exit 4")
    assert await read.wait(timeout_s=PATIENCE_S) == 4
    assert len(await read.stdout.read()) == 288_894
    alone = await start(guest, "sh", "-c", "head -c 3000000 /dev/zero; exit 5", follow=False)
    assert await alone.wait(timeout_s=PATIENCE_S) == 5
    with pytest.raises(WrongState, match="is not followed"):
        await alone.communicate()


async def test_a_killed_program_is_waited_for_also_if_nobody_reads_it(guest: BridgeGuest, tmp_path: Path) -> None:
    script = "setsid sh -c 'echo $$ > pid; exec sleep 1000' > /dev/null 2>&1 & until [ -s pid ]; do :; done; exec yes"
    program = await start(guest, "sh", "-c", script, cwd=str(tmp_path))
    await program.stdout.readline()
    await program.kill()
    assert await program.wait(timeout_s=PATIENCE_S) == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        _look(pid)
    await program.kill()  # once more is no error


def _look(pid: int) -> None:
    state = Path(f"/proc/{pid}/stat")
    if not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z":
        raise ProcessLookupError


async def test_a_signal_reaches_a_program_and_not_one_that_has_ended(guest: BridgeGuest) -> None:
    program = await start(guest, "sh", "-c", "trap 'exit 6' TERM; echo ready; while :; do sleep 0.01; done")
    await program.stdout.readline()
    await program.terminate()
    assert await program.wait(timeout_s=PATIENCE_S) == 6
    with pytest.raises(WrongState, match="has ended"):
        await program.send_signal(signal.SIGTERM)
    with pytest.raises(InvalidRequest, match="no signal"):
        await program.send_signal(0)


async def test_a_program_that_nobody_follows_loses_its_oldest_output_and_says_how_much(guest: BridgeGuest) -> None:
    program = await start(guest, "seq", "-f", "%07.0f", "0", "59999", follow=False, ring_bytes=65536)
    await program.wait(timeout_s=PATIENCE_S)
    found = await get(guest, program.number)
    rest = await found.stdout.read()
    assert COUNTED.endswith(rest)
    assert found.stdout.lost == len(COUNTED) - len(rest)
    assert found.stdout.offset == len(COUNTED)
    assert 30_000 < len(rest) <= 65536


async def test_one_that_stops_following_lets_it_go_on(guest: BridgeGuest) -> None:
    program = await start(guest, "sh", "-c", "head -c 8000000 /dev/zero; echo done >&2", ring_bytes=65536)
    assert await program.stdout.read(1) == b"\0"
    await program.stop_following()
    assert await program.wait(timeout_s=PATIENCE_S) == 0
    assert len(await program.stdout.read()) < 8_000_000  # what had come


async def test_both_streams_come_in_their_order(guest: BridgeGuest, tmp_path: Path) -> None:
    script = "echo a; sleep 0.1; echo b >&2; sleep 0.1; echo c"
    program = await start(guest, "sh", "-c", script, follow=False)
    pieces = await guest.kept.follow(program.number, stdout=0, stderr=0, hold=True, live=True, timeout_s=PATIENCE_S)
    found = [(piece.stream, piece.offset, piece.data) async for piece in pieces]
    assert found == [("stdout", 0, b"a\n"), ("stderr", 0, b"b\n"), ("stdout", 2, b"c\n")]
    assert (pieces.exit_code, pieces.stdout_offset, pieces.stderr_offset) == (0, 4, 2)


async def test_what_there_is_now_ends_also_while_the_program_runs(guest: BridgeGuest) -> None:
    program = await start(guest, "sh", "-c", "echo a; exec sleep 1000")
    await program.stdout.readline()
    pieces = await guest.kept.follow(program.number, stdout=0, stderr=0, hold=False, live=False, timeout_s=PATIENCE_S)
    assert [piece.data async for piece in pieces] == [b"a\n"]
    assert pieces.exit_code is None


async def test_a_piece_that_was_not_finished_with_is_kept_for_the_next_one(guest: BridgeGuest) -> None:
    program = await start(guest, "sh", "-c", "head -c 4000000 /dev/zero", follow=False, ring_bytes=65536)
    pieces = await guest.kept.follow(program.number, stdout=0, stderr=0, hold=True, live=True, timeout_s=PATIENCE_S)
    taken = 0
    async for piece in pieces:
        taken = piece.offset + len(piece.data)
        break
    (info,) = await guest.kept.list()
    assert info.stdout_begin <= taken  # nothing after it was dropped
    await pieces.aclose()


async def test_programs_are_listed_and_found_by_number_name_and_id(guest: BridgeGuest) -> None:
    await start(guest, "sleep", "1000", name="web", id="abc", limits=None)
    await (await start(guest, "sh", "-c", "exit 9")).wait()
    first, second = await guest.kept.list()
    assert (first.number, first.name, first.id, first.command) == (1, "web", "abc", ("sleep", "1000"))
    assert first.is_running
    assert (second.exit_code, second.is_running) == (9, False)
    assert second.ended is not None
    assert second.ended >= second.started > 1e9
    for which in (1, "web", "abc"):
        assert (await get(guest, which, follow=False)).number == 1
    for which in (3, "1", "no"):
        with pytest.raises(ProgramNotFound):
            await get(guest, which)
    await guest.kept.forget(2, timeout_s=PATIENCE_S)
    assert [info.number for info in await guest.kept.list()] == [1]
    with pytest.raises(WrongState, match="runs"):
        await guest.kept.forget(1, timeout_s=PATIENCE_S)
    with pytest.raises(ProgramNotFound):
        await guest.kept.kill(2, timeout_s=PATIENCE_S)


async def test_a_second_start_of_an_id_starts_nothing(guest: BridgeGuest, tmp_path: Path) -> None:
    command = ("sh", "-c", "echo x >> started; exec sleep 1000")
    first = await start(guest, *command, cwd=str(tmp_path), id="request1")
    second = await start(guest, *command, cwd=str(tmp_path), id="request1")
    assert first.number == second.number
    while not (tmp_path / "started").exists():
        await asyncio.sleep(0)
    assert len(await guest.kept.list()) == 1


async def test_an_answer_that_was_lost_with_the_connection_starts_one_program(
    guest: BridgeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BridgeClient.request
    cut: list[dict[str, Any]] = []

    async def lose(client: BridgeClient, kind: int, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        answer = await request(client, kind, body, timeout_s=timeout_s)
        if kind == messages.START and not cut:
            cut.append(answer)
            client.end(VMGone("cut"))
            raise VMGone("cut")
        return answer

    monkeypatch.setattr(BridgeClient, "request", lose)
    program = await start(guest, "sh", "-c", "echo once; exec sleep 1000")
    assert await program.stdout.readline() == b"once\n"
    assert len(await guest.kept.list()) == 1
    assert cut


async def test_a_program_that_ended_with_its_agent_is_not_found(guest: BridgeGuest, start_agent: StartAgent) -> None:
    program = await start(guest, "sleep", "1000")
    await start_agent()  # init ends the programs first; this imitation does not
    await guest.hang_up()
    with pytest.raises(ProgramNotFound):
        await program.wait(timeout_s=PATIENCE_S)
    with pytest.raises(ProgramNotFound):
        await program.stdout.read()
    os.kill(program.pid or 0, signal.SIGKILL)


async def test_time_that_is_up_leaves_the_program_running(guest: BridgeGuest) -> None:
    program = await start(guest, "sleep", "1000")
    with pytest.raises(DeadlineExceeded, match=r"program 1 did not end within 0\.05 s"):
        await program.wait(timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await program.communicate(timeout_s=0.05)
    assert (await guest.kept.find(1)).is_running


async def test_what_cannot_be_started_is_said_and_not_kept(guest: BridgeGuest) -> None:
    with pytest.raises(GuestRefused, match="no-such-program") as caught:
        await start(guest, "no-such-program")
    assert caught.value.kind == "not_found"
    for settings in ({"user": "no-such-user"}, {"ring_bytes": 1}, {"limits": Limits(pids=0)}, {"id": "a b"}):
        with pytest.raises(InvalidRequest):
            await start(guest, "true", **settings)
    assert await guest.kept.list() == []


@pytest.mark.parametrize("limits", [Limits(memory_bytes=5), Limits(cpus=0), Limits(pids=True), Limits(pids="9")])  # type: ignore[arg-type]
async def test_a_limit_that_cannot_be_is_refused_before_anything_is_sent(guest: BridgeGuest, limits: Limits) -> None:
    with pytest.raises(InvalidRequest, match="is out of range"):
        await guest.run(["true"], limits=limits)


async def test_an_agent_that_is_too_old_is_said_with_what_to_do(
    port: FakeSerialPort, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old agent takes no notice of a user: the program would run as root."""
    monkeypatch.setattr(serve, "VERSION", 2)
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    for call in (
        start(guest, "true"), guest.kept.list(), guest.kept.kill(1, timeout_s=1), guest.run(["true"], user="nobody"),
        guest.run(["true"], limits=Limits(pids=9)),
    ):  # fmt: skip
        with pytest.raises(NotSupported) as caught:
            await call
        assert "uvm image build" in (caught.value.remedy or "")
    assert (await guest.run(["true"])).exit_code == 0
    await guest.close()


async def test_a_run_has_a_user(guest: BridgeGuest) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    assert (await guest.run(["id", "-un"], user="nobody")).stdout == b"nobody\n"
    assert (await guest.run(["id", "-u"], user=4321)).stdout == b"4321\n"


async def test_a_template_is_refused_while_somebody_reads(guest: BridgeGuest) -> None:
    program = await start(guest, "sleep", "1000")
    with pytest.raises(GuestBusy) as caught:
        await guest.quiesce(timeout_s=PATIENCE_S)
    assert caught.value.holders == ("program 1: sleep",)
    await program.stop_following()
    await guest.quiesce(timeout_s=PATIENCE_S)
    await guest.thaw(timeout_s=PATIENCE_S)


# A guest that lies.


class Client:
    """What a follow needs of a connection."""

    def __init__(self) -> None:
        self.gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.said: list[tuple[int, dict[str, Any]]] = []

    def notify(self, kind: int, body: dict[str, Any]) -> None:
        self.said.append((kind, body))


def output(data: bytes, at: int | None, stream: str = "out") -> answers.Output:
    body = {"Process": 1, "Stream": stream, "Data": base64.b64encode(data).decode(), "At": at}
    return answers.read(answers.Output, body)


@pytest.mark.parametrize(
    "said",
    [
        [(b"a", 0), (b"b", 0)],
        [(b"a", None)],
        [(b"a", 4)] + [(bytes(32768), 5 + number * 32768) for number in range(8)],
    ],
)
async def test_output_that_is_repeated_or_too_much_breaks_the_protocol(said: list[tuple[bytes, int | None]]) -> None:
    following = Following(1, Client(), {"out": 0, "err": 0}, ProgramInput())  # type: ignore[arg-type]
    *first, last = said
    for data, at in first:
        following.take(output(data, at))
    with pytest.raises(ProtocolError):
        following.take(output(*last))


async def test_nothing_comes_after_the_end() -> None:
    following = Following(1, Client(), {"out": 0, "err": 0}, ProgramInput())  # type: ignore[arg-type]
    following.take(answers.FollowEnd(process=1, exit_code=0))
    with pytest.raises(ProtocolError, match="has ended"):
        following.take(output(b"a", 0))
    other = Following(2, Client(), {"out": 0, "err": 0}, ProgramInput())  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="another kind"):
        other.take(answers.Exit(process=2, exit_code=0))


async def test_output_in_many_small_pieces_costs_no_more_than_its_window() -> None:
    """A byte of each stream in turn, and nobody takes one."""
    following = Following(1, Client(), {"out": 0, "err": 0}, ProgramInput())  # type: ignore[arg-type]
    for at in range(messages.OUTPUT_WINDOW_BYTES // 2):
        following.take(output(b"o", at))
        following.take(output(b"e", at, "err"))
    assert len(following._pieces) <= 256
    got = {"out": bytearray(), "err": bytearray()}
    while following._pieces:
        piece = await following.next()
        assert piece is not None
        stream, at, data = piece
        assert at == len(got[stream])
        got[stream] += data
    assert got == {"out": b"o" * (1 << 17), "err": b"e" * (1 << 17)}


async def test_output_with_a_gap_before_each_byte_ends_with_an_error() -> None:
    following = Following(1, Client(), {"out": 0, "err": 0}, ProgramInput())  # type: ignore[arg-type]
    for at in range(0, 2 * 4096, 2):
        following.take(output(b"o", at))
    with pytest.raises(ProtocolError, match="more than 4096 pieces"):
        following.take(output(b"o", 20_000))


# The streams.


async def test_lines_are_as_the_program_wrote_them_and_long_ones_come_in_pieces() -> None:
    stream = ProgramOutput()
    await stream._put(0, b"a\n\nb" + bytes(70_000) + b"\nc")
    stream._end()
    lines = [line async for line in stream]
    assert lines[:2] == [b"a\n", b"\n"]
    assert b"".join(lines[2:]) == b"b" + bytes(70_000) + b"\nc"
    assert max(map(len, lines)) <= 65536


async def test_reading_exactly_what_does_not_come_says_what_came() -> None:
    stream = ProgramOutput()
    await stream._put(0, b"abc")
    stream._end()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await stream.readexactly(4)
    assert caught.value.partial == b"abc"
    assert await stream.read(5) == b""


async def test_output_that_nobody_reads_is_not_piled_up_without_end() -> None:
    stream = ProgramOutput()
    putting = asyncio.create_task(stream._put(0, bytes(streams.BUFFER_BYTES)))
    await asyncio.sleep(0)
    assert not putting.done()
    await stream.read(1)
    await putting


async def test_input_is_sent_within_its_window_and_kept_until_the_program_has_taken_it() -> None:
    info = answers.Program(
        number=1, id=answers.Name("x"), started_ms=0, ring_bytes=1, argv=[], out_begin=0, out_end=0, err_begin=0,
        err_end=0,
    )  # fmt: skip
    stdin, sent = ProgramInput(), bytearray()

    def send(body: dict[str, Any]) -> None:
        sent.extend(base64.b64decode(body["Data"]))

    data = os.urandom(messages.INPUT_WINDOW_BYTES + 5000)
    stdin.write(data)
    stdin._begin(answers.Started(program=info, feeds=True), send)
    assert bytes(sent) == data[: messages.INPUT_WINDOW_BYTES]
    stdin._took(1000)
    assert bytes(sent) == data[: messages.INPUT_WINDOW_BYTES + 1000]
    stdin._pause()
    stdin._begin(answers.Started(program=info, feeds=True, taken_at=1000, given_at=40_000), send)  # the rest was lost
    assert bytes(sent[messages.INPUT_WINDOW_BYTES + 1000 :]) == data[40_000 : messages.INPUT_WINDOW_BYTES + 1000]
    stdin.close()
    stdin._took(40_000)
    assert bytes(sent[messages.INPUT_WINDOW_BYTES + 1000 :]) == data[40_000:]
    stdin._took(len(data) - 1)
    waiting = asyncio.create_task(stdin.wait_closed())
    await asyncio.sleep(0)
    assert not waiting.done()
    stdin._took(len(data))
    await waiting
    with pytest.raises(WrongState, match="closed"):
        stdin.write(b"more")


async def test_what_was_taken_may_be_heard_before_the_connection_begins_with_less() -> None:
    """Else the window would stay full for ever: what the program has taken is told once."""
    info = answers.Program(
        number=1, id=answers.Name("x"), started_ms=0, ring_bytes=1, argv=[], out_begin=0, out_end=0, err_begin=0,
        err_end=0,
    )  # fmt: skip
    window, sent = messages.INPUT_WINDOW_BYTES, bytearray()
    stdin = ProgramInput()
    stdin.write(bytes(10))
    stdin._took(50 + window)  # of another host's input, which is in the guest
    stdin._begin(
        answers.Started(program=info, feeds=True, taken_at=50, given_at=50 + window),
        lambda body: sent.extend(base64.b64decode(body["Data"])),
    )
    assert len(sent) == 10


async def test_input_that_somebody_else_has_written_meanwhile_is_not_mixed() -> None:
    info = answers.Program(
        number=1, id=answers.Name("x"), started_ms=0, ring_bytes=1, argv=[], out_begin=0, out_end=0, err_begin=0,
        err_end=0,
    )  # fmt: skip
    stdin = ProgramInput()
    stdin._begin(answers.Started(program=info, feeds=True), lambda _: None)
    stdin.write(b"ab")
    stdin._pause()
    stdin._begin(answers.Started(program=info, feeds=True, taken_at=9, given_at=9), lambda _: None)
    with pytest.raises(WrongState, match="another handle"):
        stdin.write(b"c")
