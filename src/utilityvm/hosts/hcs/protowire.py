"""Protocol buffers, as far as a message of numbers, texts and messages goes: written as Go writes it, read strictly.

A message is a run of fields: a tag (the field's number and how its value is written), then the value. Go leaves out
what is zero, writes fields in the order of their numbers, and both halves of a map's entry always. Reading takes each
field once and only those that are known: what would be dropped here is refused instead.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from utilityvm.errors import InvalidRequest, ProtocolError

_VARINT: Final = 0
_BYTES: Final = 2
_MAX_VARINT_BYTES: Final = 10


class Kind(Enum):
    """What a field holds. Its Python type: int, int, bool, str, bytes; and lists of the last two."""

    UINT32 = "uint32"
    UINT64 = "uint64"
    BOOL = "bool"
    STRING = "string"
    MESSAGE = "message"
    STRINGS = "repeated string"
    MESSAGES = "repeated message"  # also a map's entries


_LIMITS: Final = {Kind.UINT32: (1 << 32) - 1, Kind.UINT64: (1 << 64) - 1, Kind.BOOL: 1}
_REPEATED: Final = (Kind.STRINGS, Kind.MESSAGES)


# Writing.


def varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def number(field: int, value: int, *, always: bool = False) -> bytes:
    """A number or a flag; nothing if it is zero, unless `always`."""
    return varint(field << 3 | _VARINT) + varint(value) if value or always else b""


def text(field: int, value: str, *, always: bool = False) -> bytes:
    """A text; nothing if it is empty, unless `always`.

    Raises:
        InvalidRequest: it is not valid Unicode.
    """
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{value!r} is not valid Unicode") from error
    return message(field, raw) if raw or always else b""


def message(field: int, content: bytes) -> bytes:
    """A message, also an empty one."""
    return varint(field << 3 | _BYTES) + varint(len(content)) + content


# Reading.


class Fields:
    """The fields of one message. One that is not there is zero, empty, or None for a message."""

    def __init__(self, data: bytes, known: Mapping[int, Kind], what: str) -> None:
        """Read the message; `what` is its name in errors.

        Raises:
            ProtocolError: it is cut short, or has a field that is not `known`, of another kind, or there twice.
        """
        self._values: dict[int, list[int | str | bytes]] = {}
        self._what = what
        at = 0
        while at < len(data):
            tag, at = self._varint(data, at)
            field, wire = tag >> 3, tag & 7
            kind = known.get(field)
            if kind is None:
                raise self._bad(f"field {field} is not known")
            if wire != (_VARINT if kind in _LIMITS else _BYTES):
                raise self._bad(f"field {field} is no {kind.value}")
            if field in self._values and kind not in _REPEATED:
                raise self._bad(f"field {field} is there twice")
            value, at = self._varint(data, at) if kind in _LIMITS else self._bytes(data, at, kind)
            if isinstance(value, int) and value > _LIMITS[kind]:
                raise self._bad(f"field {field} is {value}, and no {kind.value}")
            self._values.setdefault(field, []).append(value)

    def number(self, field: int) -> int:
        value = self._one(field)
        return value if isinstance(value, int) else 0

    def flag(self, field: int) -> bool:
        return bool(self.number(field))

    def text(self, field: int) -> str:
        value = self._one(field)
        return value if isinstance(value, str) else ""

    def texts(self, field: int) -> tuple[str, ...]:
        return tuple(value for value in self._values.get(field, ()) if isinstance(value, str))

    def message(self, field: int) -> bytes | None:
        value = self._one(field)
        return value if isinstance(value, bytes) else None

    def messages(self, field: int) -> tuple[bytes, ...]:
        return tuple(value for value in self._values.get(field, ()) if isinstance(value, bytes))

    def _one(self, field: int) -> int | str | bytes | None:
        return self._values.get(field, [None])[0]

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        value = 0
        for count, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
            value |= (byte & 0x7F) << 7 * count
            if byte < 0x80:
                return value, at + count + 1
        raise self._bad("a number has no end")

    def _bytes(self, data: bytes, at: int, kind: Kind) -> tuple[str | bytes, int]:
        length, at = self._varint(data, at)
        if length > len(data) - at:
            raise self._bad(f"{length} bytes are announced, and {len(data) - at} are left")
        raw = data[at : at + length]
        if kind not in (Kind.STRING, Kind.STRINGS):
            return raw, at + length
        try:
            return raw.decode(), at + length
        except UnicodeDecodeError:
            raise self._bad("a text is not UTF-8") from None

    def _bad(self, why: str) -> ProtocolError:
        return ProtocolError(f"no {self._what}: {why}")
