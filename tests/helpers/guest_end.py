"""The guest's end of the bridge without a VM: our real agent in a thread, on disks that are only remembered.

`FakeSerialPort` stands for QEMU between a Unix socket and a virtio-serial port; `AgentThread` runs the agent on what it
plugs in; `FakeDisks` keeps the disks and refuses what a guest refuses; `FakeFilesystems` and `FakeKernel` are what the
agent freezes and makes unique, for nothing of that may be done to the machine that the tests run on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from utilityvm.agent.faults import Fault
from utilityvm.agent.freezing import Filesystem, Freezer
from utilityvm.agent.identity import Identity
from utilityvm.agent.port import Port
from utilityvm.agent.serve import Disks, Serve
from utilityvm.agent.template import Template

_READ_BYTES = 65536
_CONTROLLERS = 4


class FakeDisks:
    """Implements `agent.serve.Disks`. `attached` is the bus: put slots in and take them out."""

    def __init__(self) -> None:
        self.attached: set[tuple[int, int]] = set()
        self.busy: dict[str, list[str]] = {}  # guest path: who uses it
        self.keys: dict[str, str] = {}  # guest path: the key it was opened with
        self.asked: list[dict[str, Any]] = []  # the settings of each mount
        self._mounts: dict[str, dict[str, Any]] = {}
        self._stuck: dict[tuple[int, int], threading.Event] = {}
        self._answering: set[tuple[int, int]] = set()  # those of them that can be probed
        self.notes: list[str] = []  # what is to be said of each mount
        self._lock = threading.Lock()

    def hang(self, controller: int, lun: int, *, even_probes: bool = True) -> Callable[[], None]:
        """From now on no request on the slot ends, whatever its deadline, until what this gives is called."""
        gate = threading.Event()
        if not even_probes:
            self._answering.add((controller, lun))
        self._stuck[controller, lun] = gate
        return gate.set

    def add(self, settings: dict[str, Any], deadline: float) -> list[str]:
        slot, path = self._slot(settings), self._path(settings)
        self.asked.append(settings)
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
        return self.notes

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
        if (controller, lun) not in self._answering:
            self._pass((controller, lun))
        with self._lock:
            is_there = (controller, lun) in self.attached
            return {"Present": is_there, "SizeBytes": is_there << 20, "MountPaths": self._at(controller, lun)}

    def check_grow(self, controller: int, lun: int, size_bytes: int, deadline: float) -> None:
        self._pass((controller, lun))
        for path in self._at(controller, lun):
            if self._mounts[path]["Filesystem"] == "vfat":
                raise Fault(f"{path} is a vfat file system, which cannot be grown to {size_bytes} bytes")

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


class FakeFilesystems:
    """Implements `agent.freezing.Filesystems`: `mounted` in order; `frozen` and `flushed` is what became of them."""

    def __init__(self, *paths: str) -> None:
        self.mounted = list(paths)
        self.frozen: list[str] = []
        self.flushed: list[str] = []
        self.cannot_freeze: dict[str, int] = {}  # path: errno
        self.cannot_thaw: dict[str, int] = {}
        self.inside: dict[str, str] = {}  # path: the file system that its disk is a file of
        self._open: dict[int, str] = {}
        self._slow: dict[str, threading.Event] = {}

    @property
    def open_count(self) -> int:
        return len(self._open)

    def hang(self, path: str) -> Callable[[], None]:
        """From now on freezing `path` does not end until what this gives is called."""
        gate = self._slow[path] = threading.Event()
        return gate.set

    def written(self) -> list[Filesystem]:
        return [Filesystem((8, number), (path,)) for number, path in enumerate(self.mounted)]

    def open(self, filesystem: Filesystem) -> int:
        fd = max(self._open, default=0) + 1
        self._open[fd] = filesystem.paths[0]
        return fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def freeze(self, fd: int) -> None:
        path = self._open[fd]
        if gate := self._slow.get(path):
            gate.wait()
        self._check_outer(path)
        self._refuse(self.cannot_freeze.get(path, errno.EBUSY if path in self.frozen else 0))
        self.frozen.append(path)

    def thaw(self, fd: int) -> None:
        path = self._open[fd]
        self._check_outer(path)
        self._refuse(self.cannot_thaw.get(path, 0 if path in self.frozen else errno.EINVAL))
        self.frozen.remove(path)

    def flush(self, path: str) -> None:
        self.flushed.append(path)

    def flush_all(self) -> None:
        self.flushed += self.mounted

    def _check_outer(self, path: str) -> None:
        assert self.inside.get(path) not in self.frozen, f"{path} writes to a file that is frozen, and hangs for ever"

    def _refuse(self, number: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))


class FakeKernel:
    """Implements `agent.identity.Kernel`, below `root`: what is mounted there is read through `read`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seeds: list[bytes] = []
        self.clock_ns = 0
        self.hostname = "template"
        self.binds: dict[Path, Path] = {}  # target: source
        self.refuses: set[str] = set()  # names of what follows
        self.in_memory = True  # the files that hold who the system is

    def read(self, path: str) -> str:
        """What a program reads at `path`."""
        target = self.root / path.lstrip("/")
        return self.binds.get(target, target).read_text()

    def prepare(self) -> None:
        self._refuse("prepare")

    def seed(self, data: bytes) -> None:
        self._refuse("seed")
        self.seeds.append(data)

    def set_clock(self, clock_ns: int) -> None:
        self._refuse("set_clock")
        self.clock_ns = clock_ns

    def set_hostname(self, name: str) -> None:
        self._refuse("set_hostname")
        self.hostname = name

    def bind(self, source: str, target: str) -> None:
        self._refuse("bind")
        assert Path(target) not in self.binds, "mounted over twice"
        self.binds[Path(target)] = Path(source)

    def is_in_memory(self, fd: int) -> bool:
        os.fstat(fd)
        return self.in_memory

    def _refuse(self, name: str) -> None:
        if name in self.refuses:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))


class FakeSystem:
    """A system in a folder, for the agent to freeze and to make unique: a `Template` and what it works on."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.hooks = folder / "template.d"
        self.filesystems = FakeFilesystems("/data", "/data/inner")
        self.filesystems.inside["/data/inner"] = "/data"
        self.kernel = FakeKernel(folder)
        for name, text in (
            ("etc/hostname", "template\n"),
            ("etc/hosts", "127.0.0.1 localhost template\n::1 localhost\n"),
            ("etc/machine-id", ""),
            ("proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n"),
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.template = self.new_template()

    def new_template(self) -> Template:
        """What an agent that was started has."""
        freezer = Freezer(self.filesystems, mark=self.root / "run/frozen")
        return Template(freezer, Identity(self.kernel, root=str(self.root)), folder=str(self.hooks))

    def hook(self, name: str, script: str, *, mode: int = 0o755) -> Path:
        """Put a hook there: a shell script that finds the system's folder in $ROOT."""
        self.hooks.mkdir(exist_ok=True)
        path = self.hooks / name
        path.write_text(f"#!/bin/sh\nROOT={self.root}\n{script}\n")
        path.chmod(mode)
        return path


class AgentThread:
    """The agent on one descriptor, until that is closed at the other end."""

    def __init__(self, end: socket.socket, disks: Disks, system: FakeSystem | None = None) -> None:
        self._end = end
        self.was_shut_down = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="uvm-test-")
        self.system = system or FakeSystem(Path(self._folder.name))
        self.unclean: list[str] = []  # what it says when it is shut down
        self.serve = Serve(
            Port(end.fileno()),
            disks,
            self.system.template,
            shutdown=lambda due: self.unclean,
            power_off=self.was_shut_down.set,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it has seen the other end close."""
        self._thread.join()

    def _run(self) -> None:
        with self._folder, self._end:
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
