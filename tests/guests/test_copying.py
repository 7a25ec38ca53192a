"""Copies between host and guest: our real agent, the bridge between, and all the ways in which one is interrupted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from guest_end import FakeSerialPort
from utilityvm.bridge import messages
from utilityvm.errors import (
    AccessDenied,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    ProtocolError,
    SetupError,
    UnsafePath,
    VMGone,
)
from utilityvm.files import receive
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.guests.copying import Copies, CopyResult
from utilityvm.guests.program import OutputSink

PATIENCE_S = 20.0
LARGE = os.urandom(3 << 20)  # more than any window


@pytest.fixture
def copies(guest: BridgeGuest) -> Copies:
    return Copies(guest.run_streaming, vm="one")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The host's files."""
    (tmp_path / "here/tree/in").mkdir(parents=True)
    (tmp_path / "here/tree/in/large").write_bytes(LARGE)
    (tmp_path / "here/tree/small").write_text("small")
    (tmp_path / "here/tree/link").symlink_to("in/large")
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The guest's, which in these tests are on the same machine."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


async def put(copies: Copies, src: Path | str | AsyncIterator[bytes], to: Path | str) -> CopyResult:
    return await copies.put(src, str(to), timeout_s=PATIENCE_S)


async def get(copies: Copies, path: Path | str, dst: Path | str | OutputSink, **how: object) -> CopyResult:
    return await copies.get(str(path), dst, **{"links": "refuse", "max_bytes": 1 << 30, "timeout_s": PATIENCE_S, **how})  # type: ignore[arg-type]


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


async def test_a_tree_goes_there_and_back(copies: Copies, here: Path, there: Path) -> None:
    sent = await put(copies, here / "tree", there)
    assert sent == CopyResult(files=2, folders=2, links=1, size_bytes=len(LARGE) + 5)
    got = await get(copies, f"{there}/tree", here / "back")
    assert got == sent
    assert left(here / "back") == left(there / "tree") == left(here / "tree")
    assert (here / "back/in/large").read_bytes() == LARGE
    assert (here / "back/link").readlink() == Path("in/large")
    assert (here / "back/small").stat().st_mtime_ns == (here / "tree/small").stat().st_mtime_ns


async def test_relative_paths_of_the_host_are_those_of_the_call(
    copies: Copies, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    await put(copies, "tree/small", there)
    await put(copies, "tree/.", there / "dot")
    await get(copies, f"{there}/small", ".")
    assert left(there / "dot") == left(here / "tree")
    assert (here / "small").read_text() == "small"


async def test_the_bytes_of_a_file_are_written_and_read(copies: Copies, there: Path) -> None:
    await copies.write_bytes(f"{there}/file", LARGE, mode=0o600, timeout_s=PATIENCE_S)
    assert (there / "file").stat().st_mode & 0o777 == 0o600
    assert await copies.read_bytes(f"{there}/file", max_bytes=1 << 30, timeout_s=PATIENCE_S) == LARGE
    await copies.write_bytes(f"{there}/file", b"", mode=None, timeout_s=PATIENCE_S)
    assert (there / "file").read_bytes() == b""
    assert (there / "file").stat().st_mode & 0o777 == 0o600  # that of the file which it replaced
    with pytest.raises(GuestRefused, match="more than 10 bytes") as raised:
        await copies.read_bytes("/proc/version", max_bytes=10, timeout_s=PATIENCE_S)
    assert raised.value.kind == "limit"
    with pytest.raises(GuestRefused, match="No such file") as raised:
        await copies.read_bytes(f"{there}/none", max_bytes=10, timeout_s=PATIENCE_S)
    assert raised.value.kind == "not_found"
    with pytest.raises(GuestRefused, match="is a device, and no file"):
        await copies.read_bytes("/dev/zero", max_bytes=10, timeout_s=PATIENCE_S)
    with pytest.raises(GuestRefused, match="is a folder"):
        await copies.write_bytes(str(there), b"x", mode=None, timeout_s=PATIENCE_S)


async def test_a_stream_is_copied_as_it_comes(copies: Copies, there: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(LARGE), 100_000):
            yield LARGE[at : at + 100_000]

    assert (await put(copies, pieces(), there / "file")).size_bytes == len(LARGE)
    assert (there / "file").read_bytes() == LARGE
    got = bytearray()
    assert (await get(copies, there / "file", got.extend)).size_bytes == len(LARGE)
    assert got == LARGE


async def test_a_wrong_request_says_what_is_wrong(copies: Copies, here: Path, there: Path) -> None:
    (here / "target/dir").mkdir(parents=True)
    (here / "source").mkdir()
    (here / "source/dir").write_text("a file")
    with pytest.raises(InvalidRequest, match="guest path 'data' is not absolute"):
        await put(copies, here / "tree", "data")
    with pytest.raises(InvalidRequest, match=r"ends with \.\."):
        await get(copies, "/etc/..", here)
    with pytest.raises(InvalidRequest, match="nowhere: No such file"):
        await put(copies, here / "nowhere", there)
    with pytest.raises(InvalidRequest, match="/no: No such file"):
        await get(copies, "/proc/version", here / "no/where")
    with pytest.raises(InvalidRequest, match="dir is there already, and is a folder"):
        await get(copies, f"{here}/source/dir", here / "target")
    with pytest.raises(GuestRefused, match="/no: No such file") as raised:
        await put(copies, here / "tree", there / "no/where")
    assert raised.value.kind == "not_found"
    with pytest.raises(InvalidRequest, match="NUL"):
        await get(copies, "/a\0b", here)
    assert left(there) == []


async def test_links_that_lead_out_are_refused_on_the_way_to_the_host_alone(
    copies: Copies, here: Path, there: Path
) -> None:
    (here / "tree/python").symlink_to("/usr/bin/python3")
    await put(copies, here / "tree", there)
    assert (there / "tree/python").readlink() == Path("/usr/bin/python3")
    with pytest.raises(UnsafePath, match="leads out of what is copied"):
        await get(copies, f"{there}/tree", here / "back")
    assert not (here / "back").exists()
    got = await get(copies, f"{there}/tree", here / "back", links="skip")
    assert got.skipped_count == 1
    await get(copies, f"{there}/tree", here / "kept", links="keep")
    assert (here / "kept/python").readlink() == Path("/usr/bin/python3")


def breaking(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on no more than 1 MiB of a file can be written, on either side."""
    write = receive.NewFile.write

    def limited(file: receive.NewFile, data: bytes, at: int) -> None:
        if at > 1 << 20:
            raise OSError(number, os.strerror(number))
        write(file, data, at)

    monkeypatch.setattr(receive.NewFile, "write", limited)


async def test_a_full_disk_on_either_side_leaves_nothing(
    copies: Copies, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(copies, here / "tree", there / "source")
    before = left(here), left(there)
    breaking(monkeypatch, errno.ENOSPC)
    with pytest.raises(GuestRefused, match="copy/in/large: No space left"):
        await put(copies, here / "tree", there / "copy")
    with pytest.raises(GuestRefused, match="No space left"):
        await copies.write_bytes(f"{there}/new", LARGE, mode=None, timeout_s=PATIENCE_S)
    with pytest.raises(SetupError, match="back/in/large: No space left"):
        await get(copies, there / "source", here / "back")
    assert (left(here), left(there)) == before
    breaking(monkeypatch, errno.EACCES)
    with pytest.raises(AccessDenied):
        await get(copies, there / "source", here / "back")
    assert (left(here), left(there)) == before


async def interrupted(work: Coroutine[Any, Any, object], begun: Callable[[], bool]) -> None:
    task = asyncio.ensure_future(work)
    while not begun():
        assert not task.done(), task
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.005)


async def test_a_copy_that_is_cancelled_leaves_nothing(copies: Copies, here: Path, there: Path) -> None:
    gate = asyncio.Event()
    sent = 0

    async def stuck() -> AsyncIterator[bytes]:
        nonlocal sent
        yield LARGE
        sent = 1
        await gate.wait()

    await interrupted(put(copies, stuck(), there / "file"), lambda: sent == 1)
    await until(lambda: left(there) == [])

    (there / "tree").mkdir()
    for number in range(20):
        (there / f"tree/{number}").write_bytes(LARGE)
    (here / "back").mkdir()
    await interrupted(get(copies, there / "tree", here / "back"), lambda: bool(left(here / "back")))
    assert left(here / "back") == []
    await interrupted(put(copies, there / "tree", there / "copy"), lambda: len(list(there.iterdir())) > 1)
    await until(lambda: sorted(entry.name for entry in there.iterdir()) == ["tree"])


async def test_a_copy_whose_host_dies_leaves_nothing_in_the_guest(
    copies: Copies, guest: BridgeGuest, there: Path
) -> None:
    (there / "old").write_text("old")
    given = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            given.set()

    task = asyncio.ensure_future(put(copies, endless(), there / "old"))
    await given.wait()
    await guest.close()
    with pytest.raises(VMGone):
        await task
    await until(lambda: left(there) == ["old"])
    assert (there / "old").read_text() == "old"


async def test_a_copy_whose_guest_dies_leaves_nothing_here(
    copies: Copies, port: FakeSerialPort, here: Path, there: Path
) -> None:
    (there / "tree").mkdir()
    for number in range(30):
        (there / f"tree/{number:02}").write_bytes(LARGE)
    (here / "back").mkdir()
    task = asyncio.ensure_future(get(copies, there / "tree", here / "back"))
    await until(lambda: bool(left(here / "back")))
    port.drop_host()
    with pytest.raises(VMGone):
        await task
    assert left(here / "back") == []


class Told:
    """A guest that says what it likes: `run_streaming` of one."""

    def __init__(self, *, out: bytes = b"", err: bytes = b"", code: int = 0) -> None:
        self.out, self.err, self.code = out, err, code

    async def __call__(
        self,
        command: list[str],
        *,
        stdin: AsyncIterator[bytes] | None,
        stdout: OutputSink,
        stderr: OutputSink,
        timeout_s: float | None,
    ) -> int:
        assert command[0] == messages.COPY_PROGRAM
        for sink, data in ((stdout, self.out), (stderr, self.err)):
            if data and asyncio.iscoroutine(taken := sink(data)):
                await taken
        return self.code


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (Told(), ProtocolError),  # nothing, and well done
        (Told(code=1), ProtocolError),
        (Told(code=1, err=b"not JSON"), ProtocolError),
        (Told(code=1, err=json.dumps({"Kind": 1, "Message": []}).encode()), ProtocolError),
        (Told(code=1, err=b"x" * 100_000), ProtocolError),
        (Told(code=-9, err=b'{"Kind": "system", "Message": "no"}'), GuestRefused),
        (Told(out=b"not a stream, as everybody can see"), ProtocolError),
        (Told(out=b"f\x03\0\0\0abc"), ProtocolError),
    ],
)
async def test_what_a_hostile_guest_says_is_a_typed_error(told: Told, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        await get(Copies(told, vm="one"), "/etc", tmp_path / "etc")
    assert left(tmp_path) == []


async def test_an_agent_that_knows_no_copies_is_told_as_too_old(
    tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utilityvm.agent import run

    monkeypatch.setattr(run, "is_copy", lambda body: False)
    with pytest.raises(NotSupported, match="too old to copy files"):
        await get(copies, "/etc/passwd", tmp_path / "passwd")
