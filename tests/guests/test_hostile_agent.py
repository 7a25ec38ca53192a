"""Our host end with an agent that says what it likes: whatever it is, a typed error, in time, and little memory."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, encode, guest_json
from utilityvm.errors import DeadlineExceeded, GuestRefused, InvalidRequest, ProtocolError, UtilityVMError
from utilityvm.guests import bridge_guest, session
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.guests.program import GuestProgram
from utilityvm.scsi.slot import Slot

Answer = dict[str, Any] | bytes | None
Answers = dict[int, Callable[[int, dict[str, Any]], Answer]]
ABOUT = {"Agent": 2, "Kernel": "6.1", "BootId": "b", "UptimeMs": 1}
SLOT, PATH = Slot(0, 1), PurePosixPath("/data")


def frame(kind: int, id: int, body: dict[str, Any]) -> bytes:
    return encode(kind, id, guest_json(body))


class Liar:
    """An agent that answers as it is told to, and everything else with success."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.connections = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        decoder = Decoder()
        while data := await reader.read(65536):
            for one in decoder.feed(data):
                if one.kind & messages.KIND_MASK != messages.REQUEST:
                    continue
                body = one.body()
                answer: Answer = {}
                if one.kind in self.answers:
                    answer = self.answers[one.kind](one.id, body)
                elif one.kind == messages.NEGOTIATE:
                    answer = {"Version": 4, "Capabilities": {"Utilityvm": ABOUT}}
                if isinstance(answer, dict):
                    whole = {"Result": 0, "ActivityId": body.get("ActivityId"), **answer}
                    answer = frame(messages.response_to(one.kind), one.id, whole)
                if answer is not None:
                    writer.write(answer)
        writer.close()


Connect = Callable[[Answers], Awaitable[tuple[BridgeGuest, Liar]]]


@pytest_asyncio.fixture
async def connect(folder: Path) -> AsyncGenerator[Connect]:
    """A guest whose agent lies."""
    guests: list[BridgeGuest] = []
    servers: list[asyncio.Server] = []

    async def connect(answers: Answers) -> tuple[BridgeGuest, Liar]:
        usual: Answers = {messages.RUN: ran(ended(0)), messages.MOUNTS: said(Mounts=[], More=False)}
        liar = Liar(usual | answers)
        path = folder / f"{len(servers)}.sock"
        servers.append(await asyncio.start_unix_server(liar.talk, str(path)))
        guests.append(await BridgeGuest.connect(path, timeout_s=20, vm="one"))
        return guests[-1], liar

    yield connect
    for guest in guests:
        await guest.close()
    for server in servers:
        server.close()


def said(**fields: Any) -> Callable[[int, dict[str, Any]], Answer]:
    return lambda _id, _body: fields


def ran(*notifications: tuple[int, dict[str, Any]]) -> Callable[[int, dict[str, Any]], Answer]:
    """A program is started, and of it so much is told."""

    def answer(id: int, body: dict[str, Any]) -> bytes:
        started = frame(messages.response_to(messages.RUN), id, {"Result": 0})
        about = {"Process": body["Process"]}
        return started + b"".join(frame(kind, 0, {**about, **fields}) for kind, fields in notifications)

    return answer


def output(data: bytes, stream: str = "out") -> tuple[int, dict[str, Any]]:
    return messages.RUN_OUTPUT, {"Stream": stream, "Data": base64.b64encode(data).decode()}


def ended(code: object) -> tuple[int, dict[str, Any]]:
    return messages.RUN_EXIT, {"ExitCode": code}


WRONG: list[object] = [5, -1, 1.5, "a", "", True, [1], [[]], ["x"], {"a": 1}, [{}], [None], 1 << 70]


async def ask_all(guest: BridgeGuest) -> list[UtilityVMError]:
    """Every question that there is; what each raised. Whatever is not typed fails the test."""
    raised = []
    for ask in (
        lambda: guest.probe_mount(SLOT, guest_path=PATH, timeout_s=20),
        lambda: guest.probe_device(SLOT, timeout_s=20),
        lambda: guest.eject(SLOT, timeout_s=20, force=False),
        lambda: guest.mounts(timeout_s=20),
        lambda: guest.info(timeout_s=20),
        lambda: guest.quiesce(timeout_s=20),
        lambda: guest.make_unique(seed=bytes(32), hostname="h", machine_id="a" * 32, timeout_s=20),
        lambda: guest.run(["true"], timeout_s=20),
    ):
        try:
            await ask()
        except UtilityVMError as error:
            raised.append(error)
    assert all(sign.isprintable() or sign in "\n\t" for error in raised for sign in str(error))
    return raised


@pytest.mark.parametrize("value", [5, "a", [1], True], ids=repr)
@pytest.mark.parametrize(
    "about", ["Capabilities", "Utilityvm", "Agent", "BootId", "Kernel", "UptimeMs", "Version", "Result"]
)
async def test_an_agent_that_introduces_itself_wrongly_is_refused(connect: Connect, about: str, value: object) -> None:
    whole: dict[str, Any] = {"Version": 4, "Capabilities": {"Utilityvm": dict(ABOUT)}}
    if about in whole or about == "Result":
        whole[about] = value
    elif about == "Utilityvm":
        whole["Capabilities"][about] = value
    else:
        whole["Capabilities"]["Utilityvm"][about] = value
    if (about, value) in (("Kernel", "a"), ("BootId", "a"), ("Agent", 5), ("UptimeMs", 5)):
        return  # which is right
    with pytest.raises(ProtocolError, match="guest"):
        await connect({messages.NEGOTIATE: lambda _id, _body: whole})


@pytest.mark.parametrize("member", ["Result", "ErrorMessage", "Utilityvm", "Kind", "Holders", "Remedy"])
async def test_an_answer_of_the_wrong_shape_is_a_broken_protocol(connect: Connect, member: str) -> None:
    for value in WRONG:
        if (isinstance(value, str) and member in ("ErrorMessage", "Kind", "Remedy")) or (
            (member, value) in (("Holders", ["x"]), ("Utilityvm", {"a": 1}))
        ):
            continue
        body = {"Result": -2147467259, member: value}
        if member in ("Kind", "Holders", "Remedy"):
            body = {"Result": -2147467259, "Utilityvm": {member: value}}
        guest, _ = await connect({messages.MODIFY: said(**body)})
        with pytest.raises(GuestRefused if member == "Result" and value in (5, -1) else ProtocolError):
            await guest.eject(SLOT, timeout_s=20, force=False)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (messages.PROBE, {"MountPaths": 5}),
        (messages.PROBE, {"MountPaths": ["data"]}),
        (messages.PROBE, {"MountPaths": ["/a\0"]}),
        (messages.PROBE, {"Present": 1}),
        (messages.MOUNTS, {}),
        (messages.MOUNTS, {"Mounts": [], "More": None}),
        (messages.MOUNTS, {"Mounts": [1, 2], "More": True}),
        (messages.MOUNTS, {"Mounts": [{}], "More": False}),
        (messages.MOUNTS, {"Mounts": [{"MountPath": "/a", "Lun": 256}], "More": False}),
        (messages.MOUNTS, {"Mounts": [{"MountPath": "/a\x1b]0;x\x07"}], "More": False}),
        (messages.PROBE, {"MountPaths": ["/a\u202eb"]}),
        (messages.MOUNTS, {"Mounts": [{"MountPath": "/a", "Controller": -1}], "More": False}),
        (messages.QUIESCE, {"Flushed": 5}),
        (messages.QUIESCE, {"Flushed": [5]}),
        (messages.UNIQUE, {"BootId": 5}),
        (messages.UNIQUE, {"BootId": "a b"}),
        (messages.UNIQUE, {"BootId": "a" * 101}),
        (messages.UNIQUE, {"BootId": "\x1b[2J"}),
        (messages.INFO, {"Agent": "2"}),
    ],
)
async def test_an_answer_with_a_wrong_member_is_a_broken_protocol_of_that_request(
    connect: Connect, kind: int, answer: dict[str, Any]
) -> None:
    guest, _ = await connect({kind: said(**answer)})
    raised = await ask_all(guest)
    assert {type(error) for error in raised} == {ProtocolError}
    assert any("makes no sense" in str(error) for error in raised)
    await guest.ping(timeout_s=20)


@pytest.mark.parametrize("code", [256, -65, -200, 1 << 40, -(1 << 70), "0", None, True, 1.0, [0], {}])
async def test_an_exit_code_that_no_program_has_is_refused(connect: Connect, code: object) -> None:
    guest, _ = await connect({messages.RUN: ran(ended(code))})
    with pytest.raises(ProtocolError, match="makes no sense"):
        await guest.run(["true"], timeout_s=20)


@pytest.mark.parametrize("code", [0, 255, -1, -64])
async def test_an_exit_code_that_a_program_can_have_is_taken(connect: Connect, code: int) -> None:
    guest, _ = await connect({messages.RUN: ran(output(b"a"), ended(code))})
    assert (await guest.run(["true"], timeout_s=20)).exit_code == code


@pytest.mark.parametrize(
    "told",
    [
        [ended(0), ended(1)],
        [ended(0), output(b"late")],
        [output(b"")],
        [(messages.RUN_OUTPUT, {"Stream": "other", "Data": "eHg="})],
        [(messages.RUN_OUTPUT, {"Stream": "out", "Data": "eHg"})],
        [(messages.RUN_OUTPUT, {"Stream": "out", "Data": "€"})],
        [(messages.RUN_OUTPUT, {"Data": "eHg="})],
        [(messages.RUN_CREDIT, {"Bytes": 0})],
        [(messages.RUN_CREDIT, {"Bytes": -5})],
        [(messages.RUN_CREDIT, {"Bytes": messages.INPUT_WINDOW_BYTES + 1})],
        [(0x30F0FF01, {})],
        [(messages.RUN_EXIT, {"Process": 99, "ExitCode": 0})],
        [(messages.RUN_EXIT, {"Process": 0, "ExitCode": 0})],
    ],
)
async def test_what_a_program_cannot_say_is_a_broken_protocol(
    connect: Connect, told: list[tuple[int, dict[str, Any]]]
) -> None:
    guest, _ = await connect({messages.RUN: ran(*told)})
    with pytest.raises(ProtocolError):
        await guest.run(["true"], timeout_s=20)
    await guest.ping(timeout_s=20)  # over a new connection


async def test_output_in_many_small_pieces_costs_no_more_than_its_window(connect: Connect) -> None:
    """A byte of each stream in turn, and a caller that takes nothing."""
    count = 20_000
    piece = frame(*_with_id(output(b"a"), 1)) + frame(*_with_id(output(b"b", "err"), 1))

    def answer(id: int, body: dict[str, Any]) -> bytes:
        return frame(messages.response_to(messages.RUN), id, {"Result": 0}) + piece * count

    guest, _ = await connect({messages.RUN: answer})
    has_begun = asyncio.Event()

    async def slow(_: bytes) -> None:
        has_begun.set()
        await asyncio.sleep(3600)

    tracemalloc.start()
    running = asyncio.create_task(guest.run_streaming(["x"], stdout=slow, stderr=slow))
    await has_begun.wait()
    program = guest._programs[1]
    assert isinstance(program, GuestProgram)
    while program._output_size < 2 * count:
        await asyncio.sleep(0)
    assert len(program._output) <= 256
    assert tracemalloc.get_traced_memory()[0] < 4 << 20
    tracemalloc.stop()
    running.cancel()
    await asyncio.wait([running])


def _with_id(told: tuple[int, dict[str, Any]], process: int) -> tuple[int, int, dict[str, Any]]:
    return told[0], 0, {"Process": process, **told[1]}


def endless(body: dict[str, Any]) -> dict[str, Any]:
    """A page of mounts that come after those before."""
    begin = int(body.get("After", "/0").strip("/")) + 1
    mounts = [{"MountPath": f"/{begin + number:012}"} for number in range(3)]
    return {"Mounts": mounts, "More": True}


async def test_a_list_of_mounts_without_end_has_one(connect: Connect) -> None:
    guest, _ = await connect({messages.MOUNTS: lambda _id, body: endless(body)})
    with pytest.raises(ProtocolError, match="no end: 768 so far"):
        await guest.mounts(timeout_s=20)


async def test_a_list_of_mounts_that_repeats_itself_is_refused(connect: Connect) -> None:
    page = {"Mounts": [{"MountPath": "/a"}, {"MountPath": "/b"}], "More": True}
    guest, _ = await connect({messages.MOUNTS: said(**page)})
    with pytest.raises(ProtocolError, match="does not go on after '/b'"):
        await guest.mounts(timeout_s=20)


async def test_the_time_for_a_list_of_mounts_is_that_of_all_its_pages(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_guest, "_MAX_PAGES", 1 << 30)
    guest, _ = await connect({messages.MOUNTS: lambda _id, body: endless(body)})
    with pytest.raises(DeadlineExceeded):
        await guest.mounts(timeout_s=0.2)


NOT_KNOWN = {"Result": -2147467263, "ErrorMessage": "no", "Utilityvm": {"Kind": "not_negotiated"}}


async def test_an_agent_that_always_is_a_new_one_is_not_dialled_as_fast_as_can_be(connect: Connect) -> None:
    guest, liar = await connect({messages.INFO: said(**NOT_KNOWN)})
    with pytest.raises(UtilityVMError):
        await guest.info(timeout_s=2)
    assert liar.connections < 12


async def test_a_program_is_not_offered_to_new_agents_for_ever(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_PAUSES_S", (0.0,))
    guest, liar = await connect({messages.RUN: said(**NOT_KNOWN)})
    with pytest.raises(UtilityVMError, match="started again"):
        await guest.run(["true"])
    assert liar.connections <= 9


async def test_a_negotiate_that_is_forgotten_again_and_again_ends_in_time(folder: Path) -> None:
    pings = 0

    def ping(_id: int, _body: dict[str, Any]) -> Answer:
        nonlocal pings
        pings += 1
        return NOT_KNOWN

    liar = Liar({messages.PING: ping})
    server = await asyncio.start_unix_server(liar.talk, str(folder / "a.sock"))
    with pytest.raises(UtilityVMError):
        await BridgeGuest.connect(folder / "a.sock", timeout_s=1)
    assert pings < 12
    server.close()


EVIL = "\x1b]0;pwned\x07\x1b[2J"
EVIL += "\x1b[1;32mall well\x1b[0m\x1b]52;c;cm0gLXJm\x07\x9b2J\x90q\x9c \u202egnp.exe\u2066\ud800\x7f\0"


@pytest.mark.parametrize("kind", ["refused", "busy", "invalid", "timeout", "unknown", "no_filesystem", EVIL])
async def test_words_of_a_guest_reach_no_terminal(
    connect: Connect, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    extension = {"Kind": kind, "Holders": [EVIL] * 3, "Remedy": EVIL}
    refusal = {"Result": -2147467259, "ErrorMessage": EVIL * 300, "Utilityvm": extension}
    guest, _ = await connect({messages.MODIFY: said(**refusal), messages.QUIESCE: said(Flushed=[EVIL])})
    caplog.set_level(logging.DEBUG)
    await guest.quiesce(timeout_s=20)
    with pytest.raises(UtilityVMError) as caught:
        await guest.eject(SLOT, timeout_s=20, force=False)
    error = caught.value
    texts = [str(error), error.remedy or "", *getattr(error, "holders", ()), caplog.text]
    for text in texts:
        assert all(sign.isprintable() or sign in "\n\t" for sign in text)
        assert "pwned" not in text or text == caplog.text  # where it is written as Python writes it
    assert "all well" in str(error)
    assert len(str(error)) < 5000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 66), 1 << 66) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ("Result", "ErrorMessage", "Utilityvm", "Present", "MountPaths", "Mounts", "More", "Flushed", "BootId")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.dictionaries(st.sampled_from(MEMBERS), JSON))
async def test_whatever_it_answers_errors_are_typed_and_soon(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    monkeypatch.setattr(session, "_PAUSES_S", (0.0,))
    questions = (messages.MODIFY, messages.PROBE, messages.MOUNTS, messages.INFO, messages.QUIESCE, messages.UNIQUE)
    guest, _ = await connect({kind: said(**answer) for kind in questions} | {messages.RUN: ran(ended(0))})
    await ask_all(guest)


# What is asked of it.


@pytest.mark.parametrize(
    ("command", "env", "text"),
    [
        ([], {}, "names no program"),
        ([""], {}, "names no program"),
        (["a\0b"], {}, "word 1 of the command has a NUL"),
        (["a", b"b"], {}, "word 2 of the command is no text, but bytes"),
        (["a", 5], {}, "word 2 of the command is no text, but int"),
        (["a"], {"B": "\0"}, "B has a NUL"),
        (["a"], {"B\0": "c"}, "the name of a variable has a NUL"),
        (["a"], {"B": 5}, "B is no text, but int"),
        (["a"], {"B=C": ""}, "cannot be the name"),
        (["a"], {"": ""}, "cannot be the name"),
    ],
)
async def test_a_command_that_is_none_is_refused_before_anything_is_sent(
    connect: Connect, command: list[Any], env: dict[str, Any], text: str
) -> None:
    guest, _ = await connect({messages.RUN: ran(ended(0))})
    with pytest.raises(InvalidRequest, match=text):
        await guest.run(command, env=env)
    with pytest.raises(InvalidRequest, match="the folder has a NUL"):
        await guest.run(["true"], cwd="/\0")
    assert not guest._programs


async def test_output_that_its_caller_does_not_take_in_time_is_named_as_the_cause(connect: Connect) -> None:
    async def slow(_: bytes) -> None:
        await asyncio.sleep(3600)

    for told, text in (([output(b"a"), ended(7)], "x ended with 7, but"), ([output(b"a")], "x was killed, for")):
        guest, _ = await connect({messages.RUN: ran(*told)})
        with pytest.raises(DeadlineExceeded, match=f"{text} its output was not taken within 0.2 s"):
            await guest.run_streaming(["x"], stdout=slow, stderr=slow, timeout_s=0.2)


async def test_a_request_ends_within_half_a_second_of_its_time(connect: Connect) -> None:
    guest, _ = await connect({messages.PROBE: lambda _id, _body: None})
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await guest.probe_device(SLOT, timeout_s=0.1)
    assert session.ANSWER_S <= 0.4
    assert time.monotonic() - begun < 20


async def test_our_agent_is_given_a_little_less_time_than_the_caller_has(connect: Connect) -> None:
    given_ms = []

    def probe(_id: int, body: dict[str, Any]) -> Answer:
        given_ms.append(body["Utilityvm"]["TimeoutMs"])
        return {"Present": True}

    guest, _ = await connect({messages.PROBE: probe})
    for seconds in (1.0, 100.0):
        assert await guest.probe_device(SLOT, timeout_s=seconds)
    assert 100 < given_ms[0] <= 950
    assert 90_000 < given_ms[1] <= 99_750


async def test_a_guest_that_hangs_up_amid_its_output_floods_no_log(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """What it sent is still being read, and each piece that is taken is answered."""
    guest, _ = await connect({})
    client = guest._client
    assert client is not None
    client._writer.transport.abort()
    for _ in range(20):
        client.notify(messages.RUN_CREDIT, {"Process": 1, "Bytes": 1})
    assert "socket.send() raised exception" not in caplog.text
