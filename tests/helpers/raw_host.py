"""A host's end of the bridge that is as simple as one can be: raw frames over a blocking socket."""

from __future__ import annotations

import base64
import itertools
import socket
from collections import deque
from typing import Any

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, host_json

_PATIENCE_S = 20.0  # a test that would hang fails instead


class RawHost:
    """One connection. `notifications` is what came between the answers."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.socket.settimeout(_PATIENCE_S)
        self.notifications: deque[Frame] = deque()
        self._decoder = Decoder()
        self._frames: deque[Frame] = deque()
        self._ids = itertools.count(100)

    def send(self, kind: int, body: dict[str, Any], id: int | None = None) -> int:
        """Send a frame; gives its id."""
        id = next(self._ids) if id is None else id
        self.socket.sendall(encode(kind, id, host_json(body)))
        return id

    def receive(self) -> Frame:
        """The next frame, whatever it is."""
        while not self._frames:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the agent hung up")
            self._frames += self._decoder.feed(data)
        return self._frames.popleft()

    def response(self) -> Frame:
        """The next frame that is a response; notifications before it are kept."""
        while True:
            frame = self.receive()
            if frame.kind & messages.KIND_MASK == messages.RESPONSE:
                return frame
            self.notifications.append(frame)

    def notification(self) -> Frame:
        """The next notification."""
        return self.notifications.popleft() if self.notifications else self.receive()

    def ask(self, kind: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, and give the body of the response, which must be the next."""
        id = self.send(kind, messages.request() if body is None else body)
        frame = self.response()
        assert (frame.kind, frame.id) == (messages.response_to(kind), id), frame
        return frame.body()

    def negotiate(self) -> dict[str, Any]:
        """Begin a session."""
        return self.ask(messages.NEGOTIATE, messages.negotiate_request())

    def modify(self, what: str, resource: str, settings: dict[str, Any], **extension: Any) -> dict[str, Any]:
        """One ModifySettings; `extension` is what GCS has no word for."""
        return self.ask(messages.MODIFY, messages.modify_request(what, resource, settings, extension=extension))

    def run(self, *argv: str, process: int = 1, **fields: Any) -> dict[str, Any]:
        """Start a program."""
        return self.ask(messages.RUN, messages.request(Process=process, Argv=list(argv), **fields))

    def feed(self, data: bytes, *, process: int = 1, last: bool = False) -> None:
        """Give a program input."""
        body = {"Process": process, "Data": base64.b64encode(data).decode(), "Eof": last}
        self.send(messages.RUN_INPUT, body, id=0)

    def outcome(self) -> tuple[bytes, bytes, int]:
        """Output, error output and exit code of the program that ends next."""
        output = {"out": b"", "err": b""}
        while True:
            frame = self.notification()
            body = frame.body()
            if frame.kind == messages.RUN_OUTPUT:
                data = base64.b64decode(body["Data"])
                output[body["Stream"]] += data
                self.send(messages.RUN_CREDIT, {"Process": body["Process"], "Bytes": len(data)}, id=0)
            elif frame.kind == messages.RUN_EXIT:
                return output["out"], output["err"], body["ExitCode"]
