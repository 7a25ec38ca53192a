"""The seed's SCSI mounts as Go's encoding/gob writes them: one by itself, and in the streams that it travels in.

`gobstream` has what any gob stream is made of. `encode` and `decode` are the seed's `GobEncode` and `GobDecode`: seven
values, each a message. Decoding accepts what Go writes and nothing else: it gives a whole value or raises, and the work
and memory it takes are bounded by the input.

    >>> from utilityvm.hosts.hcs import gob
    >>> mount = gob.SCSIMount(host_path="C:\\\\a.vhdx", uvm_path="/m", controller=0, lun=5, read_only=True)
    >>> gob.decode(gob.encode(mount)) == mount
    True

Source: Go encoding/gob, doc.go; recorded in tests/vectors/gob.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from utilityvm.errors import InvalidRequest
from utilityvm.hosts.hcs.gobstream import (
    BOOL,
    ENCODED,
    FIRST_USER_ID,
    INT,
    SLICE,
    STRING,
    STRUCT,
    UINT,
    Boxed,
    Encoded,
    Reader,
    Value,
    bad,
    common_type,
    decode_value,
    encode_int,
    encode_string,
    encode_uint,
    member,
    message,
    shorten,
    slice_definition,
    type_definition,
)
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
        (UINT, encode_uint(mount.serial_version_id)),
        (STRING, encode_string(mount.host_path)),
        (STRING, encode_string(mount.uvm_path)),
        (INT, encode_int(mount.controller)),
        (INT, encode_int(mount.lun)),
        (BOOL, encode_uint(bool(mount.read_only))),
        (STRING, encode_string(mount.attachment_type)),
    )
    return b"".join(message(encode_int(kind) + b"\0" + value) for kind, value in values)


def decode(data: bytes) -> SCSIMount:
    """The seed's `GobDecode`, of exactly one mount.

    Bytes of a path that are not UTF-8 become lone surrogates (`surrogateescape`), so that encoding gives them back.
    Where this refuses what the seed accepts: a slot outside 0:0 to 3:63, an attachment type that there is not, and
    bytes behind the last value.

    Raises:
        ProtocolError: it is not what Go writes for a mount of version 1, or says what cannot be.
    """
    reader = Reader(data)
    version = reader.plain(UINT, "serial version")
    if version != SERIAL_VERSION:
        raise bad(f"a mount of version {version}, and version {SERIAL_VERSION} is known")
    mount = SCSIMount(
        serial_version_id=version,
        host_path=reader.plain(STRING, "host path"),
        uvm_path=reader.plain(STRING, "guest path"),
        controller=reader.plain(INT, "controller"),
        lun=reader.plain(INT, "LUN"),
        read_only=reader.plain(BOOL, "read-only flag"),
        attachment_type=reader.plain(STRING, "attachment type"),
    )
    reader.expect_end()
    if not 0 <= mount.controller < MAX_CONTROLLERS or not 0 <= mount.lun < LUNS_PER_CONTROLLER:
        raise bad(f"a mount at {mount.controller}:{mount.lun}, and slots are 0:0 to 3:63")
    if mount.attachment_type not in ATTACHMENT_TYPES:
        raise bad(f"a mount of the attachment type {shorten(mount.attachment_type)}")
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
    for field in value.values():
        items: list[Value] = field if isinstance(field, list) else [field]
        if any(isinstance(item, (Encoded, Boxed)) for item in items):
            mounts += map(as_mount, items)
    return mounts


def as_mount(value: Value) -> SCSIMount:
    """The mount that an element of a decoded stream is.

    Raises:
        ProtocolError: it is something else, or a mount that `decode` refuses.
    """
    if isinstance(value, Boxed):
        if value.name != REGISTERED_NAME:
            raise bad(f"a resource of the type {shorten(value.name)}, and not {REGISTERED_NAME}")
        value = value.value
    if not isinstance(value, Encoded):
        raise bad(f"a {type(value).__name__} where a mount should be")
    return decode(value.data)


class _Writer:
    """One stream of a fresh process. Ids are given in the order in which Go's encoder first meets the types."""

    def __init__(self, interface_slice_name: str) -> None:
        self._next_id = FIRST_USER_ID
        self._slice_name = interface_slice_name
        self._mount_id: int | None = None

    def single(self, mount: SCSIMount) -> bytes:
        id = self._new_id()
        return message(self._mount_definition(id)) + message(encode_int(id) + b"\0" + _mount(mount))

    def slice(self, mounts: Sequence[SCSIMount]) -> bytes:
        element, id = self._new_id(), self._new_id()
        definition = type_definition(id, SLICE, common_type("", id) + member(encode_int(element)))
        value = encode_int(id) + b"\0" + encode_uint(len(mounts)) + b"".join(map(_mount, mounts))
        return message(definition) + message(self._mount_definition(element)) + message(value)

    def interface_slice(self, mounts: Sequence[SCSIMount]) -> bytes:
        id = self._new_id()
        first, *rest = self._interfaces(mounts)
        pieces = [slice_definition("", id), encode_int(id) + b"\0" + first, *rest]
        return b"".join(map(message, pieces))

    def struct(self, name: str, fields: Mapping[str, int | str | Sequence[SCSIMount]]) -> bytes:
        id = self._new_id()
        kinds, definitions = self._kinds(fields.values())
        described = [
            member(encode_string(field_name)) + member(encode_int(kind)) + b"\0"
            for field_name, kind in zip(fields, kinds, strict=True)
        ]
        members = common_type(name, id)
        if described:
            members += member(encode_uint(len(described)) + b"".join(described))
        pieces = [encode_int(id)]
        last = -1
        for number, value in enumerate(fields.values()):
            if not value:
                continue  # a field that is zero is left out
            first, *rest = self._pieces(value)
            pieces[-1] += encode_uint(number - last) + first
            pieces += rest
            last = number
        pieces[-1] += b"\0"
        return b"".join(map(message, (type_definition(id, STRUCT, members), *definitions, *pieces)))

    def _kinds(self, values: Iterable[int | str | Sequence[SCSIMount]]) -> tuple[list[int], list[bytes]]:
        """The type ids of the fields, and the definitions that they need."""
        kinds: list[int] = []
        slices: list[int] = []
        for value in values:
            if isinstance(value, str):
                kinds.append(STRING)
            elif isinstance(value, int):
                kinds.append(UINT)
            else:
                slices = slices or [self._new_id()]
                kinds += slices
        return kinds, [slice_definition(self._slice_name, id) for id in slices]

    def _pieces(self, value: int | str | Sequence[SCSIMount]) -> list[bytes]:
        if isinstance(value, str):
            return [encode_string(value)]
        return [encode_uint(value)] if isinstance(value, int) else self._interfaces(value)

    def _interfaces(self, mounts: Sequence[SCSIMount]) -> list[bytes]:
        """A slice of interfaces, cut where the definition of what is in them ends a message."""
        pieces = [encode_uint(len(mounts))]
        for mount in mounts:
            pieces[-1] += encode_string(REGISTERED_NAME)
            if self._mount_id is None:
                self._mount_id = self._new_id()
                pieces[-1] += self._mount_definition(self._mount_id)
                pieces.append(b"")
            pieces[-1] += encode_int(self._mount_id) + message(b"\0" + _mount(mount))
        return pieces

    def _mount_definition(self, id: int) -> bytes:
        return type_definition(id, ENCODED, common_type("", self._new_id()))

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def _mount(mount: SCSIMount) -> bytes:
    return message(encode(mount))
