"""Programs really run, on this system, through the agent and a raw host."""

from __future__ import annotations

import base64
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from descriptors import open_files
from guest_end import AgentThread
from raw_host import RawHost
from utilityvm.agent import cgroups, launch, processes, run
from utilityvm.agent.faults import Fault
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


def test_a_program_that_reads_no_input_is_heard_all_the_same(host: RawHost) -> None:
    """Its pipe is full, and smaller than what a host may send."""
    script = """
import fcntl, signal, sys
fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 4096)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for word in ("ready", "heard"):
    print(word, flush=True)
    signal.sigwait([signal.SIGUSR1])
"""
    host.run(sys.executable, "-c", script, Stdin=True)
    assert first_line(host) == "ready"
    for _ in range(messages.INPUT_WINDOW_BYTES // messages.CHUNK_BYTES):
        host.feed(bytes(messages.CHUNK_BYTES))
    host.send(messages.RUN_SIGNAL, {"Process": 1, "Signal": signal.SIGUSR1}, id=0)
    while (frame := host.notification()).kind == messages.RUN_CREDIT:
        pass  # for what the pipe holds
    assert base64.b64decode(frame.body()["Data"]) == b"heard\n"
    host.send(messages.RUN_SIGNAL, {"Process": 1, "Signal": signal.SIGUSR1}, id=0)
    assert host.outcome() == (b"", b"", 0)


def test_a_program_may_close_its_output_and_read_on(host: RawHost, tmp_path: Path) -> None:
    host.run("sh", "-c", 'exec >&- 2>&-; cat > "$1"', "sh", str(tmp_path / "out"), Stdin=True)
    host.feed(b"late", last=True)
    assert host.outcome() == (b"", b"", 0)
    assert (tmp_path / "out").read_bytes() == b"late"


def test_a_host_that_overfeeds_loses_the_program(host: RawHost) -> None:
    host.run("sleep", "1000", Stdin=True)
    for _ in range(2 * messages.INPUT_WINDOW_BYTES // messages.CHUNK_BYTES + 4):  # the pipe takes a window as well
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
    wait_until_ended(int((tmp_path / "pid").read_text()))  # it left the session, and is killed as well
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


def test_a_program_has_ended_when_its_own_process_has(host: RawHost) -> None:
    """Its output is told, and what it left behind holds up nothing."""
    host.run("sh", "-c", "sleep 1000 & echo $!; exit 7")
    out, err, status = host.outcome()
    assert (err, status) == (b"", 7)
    os.kill(int(out), signal.SIGKILL)


def test_what_a_child_writes_right_after_the_end_is_told(host: RawHost) -> None:
    host.run("sh", "-c", '(while kill -0 "$$" 2> /dev/null; do :; done; echo late) & exit 3')
    host_output, _, status = host.outcome()
    assert status == 3
    assert host_output in (b"late\n", b"")  # a zombie can be signalled: it is told only if it was reaped in time


def test_all_that_was_written_before_the_end_is_told_however_late_it_is_taken(host: RawHost) -> None:
    """More than the window, and a child that holds the pipe: the rest waits in it until the host takes some."""
    host.run("sh", "-c", f"sleep 1000 & echo $! >&2; head -c {WINDOW + 5000} /dev/zero; exit 0")
    got = {"out": 0, "err": 0}
    text = ""
    while got["out"] + got["err"] < WINDOW:
        body = host.notification().body()
        data = base64.b64decode(body["Data"])
        got[body["Stream"]] += len(data)
        text += data.decode() if body["Stream"] == "err" else ""
    select.select([], [], [], run._LINGER_S * 1.5)  # it ends meanwhile, and what is left may not be lost
    host.send(messages.RUN_CREDIT, {"Process": 1, "Bytes": WINDOW}, id=0)
    out, err, status = host.outcome()
    assert (got["out"] + len(out), status) == (WINDOW + 5000, 0)
    os.kill(int(text + err.decode()), signal.SIGKILL)


def test_a_child_that_holds_the_output_can_go_on_writing(host: RawHost, tmp_path: Path) -> None:
    script = f"(until [ -e go ]; do sleep 0.01; done; head -c 300000 /dev/zero; echo $? > {tmp_path}/said) & exit 0"
    host.run("sh", "-c", script, Cwd=str(tmp_path))
    assert host.outcome() == (b"", b"", 0)
    (tmp_path / "go").touch()
    while not (tmp_path / "said").exists() or not (tmp_path / "said").read_text():
        pass
    assert (tmp_path / "said").read_text() == "0\n"


def test_a_daemon_that_a_program_left_lives_on_after_its_session(host: RawHost, tmp_path: Path) -> None:
    script = "setsid sh -c 'echo $$ > pid; exec sleep 1000' > /dev/null 2>&1 & until [ -s pid ]; do :; done"
    host.run("sh", "-c", script, Cwd=str(tmp_path))
    assert host.outcome()[2] == 0
    host.negotiate()
    pid = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "SR"
    os.kill(pid, signal.SIGKILL)


def test_a_program_that_is_cancelled_while_it_lingers_is_killed_with_its_children(host: RawHost) -> None:
    host.run("sh", "-c", "sleep 1000 & echo $!; exit 0")
    pid = int(first_line(host))
    host.send(messages.RUN_CANCEL, {"Process": 1}, id=0)
    wait_until_ended(pid)


def test_a_program_is_ordinary(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may end it when memory runs out, and it may open as many files as programs usually may."""
    monkeypatch.setattr(processes, "_program_files", (512, 1024))
    host.run("sh", "-c", "cat /proc/self/oom_score_adj; ulimit -Sn; ulimit -Hn; ps -o sid= -p $$; echo $$")
    words = host.outcome()[0].split()
    assert words[:3] == [b"0", b"512", b"1024"]
    assert words[3] == words[4]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC])
@pytest.mark.parametrize("what", ["cgroup", "eventfd", "process", "pidfd"])
def test_what_the_guest_has_run_out_of_is_said_and_nothing_is_left(
    host: RawHost, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    before = open_files()
    with monkeypatch.context() as patch:
        match what:
            case "cgroup":
                patch.setattr(cgroups.here(), "make", refuse)
            case "eventfd":
                patch.setattr(os, "eventfd", refuse)
            case "process":
                patch.setattr(subprocess, "Popen", refuse)
            case "pidfd":
                patch.setattr(os, "pidfd_open", refuse)
        answer = host.run("sleep", "1000", Stdin=True)
    assert answer["Utilityvm"]["Kind"] == "refused"
    assert "cannot run sleep: " + launch._WHY[number] in answer["ErrorMessage"]
    assert open_files() <= before
    assert host.run("true")["Result"] == 0  # the number is free
    assert host.outcome()[2] == 0


def test_no_thread_is_said(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread._target.__name__ == "_live":  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert "no more threads" in host.run("true")["ErrorMessage"]
    assert host.run("true")["Result"] == 0


@pytest.mark.parametrize(
    ("head", "text"), [("#!/no/such -x\n", ", /no/such -x, is missing"), ("plain", "neither a program")]
)
def test_a_script_that_nobody_can_read_is_said(host: RawHost, tmp_path: Path, head: str, text: str) -> None:
    path = tmp_path / "script"
    path.write_text(head)
    path.chmod(0o755)
    for name, env in ((str(path), {}), ("script", {"PATH": f"/no:{tmp_path}"}), ("./script", {})):
        assert text in host.run(name, Env=env, Cwd=str(tmp_path))["ErrorMessage"]


def test_a_folder_that_is_a_file_is_named(host: RawHost) -> None:
    assert "/etc/passwd: Not a directory" in host.run("true", Cwd="/etc/passwd")["ErrorMessage"]


def test_a_thread_that_fails_ends_its_program_and_says_so(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(run.Program, "_send_output", fail)
    host.run("sh", "-c", "echo; sleep 1000")
    assert host.outcome()[2] == -signal.SIGKILL
    for thread in threading.enumerate():  # it tells the outcome first, and raises then: the hook is ours until it has
        if thread.name.endswith("(_live)"):
            thread.join(20)


@pytest.mark.parametrize(("name", "lowest", "highest"), [
    ("MemoryBytes", 1 << 20, 1 << 50), ("Pids", 1, 1 << 22), ("MilliCpus", 10, 1 << 20),
])  # fmt: skip
def test_each_limit_has_its_bounds(name: str, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        assert value in vars_of(run._limits({name: value}))
    wrong: list[object] = [lowest - 1, highest + 1, True, "1"]
    for one in wrong:
        with pytest.raises(Fault, match=name):
            run._limits({name: one})
    assert run._limits({name: None}) == run._limits(None) == cgroups.Limits()


def vars_of(limits: cgroups.Limits) -> list[int | None]:
    return [limits.memory_bytes, limits.pids, limits.milli_cpus]
