"""A mount as documents of earlier versions had it: its settings beside its name. They are read, and never written."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from utilityvm.scsi.mount_config import CallerKey, Encryption, MountConfig, ScratchKey, Verity

_KEYS: Final[dict[str | None, Encryption | None]] = {None: None, "scratch": ScratchKey(), "caller": CallerKey(b"")}


class FlatMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of an exported state of version 1 or 2, or of a template's manifest of version 1."""

    mount: str
    guest_path: str
    partition: int = 0
    read_only: bool = False
    options: tuple[str, ...] = ()
    filesystem: str | None = None
    ensure_filesystem: bool = False
    reformat: bool = False
    block_device: bool = False
    encryption: Literal["scratch", "caller"] | None = None
    scratch_key: bool = False  # the manifest's word for it
    verity: Verity | None = None
    since: float = 0.0

    def config(self) -> MountConfig:
        return MountConfig(
            partition=self.partition,
            read_only=self.read_only,
            options=self.options,
            filesystem=self.filesystem,
            ensure_filesystem=self.ensure_filesystem,
            reformat=self.reformat,
            block_device=self.block_device,
            encryption=ScratchKey() if self.scratch_key else _KEYS[self.encryption],
            verity=self.verity,
        )
