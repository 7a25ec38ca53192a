"""The guest's end of the bridge without a VM: our real agent in a thread, on disks that are only remembered.

`FakeSerialPort` stands for QEMU between a Unix socket and a virtio-serial port; `AgentThread` runs the agent on what it
plugs in; `FakeDisks` keeps the disks and refuses what a guest refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from utilityvm.agent.faults import Fault
from utilityvm.agent.port import Port
from utilityvm.agent.serve import Disks, Serve

_READ_BYTES = 65536
_CONTROLLERS = 4


class FakeDisks:
    """Implements `agent.serve.Disks`. `attached` is the bus: put slots in and take them out."""

    def __init__(self) -> None:
        self.attached: set[tuple[int, int]] = set()
        self.busy: dict[str, list[str]] = {}  # guest path: who uses it
        self.keys: dict[str, str] = {}  # guest path: the key it was opened with
        self._mounts: dict[str, dict[str, Any]] = {}
        self._stuck: dict[tuple[int, int], threading.Event] = {}
        self._lock = threading.Lock()

    def hang(self, controller: int, lun: int) -> Callable[[], None]:
        """From now on no request on the slot ends, whatever its deadline, until what this gives is called."""
        gate = threading.Event()
        self._stuck[controller, lun] = gate
        return gate.set

    def add(self, settings: dict[str, Any], deadline: float) -> None:
        slot, path = self._slot(settings), self._path(settings)
        if not self._until_there(slot, deadline):
            raise Fault(f"no disk came at {slot[0]}:{slot[1]} within the time given", kind="timeout")
        with self._lock:
            if path in self._mounts:
                raise Fault(f"{path} is in use", kind="busy", holders=[f"a mount at {path}"])
            self._mounts[path] = {
                "MountPath": path,
                "Controller": slot[0],
                "Lun": slot[1],
                "Partition": settings.get("Partition", 0),
                "Filesystem": settings.get("Filesystem", "ext4"),
            }
            if key := settings.get("Utilityvm", {}).get("Key"):
                self.keys[path] = key

    def remove(self, settings: dict[str, Any], deadline: float, *, force: bool = False) -> None:
        path = self._path(settings)
        with self._lock:
            mount = self._mounts.get(path)
        if mount is None:
            return
        self._pass((mount["Controller"], mount["Lun"]))
        if self.busy.get(path) and not force:
            raise Fault(f"{path} is in use", kind="busy", holders=self.busy[path])
        with self._lock:
            self._mounts.pop(path, None)

    def eject(self, controller: int, lun: int, deadline: float, *, force: bool = False) -> None:
        self._slot({"Controller": controller, "Lun": lun})
        self._pass((controller, lun))
        with self._lock:
            paths = self._at(controller, lun)
            if paths and not force:
                raise Fault("the disk is still mounted", kind="busy", holders=[f"mounted at {path}" for path in paths])
            for path in paths:
                del self._mounts[path]
            self.attached.discard((controller, lun))

    def probe(self, controller: int, lun: int) -> dict[str, Any]:
        self._slot({"Controller": controller, "Lun": lun})
        self._pass((controller, lun))
        with self._lock:
            is_there = (controller, lun) in self.attached
            return {"Present": is_there, "SizeBytes": is_there << 20, "MountPaths": self._at(controller, lun)}

    def grow(self, controller: int, lun: int, deadline: float) -> dict[str, Any]:
        self._pass((controller, lun))
        if (controller, lun) not in self.attached:
            raise Fault(f"there is no disk at {controller}:{lun}", kind="not_found")
        return {"SizeBytes": 1 << 20, "Grown": self._at(controller, lun), "Left": []}

    def mounts(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dict(mount) for mount in self._mounts.values()]

    def _at(self, controller: int, lun: int) -> list[str]:
        where = (controller, lun)
        return [path for path, mount in self._mounts.items() if (mount["Controller"], mount["Lun"]) == where]

    def _slot(self, settings: dict[str, Any]) -> tuple[int, int]:
        controller, lun = settings.get("Controller", 0), settings.get("Lun", 0)
        if not 0 <= controller < _CONTROLLERS:
            raise Fault(f"there is no SCSI controller {controller}", kind="invalid")
        return controller, lun

    def _path(self, settings: dict[str, Any]) -> str:
        path = settings.get("MountPath", "")
        if not path.startswith("/"):
            raise Fault(f"the guest path {path!r} must be absolute", kind="invalid")
        return str(path)

    def _pass(self, slot: tuple[int, int]) -> None:
        if gate := self._stuck.get(slot):
            gate.wait()

    def _until_there(self, slot: tuple[int, int], deadline: float) -> bool:
        self._pass(slot)
        if slot not in self.attached:
            threading.Event().wait(max(deadline - time.monotonic(), 0.0))
        return slot in self.attached


class AgentThread:
    """The agent on one descriptor, until that is closed at the other end."""

    def __init__(self, end: socket.socket, disks: Disks) -> None:
        self._end = end
        self.was_shut_down = threading.Event()
        self.serve = Serve(Port(end.fileno()), disks, shutdown=self.was_shut_down.set)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it has seen the other end close."""
        self._thread.join()

    def _run(self) -> None:
        with self._end:
            while self.serve.step():
                pass


class FakeSerialPort:
    """A virtio-serial port: hosts come and go at `path`, one at a time, and the guest's end does not see it.

    What a host sends while no guest has the port open waits; what the guest sends while no host is there is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._guest: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._has_guest = asyncio.Condition()
        self._host: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeSerialPort:
        self._server = await asyncio.start_unix_server(self._take_host, str(self.path))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server
        self._server.close()
        await self.unplug()
        if self._host:
            self._host.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def plug(self) -> socket.socket:
        """The guest's end, opened; the one before is cut off."""
        await self.unplug()
        ours, theirs = socket.socketpair()
        guest = await asyncio.open_connection(sock=ours)
        async with self._has_guest:
            self._guest = guest
            self._has_guest.notify_all()
        self._start(self._pump_to_host(guest[0]))
        return theirs

    async def unplug(self) -> None:
        """The guest closes the port. The host does not see it."""
        if self._guest:
            writer, self._guest = self._guest[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def drop_host(self) -> None:
        """The connection of the host that is there breaks."""
        if self._host:
            self._host.close()

    def _start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_host(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._host = writer
        try:
            while True:
                async with self._has_guest:
                    await self._has_guest.wait_for(lambda: self._guest is not None)
                data = await reader.read(_READ_BYTES)
                if not data:
                    return
                async with self._has_guest:
                    await self._has_guest.wait_for(lambda: self._guest is not None)
                assert self._guest
                self._guest[1].write(data)
                with contextlib.suppress(OSError):
                    await self._guest[1].drain()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            if self._host is writer:
                self._host = None

    async def _pump_to_host(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_READ_BYTES):
                if self._host:
                    self._host.write(data)
                    with contextlib.suppress(OSError):
                        await self._host.drain()
