"""Scratch disks: images that a VM makes for itself. They go when nothing uses them any more, or with the VM.

They lie in the VM's folder of overlays. A template that is made of the VM keeps its own link to them.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

from utilityvm.errors import InvalidRequest
from utilityvm.machine import oserrors, paths
from utilityvm.machine.threads import in_thread
from utilityvm.vm.owned import OwnedVM

LEAST_BYTES: Final = 1 << 20
MOST_BYTES: Final = 1 << 50
_BEGINNING: Final = "scratch-"


def check_size(size_bytes: int) -> None:
    """Raises:
    InvalidRequest: no scratch disk has that size.
    """
    if size_bytes % 512 or not LEAST_BYTES <= size_bytes <= MOST_BYTES:
        raise InvalidRequest(
            f"a scratch disk cannot have {size_bytes} bytes",
            remedy=f"give a multiple of 512, from {LEAST_BYTES} to {MOST_BYTES}",
        )


class Making:
    """A new image, for the block; kept only if a disk of the VM has it when the block ends."""

    def __init__(self, vm: OwnedVM, size_bytes: int) -> None:
        self._vm = vm
        self._size_bytes = size_bytes
        self._path = paths.overlays_dir(vm.record.uuid) / f"{_BEGINNING}{secrets.token_hex(6)}.raw"

    async def __aenter__(self) -> Path:
        """Raises:
        SetupError: no space or no right; nothing is left.
        """
        self._vm.has_scratch = True
        self._vm.making.add(str(self._path))
        try:
            await in_thread(_make, self._path, self._size_bytes, late=Path.unlink)
        except BaseException:
            await self.__aexit__()
            raise
        return self._path

    async def __aexit__(self, *_: object) -> None:
        self._vm.making.discard(str(self._path))
        await tidy(self._vm)


def _make(path: Path, size_bytes: int) -> Path:
    try:
        paths.make_folder(path.parent)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise oserrors.as_ours(error, f"cannot make a scratch disk of {size_bytes} bytes") from error
    return path


async def take_over(vm: OwnedVM) -> None:
    """Know of the images that an earlier owner made, and remove those that no disk has."""
    vm.has_scratch = True
    await tidy(vm)


async def tidy(vm: OwnedVM) -> None:
    """Remove the images that no disk of the VM has."""
    if not vm.has_scratch:
        return
    there = await in_thread(_images, paths.overlays_dir(vm.record.uuid), always=True)
    vm.has_scratch = bool(there or vm.making)
    used = vm.making | {view.host_path for view in vm.scsi.slots()}
    if unused := [path for path in there if str(path) not in used]:  # none of them is ever used again
        await in_thread(_remove, unused, always=True)


def _images(folder: Path) -> list[Path]:
    return list(folder.glob(f"{_BEGINNING}*"))


def _remove(images: list[Path]) -> None:
    for path in images:
        with suppress(OSError):  # it goes with the VM
            path.unlink()
