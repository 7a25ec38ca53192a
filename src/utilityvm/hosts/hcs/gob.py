"""The seed's SCSI mounts as Go's encoding/gob writes them: one by itself, and in the streams it travels in.

A gob stream is a run of messages, each a byte count and so many bytes. A message holds the definition of a type
(under a negative id) or the id of a type and a value of it. Ids 1 to 8 are Go's own types; a stream defines the
others, from 64 on, before their first use. Two things are odd, and are done here as Go does them: a value that holds
an interface is cut by the definitions of what is in the interface, each of which ends the message that the value has
begun; and a type that encodes itself, as `SCSIMount` does, has one id in its definition and another one inside it.

`encode` and `decode` are the seed's `GobEncode` and `GobDecode`: seven values, each a message. Decoding accepts what Go
writes and nothing else: it gives a whole value or raises, and the work and memory it takes are bounded by the input.

    >>> from utilityvm.hosts.hcs import gob
    >>> mount = gob.SCSIMount(host_path="C:\\\\a.vhdx", uvm_path="/m", controller=0, lun=5, read_only=True)
    >>> gob.decode(gob.encode(mount)) == mount
    True

Source: Go encoding/gob, doc.go; recorded in tests/vectors/gob.json.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

from utilityvm.errors import InvalidRequest, ProtocolError
from utilityvm.scsi.ports import AttachmentType
from utilityvm.scsi.slot import LUNS_PER_CONTROLLER, MAX_CONTROLLERS, Slot

__all__ = [
    "ATTACHMENT_TYPES",
    "INTERFACE_SLICE_NAME",
    "REGISTERED_NAME",
    "SERIAL_VERSION",
    "Boxed",
    "Encoded",
    "Form",
    "SCSIMount",
    "Value",
    "as_mount",
    "decode",
    "decode_outer",
    "decode_value",
    "encode",
    "encode_outer",
]

SERIAL_VERSION: Final = 1
REGISTERED_NAME: Final = "*uvm.SCSIMount"
INTERFACE_SLICE_NAME: Final = "[]uvm.Cloneable"

# The seed writes "" for the scratch disk of a Windows template (create_wcow.go); it means a virtual disk.
ATTACHMENT_TYPES: Final = frozenset({"", *AttachmentType})

_BOOL, _INT, _UINT, _FLOAT, _BYTES, _STRING, _COMPLEX, _INTERFACE = range(1, 9)
_FIRST_USER_ID: Final = 64
_MAX_DEPTH: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SCSIMount:
    """A mount as the seed serialises it, field by field under the seed's names. Its reference count is not in it."""

    host_path: str
    uvm_path: str = ""
    controller: int
    lun: int
    read_only: bool = False
    attachment_type: str = AttachmentType.VIRTUAL_DISK.value
    serial_version_id: int = SERIAL_VERSION

    @property
    def slot(self) -> Slot:
        """Where it is.

        Raises:
            InvalidRequest: there is no such slot. `decode` lets none pass.
        """
        return Slot.checked(self.controller, self.lun)


class Form(StrEnum):
    """The streams in which mounts travel, by the Go expression that writes them."""

    SINGLE = "single"  # Encode(&SCSIMount{...})
    SLICE = "slice"  # Encode([]*SCSIMount{a, b})
    INTERFACE_SLICE = "interface_slice"  # Encode([]uvm.Cloneable{a, b})
    STRUCT_WITH_INTERFACE_SLICE = "struct_with_interface_slice"  # Encode(Boxed{Resources: []uvm.Cloneable{a, b}})


# One mount by itself.


def encode(mount: SCSIMount) -> bytes:
    """The seed's `GobEncode`. Like that, it encodes a slot or a version that `decode` would refuse.

    Raises:
        InvalidRequest: a number does not fit Go's type for it (uint32 version, int64 controller, int32 LUN), or a
            text is not valid Unicode.
    """
    for name, value, low, high in (
        ("serial_version_id", mount.serial_version_id, 0, (1 << 32) - 1),
        ("controller", mount.controller, -(1 << 63), (1 << 63) - 1),
        ("lun", mount.lun, -(1 << 31), (1 << 31) - 1),
    ):
        if not low <= value <= high:
            raise InvalidRequest(f"{name} {value} of {mount.host_path} does not fit", host_path=mount.host_path)
    values = (
        (_UINT, _uint(mount.serial_version_id)),
        (_STRING, _string(mount.host_path)),
        (_STRING, _string(mount.uvm_path)),
        (_INT, _int(mount.controller)),
        (_INT, _int(mount.lun)),
        (_BOOL, _uint(bool(mount.read_only))),
        (_STRING, _string(mount.attachment_type)),
    )
    return b"".join(_message(_int(kind) + b"\0" + value) for kind, value in values)


def decode(data: bytes) -> SCSIMount:
    """The seed's `GobDecode`, of exactly one mount.

    Bytes of a path that are not UTF-8 become lone surrogates (`surrogateescape`), so that encoding gives them back.
    Where this refuses what the seed accepts: a slot outside 0:0 to 3:63, an attachment type that there is not, and
    bytes behind the last value.

    Raises:
        ProtocolError: it is not what Go writes for a mount of version 1, or says what cannot be.
    """
    reader = _Reader(data)
    version = reader.plain(_UINT, "serial version")
    if version != SERIAL_VERSION:
        raise _bad(f"a mount of version {version}, and version {SERIAL_VERSION} is known")
    mount = SCSIMount(
        serial_version_id=version,
        host_path=reader.plain(_STRING, "host path"),
        uvm_path=reader.plain(_STRING, "guest path"),
        controller=reader.plain(_INT, "controller"),
        lun=reader.plain(_INT, "LUN"),
        read_only=reader.plain(_BOOL, "read-only flag"),
        attachment_type=reader.plain(_STRING, "attachment type"),
    )
    reader.expect_end()
    if not 0 <= mount.controller < MAX_CONTROLLERS or not 0 <= mount.lun < LUNS_PER_CONTROLLER:
        raise _bad(f"a mount at {mount.controller}:{mount.lun}, and slots are 0:0 to 3:63")
    if mount.attachment_type not in ATTACHMENT_TYPES:
        raise _bad(f"a mount of the attachment type {_short(mount.attachment_type)}")
    return mount


# Mounts in a stream.


def encode_outer(
    form: Form,
    mounts: Sequence[SCSIMount],
    *,
    name: str = "Boxed",
    fields: Mapping[str, int | str | Sequence[SCSIMount]] | None = None,
    interface_slice_name: str = INTERFACE_SLICE_NAME,
) -> bytes:
    """Mounts as a fresh Go process writes them, in one of the recorded forms.

    A struct has the name `name` and one field `Resources`; with `fields` it has those, in that order: a number is a
    uint, a text a string, and a sequence of mounts a `[]Cloneable`.

    Raises:
        InvalidRequest: SINGLE with another number of mounts than one, or as `encode`.
    """
    writer = _Writer(interface_slice_name)
    match form:
        case Form.SINGLE:
            if len(mounts) != 1:
                raise InvalidRequest(f"{len(mounts)} mounts in the form of one")
            return writer.single(mounts[0])
        case Form.SLICE:
            return writer.slice(mounts)
        case Form.INTERFACE_SLICE:
            return writer.interface_slice(mounts)
        case Form.STRUCT_WITH_INTERFACE_SLICE:
            return writer.struct(name, {"Resources": mounts} if fields is None else fields)


def decode_outer(data: bytes) -> list[SCSIMount]:
    """Every mount in a stream of any of the forms, and of any struct that holds them, in their order.

    Raises:
        ProtocolError: it is no gob stream of one value, holds something else where a mount should be, or a mount
            that `decode` refuses.
    """
    value = decode_value(data)
    if not isinstance(value, dict):
        return [as_mount(item) for item in (value if isinstance(value, list) else [value])]
    mounts: list[SCSIMount] = []
    for member in value.values():
        items: list[Value] = member if isinstance(member, list) else [member]
        mounts += [as_mount(item) for item in items if isinstance(item, (Encoded, Boxed))]
    return mounts


def as_mount(value: Value) -> SCSIMount:
    """The mount that an element of a decoded stream is.

    Raises:
        ProtocolError: it is something else, or a mount that `decode` refuses.
    """
    if isinstance(value, Boxed):
        if value.name != REGISTERED_NAME:
            raise _bad(f"a resource of the type {_short(value.name)}, and not {REGISTERED_NAME}")
        value = value.value
    if not isinstance(value, Encoded):
        raise _bad(f"a {type(value).__name__} where a mount should be")
    return decode(value.data)


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
    reader = _Reader(data)
    value = reader.top_value()
    reader.expect_end()
    return value


# Writing.


def _uint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes((0x100 - len(raw),)) + raw


def _int(value: int) -> bytes:
    return _uint(~value << 1 | 1 if value < 0 else value << 1)


def _string(text: str) -> bytes:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{text!r} is not valid Unicode") from error
    return _uint(len(raw)) + raw


def _message(content: bytes) -> bytes:
    return _uint(len(content)) + content


class _Writer:
    """One stream of a fresh process. Ids are given in the order in which Go's encoder first meets the types."""

    def __init__(self, interface_slice_name: str) -> None:
        self._next_id = _FIRST_USER_ID
        self._slice_name = interface_slice_name
        self._mount_id: int | None = None

    def single(self, mount: SCSIMount) -> bytes:
        id = self._new_id()
        return _message(self._mount_definition(id)) + _message(_int(id) + b"\0" + _mount(mount))

    def slice(self, mounts: Sequence[SCSIMount]) -> bytes:
        element, id = self._new_id(), self._new_id()
        definition = _definition(id, _SLICE, _common("", id) + _next_member(_int(element)))
        value = _int(id) + b"\0" + _uint(len(mounts)) + b"".join(map(_mount, mounts))
        return _message(definition) + _message(self._mount_definition(element)) + _message(value)

    def interface_slice(self, mounts: Sequence[SCSIMount]) -> bytes:
        id = self._new_id()
        first, *rest = self._interfaces(mounts)
        pieces = [_slice_definition("", id), _int(id) + b"\0" + first, *rest]
        return b"".join(map(_message, pieces))

    def struct(self, name: str, fields: Mapping[str, int | str | Sequence[SCSIMount]]) -> bytes:
        id = self._new_id()
        kinds, definitions = self._kinds(fields.values())
        described = [
            _next_member(_string(field_name)) + _next_member(_int(kind)) + b"\0"
            for field_name, kind in zip(fields, kinds, strict=True)
        ]
        members = _common(name, id)
        if described:
            members += _next_member(_uint(len(described)) + b"".join(described))
        pieces = [_int(id)]
        last = -1
        for number, value in enumerate(fields.values()):
            if not value:
                continue  # a field that is zero is left out
            first, *rest = self._pieces(value)
            pieces[-1] += _uint(number - last) + first
            pieces += rest
            last = number
        pieces[-1] += b"\0"
        return b"".join(map(_message, (_definition(id, _STRUCT, members), *definitions, *pieces)))

    def _kinds(self, values: Iterable[int | str | Sequence[SCSIMount]]) -> tuple[list[int], list[bytes]]:
        """The type ids of the fields, and the definitions that they need."""
        kinds: list[int] = []
        slices: list[int] = []
        for value in values:
            if isinstance(value, str):
                kinds.append(_STRING)
            elif isinstance(value, int):
                kinds.append(_UINT)
            else:
                slices = slices or [self._new_id()]
                kinds += slices
        return kinds, [_slice_definition(self._slice_name, id) for id in slices]

    def _pieces(self, value: int | str | Sequence[SCSIMount]) -> list[bytes]:
        if isinstance(value, str):
            return [_string(value)]
        return [_uint(value)] if isinstance(value, int) else self._interfaces(value)

    def _interfaces(self, mounts: Sequence[SCSIMount]) -> list[bytes]:
        """A slice of interfaces, cut where the definition of what is in them ends a message."""
        pieces = [_uint(len(mounts))]
        for mount in mounts:
            pieces[-1] += _string(REGISTERED_NAME)
            if self._mount_id is None:
                self._mount_id = self._new_id()
                pieces[-1] += self._mount_definition(self._mount_id)
                pieces.append(b"")
            pieces[-1] += _int(self._mount_id) + _message(b"\0" + _mount(mount))
        return pieces

    def _mount_definition(self, id: int) -> bytes:
        return _definition(id, _ENCODED, _common("", self._new_id()))

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def _mount(mount: SCSIMount) -> bytes:
    return _message(encode(mount))


def _next_member(value: bytes) -> bytes:
    return b"\1" + value


def _common(name: str, id: int) -> bytes:
    """A type's first member, its `CommonType`: name and id, without what is zero."""
    return _next_member((b"\1" + _string(name) + b"\1" if name else b"\2") + _int(id) + b"\0")


def _definition(id: int, kind: int, members: bytes) -> bytes:
    """The definition of a type: the `kind`th member of Go's `wireType`, under the negative id."""
    return _int(-id) + _uint(kind) + members + b"\0\0"


def _slice_definition(name: str, id: int) -> bytes:
    return _definition(id, _SLICE, _common(name, id) + _next_member(_int(_INTERFACE)))


# Reading.


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else f"{text[:61]}...")


@dataclass(frozen=True, slots=True)
class _Type:
    """A type of the stream, by its member of `wireType`."""

    kind: int
    element: int = 0
    key: int = 0
    length: int = 0
    fields: tuple[tuple[str, int], ...] = ()


_ARRAY, _SLICE, _STRUCT, _MAP, _ENCODED, _BINARY, _TEXT = range(1, 8)
_KINDS: Final = ("ArrayT", "SliceT", "StructT", "MapT", "GobEncoderT", "BinaryMarshalerT", "TextMarshalerT")
_WIRE_TYPE: Final = 16

# The types of definitions are gob types themselves. Source: Go encoding/gob type.go, bootstrapType and init.
_BOOTSTRAP: Final = {
    _WIRE_TYPE: _Type(_STRUCT, fields=tuple(zip(_KINDS, (17, 19, 20, 23, 24, 24, 24), strict=True))),
    17: _Type(_STRUCT, fields=(("CommonType", 18), ("Elem", _INT), ("Len", _INT))),
    18: _Type(_STRUCT, fields=(("Name", _STRING), ("Id", _INT))),
    19: _Type(_STRUCT, fields=(("CommonType", 18), ("Elem", _INT))),
    20: _Type(_STRUCT, fields=(("CommonType", 18), ("Field", 22))),
    21: _Type(_STRUCT, fields=(("Name", _STRING), ("Id", _INT))),
    22: _Type(_SLICE, element=21),
    23: _Type(_STRUCT, fields=(("CommonType", 18), ("Key", _INT), ("Elem", _INT))),
    24: _Type(_STRUCT, fields=(("CommonType", 18),)),
}


class _Reader:
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
                self._uint(what)  # in an interface within an interface the rest has a count of its own

    def _define(self, id: int) -> None:
        if id < _FIRST_USER_ID or id in self._types:
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
        if id not in self._types or self._types[id].kind != _STRUCT:
            self._expect_zero(what)
        return self._value(id, what, depth)

    def _value(self, id: int, what: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._bad(f"the {what} lies more than {_MAX_DEPTH} deep")
        if read := _PLAIN.get(id):
            return read(self, what)
        if id == _INTERFACE:
            return self._interface(what, depth)
        definition = self._types.get(id)
        if definition is None:
            raise self._bad(f"the {what} is of type {id}, which is not defined")
        if definition.kind == _STRUCT:
            return self._struct(definition, depth)
        if definition.kind == _MAP:
            return self._map(definition, what, depth)
        if definition.kind >= _ENCODED:
            return Encoded(self._bytes(what))
        count = self._count(what)
        if definition.kind == _ARRAY and count != definition.length:
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
            fields[name] = self._value(id, _short(name), depth + 1)
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
        start = self._at
        value = self._framed(id, what, depth + 1)
        if self._at - start != length:
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
        return _bad(f"{text} (at byte {self._at})", self._data)


_PLAIN: Final[Mapping[int, Callable[[_Reader, str], Any]]] = {
    _BOOL: _Reader._bool,
    _INT: _Reader._int,
    _UINT: _Reader._uint,
    _FLOAT: _Reader._float,
    _BYTES: _Reader._bytes,
    _STRING: _Reader._string,
    _COMPLEX: _Reader._complex,
}


def _bad(text: str, data: bytes = b"") -> ProtocolError:
    shown = data[:64].hex() + ("..." if len(data) > 64 else "")
    return ProtocolError(f"no gob stream that can be taken: {text}", message=shown)
