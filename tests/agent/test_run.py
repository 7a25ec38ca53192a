"""Programs really run, on this system, through the agent and a raw host."""

from __future__ import annotations

import base64
import os
import select
import signal
import socket
from pathlib import Path

import pytest

from guest_end import AgentThread
from raw_host import RawHost
from utilityvm.agent import run
from utilityvm.bridge import messages

WINDOW = messages.OUTPUT_WINDOW_BYTES


def wait_until_ended(pid: int) -> None:
    """Return when the process has ended, whoever its parent is."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(fd) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        assert poll.poll(20_000), f"process {pid} still runs"


def first_line(host: RawHost) -> str:
    frame = host.notification()
    assert frame.kind == messages.RUN_OUTPUT
    return base64.b64decode(frame.body()["Data"]).decode().strip()


def test_a_program_has_its_words_environment_and_folder(host: RawHost) -> None:
    assert host.run("sh", "-c", 'echo "$A $1"; pwd >&2', "sh", "a  b", Env={"A": "&<>"}, Cwd="/usr")["Result"] == 0
    assert host.outcome() == (b"&<> a  b\n", b"/usr\n", 0)


def test_a_program_without_input_reads_none(host: RawHost) -> None:
    host.run("cat")
    assert host.outcome() == (b"", b"", 0)


def test_the_environment_holds_nothing_of_the_agents(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    host.run("env")
    assert set(host.outcome()[0].decode().split()) >= {"HOME=/root", "LANG=C.UTF-8"}
    host.run("env")
    assert b"SECRET" not in host.outcome()[0]


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_exit_code_is_told(host: RawHost, status: int) -> None:
    host.run("sh", "-c", f"exit {status}")
    assert host.outcome()[2] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_is_told_as_a_negative_code(host: RawHost, number: int) -> None:
    host.run("sh", "-c", f"kill -{int(number)} $$")
    assert host.outcome()[2] == -number


def test_output_that_is_no_text_comes_as_it_is(host: RawHost) -> None:
    host.run("printf", r"\000\377\n")
    assert host.outcome()[0] == b"\0\xff\n"


def test_input_comes_back_whole(host: RawHost) -> None:
    """Within the window, which is all that a host may send without an answer."""
    data = os.urandom(messages.INPUT_WINDOW_BYTES)
    host.run("cat", Stdin=True)
    for begin in range(0, len(data), messages.CHUNK_BYTES):
        host.feed(data[begin : begin + messages.CHUNK_BYTES])
    host.feed(b"", last=True)
    assert host.outcome() == (data, b"", 0)


def test_credit_for_input_is_given_as_it_is_taken(host: RawHost) -> None:
    host.run("sh", "-c", "head -c 3 >&2; read line", Stdin=True)
    host.feed(b"abc")
    taken = 0
    while taken < 3:
        frame = host.notification()
        if frame.kind == messages.RUN_CREDIT:
            taken += frame.body()["Bytes"]
    assert taken == 3
    host.feed(b"\n")
    assert host.outcome()[2] == 0


def test_a_program_that_closes_its_input_frees_what_was_sent(host: RawHost) -> None:
    """Else the host would wait for the program, which waits for nobody."""
    host.run("sh", "-c", "exec <&-; echo closed; sleep 1000", Stdin=True)
    assert first_line(host) == "closed"
    host.feed(bytes(messages.CHUNK_BYTES))
    frame = host.notification()
    assert (frame.kind, frame.body()["Bytes"]) == (messages.RUN_CREDIT, messages.CHUNK_BYTES)
    host.send(messages.RUN_CANCEL, {"Process": 1}, id=0)


def test_a_program_may_close_its_output_and_read_on(host: RawHost, tmp_path: Path) -> None:
    host.run("sh", "-c", 'exec >&- 2>&-; cat > "$1"', "sh", str(tmp_path / "out"), Stdin=True)
    host.feed(b"late", last=True)
    assert host.outcome() == (b"", b"", 0)
    assert (tmp_path / "out").read_bytes() == b"late"


def test_a_host_that_overfeeds_loses_the_program(host: RawHost) -> None:
    host.run("sleep", "1000", Stdin=True)
    for _ in range(messages.INPUT_WINDOW_BYTES // messages.CHUNK_BYTES + 4):
        host.feed(bytes(messages.CHUNK_BYTES))
    assert host.outcome()[2] == -signal.SIGKILL


def test_no_more_than_a_window_of_output_is_sent_before_the_host_takes_some(host: RawHost) -> None:
    host.run("sh", "-c", "head -c 1000000 /dev/zero; echo -n end >&2")
    sent = 0
    while sent < WINDOW:
        frame = host.notification()
        assert frame.kind == messages.RUN_OUTPUT
        sent += len(frame.body()["Data"]) // 4 * 3 - frame.body()["Data"].count("=")
    assert sent == WINDOW
    assert host.ask(messages.PING)["Result"] == 0
    assert not host.notifications
    host.send(messages.RUN_CREDIT, {"Process": 1, "Bytes": WINDOW}, id=0)
    out, err, status = host.outcome()
    assert (len(out), err, status) == (1_000_000 - WINDOW, b"end", 0)


def test_two_programs_run_at_once(host: RawHost) -> None:
    host.run("cat", process=1, Stdin=True)
    host.run("echo", "b", process=2)
    assert host.outcome() == (b"b\n", b"", 0)
    host.feed(b"a", process=1, last=True)
    assert host.outcome() == (b"a", b"", 0)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"Argv": []}, "invalid"), ({"Argv": "true"}, "invalid"), ({"Argv": [1]}, "invalid"), ({}, "invalid"),
        ({"Argv": ["true"], "Env": ["A=b"]}, "invalid"), ({"Argv": ["true"], "Env": {"A": 1}}, "invalid"),
        ({"Argv": ["true"], "Cwd": 3}, "invalid"), ({"Argv": ["a\0b"]}, "invalid"), ({"Argv": [""]}, "refused"),
        ({"Argv": ["no-such-program"]}, "not_found"), ({"Argv": ["true"], "Cwd": "/no/such"}, "not_found"),
        ({"Argv": ["/etc/passwd"]}, "refused"), ({"Argv": ["true"], "Process": "1"}, "invalid"),
        ({"Argv": ["true"], "Process": None}, "invalid"), ({"Argv": ["true"], "Env": {"A=B": "c"}}, "invalid"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_and_its_number_stays_free(
    host: RawHost, fields: dict[str, object], kind: str
) -> None:
    answer = host.ask(messages.RUN, messages.request(**{"Process": 1, **fields}))
    assert answer["Utilityvm"]["Kind"] == kind
    assert host.run("true")["Result"] == 0
    assert host.outcome()[2] == 0


def test_the_folder_that_is_not_there_is_named(host: RawHost) -> None:
    assert "/no/such" in host.run("true", Cwd="/no/such")["ErrorMessage"]


def test_a_number_in_use_is_refused(host: RawHost) -> None:
    host.run("cat", Stdin=True)
    assert "runs already" in host.run("true")["ErrorMessage"]


def test_too_many_programs_are_refused(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "AT_MOST", 2)
    for number in (1, 2):
        host.run("cat", process=number, Stdin=True)
    assert "2 programs" in host.run("true", process=3)["ErrorMessage"]


def test_a_signal_is_passed_on(host: RawHost) -> None:
    host.run("sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done")
    assert first_line(host) == "ready"
    host.send(messages.RUN_SIGNAL, {"Process": 1, "Signal": int(signal.SIGTERM)}, id=0)
    assert host.outcome()[2] == 7


@pytest.mark.parametrize("number", [0, -9, 12345, "9", None, 1 << 80])
def test_a_signal_that_is_none_is_dropped(host: RawHost, number: object) -> None:
    host.run("cat", Stdin=True)
    host.send(messages.RUN_SIGNAL, {"Process": 1, "Signal": number}, id=0)
    host.feed(b"still here", last=True)
    assert host.outcome() == (b"still here", b"", 0)


def test_cancelling_kills_a_program_with_its_children_and_says_no_more(host: RawHost, tmp_path: Path) -> None:
    daemon = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 999' > /dev/null 2>&1 &"
    wait = f"until [ -s {tmp_path}/pid ]; do :; done"
    host.run("sh", "-c", f"{daemon} sleep 1000 & (trap '' TERM HUP; sleep 1001) & last=$!; {wait}; echo $last $$; wait")
    pids = [int(word) for word in first_line(host).split()]
    host.send(messages.RUN_CANCEL, {"Process": 1}, id=0)
    for pid in pids:
        wait_until_ended(pid)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it left the session, and lives on
    host.run("true", process=2)
    frame = host.notification()
    assert frame.body() == {"Process": 2, "ExitCode": 0}


def test_a_cancel_that_comes_with_the_start_is_not_lost(host: RawHost) -> None:
    body = messages.request(Process=1, Argv=["sh", "-c", "echo $$; sleep 1000"])
    host.send(messages.RUN, body)
    host.send(messages.RUN_CANCEL, {"Process": 1}, id=0)
    assert host.response().body()["Result"] == 0
    for frame in host.notifications:  # its first line may have been quicker
        assert frame.kind == messages.RUN_OUTPUT


def test_input_that_comes_with_the_start_is_not_lost(host: RawHost) -> None:
    host.send(messages.RUN, messages.request(Process=1, Argv=["cat"], Stdin=True))
    host.feed(b"early", last=True)
    assert host.response().body()["Result"] == 0
    assert host.outcome() == (b"early", b"", 0)


@pytest.mark.parametrize("ending", ["hang up", "negotiate"])
def test_programs_end_with_their_session(ends: tuple[RawHost, AgentThread], host: RawHost, ending: str) -> None:
    host.run("sh", "-c", "echo $$; sleep 1000")
    pid = int(first_line(host))
    if ending == "hang up":
        host.socket.shutdown(socket.SHUT_RDWR)
    else:
        host.negotiate()
    wait_until_ended(pid)


def test_what_is_said_of_no_program_is_dropped(host: RawHost) -> None:
    for kind in (messages.RUN_INPUT, messages.RUN_CREDIT, messages.RUN_SIGNAL, messages.RUN_CANCEL):
        for body in ({}, {"Process": 99}, {"Process": [1]}, {"Process": None}):
            host.send(kind, body, id=0)
    assert host.ask(messages.PING)["Result"] == 0


def test_a_program_ends_when_all_that_shares_its_output_has(host: RawHost) -> None:
    host.run("sh", "-c", "(read line; echo late) & exit 3", Stdin=False)
    assert host.outcome() == (b"late\n", b"", 3)
