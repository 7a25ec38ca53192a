"""Frames: sixteen bytes of header, then a JSON object.

::

    u32 type    kind (4 bits), category (8), number (12), version (8)
    u32 size    of the whole frame, these sixteen bytes included: 16 to 65536
    u64 id      a response has its request's; notifications have 0

All little endian. The host ends its JSON with a newline; the guest does not, and escapes `& < >`.
Source: recordings between the real programs, tests/vectors/gcs.json.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final, NamedTuple

HEADER: Final = struct.Struct("<IIQ")
MIN_SIZE: Final = HEADER.size
MAX_SIZE: Final = 65536


class FrameError(ValueError):
    """The peer sent what is no frame, or we were asked to send what fits none. The connection cannot go on."""


class Frame(NamedTuple):
    kind: int
    id: int
    payload: bytes

    def body(self) -> dict[str, Any]:
        """The payload as a JSON object.

        Raises:
            FrameError: it is something else.
        """
        try:
            body = json.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"message {self.kind:#010x} is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise FrameError(f"message {self.kind:#010x} is not a JSON object")
        return body


def encode(kind: int, id: int, payload: bytes) -> bytes:
    """The bytes of one frame.

    Raises:
        FrameError: it would be larger than 65536 bytes.
    """
    size = HEADER.size + len(payload)
    if size > MAX_SIZE:
        raise FrameError(f"message {kind:#010x} of {size} bytes: at most {MAX_SIZE} fit into a frame")
    return HEADER.pack(kind, size, id) + payload


def host_json(body: dict[str, Any]) -> bytes:
    """JSON as the host writes it: Go's encoder without HTML escaping, with its newline."""
    return _json(body).encode() + b"\n"


def guest_json(body: dict[str, Any]) -> bytes:
    """JSON as the guest writes it: Go's Marshal, which escapes `& < >`."""
    text = _json(body)
    for sign in "&<>":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode()


def _json(body: dict[str, Any]) -> str:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # Go escapes these two always: they end a line in JavaScript.
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class Decoder:
    """Cuts a stream of bytes into frames. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def is_between_frames(self) -> bool:
        return not self._pending

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            FrameError: a size below 16 or above 65536. What came before it in `data` is lost with it.
        """
        self._pending += data
        frames = []
        begin = 0
        while len(self._pending) - begin >= MIN_SIZE:
            kind, size, id = HEADER.unpack_from(self._pending, begin)
            if not MIN_SIZE <= size <= MAX_SIZE:
                self._pending.clear()
                raise FrameError(f"message {kind:#010x} says it has {size} bytes: {MIN_SIZE} to {MAX_SIZE} are allowed")
            if len(self._pending) - begin < size:
                break
            frames.append(Frame(kind, id, bytes(self._pending[begin + MIN_SIZE : begin + size])))
            begin += size
        del self._pending[:begin]
        return frames
