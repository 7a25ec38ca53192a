"""How a partition is mounted: the one declaration of each setting.

A new setting is a line of `MountConfig` and a line of `MountSettings`, and the place that acts on it. The journal, the
templates' manifests and exported documents embed the struct; `DiskSpec` holds it; the command line's options and the
reference are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, TypedDict

import msgspec
from msgspec import Meta

DEFAULT_FILESYSTEM: Final = "ext4"  # what `ensure_filesystem` makes
_UNTRUSTED: Final = ("nosuid", "nodev", "noexec")  # the last of contrary options wins


class Encryption:
    """How a mount is encrypted: a `ScratchKey` or a `CallerKey`.

    Documents have only its kind. msgspec knows no way of its own to write it, so that no key gets into one by mistake.
    """

    __slots__ = ()


class ScratchKey(Encryption):
    """Encrypt with a random key that the guest makes and nobody ever learns: the data dies with the mount."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScratchKey)

    def __hash__(self) -> int:
        return hash(ScratchKey)

    def __repr__(self) -> str:
        return "ScratchKey()"


class CallerKey(Encryption):
    """Encrypt with the caller's key (aes-xts-plain64, 32 or 64 bytes). Never logged, never stored."""

    __slots__ = ("_key",)
    __match_args__ = ("key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def key(self) -> bytes:
        """Empty if the mount was read from a journal: there was a key, and it is nowhere."""
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallerKey) and self._key == other._key

    def __hash__(self) -> int:
        return hash((CallerKey, self._key))

    def __repr__(self) -> str:
        return "CallerKey()"


class Verity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dm-verity hash tree: a block that does not hash up to `root_hash` reads as an I/O error.

    The tree lies on the same partition at `hash_offset_bytes`, with its superblock (as `veritysetup format
    --hash-offset` writes it) unless the remaining fields say what the superblock would.
    """

    root_hash: bytes
    hash_offset_bytes: int
    data_blocks: int | None = None
    salt: bytes | None = None
    algorithm: str | None = None
    block_size_bytes: int | None = None


class MountConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a partition is mounted. Two requests with equal settings share a mount; `options` compare without order."""

    partition: Annotated[int, Meta(ge=0, description="Mount partition N; 0 is the whole disk.")] = 0
    read_only: Annotated[bool, Meta(description="Nobody can write to it, and other VMs may read it too.")] = False
    options: Annotated[tuple[str, ...], Meta(description="Options of mount(8), in the caller's order.")] = ()
    filesystem: Annotated[str | None, Meta(description="Mount as this file system, and no other.")] = None
    ensure_filesystem: Annotated[bool, Meta(description="Make a file system if the disk is blank.")] = False
    reformat: Annotated[bool, Meta(description="With ensure_filesystem: make it in any case. The data is lost.")] = (
        False
    )
    block_device: Annotated[bool, Meta(description="Put the device itself at the guest path.")] = False
    encryption: Annotated[Encryption | None, Meta(description="Encrypt it, with a ScratchKey or a CallerKey.")] = None
    verity: Annotated[Verity | None, Meta(description="Check each block against a hash tree of dm-verity.")] = None
    untrusted: Annotated[
        bool, Meta(description="Nothing on it runs, gets rights or is a device: nosuid, nodev and noexec.")
    ] = False

    @property
    def named_filesystem(self) -> str | None:
        """`filesystem`; if one is to be made and none is named, the default."""
        return self.filesystem or (DEFAULT_FILESYSTEM if self.ensure_filesystem else None)

    @property
    def mount_options(self) -> tuple[str, ...]:
        """What mount(8) is told."""
        return (*self.options, *_UNTRUSTED) if self.untrusted else self.options


class MountSettings(TypedDict, total=False):
    """The same as keywords of a call, for type checkers."""

    partition: int
    read_only: bool
    options: Sequence[str]
    filesystem: str | None
    ensure_filesystem: bool
    reformat: bool
    block_device: bool
    encryption: ScratchKey | CallerKey | None
    verity: Verity | None
    untrusted: bool


def encode_hook(value: Any) -> str:
    """What documents have of a key: its kind. For every encoder of a `MountConfig`."""
    match value:
        case ScratchKey():
            return "scratch"
        case CallerKey():
            return "caller"
        case _:
            raise NotImplementedError(f"{type(value).__name__} is in no document")


def decode_hook(kind: type, value: Any) -> Encryption:
    """For every decoder of a `MountConfig`."""
    match value:
        case "scratch" if kind is Encryption:
            return ScratchKey()
        case "caller" if kind is Encryption:
            return CallerKey(b"")
        case _:
            raise ValueError(f"{value!r} is no {kind.__name__}")


_encoder: Final = msgspec.json.Encoder(enc_hook=encode_hook)
_decoder: Final = msgspec.json.Decoder(MountConfig, dec_hook=decode_hook)


def to_json(config: MountConfig) -> str:
    """The settings that are not the defaults, as a document."""
    return _encoder.encode(config).decode()


def from_json(document: str) -> MountConfig:
    """Raises:
    ValueError: it is not the document of a mount's settings, or has one that this version does not know.
    """
    return _decoder.decode(document)
