"""One fault at one point of what a VM's owner asks of QEMU, of the guest's agent, of the kernel and of the store.

Nothing is replied in anybody's place: QEMU and the agent are asked for something that they do refuse, the connection is
cut, QEMU is stopped by a signal, SQLite and the kernel say what they say when there is no space.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final

import pytest

from utilityvm import UtilityVM, VMGone
from utilityvm.bridge import messages
from utilityvm.guests import bridge_guest, running, session
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.hosts.qemu import disk
from utilityvm.hosts.qemu.qmp import Qmp
from utilityvm.scsi.ports import Record
from utilityvm.scsi.steps import StepTimeouts
from utilityvm.store import SqliteJournal

STEP_S: Final = 0.4  # what a step may take while there are faults
SHORT: Final = StepTimeouts(**dict.fromkeys(StepTimeouts.__slots__, STEP_S))
_UNKNOWN: Final = 0x10F0FF01


class Fault(StrEnum):
    """What goes wrong, and with what."""

    QMP_REFUSED = "QEMU refuses a command"
    QMP_STOPPED = "QEMU stops before a command"
    BRIDGE_REFUSED = "the agent refuses a request"
    BRIDGE_STOPPED = "the guest stops before a request"
    REQUEST_LOST = "the connection to the agent ends before a request"
    ANSWER_LOST = "the connection to the agent ends after a request"
    WRITE_FAILS = "the store takes no write"
    OPEN_FAILS = "an image cannot be opened"
    LOCK_FAILS = "an image cannot be locked"
    DIES_AT_COMMAND = "QEMU dies before a command"
    DIES_AT_REQUEST = "QEMU dies before a request to the agent"


DEATHS: Final = (Fault.DIES_AT_COMMAND, Fault.DIES_AT_REQUEST)


class Faults:
    """Makes one fault in a VM that this process owns."""

    def __init__(self, vm: UtilityVM, patch: pytest.MonkeyPatch) -> None:
        self._pid = vm.process.pid
        self._fault: Fault | None = None
        self._left = 0
        self._is_stopped = False
        self._counted: Counter[Fault] = Counter()
        self._vm = vm
        self._patch_qmp(patch)
        self._patch_bridge(patch)
        self._patch_store(patch)
        patch.setattr(disk, "os", _Os(self._failing(os.open, Fault.OPEN_FAILS, _refused)))
        patch.setattr(disk, "lock", self._failing(disk.lock, Fault.LOCK_FAILS, _refused))

    @contextmanager
    def counted(self) -> Iterator[Counter[Fault]]:
        """How many points of each kind the block has; none of them fails."""
        self._counted = counted = Counter[Fault]()
        yield counted
        self._counted = Counter()

    @contextmanager
    def one(self, fault: Fault, at: int) -> Iterator[None]:
        """In the block the fault happens at point `at` of its kind, the first being 1."""
        self._fault, self._left = fault, at
        with pytest.MonkeyPatch.context() as patch:
            if fault in (Fault.QMP_STOPPED, Fault.BRIDGE_STOPPED):  # to be noticed soon
                patch.setattr(self._vm._scsi._steps, "_timeouts", SHORT)
                patch.setattr(self._vm._scsi, "_timeouts", SHORT)
                for module in (bridge_guest, running, session):
                    patch.setattr(module, "ANSWER_S", STEP_S)
            try:
                yield
                assert self._left <= 0, f"there was no point {at}"
            finally:
                self._fault = None
                if self._is_stopped:
                    os.kill(self._pid, signal.SIGCONT)
                    self._is_stopped = False

    def _stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        self._is_stopped = True

    def _is_now(self, fault: Fault) -> bool:
        self._counted[fault] += 1
        if fault is not self._fault:
            return False
        self._left -= 1
        return self._left == 0

    def _failing(self, plain: Callable[..., Any], fault: Fault, fail: Callable[[], Exception]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._is_now(fault):
                raise fail()
            return plain(*args, **kwargs)

        return wrapped

    def _patch_qmp(self, patch: pytest.MonkeyPatch) -> None:
        plain = Qmp._put

        def put(qmp: Qmp, questions: Sequence[Any], fd: int | None = None) -> None:
            for question in questions:
                if self._is_now(Fault.QMP_REFUSED):
                    question.command = "no-such-command"
                if self._is_now(Fault.QMP_STOPPED):
                    self._stop()
                if self._is_now(Fault.DIES_AT_COMMAND):
                    os.kill(self._pid, signal.SIGKILL)
                plain(qmp, [question], fd)
                fd = None

        patch.setattr(Qmp, "_put", put)

    def _patch_bridge(self, patch: pytest.MonkeyPatch) -> None:
        plain = BridgeClient._send

        def send(client: BridgeClient, kind: int, body: dict[str, Any]) -> int:
            if kind in (messages.NEGOTIATE, messages.PING):
                return plain(client, kind, body)
            if self._is_now(Fault.BRIDGE_STOPPED):
                self._stop()
            if self._is_now(Fault.DIES_AT_REQUEST):
                os.kill(self._pid, signal.SIGKILL)
            if self._is_now(Fault.REQUEST_LOST):
                client.end(VMGone("the connection was cut"))
            id = plain(client, _UNKNOWN if self._is_now(Fault.BRIDGE_REFUSED) else kind, body)
            if self._is_now(Fault.ANSWER_LOST):
                client.end(VMGone("the connection was cut"))
            return id

        patch.setattr(BridgeClient, "_send", send)

    def _patch_store(self, patch: pytest.MonkeyPatch) -> None:
        plain = SqliteJournal._write

        def write(journal: SqliteJournal, put: Sequence[Record], drop: Sequence[Record]) -> None:
            with pytest.MonkeyPatch.context() as for_this:
                if self._is_now(Fault.WRITE_FAILS):
                    for_this.setattr(journal, "_execute", _no_space)
                plain(journal, put, drop)

        patch.setattr(SqliteJournal, "_write", write)


class _Os:
    """The module `os` with another `open`, for one module."""

    def __init__(self, open: Callable[..., int]) -> None:
        self.open = open

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _no_space(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def _refused() -> Exception:
    return OSError(errno.EACCES, os.strerror(errno.EACCES))
