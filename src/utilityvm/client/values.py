"""Values of the library as they go over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utilityvm.server import types

if TYPE_CHECKING:
    from utilityvm.scsi.ports import CallerKey, ScratchKey, Verity


def encryption_of(key: ScratchKey | CallerKey | None) -> types.ScratchKey | types.CallerKey | None:
    if key is None:
        return None
    secret = getattr(key, "key", None)
    return types.ScratchKey() if secret is None else types.CallerKey(key=secret)


def verity_of(verity: Verity | None) -> types.Verity | None:
    if verity is None:
        return None
    return types.Verity(
        root_hash=verity.root_hash,
        hash_offset_bytes=verity.hash_offset_bytes,
        data_blocks=verity.data_blocks,
        salt=verity.salt,
        algorithm=verity.algorithm,
        block_size_bytes=verity.block_size_bytes,
    )
