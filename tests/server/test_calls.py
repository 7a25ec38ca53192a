"""The calls over a real connection, on a VM in memory."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
import pytest

from served import Running
from utilityvm.client.api import ENDED, FAILED
from utilityvm.errors import (
    AlreadyReleased,
    GuestBusy,
    GuestRefused,
    InvalidRequest,
    NotAttached,
    OutcomeUnknown,
    VMNotFound,
    WrongState,
)
from utilityvm.server.routes import ROUTES
from utilityvm.server.types import AddDisk, Program, RunProgram

ID = "0123456789abcdef"


async def test_a_disk_comes_and_goes(server: Running) -> None:
    api = server.api()
    made = await api.add("worker", AddDisk(host_path="/disks/a.raw", guest_path="/data"))
    assert (made.slot, made.guest_path, made.references, made.holder) == ("0:0", "/data", 1, "client")
    assert [one.id for one in await api.reservations("worker")] == [made.id]
    assert [one.guest_paths for one in await api.disks("worker")] == [["/data"]]
    assert [one.guest_path for one in await api.mounts("worker")] == ["/data"]
    assert (await api.release("worker", made.id)).references == 0
    assert await api.disks("worker") == []


async def test_the_same_request_again_makes_no_second_reservation(server: Running) -> None:
    api, disk = server.api(), AddDisk(host_path="/disks/a.raw", guest_path="/data")
    both = await asyncio.gather(api.add("worker", disk, id=ID), server.api().add("worker", disk, id=ID))
    again = await api.add("worker", disk, id=ID)
    assert {one.id for one in (*both, again)} == {ID}
    assert again.references == 1


async def test_a_request_of_the_same_id_for_another_disk_is_refused(server: Running) -> None:
    api = server.api()
    await api.add("worker", AddDisk(host_path="/disks/a.raw"), id=ID)
    with pytest.raises(InvalidRequest, match="is of /disks/a"):
        await api.add("worker", AddDisk(host_path="/disks/b.raw"), id=ID)


async def test_the_next_server_finds_what_the_last_one_did(server: Running) -> None:
    disk = AddDisk(host_path="/disks/a.raw", guest_path="/data")
    await server.api().add("worker", disk, id=ID)
    second = Running(server.path.with_name("second.sock"), server.world)
    await second.start()
    try:
        made = await second.api().add("worker", disk, id=ID)  # its answer was lost
        assert (made.id, made.references) == (ID, 1)
        assert sum(step.startswith("attach") for step in server.world.bus.log) == 1
    finally:
        await second.end()


async def test_a_client_that_hangs_up_leaves_nothing(server: Running) -> None:
    held = server.world.bus.hold()
    adding = asyncio.create_task(server.api().add("worker", AddDisk(host_path="/disks/a.raw"), id=ID))
    while not any(step.startswith("attach") for step in server.world.bus.log):
        await asyncio.sleep(0)
    adding.cancel()
    with suppress(asyncio.CancelledError):
        await adding
    while server.app.in_flight:  # until the server has seen it
        await asyncio.sleep(0)
    held.set()
    server.world.bus.held = None
    api = server.api()
    while await api.disks("worker"):
        await asyncio.sleep(0)
    assert not server.world.bus.bus


async def test_errors_have_their_fields(server: Running) -> None:
    api = server.api()
    made = await api.add("worker", AddDisk(host_path="/disks/a.raw", guest_path="/data"))
    server.world.bus.busy = {next(iter(server.world.bus.mounts)): "pid 7"}
    with pytest.raises(GuestBusy) as busy:
        await api.release("worker", made.id)
    assert "pid 7" in str(busy.value) + str(busy.value.holders)
    server.world.bus.busy = {}
    await api.release("worker", made.id)
    with pytest.raises((AlreadyReleased, NotAttached)):
        await api.release("worker", made.id)
    with pytest.raises(VMNotFound) as missing:
        await api.vm("nobody", wait_s=0)
    assert (missing.value.vm, missing.value.remedy) == ("nobody", "`uvm ps` lists them")
    with pytest.raises(InvalidRequest, match="not absolute"):
        await api.add("worker", AddDisk(host_path="a.raw"))


async def test_two_removes_at_once_drop_two(server: Running) -> None:
    api = server.api()
    for _ in range(2):
        await api.add("worker", AddDisk(host_path="/disks/a.raw"))
    await asyncio.gather(*(server.api().remove("worker", host_path="/disks/a.raw") for _ in range(2)))
    assert await api.disks("worker") == []


async def test_a_program_gets_its_input_and_gives_its_output(server: Running) -> None:
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["cat"], stdin=True))
    await api.feed("worker", ID, b"one ", at=0)
    await api.feed("worker", ID, b"one ", at=0)  # its answer was lost
    await api.feed("worker", ID, b"ne two", at=1)
    with pytest.raises(WrongState, match="to byte 7"):
        await api.feed("worker", ID, b"x", at=9)
    await api.feed("worker", ID, b"", at=7, last=True)
    pieces = [piece async for piece in api.output("worker", ID)]
    assert b"".join(data for stream, data in pieces if stream == 1) == b"one two"
    assert msgspec.json.decode(pieces[-1][1], type=Program) == Program(id=ID, state="ended", exit_code=3)
    assert pieces[-1][0] == ENDED


async def test_output_can_be_had_again_from_any_byte(server: Running) -> None:
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["cat"], stdin=True))
    await api.feed("worker", ID, b"hello", at=0, last=True)
    whole = b"".join([piece async for piece in server.programs.read("worker", ID, 0)])
    for at in range(len(whole) + 1):
        assert b"".join([piece async for piece in server.programs.read("worker", ID, at)]) == whole[at:]
    with pytest.raises(InvalidRequest, match="is kept from byte 0"):
        await anext(aiter(server.programs.read("worker", ID, len(whole) + 1)))


async def test_a_program_that_cannot_be_started_says_why(server: Running) -> None:
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["/nope"]))
    ((stream, payload),) = [piece async for piece in api.output("worker", ID)]
    assert stream == FAILED
    from utilityvm.server import problems, types

    error = problems.error_of(msgspec.json.decode(payload, type=types.Problem))
    assert isinstance(error, GuestRefused)
    assert error.kind == "not_found"


async def test_a_program_is_killed_when_its_reader_goes_away(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utilityvm.server.programs.ORPHAN_S", 0.0)
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["sleep"]))
    reading = asyncio.ensure_future(anext(aiter(api.output("worker", ID))))
    while not server.programs._runs["worker", ID].readers:
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    await server.world.guest.sleeping.wait()


async def test_a_program_of_a_server_that_ended_is_told_as_killed(server: Running) -> None:
    with pytest.raises(OutcomeUnknown, match="the program was killed"):
        await anext(aiter(server.api().output("worker", ID)))


async def test_stopping_a_vm_ends_what_uses_it(server: Running) -> None:
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["sleep"]))
    reading = asyncio.ensure_future(anext(aiter(api.output("worker", ID))))
    assert await server.api().stop("worker") == []
    stream, payload = await reading
    assert stream == FAILED
    assert b'"VMNotRunning"' in payload
    with pytest.raises(VMNotFound):
        await server.api().stop("worker")


async def test_the_document_has_every_call(server: Running) -> None:
    head, _, body = (
        await server.raw(b"GET /v1/openapi.json HTTP/1.1\r\nHost: utilityvm\r\nConnection: close\r\n\r\n")
    ).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    document = msgspec.json.decode(body)
    calls = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert calls == {(route.method, route.path) for route in ROUTES}
    assert all(route.summary for route in ROUTES)


async def test_vms_are_let_go_of_when_another_process_waits_and_nobody_uses_them(server: Running) -> None:
    api = server.api()
    await api.start_program("worker", ID, RunProgram(command=["sleep"]))
    server.world.ownership.wanted = True
    assert (await api.vm("worker", wait_s=0)).name == "worker"
    assert server.keeper.names == ["worker"]  # it is in use
    server.keeper.let_go.clear()
    await api.kill("worker", ID)
    await server.keeper.let_go.wait()
    assert server.keeper.names == []
    assert server.world.closed == 1
    server.world.ownership.wanted = False
    await api.vm("worker", wait_s=0)
    assert server.world.opened == 2


async def test_a_vm_that_dies_is_let_go_of_and_its_record_stays(server: Running) -> None:
    await server.api().vm("worker", wait_s=0)
    server.world.die()
    await server.keeper.let_go.wait()
    assert server.keeper.names == []
    assert server.world.is_there


async def test_findings_are_told_once(server: Running) -> None:
    server.world.findings = ["half done"]
    first, second = await server.api().vm("worker", wait_s=0), await server.api().vm("worker", wait_s=0)
    assert (first.findings, second.findings) == (["half done"], [])


async def test_calls_at_once_open_the_vm_once(server: Running) -> None:
    await asyncio.gather(*(server.api().vm("worker", wait_s=0) for _ in range(8)))
    assert server.world.opened == 1
