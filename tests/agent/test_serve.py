"""The agent against a host that knows only what was recorded: raw frames over a socket."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest_end import AgentThread, FakeDisks
from raw_host import RawHost
from utilityvm.agent import run, serve
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, encode, host_json

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/gcs.json").read_text())
BY_NAME: dict[str, dict[str, Any]] = {message["name"]: message for message in VECTORS["messages"]}
NEGOTIATE = bytes.fromhex(BY_NAME["negotiate_request"]["hex"])
MOUNTED = {"MountPath": "/run/mounts/scsi/m0", "Lun": 1}


def unsigned(answer: dict[str, Any]) -> int:
    assert isinstance(answer["Result"], int)
    return answer["Result"] & 0xFFFFFFFF


# What is recorded.


def test_the_recorded_conversation_of_a_plain_client_is_served(stranger: RawHost, disks: FakeDisks) -> None:
    """Frames as the real host sent them, and answers as the real guest's, to the byte."""
    for request, response in (
        ("modify_add_disk_request", "modify_add_disk_response"),
        ("modify_fails_with_stack_request", "modify_add_disk_response"),
        ("modify_remove_scsi_device_request", "modify_add_disk_response"),
    ):
        if request == "modify_add_disk_request":
            stranger.socket.sendall(NEGOTIATE)
            answer = stranger.receive()
            assert (answer.kind, answer.id) == (0x20100B01, 0)
            assert answer.body()["Version"] == 4
        stranger.socket.sendall(bytes.fromhex(BY_NAME[request]["hex"]))
        answer = stranger.receive()
        assert answer.kind == int(BY_NAME[response]["type_hex"], 16)
        assert answer.id == BY_NAME[request]["id"]
        assert answer.payload.decode() == BY_NAME[response]["body"]
    assert (0, 1) not in disks.attached


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("modify_unknown_resource_request", messages.E_FAIL),
        ("modify_scratch_type_on_linux_guest_request", messages.E_FAIL),
        ("modify_lun_over_255_request", messages.E_INVALID_JSON),
        ("unknown_message_type_request", messages.E_NOT_IMPLEMENTED),
        ("negotiate_unsupported_versions_request", messages.E_UNSUPPORTED_VERSION),
    ],
)
def test_a_recorded_request_that_is_refused_gets_the_recorded_code(host: RawHost, name: str, code: int) -> None:
    host.socket.sendall(bytes.fromhex(BY_NAME[name]["hex"]))
    answer = host.receive()
    assert answer.id == BY_NAME[name]["id"]
    assert unsigned(answer.body()) == code
    records = answer.body()["ErrorRecords"]
    assert records[0]["Message"] == answer.body()["ErrorMessage"]


@pytest.mark.parametrize("message", [m for m in VECTORS["messages"] if m["direction"] == "host_to_guest"])
def test_every_recorded_request_is_answered_once(host: RawHost, message: dict[str, Any]) -> None:
    host.socket.sendall(bytes.fromhex(message["hex"]))
    answer = host.receive()
    assert (answer.kind, answer.id) == (messages.response_to(int(message["type_hex"], 16)), message["id"])
    assert "Result" in answer.body()
    host.negotiate()  # its answer is the next thing that is heard


def test_nothing_is_served_before_a_negotiate(stranger: RawHost) -> None:
    answer = stranger.modify("Add", "MappedVirtualDisk", MOUNTED)
    assert answer["Result"] == json.loads(BY_NAME["modify_before_negotiate_response"]["body"])["Result"]


def test_nothing_is_served_after_a_negotiate_that_failed(host: RawHost) -> None:
    answer = host.ask(messages.NEGOTIATE, {**messages.negotiate_request(), "MinimumVersion": 5, "MaximumVersion": 6})
    assert unsigned(answer) == messages.E_UNSUPPORTED_VERSION
    assert unsigned(host.ask(messages.PING)) == messages.E_NOT_IMPLEMENTED


@pytest.mark.parametrize("version", ["4", None, [4]])
def test_a_version_that_is_no_number_is_refused(stranger: RawHost, version: object) -> None:
    answer = stranger.ask(messages.NEGOTIATE, {**messages.negotiate_request(), "MaximumVersion": version})
    assert unsigned(answer) == messages.E_INVALID_JSON


def test_a_negotiate_within_a_wider_range_is_served(stranger: RawHost) -> None:
    answer = stranger.ask(messages.NEGOTIATE, {"MinimumVersion": 1, "MaximumVersion": 9})
    assert (answer["Result"], answer["Version"]) == (0, 4)


def test_a_second_negotiate_is_a_new_host(host: RawHost) -> None:
    """Over virtio-serial a host that went and came again is not seen to have gone."""
    assert host.negotiate()["Result"] == 0
    assert host.ask(messages.PING)["Result"] == 0


def test_a_response_has_the_activity_of_its_request(host: RawHost) -> None:
    activity = "8f8a1bb2-3f0b-4b8a-9a30-53d6b1d4c111"
    assert host.ask(messages.PING, {**messages.request(), "ActivityId": activity})["ActivityId"] == activity


@pytest.mark.parametrize("activity", [7, None, "x" * 60000, ["a"]])
def test_an_activity_that_is_none_is_not_repeated(host: RawHost, activity: object) -> None:
    answer = host.ask(messages.PING, {**messages.request(), "ActivityId": activity})
    assert (answer["Result"], answer["ActivityId"]) == (0, messages.NULL_GUID)


@pytest.mark.parametrize("container", ["c1", "", 5, "\ud800"])
def test_a_container_that_is_not_the_vm_is_unknown(host: RawHost, container: object) -> None:
    payload = json.dumps({"ContainerId": container, "Request": {}}).encode()
    host.socket.sendall(encode(messages.MODIFY, 7, payload))
    assert unsigned(host.receive().body()) == messages.E_NO_SUCH_SYSTEM


@pytest.mark.parametrize("payload", [b"", b"abc", b"[]", b'{"a":NaN}', b"\xff\xfe", b"[" * 50000])
def test_a_request_that_is_no_json_is_refused_and_the_next_is_served(host: RawHost, payload: bytes) -> None:
    host.socket.sendall(encode(messages.MODIFY, 7, payload))
    answer = host.receive()
    assert (answer.id, unsigned(answer.body())) == (7, messages.E_INVALID_JSON)
    assert host.ask(messages.PING)["Result"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"Lun": 256}, {"Lun": -1}, {"Lun": "1"}, {"Lun": 1.5}, {"Lun": True}, {"Controller": 256}, {"Partition": -1},
        {"ReadOnly": 1}, {"Options": "ro"}, {"Options": [1]}, {"MountPath": 3}, {"Utilityvm": []}, {"BlockDev": "yes"},
    ],
)  # fmt: skip
def test_a_setting_of_a_wrong_type_is_bad_json_and_nothing_is_mounted(
    host: RawHost, disks: FakeDisks, wrong: dict[str, Any]
) -> None:
    answer = host.modify("Add", "MappedVirtualDisk", {**MOUNTED, **wrong})
    assert unsigned(answer) == messages.E_INVALID_JSON
    assert not disks.mounts()


def test_a_null_setting_is_one_that_is_left_out(host: RawHost, disks: FakeDisks) -> None:
    assert host.modify("Add", "MappedVirtualDisk", {**MOUNTED, "Options": None, "Partition": None})["Result"] == 0
    assert disks.mounts()[0]["Partition"] == 0


def test_a_request_without_a_type_is_an_add(host: RawHost, disks: FakeDisks) -> None:
    body = messages.request(Request={"ResourceType": "MappedVirtualDisk", "Settings": MOUNTED})
    assert host.ask(messages.MODIFY, body)["Result"] == 0
    assert len(disks.mounts()) == 1


@pytest.mark.parametrize(
    "request_body", [None, 3, {}, {"ResourceType": "SCSIDevice"}, {"ResourceType": "MappedVirtualDisk", "Settings": 3}]
)
def test_a_modify_that_says_nothing_is_refused(host: RawHost, request_body: object) -> None:
    assert host.ask(messages.MODIFY, messages.request(Request=request_body))["Result"] != 0


# What the real agent does, and ours must not.


def test_a_second_add_at_a_path_is_refused_with_who_is_there(host: RawHost, disks: FakeDisks) -> None:
    host.modify("Add", "MappedVirtualDisk", MOUNTED)
    answer = host.modify("Add", "MappedVirtualDisk", {**MOUNTED, "Lun": 2})
    assert unsigned(answer) == messages.E_FAIL
    assert answer["Utilityvm"] == {"Kind": "busy", "Holders": ["a mount at /run/mounts/scsi/m0"]}
    assert [mount["Lun"] for mount in disks.mounts()] == [1]


def test_a_disk_that_is_not_there_is_waited_for_as_long_as_the_host_says(host: RawHost) -> None:
    answer = host.modify("Add", "MappedVirtualDisk", {"MountPath": "/a", "Lun": 50}, TimeoutMs=30)
    assert answer["Utilityvm"]["Kind"] == "timeout"


def test_a_controller_above_3_is_refused_and_the_next_request_served(host: RawHost) -> None:
    answer = host.modify("Add", "MappedVirtualDisk", {**MOUNTED, "Controller": 4})
    assert answer["Utilityvm"]["Kind"] == "invalid"
    assert host.ask(messages.PING)["Result"] == 0


def test_a_mounted_disk_is_not_ejected_unless_forced(host: RawHost, disks: FakeDisks) -> None:
    host.modify("Add", "MappedVirtualDisk", MOUNTED)
    assert host.modify("Remove", "SCSIDevice", {"Lun": 1})["Utilityvm"]["Kind"] == "busy"
    assert host.modify("Remove", "SCSIDevice", {"Lun": 1}, Force=True)["Result"] == 0
    assert not disks.mounts()


def test_a_busy_mount_stays_unless_forced(host: RawHost, disks: FakeDisks) -> None:
    host.modify("Add", "MappedVirtualDisk", MOUNTED)
    disks.busy[MOUNTED["MountPath"]] = ["process 7 (cat)"]  # type: ignore[index]
    answer = host.modify("Remove", "MappedVirtualDisk", MOUNTED)
    assert answer["Utilityvm"] == {"Kind": "busy", "Holders": ["process 7 (cat)"]}
    assert host.modify("Remove", "MappedVirtualDisk", MOUNTED, Force=True)["Result"] == 0


# Order, time and numbers.


def test_a_request_that_hangs_is_answered_when_its_time_is_up_and_holds_up_no_other(
    host: RawHost, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_GRACE_S", 0.05)
    release = disks.hang(0, 2)
    stuck = host.send(
        messages.MODIFY, messages.modify_request("Remove", "SCSIDevice", {"Lun": 2}, extension={"TimeoutMs": 200})
    )
    assert host.ask(messages.PING)["Result"] == 0
    assert host.modify("Add", "MappedVirtualDisk", MOUNTED)["Result"] == 0
    answer = host.receive()
    assert answer.id == stuck
    assert answer.body()["Utilityvm"]["Kind"] == "timeout"
    release()
    # Its own answer comes too late and is not sent: a second would break the protocol.
    assert host.ask(messages.PROBE, messages.request(Lun=2))["Result"] == 0


def test_answers_come_as_the_work_is_done(host: RawHost, disks: FakeDisks) -> None:
    release = disks.hang(0, 2)
    first = host.send(messages.PROBE, messages.request(Lun=2))
    second = host.send(messages.PROBE, messages.request(Lun=1))
    assert host.receive().id == second
    release()
    assert host.receive().id == first


def test_a_probe_tells_what_is_so_after_what_was_asked_before_it_also_by_a_host_that_died(
    host: RawHost, disks: FakeDisks
) -> None:
    release = disks.hang(0, 2, even_probes=False)
    host.send(messages.MODIFY, messages.modify_request("Add", "MappedVirtualDisk", {**MOUNTED, "Lun": 2}))
    assert host.negotiate()["Result"] == 0
    in_vain = host.send(messages.PROBE, messages.request(Lun=2, Utilityvm={"TimeoutMs": 10}))
    answer = host.receive()
    assert (answer.id, answer.body()["Utilityvm"]["Kind"]) == (in_vain, "timeout")
    probe = host.send(messages.PROBE, messages.request(Lun=2))
    assert host.ask(messages.PROBE, messages.request(Lun=1))["MountPaths"] == []
    release()
    answer = host.receive()
    assert (answer.id, answer.body()["MountPaths"]) == (probe, [MOUNTED["MountPath"]])


def test_a_hundred_requests_at_once_are_all_answered(host: RawHost) -> None:
    sent = [host.send(messages.PROBE, messages.request(Lun=number % 5)) for number in range(100)]
    assert sorted(host.receive().id for _ in sent) == sent


def test_more_requests_than_threads_are_refused_and_not_queued(
    host: RawHost, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = disks.hang(0, 2)
    stuck = {host.send(messages.PROBE, messages.request(Lun=2)) for _ in range(serve.MAX_REQUESTS)}
    refused = host.ask(messages.PROBE, messages.request(Lun=1))
    assert "under way" in refused["ErrorMessage"]
    assert host.ask(messages.PING)["Result"] == 0
    release()
    assert {host.receive().id for _ in stuck} == stuck


def test_an_agent_that_fails_says_so(host: RawHost, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(controller: int, lun: int) -> dict[str, Any]:
        raise ZeroDivisionError("no reason")

    monkeypatch.setattr(disks, "probe", fail)
    answer = host.ask(messages.PROBE)
    assert "ZeroDivisionError: no reason" in answer["ErrorMessage"]
    assert answer["Utilityvm"]["Kind"] == "unknown"


def test_an_answer_that_fits_no_frame_is_an_error_and_not_silence(
    host: RawHost, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "probe", lambda controller, lun: {"Text": "x" * 70000})
    assert "no answer" in host.ask(messages.PROBE)["ErrorMessage"]


def test_mounts_are_told_in_pages_that_fit(host: RawHost, disks: FakeDisks) -> None:
    paths = sorted(f"/mnt/{number}/{'x' * 250}" for number in range(200))
    for path in paths:
        disks.add({"MountPath": path, "Lun": 1}, time.monotonic())
    told: list[str] = []
    more = True
    pages = 0
    while more:
        answer = host.ask(messages.MOUNTS, messages.request(After=told[-1] if told else ""))
        told += [mount["MountPath"] for mount in answer["Mounts"]]
        more = answer["More"]
        pages += 1
    assert told == paths
    assert pages > 1


def test_info_tells_kernel_and_boot(host: RawHost) -> None:
    answer = host.ask(messages.INFO)
    assert answer["BootId"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert answer["UptimeMs"] > 0
    assert answer["Kernel"]


def test_shutdown_is_answered_before_it_is_done(ends: tuple[RawHost, AgentThread], host: RawHost) -> None:
    assert host.ask(messages.SHUTDOWN)["Result"] == 0
    assert ends[1].was_shut_down.wait(20)


@pytest.mark.parametrize("kind", [0x20100A01, 0x30100101, 0x40100A01, 0x00100A01, 0xFFFFFFFF])
def test_what_is_no_request_is_not_answered(host: RawHost, kind: int) -> None:
    host.send(kind, {})
    assert host.ask(messages.PING)["Result"] == 0


# Hosts that come, go, and break.


@pytest.mark.parametrize("size", [0, 15, 65537, 2**32 - 1])
def test_after_a_broken_frame_only_a_negotiate_is_served(host: RawHost, size: int) -> None:
    host.socket.sendall(messages.PING.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(8))
    assert unsigned(host.receive().body()) == messages.E_INVALID_JSON
    assert unsigned(host.ask(messages.PING)) == messages.E_NOT_IMPLEMENTED
    assert host.negotiate()["Result"] == 0
    assert host.ask(messages.PING)["Result"] == 0


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_a_host_after_one_that_died_in_a_frame_is_served(host: RawHost, length: int) -> None:
    """The port blends them: there is no end between."""
    host.socket.sendall(encode(messages.PING, 5, bytes(5000))[:length])
    host.socket.sendall(NEGOTIATE)
    answer = host.receive()
    assert (answer.kind, answer.id) == (messages.response_to(messages.NEGOTIATE), 0)
    assert host.ask(messages.PING)["Result"] == 0


def test_what_was_meant_for_the_host_before_is_not_sent_to_the_next(host: RawHost, disks: FakeDisks) -> None:
    release = disks.hang(0, 2)
    host.send(messages.PROBE, messages.request(Lun=2), id=1)
    assert host.negotiate()["Result"] == 0
    release()
    for _ in range(3):
        assert host.ask(messages.PROBE, messages.request(Lun=2))["Result"] == 0


byte_pieces = st.lists(
    st.binary(max_size=100)
    | st.just(NEGOTIATE)
    | st.sampled_from([bytes.fromhex(message["hex"])[:70] for message in VECTORS["messages"]])
    | st.builds(
        lambda kind, id, body: encode(kind, id, json.dumps(body).encode()),
        st.sampled_from([value for name, value in vars(messages).items() if name.isupper() and isinstance(value, int)]),
        st.integers(0, 9),
        st.dictionaries(
            st.sampled_from(["Process", "Argv", "Request", "Data", "Bytes", "Signal", "After", "Lun", "ActivityId"]),
            st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
        ).filter(lambda body: not body.get("Argv")),
    ).filter(lambda frame: int.from_bytes(frame[:4], "little") != messages.SHUTDOWN)
    | st.builds(
        lambda kind, size, id: struct.pack("<IIQ", kind, size, id) + b"{}",
        st.sampled_from([messages.NEGOTIATE, messages.MODIFY, 0xFFFFFFFF]),
        st.integers(0, 15) | st.integers(65530, 65540) | st.just(0xFFFFFFFF),
        st.integers(0, 4),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(byte_pieces)
def test_no_bytes_keep_the_next_host_out(pieces: list[bytes]) -> None:
    """Our own host sends its negotiate until it is answered: one of a few must get through whatever came before."""
    ours, theirs = socket.socketpair()
    agent = AgentThread(theirs, FakeDisks())
    with ours:
        for piece in pieces:
            ours.sendall(piece)
        for id in range(1000, 1003):
            ours.sendall(encode(messages.NEGOTIATE, id, host_json(messages.negotiate_request())))
        ours.shutdown(socket.SHUT_WR)
        agent.join()
        stream = b"".join(iter(lambda: ours.recv(65536), b""))
    *_, last = Decoder().feed(stream)
    assert (last.kind, last.id, last.body()["Result"]) == (messages.response_to(messages.NEGOTIATE), 1002, 0)


@pytest.mark.parametrize("what", ["_run", "_work"])
def test_a_request_that_no_thread_is_free_for_is_refused_and_the_agent_goes_on(
    host: RawHost, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Neither one to do it, nor one to watch over it."""
    real = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread._target.__name__ == what:  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for body in (None, messages.request(Process=1, Argv=["true"])):
            kind = messages.PROBE if body is None else messages.RUN
            assert "no thread free" in host.ask(kind, body)["ErrorMessage"]
        assert host.ask(messages.PING)["Result"] == 0
    assert host.run("true")["Result"] == 0  # its number is free
    assert host.outcome()[2] == 0


def test_whatever_is_wrong_with_what_is_told_the_agent_goes_on(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(run.Programs, "tell", fail)
    host.send(messages.RUN_CANCEL, {"Process": 1}, id=0)
    assert host.ask(messages.PING)["Result"] == 0


def test_what_was_meant_for_a_host_that_sent_no_frames_is_not_sent_to_the_next(
    ends: tuple[RawHost, AgentThread], host: RawHost
) -> None:
    """The next one may be on the same port before the answer is written."""
    port = ends[1].serve._port
    before = port.session
    host.socket.sendall(bytes(16))
    host.receive()
    host.negotiate()
    assert port.session >= before + 2, "one session ended with the frame that was none, and one began"
