"""The QMP client against a monitor that keeps QEMU's rules, and can break them when told to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from utilityvm.errors import DeadlineExceeded, ProtocolError, VMGone
from utilityvm.hosts.qemu.qmp import LONGEST_MESSAGE, Qmp, QmpRefused

T = 10.0


class Monitor:
    """A monitor like QEMU's: commands in order, one held descriptor that the next one replaces, one client."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self.client: socket.socket | None = None
        self._text = ""
        self._queue: list[dict[str, Any]] = []
        self._held: int | None = None
        self.negotiated = False
        self.paused = False
        self.greets = True
        self.before_greeting = self.after_greeting = b""  # what is left of the client before
        self.seen: list[str] = []
        self.files: dict[int, int] = {}  # fdset -> inode of what it holds

    def _accept(self) -> None:
        self._loop.remove_reader(self._listener)
        self.client, _ = self._listener.accept()
        self.client.setblocking(False)
        self._loop.add_reader(self.client, self._read)
        if self.greets:
            self.send_raw(self.before_greeting)
            self.send({"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}})
            self.send_raw(self.after_greeting)

    def send(self, message: object) -> None:
        self.send_raw(json.dumps(message).encode() + b"\r\n")

    def send_raw(self, data: bytes) -> None:
        assert self.client is not None
        self.client.setblocking(True)
        self.client.sendall(data)
        self.client.setblocking(False)

    def _read(self) -> None:
        assert self.client is not None
        try:
            data, fds, _, _ = socket.recv_fds(self.client, 1 << 16, 16)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, fds = b"", []
        for fd in fds:
            self._drop_held()
            self._held = fd
        if not data:
            self._loop.remove_reader(self.client)
            return
        self._text += data.decode()
        decoder = json.JSONDecoder()
        while self._text:
            try:
                command, end = decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                break
            self._text = self._text[end:].lstrip()
            self._queue.append(command)
        self._loop.call_soon(self.work)  # reading goes on before the first command is done, as in QEMU

    def work(self) -> None:
        while self._queue and not self.paused:
            command = self._queue.pop(0)
            self.seen.append(command["execute"])
            answer = self._do(command["execute"], command.get("arguments", {}))
            if answer is not None:
                self.send({**answer, "id": command["id"]})

    def _do(self, name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        if name == "qmp_capabilities" and not self.negotiated:
            self.negotiated = True
            return {"return": {}}
        if not self.negotiated or name not in ("query-status", "add-fd", "device_del", "echo", "length"):
            return {"error": {"class": "CommandNotFound", "desc": f"The command {name} has not been found"}}
        if name == "echo":
            return {"return": arguments}
        if name == "length":
            return {"return": len(arguments["text"])}
        if name == "add-fd":
            if self._held is None:
                return {"error": {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}}
            self.files[arguments["fdset-id"]] = os.fstat(self._held).st_ino
            self._drop_held()
        if name == "device_del":
            self.event("DEVICE_DELETED", device=arguments["id"])
        return {"return": {}}

    def event(self, name: str, **data: object) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})

    def _drop_held(self) -> None:
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def hang_up(self) -> None:
        self._drop_held()
        for sock in (self._listener, self.client):
            if sock is not None and sock.fileno() >= 0:
                self._loop.remove_reader(sock)
                sock.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest_asyncio.fixture
async def monitor(path: Path) -> AsyncGenerator[Monitor]:
    made = Monitor(path)
    yield made
    made.hang_up()


@pytest_asyncio.fixture
async def qmp(monitor: Monitor, path: Path) -> AsyncGenerator[Qmp]:
    made = await Qmp.connect(path, vm="one", timeout_s=T)
    yield made
    made.close()


async def turns(until: Callable[[], bool]) -> None:
    """Let the event loop run until something is so."""
    async with asyncio.timeout(T):
        while not until():
            await asyncio.sleep(0)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_connect_negotiates_and_knows_the_version(qmp: Qmp, monitor: Monitor) -> None:
    assert qmp.version == "7.2.22"
    assert monitor.seen == ["qmp_capabilities"]


@pytest.mark.parametrize("before", [b"", b'"the end": "of an answer"}, "id": 0}\r\n', b'{"return": {}, "id": 0}\r\n'])
@pytest.mark.parametrize("after", [b"", b'{"return": {}, "id": 0}\r\n', b'{"error": {"class": "E", "desc": "?"}}\r\n'])
async def test_what_was_meant_for_the_client_before_is_skipped(
    monitor: Monitor, path: Path, before: bytes, after: bytes
) -> None:
    monitor.before_greeting, monitor.after_greeting = before, after
    qmp = await Qmp.connect(path, vm="test", timeout_s=T)
    assert await qmp.execute("echo", {"a": 1}, timeout_s=T) == {"a": 1}
    qmp.close()


async def test_a_negotiation_that_the_client_before_had_begun_is_ours(monitor: Monitor, path: Path) -> None:
    monitor.negotiated = True
    qmp = await Qmp.connect(path, vm="test", timeout_s=T)
    assert await qmp.execute("echo", {"a": 1}, timeout_s=T) == {"a": 1}
    qmp.close()


async def test_answers_reach_those_who_asked(qmp: Qmp) -> None:
    answers = await asyncio.gather(*(qmp.execute("echo", {"number": n}, timeout_s=T) for n in range(40)))
    assert answers == [{"number": n} for n in range(40)]


async def test_a_refusal_has_class_and_words(qmp: Qmp) -> None:
    with pytest.raises(QmpRefused, match="refused no-such: The command no-such has not been found") as caught:
        await qmp.execute("no-such", timeout_s=T)
    assert (caught.value.kind, caught.value.command, caught.value.vm) == ("CommandNotFound", "no-such", "one")


async def test_nothing_that_a_terminal_obeys_comes_in(qmp: Qmp, monitor: Monitor) -> None:
    """A QEMU that its guest has taken over writes to the owner's terminal through the owner's errors."""
    monitor.paused = True
    asked = asyncio.create_task(qmp.execute_all([("echo", {}), ("echo", {})], timeout_s=T))
    await turns(lambda: len(monitor._queue) == 2)
    words = "\x1b]52;c;cm0=\x07wiped\x1b[2J \u202eback\x9b1m\x7f"
    first, second = (question.id for question in qmp._pending)
    monitor.send({"error": {"class": words, "desc": words}, "id": first})
    monitor.send({"return": [{words: [words]}], "id": second})
    refusal, found = await asked
    assert isinstance(refusal, QmpRefused)
    assert isinstance(found, list)
    for text in (str(refusal), refusal.kind, refusal.description, *found[0], *found[0].popitem()[1]):
        assert text.isprintable()
        assert "wiped" in text


async def test_a_batch_gives_each_answer_and_raises_none(qmp: Qmp) -> None:
    answers = await qmp.execute_all([("echo", {"a": 1}), ("no-such", {}), ("echo", {"b": 2})], timeout_s=T)
    assert (answers[0], answers[2]) == ({"a": 1}, {"b": 2})
    assert isinstance(answers[1], QmpRefused)


async def test_each_of_many_descriptors_reaches_its_own_set(qmp: Qmp, monitor: Monitor, tmp_path: Path) -> None:
    inodes: dict[int, int] = {}

    async def pass_file(number: int) -> None:
        file = tmp_path / str(number)
        file.touch()
        inodes[number] = file.stat().st_ino
        fd = os.open(file, os.O_RDONLY)
        try:
            await qmp.execute_all([("add-fd", {"fdset-id": number}), ("echo", {})], fd=fd, timeout_s=T)
        finally:
            os.close(fd)

    await asyncio.gather(*(pass_file(number) for number in range(30)))
    assert monitor.files == inodes


async def test_a_descriptor_whose_sender_gave_up_in_the_queue_is_never_sent(qmp: Qmp, monitor: Monitor) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    before = open_fds()
    monitor.paused = True
    first = asyncio.create_task(qmp.execute_all([("add-fd", {"fdset-id": 1})], fd=fd, timeout_s=T))
    second = asyncio.create_task(qmp.execute_all([("add-fd", {"fdset-id": 2})], fd=fd, timeout_s=T))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    monitor.paused = False
    await turns(lambda: bool(monitor._queue))
    monitor.work()
    await first
    await qmp.execute("query-status", timeout_s=T)
    assert set(monitor.files) == {1}
    assert open_fds() == before
    os.close(fd)


async def test_a_descriptor_that_the_socket_had_no_room_for_is_not_sent_behind_its_senders_back(
    qmp: Qmp, monitor: Monitor
) -> None:
    text = "x" * (4 << 20)  # more than the socket takes at once
    long = asyncio.create_task(qmp.execute("length", {"text": text}, timeout_s=T))
    fd = os.open("/dev/null", os.O_RDONLY)
    task = asyncio.create_task(qmp.execute_all([("add-fd", {"fdset-id": 1}), ("echo", {})], fd=fd, timeout_s=T))
    await asyncio.sleep(0)
    assert qmp._out[-1].fd == fd
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(fd)
    other = os.open("/dev/zero", os.O_RDONLY)  # it has the number now
    assert other == fd
    assert await long == len(text)
    await qmp.execute_all([("add-fd", {"fdset-id": 2})], fd=other, timeout_s=T)
    assert set(monitor.files) == {2}
    os.close(other)


async def test_a_monitor_that_takes_no_more_connections_is_not_gone(tmp_path: Path) -> None:
    path = tmp_path / "busy.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))  # the backlog is full
        with pytest.raises(DeadlineExceeded, match="took no connection"):
            await Qmp.connect(path, vm="worker", timeout_s=0.05)


async def test_no_answer_in_time_is_a_deadline_and_later_answers_stay_in_step(qmp: Qmp, monitor: Monitor) -> None:
    monitor.paused = True
    with pytest.raises(DeadlineExceeded, match="no answer from QEMU to echo within 0"):
        await qmp.execute("echo", {"n": 1}, timeout_s=0)
    monitor.paused = False
    monitor.work()
    assert await qmp.execute("echo", {"n": 2}, timeout_s=T) == {"n": 2}


async def test_an_event_reaches_who_expects_it_of_that_device_only(qmp: Qmp, monitor: Monitor) -> None:
    with (
        qmp.expecting("DEVICE_DELETED", device="d1") as first,
        qmp.expecting("DEVICE_DELETED", device="d2") as second,
    ):
        await qmp.execute("device_del", {"id": "d2"}, timeout_s=T)
        event = await second
        assert (event.name, event.device) == ("DEVICE_DELETED", "d2")
        assert not first.done()


async def test_everybody_learns_at_once_that_qemu_hung_up(qmp: Qmp, monitor: Monitor) -> None:
    monitor.paused = True
    asked = asyncio.create_task(qmp.execute("echo", timeout_s=T))
    with qmp.expecting("DEVICE_DELETED") as event:
        await turns(lambda: bool(monitor._queue))
        monitor.event("SHUTDOWN", guest=True, reason="guest-panic")
        monitor.hang_up()
        with pytest.raises(VMGone, match="hung up after guest-panic"):
            await event
    with pytest.raises(VMGone):
        await asked
    with pytest.raises(VMGone):
        await qmp.execute("echo", timeout_s=T)
    with qmp.expecting("STOP") as late, pytest.raises(VMGone):
        await late
    assert isinstance(await qmp.gone, VMGone)


async def test_descriptors_that_wait_are_closed_when_qemu_hangs_up(qmp: Qmp, monitor: Monitor) -> None:
    before = open_fds()
    fd = os.open("/dev/null", os.O_RDONLY)
    monitor.paused = True
    tasks = [asyncio.create_task(qmp.execute_all([("add-fd", {"fdset-id": n})], fd=fd, timeout_s=T)) for n in range(5)]
    await turns(lambda: bool(monitor._queue))
    monitor.hang_up()
    assert all(isinstance(end, VMGone) for end in await asyncio.gather(*tasks, return_exceptions=True))
    os.close(fd)
    assert open_fds() == before - 3  # our socket, and the monitor's two


@pytest.mark.parametrize(
    "garbage",
    [
        b"not json\r\n",
        b"[]\r\n",
        b"{}\r\n",
        b'{"return": {}, "id": 70}\r\n',
        b'{"error": {"class": "GenericError", "desc": "parse error"}}\r\n',
        b'{"event": 1, "data": 2}\r\n',
        b'{"QMP": {}}\r\n',
        b"\xff\xfe\r\n",
        b"[" * 200_000 + b"\r\n",
    ],
)
async def test_what_is_not_qmp_ends_the_connection(qmp: Qmp, monitor: Monitor, garbage: bytes) -> None:
    monitor.paused = True
    asked = asyncio.create_task(qmp.execute("echo", timeout_s=T))
    await turns(lambda: bool(monitor._queue))
    monitor.send_raw(garbage)
    with pytest.raises(ProtocolError) as caught:
        await asked
    assert caught.value.vm == "one"


async def test_a_message_without_an_end_is_not_kept(qmp: Qmp, monitor: Monitor) -> None:
    qmp._received += bytes(LONGEST_MESSAGE)
    monitor.send_raw(b"x")
    assert isinstance(await qmp.gone, ProtocolError)


async def test_a_message_in_pieces_is_one(qmp: Qmp, monitor: Monitor) -> None:
    with qmp.expecting("STOP") as event:
        for byte in b'{"event": "STOP", "timestamp": {}}\r\n':
            monitor.send_raw(bytes([byte]))
            await asyncio.sleep(0)
        assert (await event).name == "STOP"


async def test_commands_larger_than_the_socket_takes_arrive_whole(qmp: Qmp) -> None:
    lengths = [300_000, 1, 400_000]
    asked = (qmp.execute("length", {"text": "x" * length}, timeout_s=T) for length in lengths)
    assert await asyncio.gather(*asked) == lengths


async def test_connect_where_nobody_listens(path: Path) -> None:
    with pytest.raises(VMGone, match="does not listen"):
        await Qmp.connect(path, vm="one", timeout_s=T)


async def test_connect_to_a_path_that_is_not_there() -> None:
    with pytest.raises(VMGone, match="does not listen"):
        await Qmp.connect(Path("/" + "x" * 200), vm="one", timeout_s=T)


async def test_a_monitor_that_serves_another_does_not_greet(monitor: Monitor, path: Path) -> None:
    monitor.greets = False
    with pytest.raises(DeadlineExceeded, match="did not greet") as caught:
        await Qmp.connect(path, vm="one", timeout_s=0.01)
    assert "one client at a time" in (caught.value.remedy or "")


async def test_a_monitor_that_hangs_up_before_it_greets(monitor: Monitor, path: Path) -> None:
    monitor.greets = False
    connecting = asyncio.create_task(Qmp.connect(path, vm="one", timeout_s=T))
    await turns(lambda: monitor.client is not None)
    monitor.hang_up()
    with pytest.raises(VMGone, match="hung up"):
        await connecting


async def test_closing_is_an_end_for_all_who_wait(qmp: Qmp, monitor: Monitor) -> None:
    monitor.paused = True
    asked = asyncio.create_task(qmp.execute("echo", timeout_s=T))
    await turns(lambda: bool(monitor._queue))
    qmp.close()
    qmp.close()
    with pytest.raises(VMGone, match="was closed"):
        await asked
