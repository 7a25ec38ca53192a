"""What a guest may say: each document by its type, in one place. The guest is not trusted.

A document of another shape is a ProtocolError. Words for people are cleaned here, where they enter (`Words`), so that
no error, log or result holds what a terminal would obey. What is not named here is not looked at: other guests of the
same protocol say more.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from utilityvm.bridge import messages
from utilityvm.bridge.guest_path import spelled
from utilityvm.errors import ProtocolError
from utilityvm.text import clean

_MAX_NAME: Final = 100
_MAX_ERROR: Final = 300


class _Checked(type):
    """A type that says how a string is read. What was read is a plain str or bytes: no other can be encoded again."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__bases__[0])


class Words(str, metaclass=_Checked):
    """Text for people, cleaned."""


class Name(str, metaclass=_Checked):
    """An identifier: printable ASCII without blanks, not empty and not long."""


class MountPath(str, metaclass=_Checked):
    """A guest path at which something can be mounted. It may hold what must not be shown as it is."""


class Data(bytes, metaclass=_Checked):
    """A piece of output: base64, and never empty."""


Number = Annotated[int, Meta(ge=0, le=1 << 62)]
Process = Annotated[int, Meta(ge=1, le=1 << 62)]
ExitCode = Annotated[int, Meta(ge=-64, le=255)]


class _Document(msgspec.Struct, kw_only=True, rename="pascal"):
    pass


class About(_Document):
    """What our agent says of itself."""

    agent: Number = 0
    kernel: Words | None = None
    boot_id: Name | None = None
    uptime_ms: Number | None = None


class _Capabilities(_Document):
    utilityvm: About | None = None


class _Extension(_Document):
    kind: Words | None = None
    holders: list[Words] | None = None
    remedy: Words | None = None
    notes: list[Words] | None = None


class Response(_Document):
    """What every answer has: a result, and why it is none."""

    result: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 32)] = 0
    error_message: Words | None = None
    utilityvm: _Extension | None = None

    @property
    def kind(self) -> str | None:
        """What our agent calls the refusal."""
        return self.utilityvm.kind if self.utilityvm else None

    @property
    def holders(self) -> list[str]:
        """Who keeps the guest from doing it."""
        return list(self.utilityvm.holders or ()) if self.utilityvm else []

    @property
    def remedy(self) -> str | None:
        """What our agent advises."""
        return self.utilityvm.remedy if self.utilityvm else None

    @property
    def notes(self) -> list[str]:
        """What our agent has to say of what it did."""
        return list(self.utilityvm.notes or ()) if self.utilityvm else []


class Negotiated(Response):
    """The answer to a negotiate."""

    version: int | None = None
    capabilities: _Capabilities | None = None


class Probed(_Document):
    """What is so of a disk."""

    present: bool = False
    mount_paths: list[MountPath] = []


class Mount(_Document):
    """One mount."""

    mount_path: MountPath
    controller: Annotated[int, Meta(ge=0, le=255)] = 0
    lun: Annotated[int, Meta(ge=0, le=255)] = 0
    partition: Annotated[int, Meta(ge=0, le=255)] = 0
    filesystem: Words | None = None

    def told(self) -> dict[str, Any]:
        """The document, for those who take it as it comes."""
        return {
            "MountPath": str(self.mount_path),
            "Controller": self.controller,
            "Lun": self.lun,
            "Partition": self.partition,
            "Filesystem": self.filesystem,
        }


class Mounts(_Document):
    """Some mounts, in the order of their paths; there may be more."""

    mounts: list[Mount]
    more: bool


class Quiesced(_Document):
    """What could not be frozen."""

    flushed: list[Words] | None = None


class ShutDown(_Document):
    """What is not clean, a sentence each."""

    unclean: list[Words] | None = None


class Unique(_Document):
    """A clone that is its own."""

    boot_id: Name | None = None


class Output(_Document):
    """A piece of a program's output."""

    process: Process
    stream: Literal["out", "err"]
    data: Data
    at: Number | None = None  # its offset in the stream, of a kept program


class Credit(_Document):
    """So much of a program's input was taken."""

    process: Process
    bytes: Annotated[int, Meta(ge=1, le=messages.INPUT_WINDOW_BYTES)]
    at: Number | None = None  # so much in all, of a kept program


class Exit(_Document):
    """How a program ended: its code, or less than zero for the signal that killed it."""

    process: Process
    exit_code: ExitCode


class FollowEnd(_Document):
    """Nothing more is told of a kept program: it ended with this code, or, without one, still runs."""

    process: Process
    exit_code: ExitCode | None = None
    out_of_memory: bool = False


class CopyFailed(_Document):
    """Why the agent did not copy a file."""

    kind: Words
    message: Words
    errno: Annotated[int, Meta(ge=0, le=4095)] = 0


class Program(_Document):
    """A kept program."""

    number: Process
    id: Name
    started_ms: Number
    ring_bytes: Number
    argv: list[Words]
    out_begin: Number
    out_end: Number
    err_begin: Number
    err_end: Number
    name: Words | None = None
    user: Words | None = None
    pid: Number | None = None
    ended_ms: Number | None = None
    exit_code: ExitCode | None = None
    out_of_memory: bool = False
    stdin: bool = False
    terminal: bool = False
    follows: Number = 0


class Programs(_Document):
    """Some kept programs, in the order of their numbers; there may be more."""

    programs: list[Program]
    more: bool


class Started(_Document):
    """The answer to a START or a FOLLOW."""

    program: Program
    feeds: bool = False
    taken_at: Number = 0
    given_at: Number = 0


T = TypeVar("T", bound=_Document)


def read(kind: type[T], body: object, *, what: str = "answer", vm: str | None = None) -> T:
    """The document `body` as what it should be.

    Raises:
        ProtocolError: it is not that; names the member.
    """
    try:
        return msgspec.convert(body, kind, dec_hook=_hook)
    except msgspec.ValidationError as error:
        text = f"the guest's {what} makes no sense: {clean(str(error), _MAX_ERROR)}"
        raise ProtocolError(text, message=body, vm=vm) from None


def _hook(kind: type, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    if kind is Words:
        return clean(value)
    if kind is Name:
        if not (0 < len(value) <= _MAX_NAME and value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("not an identifier")
        return value
    if kind is MountPath:
        return str(spelled(value))
    data = base64.b64decode(value, validate=True)
    if not data:
        raise ValueError("no data")
    return data
