"""A mount as the bridge's messages say it, and what they cannot say."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from utilityvm.bridge import hazards, messages, mount_options
from utilityvm.bridge.guest_path import mountable, spelled
from utilityvm.errors import InvalidRequest, NotSupported
from utilityvm.scsi.ports import CallerKey, MountConfig, ScratchKey
from utilityvm.scsi.slot import Slot

_KEY_BYTES: Final = (32, 64)
_MAX_PARTITION: Final = 255
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECTOR_BYTES: Final = 512


def check_config(config: MountConfig) -> None:
    """Refuse what is wrong by itself.

    Raises:
        InvalidRequest: names the value.
    """
    if not 0 <= config.partition <= _MAX_PARTITION:
        raise InvalidRequest(
            f"partition {config.partition} is invalid: partitions count from 1", remedy="0 is the whole disk"
        )
    for option in config.mount_options:
        if not option or any(sign in option for sign in "\0\n"):
            raise InvalidRequest(f"{option!r} is no mount option", remedy="leave it out")
    try:
        mount_options.parse(config.mount_options, read_only=config.read_only)
    except ValueError as why:
        raise InvalidRequest(f"the mount option {why}", remedy="leave it out") from None
    if config.filesystem is not None and not _NAME.fullmatch(config.filesystem):
        raise InvalidRequest(f"{config.filesystem!r} is no file system", remedy="name it as mount(8) does: ext4, xfs")
    if config.ensure_filesystem and config.read_only:
        raise InvalidRequest("a file system cannot be made on a read-only disk")
    if config.reformat and not config.ensure_filesystem:
        raise InvalidRequest("reformat=True without ensure_filesystem=True", remedy="set both")
    if config.block_device and config.mount_options:
        raise InvalidRequest("block_device=True takes no mount options", remedy="leave the options out")
    match config.encryption:
        case CallerKey(key) if len(key) not in _KEY_BYTES:
            raise InvalidRequest(f"the encryption key has {len(key)} bytes", remedy="a key of aes-xts has 32 or 64")
    if verity := config.verity:
        if not config.read_only:
            raise InvalidRequest("dm-verity needs a read-only mount", remedy="add read_only=True")
        if not verity.root_hash:
            raise InvalidRequest("dm-verity needs a root hash")
        if verity.hash_offset_bytes <= 0 or verity.hash_offset_bytes % _SECTOR_BYTES:
            raise InvalidRequest(
                f"a hash tree at byte {verity.hash_offset_bytes}", remedy=f"it begins at a multiple of {_SECTOR_BYTES}"
            )


def check_path(guest_path: PurePosixPath, *, to_mount: bool) -> None:
    """Refuse what is no place to mount at; to unmount, any absolute path will do.

    Raises:
        InvalidRequest: it is relative, has `..` in it, is too long, or is no text; or it is the system's.
    """
    text = str(guest_path)
    try:
        plain = str((mountable if to_mount else spelled)(text))
        if plain != text:
            raise ValueError(f"is spelled {plain}")
    except ValueError as why:
        remedy = "choose another, such as /mnt/data"
        raise InvalidRequest(f"guest path {text!r} {why}", remedy=remedy) from None


def check_plain(config: MountConfig) -> None:
    """Refuse what a guest that is not ours cannot be told, or would do otherwise than it is meant (`hazards`).

    Raises:
        NotSupported: names it.
    """
    for is_wanted, what in (
        (isinstance(config.encryption, CallerKey), "key of the caller's"),
        (config.verity is not None, "dm-verity tree of the caller's"),
    ):
        if is_wanted:
            raise NotSupported(f"this guest's agent knows no {what}", remedy="use utilityvm's guest image")
    if objection := hazards.objection(
        filesystem=config.named_filesystem,
        ensure_filesystem=config.ensure_filesystem,
        reformat=config.reformat,
        encrypted=config.encryption is not None,
        block_device=config.block_device,
        options=config.mount_options,
    ):
        raise NotSupported(objection.reason, remedy=objection.remedy)


def disk_settings(slot: Slot, config: MountConfig, guest_path: PurePosixPath) -> dict[str, Any]:
    """The settings of a MappedVirtualDisk, in GCS's order and without its zeros: for a mount, and for its unmount.

    That an unmount repeats them all is as hcsshim's newest does it: without `Encrypted` its guest leaves the
    encrypted mapping behind. Source: tests/vectors/gcs.json.
    """
    return nonzero(
        MountPath=str(guest_path),
        Lun=slot.lun,
        Controller=slot.controller,
        Partition=config.partition,
        ReadOnly=config.read_only,
        Encrypted=isinstance(config.encryption, ScratchKey),
        Options=list(config.mount_options),
        BlockDev=config.block_device,
        EnsureFilesystem=config.ensure_filesystem,
        Filesystem=config.named_filesystem,
    )


def disk_extension(config: MountConfig, *, may_hold: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    """What a mount needs that GCS has no word for; only for our agent. Holds the caller's key.

    `may_hold`: outside of these ranges, offsets and lengths, the disk reads as zeros.
    """
    extension: dict[str, Any] = {}
    if may_hold is not None:
        extension["MayHold"] = [list(one) for one in may_hold]
    if isinstance(config.encryption, CallerKey):
        extension["Key"] = base64.b64encode(config.encryption.key).decode()
    if config.reformat:
        extension["Reformat"] = True
    if verity := config.verity:
        optional = {
            "DataBlocks": verity.data_blocks,
            "Salt": None if verity.salt is None else verity.salt.hex(),
            "Algorithm": verity.algorithm,
            "BlockSize": verity.block_size_bytes,
        }
        extension["Verity"] = {
            "RootHash": verity.root_hash.hex(),
            "HashOffset": verity.hash_offset_bytes,
            **{name: value for name, value in optional.items() if value is not None},
        }
    return {messages.EXTENSION: extension} if extension else {}


def nonzero(**fields: Any) -> dict[str, Any]:
    """The fields that are not zero, empty, false or None, as Go's omitempty."""
    return {name: value for name, value in fields.items() if value}
