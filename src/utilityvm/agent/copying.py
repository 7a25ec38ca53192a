"""Copies between host and guest: what the agent does itself when a host runs `messages.COPY_PROGRAM`.

To the host it is a program like any other: input, output, an exit code, and a cancellation. But no process is started
for it, which would cost more than most copies do: a thread of the agent moves the bytes. On its standard output is
what was asked for; a failure is exit code 1 and a JSON object on its standard error::

    send PATH                the stream of `files.send`
    read PATH                the bytes of a file
    receive PATH {options}   takes such a stream: {Base, Contents}
    write PATH {options}     takes the bytes of a file: {Mode}
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final

from utilityvm.agent.faults import Fault
from utilityvm.bridge import messages
from utilityvm.files import receive, send
from utilityvm.files.records import CopyFault

if TYPE_CHECKING:
    from utilityvm.agent.run import Outlet

_DEFAULT_MODE: Final = 0o644


class _Cancelled(Exception):
    """The host wants no more of it, or is gone."""


class Copy:
    """One of them, as `run.Program` is one program."""

    def __init__(self, name: str, body: dict[str, Any], outlet: Outlet) -> None:
        """Raises:
        Fault: the request is wrong.
        """
        self._act, self._path, self._options = _asked(body)
        self.name = f"{name}: a copy of {self._path[:100]}"
        self._outlet = outlet
        self._changed = threading.Condition()  # guards what follows
        self._input: deque[bytes] = deque()
        self._input_size = 0
        self._input_ends = False
        self._is_cancelled = False

    def start(self) -> None:
        """Raises:
        Fault: there is no thread for it.
        """
        try:
            threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError:
            self._outlet.gone()
            raise Fault("cannot copy: the agent gets no more threads") from None

    def give_up(self) -> None:
        """It is not going to be started."""
        self._outlet.gone()

    def feed(self, data: bytes, *, last: bool) -> None:
        """Give it input. A host that sends more than its window allows loses the copy."""
        with self._changed:
            self._input.append(data)
            self._input_size += len(data)
            self._input_ends |= last
            if self._input_size > messages.INPUT_WINDOW_BYTES:
                self._is_cancelled = True
            self._changed.notify_all()

    def nudge(self) -> None:
        """There may be more room at the outlet."""
        with self._changed:
            self._changed.notify_all()

    def signal(self, number: int) -> None:
        """Any signal ends it: there is no process that could handle one."""
        self.cancel()

    def cancel(self) -> None:
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def _run(self) -> None:
        status = 0
        try:
            match self._act:
                case "send":
                    self._give(send.send(self._path))
                case "read":
                    self._give(send.read(self._path))
                case "receive":
                    self._receive()
                case _:
                    self._write_file()
        except _Cancelled:
            self._outlet.gone()
            return
        except Exception as error:  # whatever it is, the host must hear of it
            status = 1
            with suppress(_Cancelled):
                self._write("err", json.dumps(_failure(error)).encode())
        if self._is_cancelled:
            self._outlet.gone()
        else:
            self._outlet.ended(status)

    def _give(self, pieces: Iterator[bytes]) -> None:
        with closing(pieces):  # type: ignore[type-var]  # they are generators
            for piece in pieces:
                self._write("out", piece)

    def _write(self, stream: str, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            with self._changed:
                while (room := self._outlet.room()) <= 0 and not self._is_cancelled:
                    self._changed.wait()
                if self._is_cancelled:
                    raise _Cancelled
            size = min(room, messages.CHUNK_BYTES, len(rest))
            self._outlet.write(stream, bytes(rest[:size]))
            rest = rest[size:]

    def _pieces(self) -> Iterator[bytes]:
        """The input, to its end. It counts as taken when the next is asked for."""
        taken = 0
        while True:
            with self._changed:
                while not self._input and not self._input_ends and not self._is_cancelled:
                    self._changed.wait()
                if self._is_cancelled:
                    raise _Cancelled
                data = b"".join(self._input)
                self._input.clear()
                self._input_size = 0
                is_last = self._input_ends
            if data:
                yield data
                taken += len(data)
                self._outlet.took(len(data), taken)
            if is_last:
                return

    def _receive(self) -> None:
        rules = receive.Rules(links=receive.KEEP, is_trusted=True, is_durable=True)
        base, contents = self._options.get("Base", ""), self._options.get("Contents") is True
        receiver = receive.Receiver(self._path, base=base, contents=contents, rules=rules)
        try:
            for data in self._pieces():
                receiver.feed(data)
            receiver.finish()
        finally:
            receiver.close()

    def _write_file(self) -> None:
        folder, name = os.path.split(self._path)
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not name:
                raise CopyFault("refused", f"{self._path} is a folder")
            receive.refuse_others(parent, os.fsencode(name), self._path)
            mode, owner = self._new_mode(parent, name)
            file = receive.NewFile(parent, os.fsencode(name))
            try:
                at = 0
                for data in self._pieces():
                    file.write(data, at)
                    at += len(data)
                if owner is not None:
                    os.fchown(file.fd, *owner)
                os.fchmod(file.fd, mode)
                file.named(is_durable=True)
            finally:
                file.drop()
        finally:
            os.close(parent)

    def _new_mode(self, parent: int, name: str) -> tuple[int, tuple[int, int] | None]:
        """Of the file that is written: what was asked for, else that of the file that it replaces."""
        wanted = self._options.get("Mode")
        mode = wanted if isinstance(wanted, int) else _DEFAULT_MODE
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return mode, None
        if not stat.S_ISREG(status.st_mode):
            return mode, None
        return mode if isinstance(wanted, int) else stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)


def is_copy(body: dict[str, Any]) -> bool:
    """Is that a request for a copy, and not for a program?"""
    argv = body.get("Argv")
    return isinstance(argv, list) and argv[:1] == [messages.COPY_PROGRAM]


def _asked(body: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    words = body["Argv"][1:]
    if len(words) != 3 or not all(isinstance(word, str) for word in words):
        raise Fault("a copy has an act, a path and options", kind="invalid")
    act, path, text = words
    if act not in ("send", "read", "receive", "write"):
        raise Fault(f"there is no copy of the kind {act[:20]!r}", kind="invalid")
    if not path.startswith("/") or "\0" in path:
        raise Fault(f"the guest path {path[:100]!r} must be absolute", kind="invalid")
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict) or not isinstance(options.get("Base", ""), str):
        raise Fault("the options of a copy must be an object", kind="invalid")
    if body.get("User") is not None or body.get("Limits") is not None:
        raise Fault("a copy has no user and no limits", kind="invalid")
    return act, path, options


def _failure(error: Exception) -> dict[str, Any]:
    match error:
        case CopyFault():
            return {"Kind": error.kind, "Message": error.message[:1000]}
        case OSError():
            where = f"{os.fsdecode(error.filename)[:1000]}: " if error.filename is not None else ""
            return {"Kind": "system", "Errno": error.errno or 0, "Message": f"{where}{error.strerror or error}"}
    return {"Kind": "unknown", "Message": f"the agent failed: {type(error).__name__}: {error}"[:1000]}
