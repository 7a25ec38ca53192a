"""Rows of earlier versions of the store, as the present one has them. Called by the migrations."""

from __future__ import annotations

import msgspec

from utilityvm.scsi import mount_config as mount_configs
from utilityvm.scsi.mount_config import CallerKey, Encryption, MountConfig, ScratchKey, Verity


class _Verity(msgspec.Struct):
    """The column `verity` of a store before version 5: its hashes are in hexadecimal digits."""

    root_hash: str
    hash_offset_bytes: int
    data_blocks: int | None
    salt: str | None
    algorithm: str | None
    block_size_bytes: int | None

    def now(self) -> Verity:
        return Verity(
            root_hash=bytes.fromhex(self.root_hash),
            hash_offset_bytes=self.hash_offset_bytes,
            data_blocks=self.data_blocks,
            salt=None if self.salt is None else bytes.fromhex(self.salt),
            algorithm=self.algorithm,
            block_size_bytes=self.block_size_bytes,
        )


def mount_config(
    partition: int,
    read_only: int,
    options: str,
    filesystem: str | None,
    ensure_filesystem: int,
    reformat: int,
    block_device: int,
    encryption: str | None,
    verity: str | None,
) -> str:
    """The settings of a mount from the columns of a store before version 5, as the column `config`.

    A row that no utilityvm wrote stays one that cannot be read: it must not keep a store with others from opening.
    """
    keys: dict[str | None, Encryption | None] = {None: None, "scratch": ScratchKey(), "caller": CallerKey(b"")}
    try:
        config = MountConfig(
            partition=partition,
            read_only=bool(read_only),
            options=tuple(msgspec.json.decode(options, type=list[str])) if options else (),
            filesystem=filesystem,
            ensure_filesystem=bool(ensure_filesystem),
            reformat=bool(reformat),
            block_device=bool(block_device),
            encryption=keys[encryption],
            verity=msgspec.json.decode(verity, type=_Verity).now() if verity else None,
        )
    except (ValueError, KeyError) as error:
        return f"not the settings of a mount: {error}"
    return mount_configs.to_json(config)
