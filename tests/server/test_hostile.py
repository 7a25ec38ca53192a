"""A hostile client gets nothing, and holds up nobody."""

from __future__ import annotations

import json
import socket
import struct

import pytest

from served import Running
from utilityvm.server import app, listening
from utilityvm.server.routes import MOST_BODY_BYTES


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def request(head: str, *more: str, body: bytes = b"", host: str = "utilityvm") -> bytes:
    lines = [f"{head} HTTP/1.1", f"Host: {host}", "Connection: close", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "utilityvm.evil.example"])
async def test_another_host_is_refused(server: Running, host: str) -> None:
    assert status(await server.raw(request("GET /v1", host=host))) == 421


@pytest.mark.parametrize("header", ["Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"])
async def test_a_web_page_is_refused(server: Running, header: str) -> None:
    assert status(await server.raw(request("GET /v1", header))) == 403


async def test_a_body_of_any_size_is_refused_before_it_is_read(server: Running) -> None:
    put = "PUT /v1/vms/worker/reservations/0123456789ab"
    sized = f"Content-Length: {MOST_BODY_BYTES + 1}"
    assert status(await server.raw(request(put, "Content-Type: application/json", sized))) == 413
    endless = b"%x\r\n%s\r\n" % (65536, b"x" * 65536) * (MOST_BODY_BYTES // 65536 + 1)
    answer = await server.raw(request(put, "Transfer-Encoding: chunked", body=endless))
    assert not answer or status(answer) == 413  # the kernel may drop an answer to one who is still sending
    assert server.world.opened == 0


async def test_a_body_that_does_not_come_is_not_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.05)
    slow = request("PUT /v1/vms/worker/reservations/0123456789ab", "Content-Length: 10", body=b"{")
    assert status(await server.raw(slow)) == 408


async def test_a_head_that_does_not_come_is_not_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEAD_S", 0.05)
    assert await server.raw(b"") == b""
    assert await server.raw(b"GET /v1 HTTP/1.1\r\nHost: ") == b""


async def test_a_head_of_any_size_is_refused(server: Running) -> None:
    endless = b"GET /v1 HTTP/1.1\r\nHost: utilityvm\r\nX: " + b"x" * (2 * listening.MOST_HEAD_BYTES)
    assert status(await server.raw(endless)) == 400


@pytest.mark.parametrize(
    ("head", "more", "body", "code"),
    [
        ("GET /v2", (), b"", 404),
        ("GET /v1/vms/../v1", (), b"", 404),
        ("POST /v1", ("Content-Length: 0",), b"", 405),
        ("GET /v1?x=1", (), b"", 422),
        ("GET /v1/vms/worker?wait_s=0&wait_s=1", (), b"", 422),
        ("GET /v1/vms/worker?wait_s=-1", (), b"", 422),
        ("GET /v1/vms/worker?wait_s=nan", (), b"", 422),
        ("GET /v1/vms/%ff", (), b"", 422),
        ("GET /v1", ("Content-Length: 1",), b"x", 400),
        ("PUT /v1/vms/worker/reservations/0123456789ab", ("Content-Length: 2",), b"{}", 415),
        ("PUT /v1/vms/worker/reservations/../../x", ("Content-Length: 2",), b"{}", 404),
        ("PUT /v1/vms/worker/reservations/ABC", ("Content-Length: 2",), b"{}", 422),
    ],
)
async def test_what_is_no_call_is_refused(
    server: Running, head: str, more: tuple[str, ...], body: bytes, code: int
) -> None:
    answer = await server.raw(request(head, *more, body=body))
    assert status(answer) == code, answer
    assert b"application/problem+json" in answer
    assert server.world.opened == 0


@pytest.mark.parametrize("path", ["/v1/" + "x" * 3000, "/v1/vms/%1b%5d0;x%07/programs/0123456789ab"])
async def test_an_error_is_short_and_has_nothing_that_a_terminal_obeys(server: Running, path: str) -> None:
    answer = await server.raw(request(f"GET {path}"))
    detail = json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    assert detail.isprintable()
    assert len(detail) < 300


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b"[" * 5000, b'{"host_path":"/a","more":1}', b'{"host_path":1}']
)
async def test_what_is_no_document_is_refused(server: Running, body: bytes) -> None:
    more = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    answer = await server.raw(request("PUT /v1/vms/worker/reservations/0123456789ab", *more, body=body))
    assert status(answer) == 422
    assert server.world.opened == 0


class From:
    """A connection of that user."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    def getsockopt(self, *what: int) -> bytes:
        assert what[:2] == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return struct.pack("3i", 1, self._uid, 1)


def test_another_user_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert listening._is_ours(From(1000))
    assert listening._is_ours(From(0))
    assert not listening._is_ours(From(1001))


async def test_a_connection_of_another_user_is_closed_unread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_is_ours", lambda connection: False)
    assert await server.raw(request("GET /v1")) == b""
    assert server.app.in_flight == 0
