"""What is fed with anything: each reader of bytes that a stranger wrote, and the errors that it may answer with.

Whatever else a target raises is a fault of ours, and so is one that reads, or keeps, more than it may. A target sends
nothing, opens nothing and starts nothing: it can be fed with everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, cast
from unittest import mock

import click

from utilityvm.agent import disks as agent_disks
from utilityvm.agent import run as agent_run
from utilityvm.agent import serve as agent_serve
from utilityvm.agent.faults import Fault
from utilityvm.bridge import messages, mount_options
from utilityvm.bridge.frame import Decoder, FrameError
from utilityvm.cli import values
from utilityvm.diskimage import gpt, headers, safety
from utilityvm.diskimage.source import Source
from utilityvm.errors import (
    ConfigDiffers,
    ImageError,
    InvalidRequest,
    NotSupported,
    ProtocolError,
    StoreError,
    TemplateDamaged,
    VMNotFound,
)
from utilityvm.guests import answers
from utilityvm.hosts.hcs import clone, gob, savedstate
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.ports import DiskFormat
from utilityvm.server import routes
from utilityvm.server.app import App
from utilityvm.server.keeper import Keeper
from utilityvm.server.programs import Programs
from utilityvm.server.types import ServerInfo
from utilityvm.store import journal
from utilityvm.templates import manifest

MOST_READ: Final = 8 << 20  # of an image, whatever it says
_EXTENT: Final = struct.Struct("<IH")
_LARGEST: Final = 64 << 20
_MOST_PARTS: Final = 512
_ANSWERS: Final = (
    answers.Negotiated,
    answers.Probed,
    answers.Mounts,
    answers.Quiesced,
    answers.ShutDown,
    answers.Unique,
    answers.Output,
    answers.Credit,
    answers.Exit,
    answers.FollowEnd,
    answers.Programs,
    answers.Started,
    answers.About,
    answers.Response,
)
_ROWS: Final[tuple[Callable[[tuple[Any, ...]], object], ...]] = (journal._disk, journal._mount, journal._reservation)


@dataclass(frozen=True, slots=True)
class Target:
    """`one` takes an input; `errors` are those by which it may refuse it."""

    name: str
    one: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]

    def feed(self, data: bytes) -> bool:
        """Was it taken? Not: it was refused as it should be."""
        try:
            self.one(data)
        except self.errors:
            return False
        return True


def packed(image: bytes) -> bytes:
    """An image as an input: its size, and the parts that are not zero. The parts of a sparse one are few and small."""
    parts = [struct.pack("<I", len(image))]
    for at in range(0, len(image), 512):
        part = image[at : at + 512].rstrip(b"\0")
        if part:
            parts.append(_EXTENT.pack(at, len(part)) + part)
    return b"".join(parts)


class Parts:
    """What `packed` made, read as a file. Where two parts cover one place, the later one counts."""

    def __init__(self, data: bytes) -> None:
        self.size = min(int.from_bytes(data[:4], "little"), _LARGEST)
        self.bytes_read = 0
        self._parts: list[tuple[int, bytes]] = []
        at = 4
        while at + _EXTENT.size <= len(data) and len(self._parts) < _MOST_PARTS:
            offset, length = _EXTENT.unpack_from(data, at)
            self._parts.append((offset, data[at + _EXTENT.size :][:length]))
            at += _EXTENT.size + length

    def pread(self, length: int, offset: int) -> bytes:
        found = bytearray(max(0, min(length, self.size - offset)))
        for begin, part in self._parts:
            first, last = max(begin, offset), min(begin + len(part), offset + len(found))
            if first < last:
                found[first - offset : last - offset] = part[first - begin : last - begin]
        self.bytes_read += len(found)
        return bytes(found)


def images(data: bytes) -> None:
    """A disk image, in each format that may be asked for."""
    image = Parts(data)
    for expected in (None, *DiskFormat):
        image.bytes_read = 0
        source = Source(image.pread, size_bytes=image.size, name="image")
        try:
            header = headers.read_source(source, expected=expected)
            gpt.foreign_sectors(source, header)
            for read_only in (True, False):
                list(safety.problems(header, read_only=read_only))
            headers.driver_options(header)
        except (ImageError, ConfigDiffers, NotSupported):
            continue
        finally:
            assert image.bytes_read <= MOST_READ, f"{image.bytes_read} bytes were read of {image.size}"


def from_guest(data: bytes) -> None:
    """What a guest's agent sends: frames, and in them every document that we read."""
    decoder = Decoder()
    for begin in range(0, len(data), 4096):
        for frame in decoder.feed(data[begin : begin + 4096]):
            try:
                body = frame.body()
            except FrameError:
                continue
            for kind in _ANSWERS:
                try:
                    answers.read(kind, body)
                except ProtocolError as error:
                    shown = str(error)
                    assert len(shown) < 2000, "an error of the guest's size"
                    assert shown.isprintable(), f"what a terminal obeys is in an error: {shown!r}"


def from_host(data: bytes) -> None:
    """What the agent is sent. Only what reads a request, for the rest of it acts on the machine that it is on."""
    decoder = agent_serve._decoder()
    for frame in decoder.feed(data):
        try:
            body = frame.body()
        except FrameError:
            continue
        for read in (
            agent_serve._slot,
            agent_run.Command,
            agent_run.data_of,
            agent_run.process_number,
            lambda body: agent_serve._seconds(body.get("TimeoutMs"), 1.0),
            _settings,
        ):
            try:
                read(body)
            except Fault:
                continue


def _settings(body: dict[str, Any]) -> None:
    request = body.get("Request")
    settings = agent_serve._settings(request if isinstance(request, dict) else body)
    extension = body.get(messages.EXTENSION)
    if isinstance(extension, dict):
        agent_disks._key(settings, extension)
        agent_disks._ranges(extension.get("MayHold"), start=0, size=1 << 30)
    options = settings.get("Options") or []
    with contextlib.suppress(ValueError):
        mount_options.parse(options, read_only=bool(settings.get("ReadOnly")))
    agent_disks._guest_path(settings, to_mount=True)


def gobs(data: bytes) -> None:
    """A mount in Go's encoding, which comes back as it was."""
    for read in (gob.decode_outer, gob.decode_value, clone.load):
        try:
            read(data)
        except ProtocolError:
            continue
    mount = gob.decode(data)
    assert gob.decode(gob.encode(mount)) == mount


def saved_states(data: bytes) -> None:
    """A saved state of hcsshim's, which comes back as it was."""
    state = savedstate.decode(data)
    assert savedstate.decode(savedstate.encode(state)) == state
    savedstate.section_of(state)


def states(data: bytes) -> None:
    """A manager's exported state, which comes back as it was."""
    state = ScsiState.from_json(data)
    assert ScsiState.from_json(state.to_json()) == state


def manifests(data: bytes) -> None:
    """A template's manifest."""
    found = manifest.parse(data, where="warm/manifest.json", name="warm")
    assert manifest.parse(manifest.encode(found), where="warm/manifest.json", name="warm") == found


def journal_rows(data: bytes) -> None:
    """Rows of the journal, as SQLite gives them: the values are those of a JSON list, of a list for each table."""
    try:
        tables = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(tables, list):
        return
    rows = [
        [tuple(row) for row in table if isinstance(row, list)] if isinstance(table, list) else []
        for table in tables[:3]
    ]
    rows += [[]] * (3 - len(rows))
    journal.records(*rows, vm="fuzz")


def disk_words(data: bytes) -> None:
    """What stands on a command line for a disk, a size, a time and a count."""
    text = data.decode(errors="surrogateescape").replace("\0", "")
    for read in (values.place, *(lambda text, kind=kind: kind.convert(text, None, None) for kind in _KINDS)):
        try:
            read(text)
        except click.UsageError:
            continue


class _NoVMs:
    """A server's keeper without VMs."""

    @contextlib.asynccontextmanager
    async def use(self, name: str, **_: object) -> AsyncIterator[None]:
        raise VMNotFound(f"there is no VM named {name!r}", vm=name)
        yield

    def told(self, name: str) -> list[str]:
        return []

    async def stop(self, name: str, **_: object) -> list[str]:
        raise VMNotFound(f"there is no VM named {name!r}", vm=name)


@functools.cache
def _server() -> tuple[asyncio.AbstractEventLoop, App]:
    keeper = cast(Keeper, _NoVMs())
    info = ServerInfo(version="0", pid=1, state_folder="/", vms=[])
    service = routes.Service(keeper, Programs(keeper), lambda: info)
    return asyncio.new_event_loop(), App(service, version="0")


def http(data: bytes) -> None:
    """A request to the server, as uvicorn hands it over: method, target and headers in lines, then the body."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, target = first.partition(b" ")
    path, _, query = target.partition(b"?")
    headers = [(b"host", b"utilityvm")]
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name.strip().lower(), value.strip()))
    scope = {
        "type": "http", "method": method.decode("latin-1"), "path": path.decode("latin-1"), "raw_path": path,
        "query_string": query, "headers": headers,
    }  # fmt: skip
    messages_in = [{"type": "http.request", "body": body[at : at + 4096], "more_body": True} for at in (0, 4096)]
    messages_in.append({"type": "http.request", "body": body[8192:]})
    sent: list[Any] = []

    async def receive() -> Any:
        if not messages_in:
            await asyncio.get_running_loop().create_future()
        return messages_in.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    loop, app = _server()
    with mock.patch.object(routes, "stored", list):
        loop.run_until_complete(app(scope, receive, send))
    assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"], sent
    status, answer = sent[0]["status"], sent[1]["body"]
    assert status in (200, 400, 403, 404, 405, 409, 413, 415, 421, 422), (status, answer)
    assert status == 200 or len(answer) < 32768, "an error of the request's size"
    detail = json.loads(answer)
    if status != 200:
        assert all(sign.isprintable() or sign in "\n\t" for sign in detail["detail"]), detail


_KINDS: Final = (values.SIZE, values.MEMORY, values.SECONDS, values.WAIT, values.Count(1, 100))

TARGETS: Final = {
    target.name: target
    for target in (
        Target("images", images, ()),
        Target("from_guest", from_guest, (FrameError,)),
        Target("from_host", from_host, (FrameError,)),
        Target("gob", gobs, (ProtocolError,)),
        Target("saved_states", saved_states, (ProtocolError,)),
        Target("states", states, (InvalidRequest,)),
        Target("manifests", manifests, (TemplateDamaged,)),
        Target("journal_rows", journal_rows, (StoreError,)),
        Target("disk_words", disk_words, ()),
        Target("http", http, ()),
    )
}
