"""Files between this host and a guest: `put`, `get`, and the bytes of one file.

All of it goes over `run_streaming`, as a program that the agent is itself (`messages.COPY_PROGRAM`): whatever can run a
program in the guest can copy. The host's own files are read and written in threads, for storage may hang.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from utilityvm.bridge import messages
from utilityvm.errors import (
    AccessDenied,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    ProtocolError,
    UnsafePath,
    UtilityVMError,
)
from utilityvm.guests import answers
from utilityvm.guests.program import OutputSink
from utilityvm.machine.hostpath import HostPath
from utilityvm.machine.oserrors import as_ours
from utilityvm.machine.threads import aside, in_thread
from utilityvm.text import clean

if TYPE_CHECKING:
    from utilityvm.files.records import Counts

MAX_READ_BYTES: Final = 64 << 20
MAX_GET_BYTES: Final = 16 << 30
_MAX_ENTRIES: Final = 1_000_000
_MAX_SAID_BYTES: Final = 65536
_CLOSE_S: Final = 0.2  # to remove what is half done, when the storage hangs

EscapingLinks: TypeAlias = Literal["refuse", "skip", "keep"]
"""What becomes of symbolic links that lead out of what is copied."""


class Run(Protocol):
    """`run_streaming` of a VM, whoever owns it."""

    async def __call__(
        self,
        command: list[str],
        *,
        stdin: AsyncIterator[bytes] | None,
        stdout: OutputSink,
        stderr: OutputSink,
        timeout_s: float | None,
    ) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """What was copied. `skipped` has a line for each thing that was left out, the first hundred of `skipped_count`."""

    files: int
    folders: int
    links: int
    size_bytes: int  # of data: holes in files do not count
    skipped: tuple[str, ...] = ()
    skipped_count: int = 0


class Copies:
    """Those of one VM."""

    def __init__(self, run: Run, *, vm: str | None) -> None:
        self._run = run
        self._vm = vm

    async def put(
        self,
        src: HostPath | AsyncIterable[bytes],
        guest_path: str | PurePosixPath,
        *,
        timeout_s: float | None,
    ) -> CopyResult:
        """See `UtilityVM.put`."""
        target = self._guest_path(guest_path)
        if not isinstance(src, (str, os.PathLike)):
            size = await self._write(target, src, mode=None, timeout_s=timeout_s)
            return CopyResult(files=1, folders=0, links=0, size_bytes=size)
        from utilityvm.files.records import CopyFault, Counts
        from utilityvm.files.send import send

        counts = Counts()
        path = self._host_path(src)
        pieces = _InThread(send(path, counts))
        options = {"Base": _base_of(path), "Contents": _is_contents(path)}
        try:
            await self._do("receive", target, options, stdin=pieces.all(), timeout_s=timeout_s)
        except CopyFault as fault:
            raise InvalidRequest(fault.message, vm=self._vm) from None
        except OSError as error:
            raise self._host_error(error, "copy to the guest") from error
        finally:
            pieces.close()
        return _result(counts)

    async def get(
        self,
        guest_path: str | PurePosixPath,
        dst: HostPath | OutputSink,
        *,
        links: EscapingLinks,
        max_bytes: int,
        timeout_s: float | None,
    ) -> CopyResult:
        """See `UtilityVM.get`."""
        source = self._guest_path(guest_path)
        if not isinstance(dst, (str, os.PathLike)):
            size = await self._read(source, dst, max_bytes=max_bytes, timeout_s=timeout_s)
            return CopyResult(files=1, folders=0, links=0, size_bytes=size)
        from utilityvm.files.receive import Receiver, Rules
        from utilityvm.files.records import CopyFault

        rules = Rules(links=links, max_bytes=max_bytes, max_entries=_MAX_ENTRIES)
        target = self._host_path(dst)
        receiver = Receiver(target, base=_base_of(source), contents=_is_contents(source), rules=rules)
        lock = threading.Lock()  # a call that was given up goes on in its thread

        def feed(data: bytes) -> None:
            with lock:
                receiver.feed(data)

        def finish() -> Counts:
            with lock:
                return receiver.finish()

        def close() -> None:
            with lock:
                receiver.close()

        try:
            await self._do("send", source, {}, stdout=lambda data: in_thread(feed, data), timeout_s=timeout_s)
            return _result(await in_thread(finish))
        except CopyFault as fault:
            raise self._fault(fault.kind, fault.message) from None
        except OSError as error:
            raise self._host_error(error, "copy from the guest") from error
        finally:
            closing = asyncio.ensure_future(in_thread(close, always=True))
            await asyncio.wait([closing], timeout=_CLOSE_S)

    async def read_bytes(self, guest_path: str | PurePosixPath, *, max_bytes: int, timeout_s: float | None) -> bytes:
        """See `UtilityVM.read_bytes`."""
        data = bytearray()
        await self._read(self._guest_path(guest_path), data.extend, max_bytes=max_bytes, timeout_s=timeout_s)
        return bytes(data)

    async def write_bytes(
        self, guest_path: str | PurePosixPath, data: bytes, *, mode: int | None, timeout_s: float | None
    ) -> None:
        """See `UtilityVM.write_bytes`."""

        async def given() -> AsyncIterator[bytes]:
            yield data

        await self._write(self._guest_path(guest_path), given(), mode=mode, timeout_s=timeout_s)

    async def _read(self, source: str, sink: OutputSink, *, max_bytes: int, timeout_s: float | None) -> int:
        size = 0

        def take(data: bytes) -> object:
            nonlocal size
            size += len(data)
            if size > max_bytes:
                raise self._fault("limit", f"{source} has more than {max_bytes} bytes")
            return sink(data)

        await self._do("read", source, {}, stdout=take, timeout_s=timeout_s)
        return size

    async def _write(
        self, target: str, source: AsyncIterable[bytes], *, mode: int | None, timeout_s: float | None
    ) -> int:
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for data in source:
                size += len(data)
                yield data

        if target.endswith("/"):
            raise InvalidRequest(f"guest path {target!r} is a folder", vm=self._vm, remedy="give the file's name too")
        options = {} if mode is None else {"Mode": mode}
        await self._do("write", target, options, stdin=counted(), timeout_s=timeout_s)
        return size

    async def _do(
        self,
        act: str,
        path: str,
        options: dict[str, Any],
        *,
        stdin: AsyncIterator[bytes] | None = None,
        stdout: OutputSink = len,
        timeout_s: float | None,
    ) -> None:
        said = bytearray()

        def hear(data: bytes) -> None:
            said.extend(data)
            if len(said) > _MAX_SAID_BYTES:
                raise ProtocolError("the guest does not end to say why a copy failed", vm=self._vm)

        command = [messages.COPY_PROGRAM, act, path, json.dumps(options)]
        try:
            code = await self._run(command, stdin=stdin, stdout=stdout, stderr=hear, timeout_s=timeout_s)
        except GuestRefused as error:
            if error.kind != "not_found" or messages.COPY_PROGRAM not in str(error):
                raise
            remedy = "build the guest image anew (uvm image build), and start the VM from it"
            raise NotSupported("this guest's agent is too old to copy files", vm=self._vm, remedy=remedy) from None
        if code:
            raise self._failed(bytes(said))

    def _failed(self, said: bytes) -> UtilityVMError:
        try:
            body = json.loads(said)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return ProtocolError("the guest does not say why a copy failed", message=said[:200], vm=self._vm)
        try:
            failure = answers.read(answers.CopyFailed, body, what="reason why a copy failed", vm=self._vm)
        except ProtocolError as broken:
            return broken
        error = GuestRefused(str(failure.message), vm=self._vm, remedy=_REMEDIES.get(failure.errno))
        error.kind = {errno.ENOENT: "not_found"}.get(failure.errno, str(failure.kind))
        return error

    def _fault(self, kind: str, message: str) -> UtilityVMError:
        """Why the host takes no more of what the guest sends."""
        message = clean(message)  # it may have names of the guest's choosing
        match kind:
            case "unsafe":
                remedy = 'links="skip" leaves such links out, links="keep" makes them'
                return UnsafePath(message, vm=self._vm, remedy=remedy if "link" in message else None)
            case "limit":
                error = GuestRefused(message, vm=self._vm, remedy="raise max_bytes, if you trust the guest")
                error.kind = "limit"
                return error
            case "broken":
                return ProtocolError(message, vm=self._vm)
        return InvalidRequest(message, vm=self._vm)

    def _host_error(self, error: OSError, doing: str) -> UtilityVMError:
        where = clean(os.fsdecode(error.filename)) if error.filename else "a file of this host"
        text = f"{doing}: {where}: {error.strerror}"
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG:
                return InvalidRequest(text, vm=self._vm)
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return AccessDenied(text, vm=self._vm)
        return as_ours(error, doing, vm=self._vm)

    def _guest_path(self, given: str | PurePosixPath) -> str:
        path = str(given)
        why = remedy = None
        if not path.startswith("/"):
            why, remedy = "is not absolute", f"write it as {'/' + path!r}"
        elif "\0" in path:
            why = "has a NUL in it"
        elif path.rstrip("/").endswith("/.."):
            why, remedy = "ends with ..", "write the folder's own name"
        if why:
            raise InvalidRequest(f"guest path {path!r} {why}", vm=self._vm, remedy=remedy)
        return path

    def _host_path(self, given: HostPath) -> str:
        path = os.fspath(given)
        if not path or "\0" in path:
            raise InvalidRequest(f"host path {path!r} is none", vm=self._vm)
        # As it was written: a slash at its end, or a dot, says something. Not the folder that we may change to later.
        return path if path.startswith("/") else f"{Path.cwd()}/{path}"


_REMEDIES: Final = {
    errno.ENOSPC: "make room in the guest: df shows where",
    errno.EROFS: "the guest has it mounted read-only",
}


def _base_of(path: str) -> str:
    """What the copy is called in a folder."""
    return path.rstrip("/").rpartition("/")[2]


def _is_contents(path: str) -> bool:
    """As cp(1) and docker cp: `folder/.` is what is in the folder."""
    return path.endswith("/.")


def _result(counts: Counts) -> CopyResult:
    return CopyResult(
        files=counts.files,
        folders=counts.folders,
        links=counts.links,
        size_bytes=counts.bytes,
        skipped=tuple(map(clean, counts.skipped)),
        skipped_count=counts.skipped_count,
    )


class _InThread:
    """An iterator that is gone through in threads, one step at a time."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._lock = threading.Lock()  # a step that was given up goes on in its thread
        self._is_closed = False

    async def all(self) -> AsyncIterator[bytes]:
        while (piece := await in_thread(self._next)) is not None:
            yield piece

    def close(self) -> None:
        """Do not wait for it: what it reads may hang."""
        aside(self._close)

    def _next(self) -> bytes | None:
        with self._lock:
            return None if self._is_closed else next(self._pieces, None)

    def _close(self) -> None:
        with self._lock:
            self._is_closed = True
            close: Callable[[], object] = self._pieces.close  # type: ignore[attr-defined]  # a generator
            close()
