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
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, NoReturn

HEADER: Final = struct.Struct("<IIQ")
MIN_SIZE: Final = HEADER.size
MAX_SIZE: Final = 65536
_ID_OFFSET: Final = 8


class FrameError(ValueError):
    """The peer sent what is no frame, or we were asked to send what fits none.

    From a `Decoder`: the stream cannot go on, for nobody knows where its next frame begins.
    """


class Frame(NamedTuple):
    kind: int
    id: int
    payload: bytes

    def body(self) -> dict[str, Any]:
        """The payload as a JSON object.

        Raises:
            FrameError: it is something else. The frame's neighbours are not harmed.
        """
        try:
            body = _DECODER.decode(self.payload.decode())
        except (ValueError, RecursionError) as error:
            raise FrameError(f"message {self.kind:#010x} is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise FrameError(f"message {self.kind:#010x} is not a JSON object")
        return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")  # Python's reader takes NaN and Infinity


# Made once: a clone's first answer takes as long as the code is that it runs through for the first time.
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


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
    """JSON as the host writes it: Go's encoder without HTML escaping, with its newline.

    Raises:
        FrameError: it holds what is no text (half a surrogate pair) or no number (NaN).
    """
    try:
        return _json(body).encode() + b"\n"
    except ValueError as error:
        raise FrameError(f"this cannot be sent: {error}") from None


def guest_json(body: dict[str, Any]) -> bytes:
    """JSON as the guest writes it: Go's Marshal, which escapes `& < >`, and puts U+FFFD for what is no text."""
    text = _json(body)
    for sign, escaped in (("&", "\\u0026"), ("<", "\\u003c"), (">", "\\u003e")):
        text = text.replace(sign, escaped)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _json(body: dict[str, Any]) -> str:
    text = _ENCODER.encode(body)
    # Go escapes these two always: they end a line in JavaScript.
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class Decoder:
    """Cuts a stream of bytes into frames. Holds no more than one unfinished frame and what it was fed last."""

    def __init__(self, *, anew_at: int | None = None) -> None:
        """With `anew_at`, a frame of that type begins the stream anew wherever it is found.

        That is for a port on which one host's last bytes and the next one's first can blend. JSON holds no byte below
        0x20 and a type has one, so that no payload holds a type; an id could, and is not looked into.
        """
        self._pending = bytearray()
        self._head = None if anew_at is None else anew_at.to_bytes(4, "little")

    @property
    def is_between_frames(self) -> bool:
        """Has every frame that began been given? Only there may a stream end."""
        return not self._pending

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Take them all before feeding more.

        Raises:
            FrameError: (while iterating, after the frames before it) a size below 16 or above 65536. No frame is ever
                given again.
        """
        self._pending += data
        return self._complete()

    def _complete(self) -> Iterator[Frame]:
        begin = 0
        try:
            while len(self._pending) - begin >= MIN_SIZE:
                kind, size, id = HEADER.unpack_from(self._pending, begin)
                is_valid = MIN_SIZE <= size <= MAX_SIZE
                is_whole = is_valid and len(self._pending) - begin >= size
                if (anew := self._anew(begin, begin + size if is_whole else len(self._pending))) is not None:
                    begin = anew
                elif is_whole:
                    payload = bytes(self._pending[begin + MIN_SIZE : begin + size])
                    begin += size
                    yield Frame(kind, id, payload)
                elif is_valid:
                    break
                else:
                    raise FrameError(
                        f"message {kind:#010x} says it has {size} bytes: {MIN_SIZE} to {MAX_SIZE} are allowed"
                    )
        finally:
            del self._pending[:begin]

    def _anew(self, begin: int, end: int) -> int | None:
        """Where another stream begins within what seems to be a frame."""
        at = begin
        while self._head and (at := self._pending.find(self._head, at + 1, end)) > 0:
            if not _ID_OFFSET <= at - begin <= MIN_SIZE - len(self._head):
                return at
        return None
