"""The bytes of an image, read by `pread` alone, from an open file or block device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from utilityvm.errors import ImageDamaged, ImageUnsafe, InvalidRequest

SECTOR = 512


class Source:
    """An image as its readers see it. They ask for few bytes at a time, whatever the image says."""

    def __init__(self, pread: Callable[[int, int], bytes], *, size_bytes: int, name: str) -> None:
        """`pread(length, offset)` gives up to `length` bytes, fewer at the end, and may raise OSError."""
        self._pread = pread
        self.size_bytes = size_bytes
        self.name = name

    @classmethod
    def of_fd(cls, fd: int, *, name: str) -> Source:
        """The image behind `fd`, which stays open and keeps its file position.

        Raises:
            InvalidRequest: it is neither a regular file nor a block device.
            ImageDamaged: its size cannot be read.
        """
        try:
            status = os.fstat(fd)
            if stat.S_ISBLK(status.st_mode):
                from utilityvm.diskimage import blockdev  # not importable on Windows, which has no such devices

                size_bytes = blockdev.size_bytes(fd)
            elif stat.S_ISREG(status.st_mode):
                size_bytes = status.st_size
            else:
                raise InvalidRequest(
                    f"{name} is neither a file nor a block device",
                    host_path=name,
                    remedy="give the path of a disk image or of a block device",
                )
        except OSError as error:
            raise _unreadable(name, error) from error
        return cls(lambda length, offset: os.pread(fd, length, offset), size_bytes=size_bytes, name=name)

    @property
    def sectors_end(self) -> int:
        """Where the file ends in QEMU's eyes: it counts whole sectors and reads zeros behind the last byte."""
        return -(-self.size_bytes // SECTOR) * SECTOR

    def read(self, offset: int, length: int, *, what: str) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            ImageDamaged: the image ends before that, or its storage fails.
        """
        if offset + length > self.size_bytes:
            raise self.damaged(
                f"it is cut short: {what} is at {offset} to {offset + length}, and the file ends at {self.size_bytes}"
            )
        data = self.read_up_to(offset, length)
        if len(data) != length:
            raise self.damaged(f"it became shorter while {what} was read", remedy="stop what is writing to it")
        return data

    def read_up_to(self, offset: int, length: int) -> bytes:
        """What the file has of the `length` bytes at `offset`; behind its end that is nothing.

        Raises:
            ImageDamaged: its storage fails.
        """
        parts: list[bytes] = []
        while length > 0 and offset < self.size_bytes:
            try:
                part = self._pread(length, offset)
            except OSError as error:
                raise _unreadable(self.name, error) from error
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def damaged(self, reason: str, *, remedy: str = "restore it from a good copy") -> ImageDamaged:
        return ImageDamaged(f"{self.name}: {reason}", host_path=self.name, remedy=remedy)

    def unsafe(self, reason: str, *, remedy: str) -> ImageUnsafe:
        return ImageUnsafe(f"{self.name}: {reason}", host_path=self.name, remedy=remedy)


def _unreadable(name: str, error: OSError) -> ImageDamaged:
    text = error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
    return ImageDamaged(f"{name}: it cannot be read: {text}", host_path=name, remedy="look at the host's storage")
