"""Programs that belong to the guest, really run on this system: hosts come and go, and they go on."""

from __future__ import annotations

import base64
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guest_end import AgentThread
from raw_host import RawHost
from utilityvm.agent import cgroups, kept
from utilityvm.agent.ring import PIECE_COST
from utilityvm.bridge import messages

from .test_run import wait_until_ended

WINDOW = messages.OUTPUT_WINDOW_BYTES


def start(host: RawHost, *argv: str, **fields: Any) -> dict[str, Any]:
    """Start a kept program; gives what is told of it."""
    answer = host.ask(messages.START, messages.request(Argv=list(argv), **fields))
    assert answer["Result"] == 0, answer
    return dict(answer["Program"])


def follow(host: RawHost, number: int, *, process: int = 50, **fields: Any) -> dict[str, Any]:
    return host.ask(messages.FOLLOW, messages.request(Process=process, Number=number, **fields))


def listed(host: RawHost) -> list[dict[str, Any]]:
    return list(host.ask(messages.PROGRAMS)["Programs"])


class Heard:
    """What a follow tells: each stream, the offsets at which something was lost, and the end."""

    def __init__(self) -> None:
        self.streams = {"out": b"", "err": b""}
        self.at = {"out": 0, "err": 0}
        self.lost = 0
        self.end: dict[str, Any] | None = None


def hear(host: RawHost, *, until: Callable[[Heard], bool] = lambda _: False, credit: bool = True) -> Heard:
    """Take what comes, until the follow ends or `until`."""
    heard = Heard()
    while heard.end is None and not until(heard):
        frame = host.notification()
        body = frame.body()
        if frame.kind == messages.FOLLOW_END:
            heard.end = body
        elif frame.kind == messages.RUN_OUTPUT:
            data, stream = base64.b64decode(body["Data"]), body["Stream"]
            if not heard.streams[stream]:
                heard.at[stream] = body["At"]
            else:
                heard.lost += body["At"] - heard.at[stream] - len(heard.streams[stream])
            heard.streams[stream] += data
            if credit:
                host.send(messages.RUN_CREDIT, {"Process": body["Process"], "Bytes": len(data)}, id=0)
    return heard


def until_out(text: bytes) -> Callable[[Heard], bool]:
    return lambda heard: heard.streams["out"].endswith(text)


def test_a_program_outlives_the_host_that_started_it_and_the_next_one_has_all_of_it(
    host: RawHost, tmp_path: Path
) -> None:
    script = "echo one; echo two >&2; until [ -e go ]; do sleep 0.01; done; echo three; exit 7"
    program = start(host, "sh", "-c", script, Cwd=str(tmp_path))
    host.negotiate()  # another host
    (tmp_path / "go").touch()
    assert follow(host, program["Number"], Id=program["Id"])["Result"] == 0
    heard = hear(host)
    assert (heard.streams, heard.lost) == ({"out": b"one\nthree\n", "err": b"two\n"}, 0)
    assert heard.end == {"Process": 50, "ExitCode": 7}
    (told,) = listed(host)
    assert (told["ExitCode"], told["OutEnd"], told["ErrEnd"], told["Follows"]) == (7, 10, 4, 0)
    assert told["EndedMs"] >= told["StartedMs"]


def test_the_exit_code_is_kept_until_it_is_forgotten(host: RawHost) -> None:
    program = start(host, "sh", "-c", "exit 3", Follow={"Process": 50})
    for _ in range(2):
        assert hear(host).end == {"Process": 50, "ExitCode": 3}
        follow(host, program["Number"])
    assert hear(host).end == {"Process": 50, "ExitCode": 3}
    assert host.ask(messages.FORGET, messages.request(Number=program["Number"]))["Result"] == 0
    assert listed(host) == []
    assert follow(host, program["Number"])["Utilityvm"]["Kind"] == "no_program"


def test_a_number_is_never_another_program_s(host: RawHost) -> None:
    first, second = start(host, "true"), start(host, "true")
    assert (first["Number"], second["Number"]) == (1, 2)
    assert follow(host, 1, Id=second["Id"])["Utilityvm"]["Kind"] == "no_program"
    follow(host, 1)
    hear(host)
    host.ask(messages.FORGET, messages.request(Number=1, Id=first["Id"]))
    assert start(host, "true")["Number"] == 3


def test_a_host_that_died_in_the_middle_of_output_is_followed_without_a_byte_lost_or_repeated(host: RawHost) -> None:
    """The second host begins where the first one, which took less than it was sent, had come to."""
    whole = b"".join(b"%07d\n" % number for number in range(60_000))
    program = start(host, "seq", "-f", "%07.0f", "0", "59999", Follow={"Process": 50, "Hold": True})
    first = hear(host, until=lambda heard: len(heard.streams["out"]) > 50_000)
    taken = len(first.streams["out"]) - 1234  # so much it had handled; the rest is lost with it
    host.negotiate()
    host.notifications.clear()
    follow(host, program["Number"], process=51, Out=taken, Hold=True)
    second = hear(host)
    assert second.at["out"] == taken
    assert first.streams["out"][:taken] + second.streams["out"] == whole
    assert second.lost == 0


def test_a_full_ring_holds_the_program_back_while_somebody_follows(host: RawHost, tmp_path: Path) -> None:
    size = 8192
    script = "head -c 1000000 /dev/zero; touch done"
    body = {"Process": 50, "Hold": True}
    program = start(host, "sh", "-c", script, Cwd=str(tmp_path), RingBytes=size, Follow=body)
    heard = hear(host, credit=False, until=lambda heard: len(heard.streams["out"]) >= size - 4 * PIECE_COST - 1024)
    assert host.ask(messages.PING)["Result"] == 0
    assert not (tmp_path / "done").exists()
    host.send(messages.RUN_CREDIT, {"Process": 50, "Bytes": len(heard.streams["out"])}, id=0)
    rest = hear(host)
    assert len(heard.streams["out"]) + len(rest.streams["out"]) == 1_000_000
    assert (rest.lost, rest.end) == (0, {"Process": 50, "ExitCode": 0})
    assert listed(host)[0]["OutBegin"] >= 1_000_000 - size
    assert program["RingBytes"] == size


def test_without_a_follower_the_oldest_output_goes_and_the_loss_is_told(host: RawHost) -> None:
    program = start(host, "sh", "-c", "seq -f %07.0f 0 59999", RingBytes=16384, Follow={"Process": 50, "Output": False})
    assert hear(host).end == {"Process": 50, "ExitCode": 0}
    follow(host, program["Number"], process=51)
    heard = hear(host)
    assert 8_000 < len(heard.streams["out"]) <= 16384
    assert heard.at["out"] == 480_000 - len(heard.streams["out"])
    assert heard.streams["out"].endswith(b"0059999\n")


@pytest.mark.parametrize("ending", ["negotiate", "unfollow", "kill"])
def test_a_follower_that_goes_holds_nothing_back(host: RawHost, ending: str) -> None:
    script = "head -c 3000000 /dev/zero"
    program = start(host, "sh", "-c", script, RingBytes=8192, Follow={"Process": 50, "Hold": True})
    hear(host, credit=False, until=lambda heard: bool(heard.streams["out"]))
    if ending == "negotiate":
        host.negotiate()
    elif ending == "unfollow":
        host.send(messages.UNFOLLOW, {"Process": 50}, id=0)
    else:
        assert host.ask(messages.KILL, messages.request(Number=1))["Result"] == 0
    host.notifications.clear()
    follow(host, program["Number"], process=51, Output=False)
    ends = [hear(host).end]
    if ending == "kill" and ends != [{"Process": 51, "ExitCode": -9}]:
        ends = [hear(host).end]  # what the first one was told may come late
    assert ends == [{"Process": 51, "ExitCode": -9 if ending == "kill" else 0}]


def test_one_who_only_looks_holds_nothing_back(host: RawHost) -> None:
    program = start(host, "sh", "-c", "head -c 3000000 /dev/zero", Follow={"Process": 50, "Hold": False})
    follow(host, program["Number"], process=51, Output=False)
    heard = hear(host, credit=False)
    assert heard.end == {"Process": 51, "ExitCode": 0}
    assert len(heard.streams["out"]) <= WINDOW


def test_what_is_there_can_be_asked_for_without_waiting_for_more(host: RawHost) -> None:
    program = start(host, "sh", "-c", "echo ready; exec sleep 1000", Follow={"Process": 50})
    hear(host, until=until_out(b"ready\n"))
    follow(host, program["Number"], process=51, Live=False)
    heard = hear(host)
    assert (heard.streams["out"], heard.end) == (b"ready\n", {"Process": 51})  # no exit code: it runs
    host.ask(messages.KILL, messages.request(Number=1))


def test_offsets_after_the_end_are_refused(host: RawHost) -> None:
    start(host, "true", Follow={"Process": 50})
    hear(host)
    answer = follow(host, 1, Out=1)
    assert answer["Utilityvm"]["Kind"] == "invalid"
    assert "offset 1 of its out is after its end, 0" in answer["ErrorMessage"]


def test_input_goes_on_with_the_next_host_from_the_byte_that_was_given(host: RawHost) -> None:
    program = start(host, "cat", Stdin=True, Follow={"Process": 50, "Feed": True})
    host.feed(b"abc", process=50)
    hear(host, until=until_out(b"abc"))
    host.negotiate()
    answer = follow(host, program["Number"], process=51, Out=3, Feed=True)
    assert (answer["Feeds"], answer["GivenAt"], answer["TakenAt"]) == (True, 3, 3)
    host.feed(b"def", process=51, last=True)
    heard = hear(host)
    assert (heard.streams["out"], heard.end) == (b"def", {"Process": 51, "ExitCode": 0})


def test_one_follow_feeds_and_what_others_send_is_dropped(host: RawHost) -> None:
    program = start(host, "cat", Stdin=True, Follow={"Process": 50, "Feed": True})
    assert follow(host, program["Number"], process=51, Feed=True, Output=False)["Feeds"] is False
    host.feed(b"stray", process=51, last=True)
    host.feed(b"mine", process=50, last=True)
    host.feed(b"late", process=50)
    told = [hear(host), hear(host)]  # each follow has a thread of its own: either may tell the end first
    assert b"".join(heard.streams["out"] for heard in told) == b"mine"
    assert {heard.end["Process"] for heard in told if heard.end} == {50, 51}


def test_a_signal_reaches_it_and_not_one_that_has_ended(host: RawHost) -> None:
    script = "trap 'exit 5' USR1; echo ready; while :; do sleep 0.01; done"
    start(host, "sh", "-c", script, Follow={"Process": 50})
    hear(host, until=until_out(b"ready\n"))
    ask = messages.request(Number=1, Signal=int(signal.SIGUSR1))
    assert host.ask(messages.SIGNAL, ask)["Result"] == 0
    assert hear(host).end == {"Process": 50, "ExitCode": 5}
    assert host.ask(messages.SIGNAL, ask)["Utilityvm"]["Kind"] == "ended"
    assert host.ask(messages.SIGNAL, messages.request(Number=1, Signal=0))["Utilityvm"]["Kind"] == "invalid"


@pytest.mark.parametrize("has_ended", [False, True])
def test_kill_ends_all_that_it_started_also_after_its_own_end(host: RawHost, tmp_path: Path, has_ended: bool) -> None:
    if has_ended and cgroups._own() is None:
        pytest.skip("no cgroup v2")
    daemon = "setsid sh -c 'echo $$ > pid; exec sleep 1000' < /dev/null > /dev/null 2>&1 &"
    script = f"{daemon} until [ -s pid ]; do :; done; echo ready; {'exit 0' if has_ended else 'exec sleep 1000'}"
    start(host, "sh", "-c", script, Cwd=str(tmp_path), Follow={"Process": 50})
    hear(host, until=(lambda _: False) if has_ended else until_out(b"ready\n"))
    assert host.ask(messages.KILL, messages.request(Number=1))["Result"] == 0
    wait_until_ended(int((tmp_path / "pid").read_text()))
    assert listed(host)[0]["ExitCode"] == (0 if has_ended else -9)


def test_what_a_forgotten_program_left_behind_goes_on(host: RawHost, tmp_path: Path) -> None:
    script = "setsid sh -c 'echo $$ > pid; exec sleep 1000' > /dev/null 2>&1 & until [ -s pid ]; do :; done"
    start(host, "sh", "-c", script, Cwd=str(tmp_path), Follow={"Process": 50})
    hear(host)
    host.ask(messages.FORGET, messages.request(Number=1))
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)


def test_one_that_runs_is_not_forgotten(host: RawHost) -> None:
    start(host, "sleep", "1000")
    assert host.ask(messages.FORGET, messages.request(Number=1))["Utilityvm"]["Kind"] == "running"
    host.ask(messages.KILL, messages.request(Number=1))


def test_a_name_is_one_program_s(host: RawHost) -> None:
    assert start(host, "true", Name="web")["Name"] == "web"
    for name in ("web", "", "7", "a\nb", 3, "x" * 65):
        answer = host.ask(messages.START, messages.request(Argv=["true"], Name=name))
        assert answer["Utilityvm"]["Kind"] == "invalid", name
    assert len(listed(host)) == 1


@pytest.mark.parametrize("fields", [{"Argv": ["/no/such"]}, {"Argv": ["true"], "Cwd": "/no"}, {"Argv": []}])
def test_what_cannot_be_started_is_not_kept(host: RawHost, fields: dict[str, Any]) -> None:
    body = messages.request(**fields, Follow={"Process": 50, "Hold": True})
    assert host.ask(messages.START, body)["Result"] != 0
    assert listed(host) == []
    start(host, "true", Follow={"Process": 50})  # the number of the follow is free
    assert hear(host).end == {"Process": 50, "ExitCode": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {"RingBytes": 1}, {"RingBytes": 1 << 40}, {"Follow": {"Process": []}}, {"Follow": {"Process": 50, "Out": -1}},
        {"Limits": {"Memory": 1}}, {"Limits": {"Pids": 0}}, {"Limits": []}, {"User": "no-such-user"}, {"User": -1},
        {"User": 1 << 40}, {"User": []}, {"User": "a\0b"},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_started(host: RawHost, fields: dict[str, Any]) -> None:
    answer = host.ask(messages.START, messages.request(Argv=["true"], **fields))
    assert answer["Utilityvm"]["Kind"] == "invalid", answer
    assert listed(host) == []


@pytest.mark.parametrize("kind", [messages.FOLLOW, messages.SIGNAL, messages.KILL, messages.FORGET])
@pytest.mark.parametrize("number", [None, [], "1", 99, -1])
def test_what_is_asked_of_no_program_is_not_found(host: RawHost, kind: int, number: object) -> None:
    answer = host.ask(kind, messages.request(Process=50, Number=number, Signal=1))
    assert answer["Utilityvm"]["Kind"] == "no_program"


def test_the_oldest_that_have_ended_make_room_and_what_runs_does_not(
    ends: tuple[RawHost, AgentThread], host: RawHost
) -> None:
    ends[1].serve._programs._kept._room_bytes = 3 << 20
    for number in (1, 2, 3, 4):
        start(host, "true", Follow={"Process": 50})
        assert hear(host).end == {"Process": 50, "ExitCode": 0}
        assert [told["Number"] for told in listed(host)][-1] == number
    assert [told["Number"] for told in listed(host)] == [2, 3, 4]
    for _ in range(3):
        start(host, "sleep", "1000")
    refused = host.ask(messages.START, messages.request(Argv=["true"]))
    assert "a quarter of the guest's memory" in refused["ErrorMessage"]
    for told in listed(host):
        host.ask(messages.KILL, messages.request(Number=told["Number"]))


def test_there_are_not_too_many(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "AT_MOST", 2)
    start(host, "sleep", "1000")
    start(host, "sleep", "1000")
    assert "2 programs run already" in host.ask(messages.START, messages.request(Argv=["true"]))["ErrorMessage"]
    for number in (1, 2):
        host.ask(messages.KILL, messages.request(Number=number))


def test_a_list_that_fits_no_answer_comes_in_parts(host: RawHost) -> None:
    for _ in range(6):
        start(host, "true", *["\N{GRINNING FACE}" * 300] * 10)
    found: list[int] = []
    more = True
    while more:
        page = host.ask(messages.PROGRAMS, messages.request(After=found[-1] if found else 0))
        found += [told["Number"] for told in page["Programs"]]
        more = page["More"]
    assert found == [1, 2, 3, 4, 5, 6]


def test_a_program_runs_as_a_user_with_its_environment(host: RawHost) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    for user in ("nobody", 65534, "65534"):
        start(host, "sh", "-c", "id -u; id -g; echo $USER $HOME $A", User=user, Env={"A": "b"}, Follow={"Process": 50})
        assert hear(host).streams["out"] == b"65534\n65534\nnobody /nonexistent b\n"
    start(host, "sh", "-c", "id -u; id -G; echo $HOME", User=54321, Follow={"Process": 50})
    assert hear(host).streams["out"] == b"54321\n54321\n/\n"
    host.run("id", "-u", User="nobody")
    assert host.outcome()[0] == b"65534\n"


def test_a_limit_that_cannot_be_kept_refuses_the_program(host: RawHost) -> None:
    """This machine's cgroup v2 may have no controllers; in a VM it has them: see the tests with a real one."""
    answer = host.ask(messages.START, messages.request(Argv=["true"], Limits={"MemoryBytes": 1 << 24}))
    if answer["Result"]:
        assert "cgroup" in answer["ErrorMessage"] or "keeps no memory.max" in answer["ErrorMessage"]
        assert listed(host) == []


def test_a_program_that_is_followed_is_not_cut_off_by_a_template_and_one_that_is_not_goes_on(host: RawHost) -> None:
    start(host, "sleep", "1000", Follow={"Process": 50, "Hold": True})
    refused = host.ask(messages.QUIESCE, messages.request())["Utilityvm"]
    assert (refused["Kind"], refused["Holders"]) == ("busy", ["program 1: sleep"])
    host.send(messages.UNFOLLOW, {"Process": 50}, id=0)
    assert host.ask(messages.QUIESCE, messages.request())["Result"] == 0
    assert "frozen" in host.ask(messages.START, messages.request(Argv=["true"]))["ErrorMessage"]
    assert host.ask(messages.THAW, messages.request())["Result"] == 0
    assert listed(host)[0]["Number"] == 1
    host.ask(messages.KILL, messages.request(Number=1))


def test_no_thread_for_a_follow_is_said_and_leaves_none(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread._target.__name__ == "_send_all":  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        real(thread)

    start(host, "sleep", "1000")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert "no more threads" in follow(host, 1)["ErrorMessage"]
    assert listed(host)[0]["Follows"] == 0
    host.ask(messages.KILL, messages.request(Number=1))
