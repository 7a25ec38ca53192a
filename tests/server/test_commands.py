"""The client as commands use it: calls that block, one answer a call, and an interruption that leaves nothing."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from served import Running
from utilityvm.client import blocking, command, starting
from utilityvm.client.api import Api
from utilityvm.client.blocking import Blocking, drive
from utilityvm.client.remote import RemoteVM
from utilityvm.client.wire import Transport, Wire
from utilityvm.errors import InvalidRequest, NotAttached
from utilityvm.scsi.mount_config import MountConfig
from utilityvm.server import types

DISK = "/disks/a.raw"


class Dialler:
    """Connects at once."""

    def __init__(self, server: Running, *, on_quiet: Callable[[], object] = lambda: None) -> None:
        self._server = server
        self._on_quiet = on_quiet

    async def dial(self) -> Transport:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._server.path))
        return Blocking(connection, self._on_quiet)


async def in_a_command(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def test_calls_that_block_need_no_event_loop(server: Running) -> None:
    found: list[str] = []
    server.world.findings = ["slot 0:5 has a disk that is in no journal"]

    def job() -> None:
        api = Api(Wire(Dialler(server)), on_finding=found.append)
        try:
            vm = RemoteVM(api, "worker", "")
            made = drive(vm.add_scsi(DISK, "/data", read_only=True)._add())
            again = drive(vm.add_scsi(DISK, "/data", read_only=True)._add())
            assert (made.ref_count, again.ref_count) == (1, 2)
            (row,) = drive(vm.scsi_slots())
            assert (row.host_path, row.references) == (DISK, 2)
            drive(vm.release(made.id))
            drive(vm.remove_scsi(DISK))
            with pytest.raises(NotAttached):
                drive(vm.remove_scsi(DISK))
        finally:
            api.close()

    await in_a_command(job)
    assert found == ["slot 0:5 has a disk that is in no journal"]  # once, though it was the call of a disk


async def test_an_interrupted_command_has_undone_its_reservation_when_it_returns(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "QUIET_S", 0.01)
    held = server.world.bus.hold()
    loop = asyncio.get_running_loop()
    interrupted: list[bool] = []

    def interrupt() -> None:
        if any(step.startswith("attach") for step in server.world.bus.log) and not interrupted:
            interrupted.append(True)
            loop.call_soon_threadsafe(held.set)
            raise KeyboardInterrupt

    def job() -> list[Any]:
        api = Api(Wire(Dialler(server, on_quiet=interrupt)))
        try:
            vm = RemoteVM(api, "worker", "")
            with pytest.raises(KeyboardInterrupt):
                drive(vm.add_scsi(DISK)._add())
            return drive(vm.scsi_reservations())
        finally:
            api.close()

    assert await in_a_command(job) == []


def test_every_setting_of_a_mount_goes_over_the_wire() -> None:
    settings = {field.name for field in msgspec.structs.fields(MountConfig)}
    assert settings <= set(types.AddDisk.__struct_fields__)
    assert settings <= set(inspect.signature(RemoteVM.add_scsi).parameters)
    body = types.AddDisk(host_path="/a", options=["noatime"], untrusted=True, partition=2)
    mount = types.spec_of(body).mount
    assert mount == MountConfig(options=("noatime",), untrusted=True, partition=2)


def test_work_that_needs_an_event_loop_is_a_mistake_and_not_a_hang() -> None:
    with pytest.raises(AssertionError, match="event loop"):
        drive(asyncio.sleep(0))


@pytest.mark.parametrize(("value", "wanted"), [("", True), ("auto", True), ("off", False)])
def test_the_variable_says_whether_commands_use_the_server(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    monkeypatch.setenv("UTILITYVM_SERVER", value)
    assert command.is_wanted() is wanted
    monkeypatch.setenv("UTILITYVM_SERVER", "of")
    with pytest.raises(InvalidRequest, match="neither auto nor off"):
        command.is_wanted()


def test_without_its_extra_commands_do_without_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert not command.is_wanted()


def test_no_server_is_told_as_none_and_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(starting, "_spawn_in_turn", lambda until: pytest.fail("it was started"))
    assert not starting.StartingNow().answers()
    assert not list(tmp_path.iterdir())
