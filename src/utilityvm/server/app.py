"""The ASGI application: reads and checks a request, does the call, and answers. Every error is a problem document.

A client that hangs up before it has its answer gets nothing done: the call is cancelled, and undone as any cancelled
call is. What was done before that is found again by the ids in the request.

No web page can use it: a browser says with `Origin` or `Sec-Fetch-Site` that a page asks, and with `Host` what the page
called the server; both are refused.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, unquote

import msgspec

from utilityvm.errors import InvalidRequest, UtilityVMError
from utilityvm.log import logger
from utilityvm.server import openapi
from utilityvm.server.problems import CONTENT_TYPE, problem_of
from utilityvm.server.routes import MOST_BODY_BYTES, OCTETS, PARTS, PATTERNS, Request, Route, Service
from utilityvm.text import clean

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

HOSTS: Final = frozenset({b"utilityvm", b"localhost"})
FINDINGS: Final = b"utilityvm-findings"
_MOST_FINDINGS, _LONGEST_FINDING = 20, 300  # a client takes 16 KiB of headers
DOCUMENT: Final = "/v1/openapi.json"
BODY_S: Final = 15.0  # for all of a body to come
_JSON: Final = "application/json"
_LONGEST_DETAIL: Final = 250
_OF_A_PAGE: Final = frozenset({b"origin", b"sec-fetch-site"})

_log = logger(__name__)


class _Refused(Exception):
    """A request that is no call, with its status."""

    def __init__(self, status: int, detail: str, *, remedy: str | None = None, headers: Headers = ()) -> None:
        self.error = InvalidRequest(clean(detail, _LONGEST_DETAIL), remedy=remedy)
        self.status = status
        self.headers = headers


Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]


class _Gone(Exception):
    """The client hung up."""


class App:
    """The application. `in_flight` requests are being answered."""

    def __init__(self, service: Service, *, version: str) -> None:
        self._service = service
        self._document = msgspec.json.encode(openapi.document(version))
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to send nothing else"
        self.in_flight += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            _check_source(scope)
            if scope["path"] == DOCUMENT and scope["method"] == "GET":
                await _send(send, 200, self._document, _JSON)
                return
            route, request = await _read(scope, receive)
            answer = await _unless_gone(route.call(self._service, request), receive)
            headers = _findings(self._service, request)
            if route.answer is bytes:
                await _stream(answer, route, receive, send, headers)
            elif route.answer is None:
                await _send(send, route.status, b"", None, headers)
            else:
                await _send(send, route.status, msgspec.json.encode(answer), route.media_type, headers)
        except _Gone:
            return
        except _Refused as refused:
            await _tell(send, refused.error, status=refused.status, headers=refused.headers)
        except UtilityVMError as error:
            await _tell(send, error)
        except Exception as error:
            _log.error("%s %s: %s", scope["method"], scope["path"], "".join(traceback.format_exception(error)))
            await _tell(send, UtilityVMError(f"the server has a fault: {error!r}", remedy="its log has more"))


def _check_source(scope: Scope) -> None:
    names = [name for name, _ in scope["headers"]]
    hosts = [value.partition(b":")[0].lower() for name, value in scope["headers"] if name == b"host"]
    if _OF_A_PAGE.intersection(names):
        raise _Refused(403, "web pages cannot use this server")
    if len(hosts) != 1 or hosts[0] not in HOSTS:
        raise _Refused(421, "the request names another host", remedy="send `Host: utilityvm`")


async def _read(scope: Scope, receive: Receive) -> tuple[Route, Request]:
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.partition(b"?")[0].decode("latin-1")
    found = [(match, route) for pattern, route in PATTERNS if (match := pattern.fullmatch(path))]
    if not found:
        raise _Refused(404, f"there is no {path}", remedy=f"{DOCUMENT} has every path")
    methods = ", ".join(dict.fromkeys(route.method for _, route in found)).encode()
    for match, route in found:
        if route.method != scope["method"]:
            continue
        try:
            parts = {name: unquote(value, errors="strict") for name, value in match.groupdict().items()}
            for name, value in parts.items():
                msgspec.convert(value, PARTS[name])
            query = msgspec.convert(_query(scope["query_string"]), route.query, strict=False)
        except (msgspec.ValidationError, UnicodeError) as error:
            raise _Refused(422, f"{route.method} {route.path}: {error}") from None
        return route, Request(path=parts, query=query, body=await _body(route, scope, receive))
    raise _Refused(405, f"{path} takes {methods.decode()}", headers=((b"allow", methods),))


def _query(text: bytes) -> dict[str, str]:
    pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, errors="strict")
    query = dict(pairs)
    if len(query) != len(pairs):
        raise _Refused(422, "a parameter is given twice")
    return query


async def _body(route: Route, scope: Scope, receive: Receive) -> Any:
    headers = dict(scope["headers"])
    content = await _content(headers, receive)
    if route.body is None:
        if content:
            raise _Refused(400, f"{route.method} {route.path} takes no body")
        return None
    wanted = OCTETS if route.body is bytes else _JSON
    given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    if given != wanted:
        raise _Refused(415, f"the body is {given or 'of no type'}, and has to be {wanted}")
    if route.body is bytes:
        return content
    try:
        return msgspec.json.decode(content, type=route.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _Refused(422, f"the body cannot be read: {error}") from None


async def _content(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    too_large = _Refused(413, f"the body has more than {MOST_BODY_BYTES} bytes", headers=((b"connection", b"close"),))
    try:
        length = int(headers.get(b"content-length", b"0"))
    except ValueError:
        raise _Refused(400, "the body's length is no number") from None
    if length > MOST_BODY_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                content += message.get("body", b"")
                if len(content) > MOST_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(content)
    except TimeoutError:
        raise _Refused(
            408, f"the body did not come within {BODY_S:g} s", headers=((b"connection", b"close"),)
        ) from None


async def _unless_gone(call: Awaitable[Any], receive: Receive) -> Any:
    """The result of the call, which is cancelled if the client hangs up."""
    calling = asyncio.ensure_future(call)
    hearing = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait([calling, hearing], return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return calling.result()
        raise _Gone
    finally:
        hearing.cancel()
        if not calling.done():
            calling.cancel()
            with suppress(asyncio.CancelledError, UtilityVMError):
                await calling


async def _hang_up(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _findings(service: Service, request: Request) -> Headers:
    """What was found half done when the VM was taken over: once, with the first answer about it."""
    if not (told := service.keeper.told(request.path.get("vm", ""))):
        return ()
    text = json.dumps([line[:_LONGEST_FINDING] for line in told[:_MOST_FINDINGS]])
    return ((FINDINGS, text.encode()),)


async def _stream(pieces: AsyncIterator[bytes], route: Route, receive: Receive, send: Send, headers: Headers) -> None:
    first = True
    headers = (*headers, (b"content-type", route.media_type.encode()))

    async def pump() -> None:
        nonlocal first
        async for piece in pieces:
            if first:
                await _start(send, route.status, headers)
                first = False
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if first:
            await _start(send, route.status, headers)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    try:
        await _unless_gone(pump(), receive)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


async def _start(send: Send, status: int, headers: Headers) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"cache-control", b"no-store")]}
    )


async def _send(send: Send, status: int, body: bytes, media_type: str | None, headers: Headers = ()) -> None:
    if media_type is not None:
        headers = (
            *headers,
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-content-type-options", b"nosniff"),
        )
    await _start(send, status, headers)
    await send({"type": "http.response.body", "body": body})


async def _tell(send: Send, error: UtilityVMError, *, status: int | None = None, headers: Headers = ()) -> None:
    problem = problem_of(error, status=status)
    await _send(send, problem.status, msgspec.json.encode(problem), CONTENT_TYPE, headers)
