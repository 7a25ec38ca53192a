"""Go's gob, as far as a stream of one value goes: numbers, texts, messages, definitions of types, and any value read.

A stream is a run of messages, each a byte count and so many bytes. A message holds the definition of a type (under a
negative id) or the id of a type and a value of it. Ids 1 to 8 are Go's own types; a stream defines the others, from 64
on, before their first use. Two things are odd, and are done here as Go does them: a value that holds an interface is
cut by the definitions of what is in the interface, each of which ends the message that the value has begun; and a type
that encodes itself has one id in its definition and another one inside it.

Reading trusts nothing: a count is checked against the bytes that are left before anything is made for it, and nesting
has an end. So the work and memory it takes are bounded by the input.

Source: Go encoding/gob, doc.go and type.go.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from utilityvm.errors import InvalidRequest, ProtocolError

BOOL, INT, UINT, FLOAT, BYTES, STRING, COMPLEX, INTERFACE = range(1, 9)
ARRAY, SLICE, STRUCT, MAP, ENCODED, BINARY, TEXT = range(1, 8)  # the members of Go's wireType
FIRST_USER_ID: Final = 64
_MAX_DEPTH: Final = 100


class Encoded(NamedTuple):
    """A value that encoded itself (GobEncoder, BinaryMarshaler, TextMarshaler): its bytes."""

    data: bytes


class Boxed(NamedTuple):
    """What an interface held, and the name under which its type is registered."""

    name: str
    value: Any


# A struct is a dict of the fields that are not zero, an empty interface None, a complex number a complex.
Value: TypeAlias = "bool | int | float | complex | bytes | str | Encoded | Boxed | list[Any] | dict[Any, Any] | None"


def decode_value(data: bytes) -> Value:
    """The one value that a gob stream holds, whatever its type is.

    Raises:
        ProtocolError: it is no gob stream of one value.
    """
    reader = Reader(data)
    value = reader.top_value()
    reader.expect_end()
    return value


# Writing.


def encode_uint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes((0x100 - len(raw),)) + raw


def encode_int(value: int) -> bytes:
    return encode_uint(~value << 1 | 1 if value < 0 else value << 1)


def encode_string(text: str) -> bytes:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{text!r} is not valid Unicode") from error
    return encode_uint(len(raw)) + raw


def message(content: bytes) -> bytes:
    return encode_uint(len(content)) + content


def member(value: bytes) -> bytes:
    return b"\1" + value


def common_type(name: str, id: int) -> bytes:
    """A type's first member, its `CommonType`: name and id, without what is zero."""
    return member((b"\1" + encode_string(name) + b"\1" if name else b"\2") + encode_int(id) + b"\0")


def type_definition(id: int, kind: int, members: bytes) -> bytes:
    """The definition of a type: the `kind`th member of Go's `wireType`, under the negative id."""
    return encode_int(-id) + encode_uint(kind) + members + b"\0\0"


def slice_definition(name: str, id: int) -> bytes:
    return type_definition(id, SLICE, common_type(name, id) + member(encode_int(INTERFACE)))


# Reading.


def shorten(text: str) -> str:
    return repr(text if len(text) <= 64 else f"{text[:61]}...")


@dataclass(frozen=True, slots=True)
class _Type:
    """A type of the stream, by its member of `wireType`."""

    kind: int
    element: int = 0
    key: int = 0
    length: int = 0
    fields: tuple[tuple[str, int], ...] = ()


_KINDS: Final = ("ArrayT", "SliceT", "StructT", "MapT", "GobEncoderT", "BinaryMarshalerT", "TextMarshalerT")
_WIRE_TYPE: Final = 16

# The types of definitions are gob types themselves. Source: Go encoding/gob type.go, bootstrapType and init.
_BOOTSTRAP: Final = {
    _WIRE_TYPE: _Type(STRUCT, fields=tuple(zip(_KINDS, (17, 19, 20, 23, 24, 24, 24), strict=True))),
    17: _Type(STRUCT, fields=(("CommonType", 18), ("Elem", INT), ("Len", INT))),
    18: _Type(STRUCT, fields=(("Name", STRING), ("Id", INT))),
    19: _Type(STRUCT, fields=(("CommonType", 18), ("Elem", INT))),
    20: _Type(STRUCT, fields=(("CommonType", 18), ("Field", 22))),
    21: _Type(STRUCT, fields=(("Name", STRING), ("Id", INT))),
    22: _Type(SLICE, element=21),
    23: _Type(STRUCT, fields=(("CommonType", 18), ("Key", INT), ("Elem", INT))),
    24: _Type(STRUCT, fields=(("CommonType", 18),)),
}


class Reader:
    """Reads one stream. Counts are checked against the bytes that are left before anything is made for them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._end = 0  # of the message in hand; the next one begins there
        self._types = dict(_BOOTSTRAP)

    # Messages.

    def plain(self, kind: int, what: str) -> Any:
        """The value of the next message, which must be of Go's own type `kind`."""
        self._begin_message(what)
        found = self._int(what)
        if found != kind:
            raise self._bad(f"the {what} is of type {found}, and not {kind}")
        self._expect_zero(what)
        value = self._value(kind, what, 0)
        self._end_message(what)
        return value

    def top_value(self) -> Value:
        """The value of the stream, after the definitions before it."""
        id = self._type_of_next("value", inside=False)
        value: Value = self._framed(id, "value", 0)
        self._end_message("value")
        return value

    def expect_end(self) -> None:
        if self._end != len(self._data):
            raise self._bad(f"{len(self._data) - self._end} bytes follow its end")

    def _begin_message(self, what: str) -> None:
        self._end = len(self._data)
        if self._at == self._end:
            raise self._bad(f"it ends before the {what}")
        length = self._uint(what)
        if length > self._end - self._at:
            raise self._bad(f"a message of {length} bytes, and {self._end - self._at} are left")
        self._end = self._at + length

    def _end_message(self, what: str) -> None:
        if self._at != self._end:
            raise self._bad(f"{self._end - self._at} bytes follow the {what} in its message")

    def _type_of_next(self, what: str, *, inside: bool) -> int:
        """The id of the value that comes next, after reading the definitions before it."""
        while True:
            if self._at == self._end:
                self._begin_message(what)
            id = self._int(what)
            if id >= 0:
                return id
            self._define(-id)
            if not inside:
                self._end_message("definition")
            elif self._at != self._end:
                self._uint(what)  # in an interface within an interface what follows has a count of its own

    def _define(self, id: int) -> None:
        if id < FIRST_USER_ID or id in self._types:
            raise self._bad(f"it defines type {id}, which exists")
        wire: dict[str, Any] = self._value(_WIRE_TYPE, "definition", 0)
        if len(wire) != 1:
            raise self._bad(f"type {id} is defined as {len(wire)} kinds")
        ((kind, members),) = wire.items()
        self._types[id] = _Type(
            _KINDS.index(kind) + 1,
            element=members.get("Elem", 0),
            key=members.get("Key", 0),
            length=members.get("Len", 0),
            fields=tuple((item.get("Name", ""), item.get("Id", 0)) for item in members.get("Field", ())),
        )

    # Values.

    def _framed(self, id: int, what: str, depth: int) -> Any:
        """A value that stands by itself: if it is no struct, a zero comes before it."""
        if id not in self._types or self._types[id].kind != STRUCT:
            self._expect_zero(what)
        return self._value(id, what, depth)

    def _value(self, id: int, what: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._bad(f"the {what} lies more than {_MAX_DEPTH} deep")
        if read := _PLAIN.get(id):
            return read(self, what)
        if id == INTERFACE:
            return self._interface(what, depth)
        definition = self._types.get(id)
        if definition is None:
            raise self._bad(f"the {what} is of type {id}, which is not defined")
        if definition.kind == STRUCT:
            return self._struct(definition, depth)
        if definition.kind == MAP:
            return self._map(definition, what, depth)
        if definition.kind >= ENCODED:
            return Encoded(self._bytes(what))
        count = self._count(what)
        if definition.kind == ARRAY and count != definition.length:
            raise self._bad(f"the {what} has {count} of {definition.length} elements")
        return [self._value(definition.element, what, depth + 1) for _ in range(count)]

    def _struct(self, definition: _Type, depth: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        number = -1
        while delta := self._uint("field"):
            number += delta
            if number >= len(definition.fields):
                raise self._bad(f"field {number} of a struct of {len(definition.fields)}")
            name, id = definition.fields[number]
            if name in fields:
                raise self._bad(f"the field {shorten(name)} is there twice")
            fields[name] = self._value(id, shorten(name), depth + 1)
        return fields

    def _map(self, definition: _Type, what: str, depth: int) -> dict[Any, Any]:
        pairs: dict[Any, Any] = {}
        for _ in range(self._count(what)):
            key = self._value(definition.key, what, depth + 1)
            value = self._value(definition.element, what, depth + 1)
            try:
                pairs[key] = value
            except TypeError:
                raise self._bad(f"the {what} has a key that is no plain value") from None
        return pairs

    def _interface(self, what: str, depth: int) -> Boxed | None:
        name = self._string(what)
        if not name:
            return None
        id = self._type_of_next(what, inside=True)
        length = self._uint(what)
        start, types = self._at, len(self._types)
        value = self._framed(id, what, depth + 1)
        # A definition within the value ends what is counted, and a new count follows it (see `_type_of_next`).
        if self._at - start != length and types == len(self._types):
            raise self._bad(f"the {what} has {self._at - start} bytes, and says {length}")
        return Boxed(name, value)

    # Go's own types.

    def _take(self, length: int, what: str) -> bytes:
        if length > self._end - self._at:
            raise self._bad(f"the {what} is cut short")
        self._at += length
        return self._data[self._at - length : self._at]

    def _uint(self, what: str) -> int:
        first = self._take(1, what)[0]
        if first < 0x80:
            return first
        length = 0x100 - first
        if length > 8:
            raise self._bad(f"the {what} has a number of {length} bytes")
        return int.from_bytes(self._take(length, what), "big")

    def _int(self, what: str) -> int:
        raw = self._uint(what)
        return ~(raw >> 1) if raw & 1 else raw >> 1

    def _bool(self, what: str) -> bool:
        return self._uint(what) != 0

    def _float(self, what: str) -> float:
        return float(struct.unpack("<d", self._uint(what).to_bytes(8, "big"))[0])

    def _complex(self, what: str) -> complex:
        return complex(self._float(what), self._float(what))

    def _bytes(self, what: str) -> bytes:
        return self._take(self._uint(what), what)

    def _string(self, what: str) -> str:
        return self._bytes(what).decode("utf-8", "surrogateescape")

    def _count(self, what: str) -> int:
        """How many elements follow; each takes a byte at least, here or in a message behind this one."""
        count = self._uint(what)
        if count > len(self._data) - self._at:
            raise self._bad(f"the {what} has {count} elements, and {len(self._data) - self._at} bytes are left")
        return count

    def _expect_zero(self, what: str) -> None:
        if self._uint(what) != 0:
            raise self._bad(f"the {what} does not begin with a zero")

    def _bad(self, text: str) -> ProtocolError:
        return bad(f"{text} (at byte {self._at})", self._data)


_PLAIN: Final[Mapping[int, Callable[[Reader, str], Any]]] = {
    BOOL: Reader._bool,
    INT: Reader._int,
    UINT: Reader._uint,
    FLOAT: Reader._float,
    BYTES: Reader._bytes,
    STRING: Reader._string,
    COMPLEX: Reader._complex,
}


def bad(text: str, data: bytes = b"") -> ProtocolError:
    shown = data[:64].hex() + ("..." if len(data) > 64 else "")
    return ProtocolError(f"no gob stream that can be taken: {text}", message=shown)
