"""The points at which a VM's owner leaves its own memory: each write to the store, each message sent and answered.

`Points` counts them in this process, and kills it with SIGKILL at one of them. The counting is wrapped around the real
code from outside, so that nothing in the library knows of it.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Frame
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.hosts.qemu import console, launch, memory
from utilityvm.hosts.qemu.qmp import Event, Qmp
from utilityvm.store import SqliteJournal, Store
from utilityvm.store.ownership import Ownership
from utilityvm.templates import draft, overlay
from utilityvm.vm import lifecycle

# Sent again and again until they are answered: their number is not the same each time.
_AS_OFTEN_AS_NEEDED: Final = frozenset({messages.NEGOTIATE, messages.PING})
_ANSWERS_TO_THEM: Final = frozenset(map(messages.response_to, _AS_OFTEN_AS_NEEDED))


class Points:
    """Counts points while it is armed. At number `kill_at` the process tells the point's name, and dies."""

    def __init__(self, kill_at: int, tell: Callable[[str], None]) -> None:
        self._kill_at = kill_at
        self._tell = tell
        self._is_armed = False
        self._doing = ""
        self.count = 0

    def arm(self, doing: str) -> None:
        self._doing = doing
        self._is_armed = True

    def disarm(self) -> None:
        self._is_armed = False

    def at(self, name: str) -> None:
        """Here is a point."""
        if not self._is_armed:
            return
        self.count += 1
        if self.count == self._kill_at:
            self._tell(f"{self._doing}: {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, what: str) -> None:
        """Two points: before the function is called, and after it returned."""
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.at(f"before {what}")
            result = plain(*args, **kwargs)
            self.at(f"after {what}")
            return result

        setattr(owner, name, wrapped)

    def before(self, owner: Any, name: str, what: str) -> None:
        """One point: before the function is called."""
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.at(f"before {what}")
            return plain(*args, **kwargs)

        setattr(owner, name, wrapped)


def install(points: Points) -> None:
    """Make every write, message and process of this process a point."""
    points.around(SqliteJournal, "_write", "a write to the journal")
    points.around(Store, "_do", "a write to the store")
    points.around(Store, "add", "the VM's record")
    _install_qmp(points)
    _install_bridge(points)


def install_start_and_stop(points: Points) -> None:
    """Also what only the begin and the end of a VM have: its processes, its files, its lock."""
    points.around(launch, "spawn", "QEMU is spawned")
    points.around(console, "start_writer", "the log's writer is started")
    points.around(launch, "clean", "the runtime folder is cleaned")
    points.around(lifecycle, "write_copy", "the copy of the record is written")
    points.around(lifecycle, "remove_copy", "the copy of the record is removed")
    points.around(Ownership, "release", "the lock is given back")


def install_templates(points: Points) -> None:
    """Also the files of templates and clones."""
    points.around(memory, "copy", "the memory is copied")
    points.around(overlay, "create", "an overlay is made")
    points.around(draft, "_flush", "a file is flushed")
    points.around(Path, "rename", "a folder gets its name")
    points.around(Path, "write_bytes", "the manifest is written")
    points.before(shutil, "rmtree", "a folder is removed")


def _install_qmp(points: Points) -> None:
    plain_put, plain_answer, plain_event = Qmp._put, Qmp._take_answer, Qmp._take_event

    def put(self: Qmp, questions: Sequence[Any], fd: int | None = None) -> Any:
        chunks = []
        for question in questions:  # one after the other, as QEMU reads them: the owner may die between two
            points.at(f"before {question.command} is sent")
            chunks.append(plain_put(self, [question], fd))
            points.at(f"after {question.command} was sent")
            fd = None
        return chunks[0] if chunks else plain_put(self, [], fd)  # the one with the descriptor

    def take_answer(self: Qmp, message: dict[str, Any]) -> None:
        points.at(f"{self._pending[0].command} was answered")
        plain_answer(self, message)

    def take_event(self: Qmp, event: Event) -> None:
        if event.name == "DEVICE_DELETED":
            points.at(event.name)
        plain_event(self, event)

    Qmp._put = put  # type: ignore[method-assign]
    Qmp._take_answer = take_answer  # type: ignore[method-assign]
    Qmp._take_event = take_event  # type: ignore[method-assign]


def _install_bridge(points: Points) -> None:
    plain_send, plain_take = BridgeClient._send, BridgeClient._take

    def send(self: BridgeClient, kind: int, body: dict[str, Any]) -> int:
        if kind in _AS_OFTEN_AS_NEEDED:
            return plain_send(self, kind, body)
        points.at(f"before request {kind:#010x} is sent")
        id = plain_send(self, kind, body)
        points.at(f"after request {kind:#010x} was sent")
        return id

    def take(self: BridgeClient, frame: Frame) -> None:
        if frame.kind not in _ANSWERS_TO_THEM:
            points.at(f"{frame.kind:#010x} came")
        plain_take(self, frame)

    BridgeClient._send = send  # type: ignore[method-assign]
    BridgeClient._take = take  # type: ignore[method-assign]
    points.before(BridgeClient, "_take_negotiated", "the answer to a negotiate is taken")
