"""Our host end with our agent, through a port as QEMU's."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from guest_end import AgentThread, FakeDisks, FakeSerialPort
from utilityvm.agent import serve
from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    OutcomeUnknown,
    ProtocolError,
    VMGone,
)
from utilityvm.guests import bridge_client
from utilityvm.guests.bridge_guest import BridgeGuest, CommandResult, OutputSink
from utilityvm.guests.program import GuestProgram
from utilityvm.scsi.ports import CallerKey, GuestBackend, MountConfig, ScratchKey, Verity
from utilityvm.scsi.slot import Slot

StartAgent = Callable[[], Awaitable[AgentThread]]

SLOT = Slot(0, 1)
PATH = PurePosixPath("/mnt/a")
PLAIN = MountConfig()


async def mount(guest: GuestBackend, slot: Slot = SLOT, path: PurePosixPath = PATH) -> None:
    await guest.mount(slot, PLAIN, guest_path=path, timeout_s=20)


async def ended(guest: BridgeGuest, pattern: str) -> None:
    """Return when no process of that command line is left."""
    async with asyncio.timeout(20):
        while (await guest.run(["pgrep", "-f", pattern])).exit_code == 0:
            pass


# Mounts.


async def test_what_the_agent_says_of_a_mount_is_given_to_its_caller(guest: BridgeGuest, disks: FakeDisks) -> None:
    disks.notes = ["/mnt/a is mounted read-only", *(f"{number}" for number in range(20))]
    said = await guest.mount(SLOT, PLAIN, guest_path=PATH, timeout_s=20)
    assert list(said) == ["/mnt/a is mounted read-only", *"012345678"]


async def test_a_mount_is_there_until_it_is_unmounted(guest: BridgeGuest, disks: FakeDisks) -> None:
    await mount(guest)
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=20)
    assert [entry["MountPath"] for entry in await guest.mounts()] == ["/mnt/a"]
    await guest.unmount(SLOT, PLAIN, guest_path=PATH, timeout_s=20, force=False)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=20)
    assert await guest.probe_device(SLOT, timeout_s=20)
    await guest.eject(SLOT, timeout_s=20, force=False)
    assert not await guest.probe_device(SLOT, timeout_s=20)
    assert (0, 1) not in disks.attached


async def test_many_mounts_are_all_told(guest: BridgeGuest, disks: FakeDisks) -> None:
    paths = sorted(f"/mnt/{number}/{'x' * 250}" for number in range(200))
    await asyncio.gather(*(mount(guest, path=PurePosixPath(path)) for path in paths))
    assert [entry["MountPath"] for entry in await guest.mounts(timeout_s=20)] == paths


async def test_a_refusal_names_slot_and_path(guest: BridgeGuest) -> None:
    await mount(guest)
    with pytest.raises(GuestPathInUse, match=r"0:2 at /mnt/a: /mnt/a is in use") as caught:
        await mount(guest, Slot(0, 2))
    assert (caught.value.slot, caught.value.vm) == (Slot(0, 2), "one")


async def test_a_busy_mount_is_told_with_its_users_and_can_be_forced(guest: BridgeGuest, disks: FakeDisks) -> None:
    await mount(guest)
    disks.busy["/mnt/a"] = ["process 7 (cat)"]
    with pytest.raises(GuestBusy) as caught:
        await guest.unmount(SLOT, PLAIN, guest_path=PATH, timeout_s=20, force=False)
    assert caught.value.holders == ("process 7 (cat)",)
    await guest.unmount(SLOT, PLAIN, guest_path=PATH, timeout_s=20, force=True)
    assert not await guest.mounts()


async def test_a_disk_that_does_not_come_is_a_deadline_of_that_request(guest: BridgeGuest) -> None:
    with pytest.raises(DeadlineExceeded, match="no disk came at 0:50"):
        await guest.mount(Slot(0, 50), PLAIN, guest_path=PATH, timeout_s=0.05)
    await guest.ping()


async def test_a_request_that_hangs_costs_only_its_caller(
    guest: BridgeGuest, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utilityvm.agent.serve._GRACE_S", 60.0)  # the agent does not say so either
    monkeypatch.setattr("utilityvm.guests.session.ANSWER_S", 0.0)
    release = disks.hang(*SLOT)
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        await guest.probe_device(SLOT, timeout_s=0.1)
    await mount(guest, Slot(0, 2))
    release()
    for _ in range(3):  # the late answer is dropped
        assert await guest.probe_device(SLOT, timeout_s=20)


async def test_a_request_that_hangs_is_answered_by_the_agent_for_it(
    guest: BridgeGuest, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utilityvm.agent.serve._GRACE_S", 0.01)
    monkeypatch.setattr("utilityvm.guests.session.ANSWER_S", 60.0)
    release = disks.hang(*SLOT)
    with pytest.raises(DeadlineExceeded, match="0:1: it was not done within"):
        await guest.eject(SLOT, timeout_s=0.1, force=False)
    release()


async def test_what_the_agent_cannot_say_is_unknown(
    guest: BridgeGuest, disks: FakeDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: dict[str, Any], deadline: float) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(disks, "add", fail)
    with pytest.raises(OutcomeUnknown, match="ZeroDivisionError"):
        await mount(guest)


async def test_what_the_host_knows_of_a_disk_goes_with_a_mount_that_may_make_a_file_system(
    guest: BridgeGuest, disks: FakeDisks
) -> None:
    asked: list[Slot] = []

    async def allocated(slot: Slot) -> list[tuple[int, int]]:
        asked.append(slot)
        return [(0, 4096)]

    guest.allocated = allocated
    await mount(guest)
    await guest.mount(SLOT, MountConfig(ensure_filesystem=True), guest_path=PurePosixPath("/mnt/made"), timeout_s=20)
    assert asked == [SLOT]
    assert [settings.get("Utilityvm") for settings in disks.asked] == [None, {"MayHold": [[0, 4096]]}]


async def test_grow_goes_through(guest: BridgeGuest) -> None:
    await guest.grow(SLOT, mounts=[], timeout_s=20)
    with pytest.raises(GuestRefused, match="0:9: there is no disk"):
        await guest.grow(Slot(0, 9), mounts=[], timeout_s=20)


@pytest.mark.parametrize(
    "path", ["mnt/a", "/", "//a", "/a/../b", "/a\0b", "/a\nb", "/" + "a" * 256, "/a" * 2048, "/\ud800"]
)
async def test_a_guest_path_that_is_none_is_refused_before_anything_is_sent(guest: BridgeGuest, path: str) -> None:
    with pytest.raises(InvalidRequest, match="guest path"):
        await mount(guest, path=PurePosixPath(path))
    assert not await guest.mounts()


@pytest.mark.parametrize("slot", [Slot(4, 0), Slot(-1, 0), Slot(0, 64)])
async def test_a_slot_that_does_not_exist_is_refused_before_anything_is_sent(guest: BridgeGuest, slot: Slot) -> None:
    for step in (
        mount(guest, slot),
        guest.unmount(slot, PLAIN, guest_path=PATH, timeout_s=20, force=False),
        guest.eject(slot, timeout_s=20, force=False),
    ):
        with pytest.raises(InvalidRequest, match="does not exist"):
            await step


VERITY = Verity(root_hash=b"h" * 32, hash_offset_bytes=4096)


@pytest.mark.parametrize(
    "config",
    [
        MountConfig(partition=-1),
        MountConfig(partition=1000),
        MountConfig(options=("",)),
        MountConfig(options=("a\0b",)),
        MountConfig(filesystem="../evil"),
        MountConfig(filesystem=""),
        MountConfig(ensure_filesystem=True, read_only=True),
        MountConfig(reformat=True),
        MountConfig(block_device=True, options=("noatime",)),
        MountConfig(encryption=CallerKey(b"short")),
        MountConfig(verity=VERITY),
        MountConfig(verity=Verity(root_hash=b"", hash_offset_bytes=4096), read_only=True),
        MountConfig(verity=Verity(root_hash=b"h", hash_offset_bytes=0), read_only=True),
        MountConfig(verity=Verity(root_hash=b"h", hash_offset_bytes=100), read_only=True),
    ],
)
async def test_a_config_that_makes_no_sense_is_refused(guest: BridgeGuest, config: MountConfig) -> None:
    with pytest.raises(InvalidRequest):
        guest.check(SLOT, config)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        MountConfig(partition=1, options=("noatime", "data=ordered"), filesystem="ext4"),
        MountConfig(verity=VERITY, read_only=True),
        MountConfig(encryption=CallerKey(b"k" * 64), ensure_filesystem=True, reformat=True),
        MountConfig(encryption=ScratchKey(), ensure_filesystem=True),
        MountConfig(block_device=True),
    ],
)
async def test_our_agent_can_be_told_all_that_makes_sense(guest: BridgeGuest, config: MountConfig) -> None:
    guest.check(SLOT, config)


async def test_a_key_reaches_the_disk_and_no_log(
    guest: BridgeGuest, disks: FakeDisks, caplog: pytest.LogCaptureFixture
) -> None:
    key = base64.b64encode(b"k" * 32).decode()
    with caplog.at_level(logging.DEBUG, logger="utilityvm"):
        config = MountConfig(encryption=CallerKey(b"k" * 32))
        await guest.mount(SLOT, config, guest_path=PATH, timeout_s=20)
        await guest.run(["true"], env={"TOKEN": "s3cret"}, stdin=b"s3cret too")
    assert disks.keys == {"/mnt/a": key}
    shown = "".join(record.getMessage() for record in caplog.records)
    assert "--> 0x10100a01" in shown
    assert "<-- 0x20100a01" in shown
    for secret in (key, "s3cret", base64.b64encode(b"s3cret too").decode()):
        assert secret not in shown


async def test_nothing_is_formatted_for_a_log_that_is_off(guest: BridgeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(body: object) -> object:
        raise AssertionError("formatted")

    monkeypatch.setattr(bridge_client, "_shown", fail)
    logging.getLogger("utilityvm").setLevel(logging.INFO)
    try:
        await guest.ping()
    finally:
        logging.getLogger("utilityvm").setLevel(logging.NOTSET)


async def test_a_guest_that_speaks_of_a_program_nobody_started_is_cut_off(guest: BridgeGuest) -> None:
    assert guest._client
    await guest.run(["true"])
    guest._take_notification(messages.RUN_EXIT, {"Process": 1, "ExitCode": 0})  # late, of one that we gave up
    for body in ({"Process": 2, "ExitCode": 0}, {"Process": "1"}, {}):
        with pytest.raises(ProtocolError):
            guest._take_notification(messages.RUN_EXIT, body)
    with pytest.raises(ProtocolError):
        guest._take_notification(0x30F0FF01, {"Process": 1})
    guest._take_notification(messages.CONTAINER_NOTIFICATION, {"ContainerId": "c1"})


async def test_a_hundred_pings_at_once(guest: BridgeGuest) -> None:
    await asyncio.gather(*(guest.ping() for _ in range(100)))


async def test_info_is_of_the_agents_kernel(guest: BridgeGuest) -> None:
    info = await guest.info()
    assert info["BootId"] == guest.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert info["Agent"] == serve.VERSION


async def test_shutdown_is_begun(port: FakeSerialPort, start_agent: StartAgent) -> None:
    agent = await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=20)
    agent.unclean = ["/data is not clean: swap in /data/swap"]
    assert await guest.shutdown() == ("/data is not clean: swap in /data/swap",)
    await asyncio.to_thread(agent.was_shut_down.wait, 20)
    await guest.close()


async def test_a_request_too_large_for_a_frame_is_refused_and_harms_nothing(guest: BridgeGuest) -> None:
    with pytest.raises(InvalidRequest, match="65536"):
        await guest.run(["echo", "x" * 70000])
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        await guest.run(["echo", "\ud800"])
    await guest.ping()


# Connections and agents that end.


async def test_an_agent_that_comes_up_late_is_waited_for(port: FakeSerialPort, start_agent: StartAgent) -> None:
    connecting = asyncio.create_task(BridgeGuest.connect(port.path, timeout_s=20))
    await asyncio.sleep(0)
    await start_agent()
    guest = await connecting
    await guest.ping()
    await guest.close()


async def test_no_agent_is_a_deadline(port: FakeSerialPort) -> None:
    with pytest.raises(DeadlineExceeded, match="did not answer within") as caught:
        await BridgeGuest.connect(port.path, timeout_s=0.2)
    assert caught.value.remedy


async def test_nobody_listening_is_told_at_once(folder: Path) -> None:
    with pytest.raises(VMGone, match="nobody answers"):
        await BridgeGuest.connect(folder / "none.sock", timeout_s=20)


async def test_the_end_of_the_connection_reaches_all_who_wait_at_once(
    guest: BridgeGuest, port: FakeSerialPort, disks: FakeDisks
) -> None:
    release = disks.hang(*SLOT)
    waiting = [asyncio.create_task(guest.probe_device(SLOT, timeout_s=3600)) for _ in range(5)]
    waiting.append(asyncio.create_task(guest.run(["sleep", "1000"])))  # type: ignore[arg-type]
    await guest.ping()
    port.drop_host()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [VMGone] * 6
    assert len({id(error) for error in errors}) == 6  # each has a traceback of its own
    release()


async def test_the_next_request_connects_anew(guest: BridgeGuest, port: FakeSerialPort) -> None:
    await mount(guest)
    port.drop_host()
    with pytest.raises(VMGone):
        await guest.run(["sleep", "1000"])
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=20)


async def test_an_agent_that_was_started_again_is_met_without_a_word(
    guest: BridgeGuest, start_agent: StartAgent
) -> None:
    await mount(guest)
    await start_agent()
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=20)
    await start_agent()
    assert (await guest.run(["echo", "a"])).stdout == b"a\n"


async def test_requests_that_an_agent_takes_to_its_grave_are_unknown_soon(
    guest: BridgeGuest, start_agent: StartAgent, disks: FakeDisks
) -> None:
    """Not sent again: they may have been done. The connection itself does not end, QEMU holds it."""
    release = disks.hang(*SLOT)
    waiting = [
        asyncio.create_task(guest.eject(SLOT, timeout_s=3600, force=False)),
        asyncio.create_task(guest.run(["sleep", "1000"])),
    ]
    await guest.ping()
    await start_agent()
    await guest.ping()  # the first to notice
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [OutcomeUnknown, OutcomeUnknown]
    release()


async def test_a_dead_agent_is_noticed_while_somebody_waits(
    port: FakeSerialPort, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_client, "_DOUBT_S", 0.02)
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=20)
    running = asyncio.create_task(guest.run(["sleep", "1000"]))
    await guest.ping()
    await start_agent()
    with pytest.raises(OutcomeUnknown, match="started again"):
        await running
    await guest.close()


async def test_after_close_nothing_is_connected_anew(guest: BridgeGuest) -> None:
    await guest.close()
    await guest.close()
    with pytest.raises(VMGone, match="closed"):
        await guest.ping()


async def test_a_caller_who_is_cancelled_leaves_the_others_alone(guest: BridgeGuest, disks: FakeDisks) -> None:
    release = disks.hang(*SLOT)
    waiting = asyncio.create_task(guest.probe_device(SLOT, timeout_s=3600))
    await guest.ping()
    waiting.cancel()
    await asyncio.wait([waiting])
    release()
    assert await guest.probe_device(SLOT, timeout_s=20)  # the late answer was dropped


# Programs.


async def test_a_program_is_run(guest: BridgeGuest) -> None:
    script = 'echo "$A"; pwd >&2; cat; exit 3'
    result = await guest.run(["sh", "-c", script], stdin=b"in", env={"A": "b"}, cwd="/usr")
    assert result == CommandResult(exit_code=3, stdout=b"b\nin", stderr=b"/usr\n")


async def test_five_megabytes_go_through_a_program_and_come_back(guest: BridgeGuest) -> None:
    data = os.urandom(5 << 20)
    result = await guest.run(["cat"], stdin=data, timeout_s=60)
    assert result.exit_code == 0
    assert result.stdout == data


async def test_programs_at_once_keep_their_output_apart(guest: BridgeGuest) -> None:
    results = await asyncio.gather(*(guest.run(["sh", "-c", f"echo {n}; exit {n}"]) for n in range(20)))
    assert [(result.stdout, result.exit_code) for result in results] == [(b"%d\n" % n, n) for n in range(20)]


async def test_a_killed_program_has_a_negative_code(guest: BridgeGuest) -> None:
    assert (await guest.run(["sh", "-c", "kill -9 $$"])).exit_code == -signal.SIGKILL


async def test_a_program_that_does_not_read_its_input_ends_nevertheless(guest: BridgeGuest) -> None:
    assert (await guest.run(["true"], stdin=bytes(1 << 20))).exit_code == 0


async def test_a_program_that_is_not_there_is_a_refusal(guest: BridgeGuest) -> None:
    with pytest.raises(GuestRefused, match="no-such-program: No such file"):
        await guest.run(["no-such-program"])


async def test_a_command_without_words_is_refused(guest: BridgeGuest) -> None:
    with pytest.raises(InvalidRequest, match="names no program"):
        await guest.run([])


async def test_a_program_out_of_time_is_killed(guest: BridgeGuest) -> None:
    with pytest.raises(DeadlineExceeded, match=r"sleep did not end within 0\.1 s"):
        await guest.run(["sleep", "987654"], timeout_s=0.1)
    await ended(guest, "sleep 98765[4]")


async def test_what_a_program_out_of_time_had_written_is_in_the_error(
    guest: BridgeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def out_of_time(_: object, *, stdout: OutputSink, stderr: OutputSink, **__: object) -> int:
        stdout(b"so far")
        stderr(b"and no further")
        raise DeadlineExceeded("the test broke it")

    monkeypatch.setattr(guest, "run_streaming", out_of_time)
    with pytest.raises(DeadlineExceeded) as caught:
        await guest.run(["make"], timeout_s=1)
    assert (caught.value.stdout, caught.value.stderr) == (b"so far", b"and no further")


async def test_a_program_that_is_cancelled_is_killed_with_its_children(guest: BridgeGuest) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(
        guest.run_streaming(
            ["sh", "-c", "sleep 987653 & echo; wait"], stdout=lambda data: started.set(), stderr=lambda data: None
        )
    )
    await started.wait()
    running.cancel()
    await asyncio.wait([running])
    await ended(guest, "sleep 98765[3]")


async def test_too_much_output_for_run_kills_the_program(guest: BridgeGuest) -> None:
    with pytest.raises(GuestRefused, match="more than 100000 bytes") as caught:
        await guest.run(["cat", "/dev/zero"], max_output_bytes=100_000)
    assert caught.value.remedy
    await guest.ping()


async def test_a_slow_sink_holds_the_program_back(guest: BridgeGuest) -> None:
    may_go = asyncio.Event()
    sizes: list[int] = []

    async def slow(data: bytes) -> None:
        sizes.append(len(data))
        await may_go.wait()

    running = asyncio.create_task(
        guest.run_streaming(["head", "-c", "3000000", "/dev/zero"], stdout=slow, stderr=slow, timeout_s=60)
    )
    while not sizes:
        await guest.ping()
    program = next(iter(guest._programs.values()))
    assert isinstance(program, GuestProgram)
    for _ in range(20):
        await guest.ping()
    assert program._output_size <= 262144
    may_go.set()
    assert await running == 0
    assert sum(sizes) == 3_000_000


async def test_what_a_sink_raises_kills_the_program_and_reaches_the_caller(guest: BridgeGuest) -> None:
    def fail(data: bytes) -> None:
        raise KeyError("the disk of the host is full")

    with pytest.raises(KeyError, match="full"):
        await guest.run_streaming(["cat", "/dev/zero"], stdout=fail, stderr=fail)
    await guest.ping()


async def test_what_the_input_raises_kills_the_program_and_reaches_the_caller(guest: BridgeGuest) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise OSError("cannot read on")

    with pytest.raises(OSError, match="cannot read on"):
        await guest.run_streaming(["cat"], stdin=broken(), stdout=lambda data: None, stderr=lambda data: None)


async def test_a_conversation_with_a_program(guest: BridgeGuest) -> None:
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def questions() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"%d\n" % number
            assert await lines.get() == b"got %d\n" % number

    script = 'while read x; do echo "got $x"; done'
    status = await guest.run_streaming(
        ["sh", "-c", script], stdin=questions(), stdout=lines.put_nowait, stderr=lambda data: None
    )
    assert status == 0
