"""Which format an image has: what its caller says, else what was decided when it was first opened, else its bytes.

A guest writes what it likes into a raw disk, the header of a qcow2 among it, and whoever then believes the bytes opens
files of the host for it (CVE-2008-2004). So bytes decide once, before any guest of this host had the file. What was
decided is remembered for the file itself: a guest can neither change which file it is nor how large.

The host's user can, and may put another image into the same file. Where bytes and memory differ and it is not the
guest's doing for certain, neither is believed, and the caller has to say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from utilityvm.diskimage import headers
from utilityvm.diskimage.source import Source
from utilityvm.errors import ConfigDiffers, ImageError
from utilityvm.machine.fileid import FileId
from utilityvm.scsi.ports import DiskFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What an image was when it was opened last."""

    format: DiskFormat
    size_bytes: int  # of its file


class FormatMemory(Protocol):
    """What images were found or said to be. Its calls block, and come from several threads at once."""

    def recall(self, file: FileId) -> tuple[DiskFormat, int] | None:
        """The format of the file and its size at that time; None: it was never opened."""
        ...

    def remember(self, file: FileId, format: DiskFormat, *, size_bytes: int) -> None: ...


def read_header(
    fd: int, *, name: str, stated: DiskFormat | None, read_only: bool, memory: FormatMemory | None
) -> headers.ImageHeader:
    """The header of a safe image, and its format is remembered: before any VM gets it.

    Raises:
        ConfigDiffers: its bytes are not of the `stated` format, or no longer of the one that was decided.
        ImageError, NotSupported: what `headers.read` and `headers.check_safe` say of it.
        StoreError: it cannot be remembered.
    """
    file = FileId.of(fd)
    known = memory.recall(file) if memory is not None and stated is None else None
    decided = None if known is None else Decided(format=known[0], size_bytes=known[1])
    if decided is None:
        header = headers.read(fd, name=name, expected=stated)
    else:
        _check_as_decided(fd, name, file, decided)
        header = headers.read(fd, name=name, expected=decided.format)
    headers.check_safe(header, read_only=read_only)
    now = Decided(format=header.format, size_bytes=header.file_size_bytes)
    if memory is not None and decided != now:
        memory.remember(file, now.format, size_bytes=now.size_bytes)
    return header


def _check_as_decided(fd: int, name: str, file: FileId, decided: Decided) -> None:
    """Refuse an image that somebody else than a guest may have put in the place of the one that was decided."""
    is_guests = decided.format is DiskFormat.RAW and file.lasting is not None
    if is_guests and os.fstat(fd).st_size == decided.size_bytes:
        return
    image = Source.of_fd(fd, name=name)
    try:
        seen = str(headers.detect(image))
    except ImageError as error:
        if decided.format is not DiskFormat.RAW and headers.may_be(image, decided.format):
            return  # such as a fixed VHD in whose first sector its guest wrote
        seen = f"something else ({str(error).removeprefix(f'{name}: ')})"
    if seen == decided.format:
        return
    raise ConfigDiffers(
        f"{name}: it was {decided.format} when it was opened before, and its bytes say {seen} now",
        host_path=name,
        remedy=f"give the format: {decided.format} if only a guest wrote to it, else that of the image you put there",
    )
