"""Templates and clones as a host asks for them: raw frames over a socket."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from guest_end import AgentThread, FakeDisks, FakeSystem
from raw_host import RawHost
from utilityvm.agent import serve
from utilityvm.bridge import messages

MOUNTED = {"MountPath": "/mnt/a", "Lun": 1}
UNIQUE = messages.request(Seed="ab" * 32, Hostname="clone-1", MachineId="0f" * 16, ClockNs=10**18)
BOTH = ["/data", "/data/inner"]


@pytest.fixture
def system(ends: tuple[RawHost, AgentThread]) -> FakeSystem:
    return ends[1].system


def quiesce(host: RawHost, **fields: Any) -> dict[str, Any]:
    return host.ask(messages.QUIESCE, messages.request(**fields))


def test_a_frozen_guest_refuses_what_would_change_it_and_answers_the_rest(
    host: RawHost, system: FakeSystem, disks: FakeDisks
) -> None:
    assert quiesce(host)["Result"] == 0
    assert sorted(system.filesystems.frozen) == BOTH
    for answer in (
        host.modify("Add", "MappedVirtualDisk", MOUNTED),
        host.modify("Remove", "SCSIDevice", {"Lun": 1}),
        host.ask(messages.GROW, messages.request(Lun=1)),
        host.run("true"),
    ):
        assert "frozen to become a template" in answer["ErrorMessage"]
        assert answer["Utilityvm"]["Kind"] == "refused"
    assert (0, 1) in disks.attached
    for kind in (messages.PING, messages.INFO, messages.PROBE, messages.MOUNTS):
        assert host.ask(kind)["Result"] == 0
    assert host.ask(messages.THAW)["Result"] == 0
    assert host.modify("Add", "MappedVirtualDisk", MOUNTED)["Result"] == 0
    assert host.run("true")["Result"] == 0


def test_programs_of_the_host_are_named_and_nothing_is_frozen(host: RawHost, system: FakeSystem) -> None:
    host.run("cat", Stdin=True)
    answer = quiesce(host)
    assert answer["Utilityvm"] == {"Kind": "busy", "Holders": ["process 1: cat"]}
    assert not system.filesystems.frozen
    host.feed(b"", last=True)
    assert host.outcome()[2] == 0
    assert quiesce(host)["Result"] == 0


def test_a_freeze_that_hangs_is_answered_in_time_and_undone_when_it_ends(
    host: RawHost, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_GRACE_S", 0.05)
    release = system.filesystems.hang("/data")
    answer = quiesce(host, Utilityvm={"TimeoutMs": 50})
    assert answer["Utilityvm"]["Kind"] == "timeout"
    assert host.ask(messages.PING)["Result"] == 0
    release()
    assert host.ask(messages.THAW)["Result"] == 0
    assert not system.filesystems.frozen


@pytest.mark.parametrize("hold", ["50", None, -1, [], 50])
def test_a_hold_that_makes_no_sense_is_the_usual_one(host: RawHost, system: FakeSystem, hold: object) -> None:
    assert quiesce(host, HoldMs=hold)["Result"] == 0
    if hold in (50, -1):
        until = time.monotonic() + 20
        while system.filesystems.frozen:
            assert time.monotonic() < until
    else:
        assert sorted(system.filesystems.frozen) == BOTH


def test_a_clone_is_made_itself_and_says_so(host: RawHost, system: FakeSystem) -> None:
    quiesce(host)
    template = host.ask(messages.INFO)["BootId"]
    answer = host.ask(messages.UNIQUE, UNIQUE)
    assert answer["Result"] == 0
    assert answer["BootId"] != template
    assert host.ask(messages.INFO)["BootId"] == answer["BootId"]
    assert system.kernel.hostname == "clone-1"
    assert not system.filesystems.frozen
    assert host.modify("Add", "MappedVirtualDisk", MOUNTED)["Result"] == 0


@pytest.mark.parametrize("wrong", [{"Seed": "ab"}, {"Hostname": None}, {"ClockNs": []}])
def test_a_clone_that_is_given_nonsense_stays_what_it_is(
    host: RawHost, system: FakeSystem, wrong: dict[str, Any]
) -> None:
    quiesce(host)
    assert host.ask(messages.UNIQUE, {**UNIQUE, **wrong})["Utilityvm"]["Kind"] == "invalid"
    assert sorted(system.filesystems.frozen) == BOTH
    assert not system.kernel.seeds


def test_a_hook_that_takes_its_time_holds_up_nobody(host: RawHost, system: FakeSystem) -> None:
    gate = system.root / "gate"
    os.mkfifo(gate)
    system.hook("10-slow", "cat $ROOT/gate")
    sent = host.send(messages.UNIQUE, UNIQUE)
    assert host.ask(messages.PING)["Result"] == 0
    gate.write_text("go on\n")
    answer = host.receive()
    assert (answer.id, answer.body()["Result"]) == (sent, 0)


def test_a_hook_that_fails_is_named_to_the_host(host: RawHost, system: FakeSystem) -> None:
    system.hook("10-keys", "echo no keys; exit 4")
    answer = host.ask(messages.UNIQUE, UNIQUE)
    assert answer["ErrorMessage"] == f"the hook {system.hooks}/10-keys clone ended with 4: no keys"


def test_what_the_template_was_asked_is_not_answered_to_the_clones_host(host: RawHost, disks: FakeDisks) -> None:
    """The next host on the port may be that of a clone; there a request may end that the template had begun."""
    release = disks.hang(0, 2)
    for id in range(5):
        host.send(messages.PROBE, messages.request(Lun=2), id=id)
    assert quiesce(host)["Result"] == 0
    assert host.negotiate()["Result"] == 0
    assert host.ask(messages.UNIQUE, UNIQUE)["Result"] == 0
    release()
    for id in range(5, 10):
        host.send(messages.PROBE, messages.request(Lun=1), id=id)
    assert sorted(host.response().id for _ in range(5)) == list(range(5, 10))
