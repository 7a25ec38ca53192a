"""A server in this process: true routes, manager and HTTP, and a VM in memory."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utilityvm import UtilityVM, VMConfig
from utilityvm.client.api import Api
from utilityvm.client.waiting import Waiting
from utilityvm.client.wire import Transport, Wire
from utilityvm.errors import GuestRefused, UtilityVMError, VMGone, VMNotFound
from utilityvm.scsi.manager import ScsiManager
from utilityvm.server import listening
from utilityvm.server.app import App
from utilityvm.server.keeper import Keeper
from utilityvm.server.programs import Programs
from utilityvm.server.routes import Service, info_of
from utilityvm.store import StoredVM, VMState
from utilityvm.testing import FakeGuest, FakeHost, FakeWorld, MemoryJournal


class Ownership:
    """Says whether another process waits."""

    wanted = False

    def share(self) -> None: ...

    def is_wanted(self) -> bool:
        return self.wanted


class Guest(FakeGuest):
    """Runs two programs: `cat`, and `sleep`, which does not end."""

    async def run_streaming(
        self, command: Sequence[str], *, stdin: AsyncIterator[bytes] | None, stdout: Callable[[bytes], Any], **_: object
    ) -> int:
        if command[0] == "sleep":
            self.sleeping = asyncio.Event()
            try:
                await asyncio.Event().wait()
            finally:
                self.sleeping.set()
        if command[0] != "cat":
            error = GuestRefused(f"cannot run {command[0]}: No such file or directory", vm="worker")
            error.kind = "not_found"
            raise error
        if stdin is not None:
            async for data in stdin:
                await stdout(data)
        return 3


class VM(UtilityVM):
    """One VM, in memory."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ended: asyncio.Future[UtilityVMError] = asyncio.get_running_loop().create_future()
        owned: Any = SimpleNamespace(
            name="worker",
            config=VMConfig(name="worker", keep=True),
            aliases={},
            has_scratch=False,
            findings=tuple(world.findings),
            scsi=ScsiManager(world.host, world.guest, world.journal, controllers=1, vm="worker"),
            guest=world.guest,
            ownership=world.ownership,
            record=world.record,
            is_running=True,
            check=lambda: None,
            check_here=lambda: None,
            ready=lambda deadline: asyncio.sleep(0),
            ends_told=nullcontext,
        )
        super().__init__(owned)

    async def wait(self, *, timeout_s: float | None = None) -> UtilityVMError:
        return await asyncio.shield(self.ended)

    async def close(self, *, timeout_s: float = 0) -> None:
        await self._vm.scsi.settle()
        self._vm.is_running = False  # type: ignore[misc]
        self.world.closed += 1


class World:
    """What is there, whichever server comes: the VM's bus, its guest and its journal."""

    def __init__(self) -> None:
        self.bus = FakeWorld()
        self.host = FakeHost(self.bus)
        self.guest = Guest(self.bus)
        self.journal = MemoryJournal()
        self.ownership = Ownership()
        self.findings: list[str] = []
        self.opened = self.closed = 0
        self.is_there = True
        self.record = StoredVM(
            id=1, name="worker", uuid="u", state=VMState.RUNNING, created=1.0, config={"keep": True}, process=None
        )
        self.vm: VM | None = None

    async def open(self, name: str, *, wait_s: float = 0.0, needs_guest: bool = True) -> VM:
        if name != "worker" or not self.is_there:
            raise VMNotFound(f"no VM named {name!r}", vm=name, remedy="`uvm ps` lists them")
        self.opened += 1
        self.vm = VM(self)
        await self.vm._vm.scsi.restore(is_alive=lambda holder: True, sizes={}, records=self.journal.read())
        return self.vm

    async def remove(self, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = 0.0) -> list[str]:
        if name != "worker" or not self.is_there:
            raise VMNotFound(f"no VM named {name!r}", vm=name)
        self.is_there = False
        return []

    def die(self) -> None:
        assert self.vm is not None
        self.vm._vm.is_running = False  # type: ignore[misc]
        self.vm.ended.set_result(VMGone("QEMU ended", vm="worker"))


class Running:
    """A server that answers at a socket."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self.keeper = Keeper()
        self.programs = Programs(self.keeper)
        service = Service(self.keeper, self.programs, lambda: info_of(self.keeper, version="1", pid=1))
        self.app = App(service, version="1")
        self._clients: list[Api] = []
        self._over = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(64)
        self._serving = asyncio.create_task(listening.serve(self.app, listener, until=self._wait))

    async def _wait(self) -> None:
        await self._over.wait()

    async def end(self) -> None:
        for client in self._clients:
            client.close()
        self._over.set()
        assert self._serving is not None
        await self._serving
        await self.keeper.close()

    async def dial(self) -> Transport:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(self.path))
        return Waiting(connection)

    def api(self) -> Api:
        """A client, which is closed with the server."""
        api = Api(Wire(self))
        self._clients.append(api)
        return api

    async def raw(self, text: bytes) -> bytes:
        """What comes back, to the end of the connection."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(text)
            with suppress(ConnectionError):
                await writer.drain()
            with suppress(ConnectionError):
                return await reader.read()
            return b""
        finally:
            writer.close()


@asynccontextmanager
async def serving(folder: Path, patch: Any) -> AsyncIterator[Running]:
    world = World()
    patch.setattr(UtilityVM, "open", world.open)
    patch.setattr(UtilityVM, "remove", world.remove)

    async def leave(vm: object) -> None:
        world.closed += 1

    patch.setattr("utilityvm.vm.end.leave", leave)
    server = Running(folder / "api.sock", world)
    await server.start()
    try:
        yield server
    finally:
        await server.end()
