"""The sending end of a copy: files, folders and links as a stream of records.

Nothing is followed below the path that was asked for: a link is sent as a link. A file is opened without waiting, and
only if it is a regular one: opening a FIFO would wait, and reading a device may do anything.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from utilityvm.files.records import (
    DATA,
    DATA_BYTES,
    DONE,
    FILE,
    FILE_END,
    FOLDER,
    FOLDER_END,
    LINK,
    MAX_DEPTH,
    OFFSET,
    SKIPPED,
    CopyFault,
    Counts,
    Head,
    headed,
    kind_of,
    record,
)

PIECE_BYTES: Final = 65536  # of the stream, at the least, before it is handed on
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY


def send(path: str, counts: Counts | None = None) -> Iterator[bytes]:
    """The stream of what is at `path`, in pieces. Close the iterator if it is not read to its end.

    A final slash follows a link to a folder. Sockets, FIFOs and devices below a folder are left out, and said to be.
    `counts` says what was sent.

    Raises:
        CopyFault: `path` itself is one of these; or folders are too deep in one another.
        OSError: something cannot be read; has its path.
    """
    walk = _Walk(path, Counts() if counts is None else counts)
    out = bytearray()
    try:
        for piece in walk.records():
            out += piece
            if len(out) >= PIECE_BYTES:
                yield bytes(out)
                out.clear()
        yield bytes(out)
    finally:
        walk.close()


def read(path: str) -> Iterator[bytes]:
    """The bytes of the file at `path`, links followed.

    Raises:
        CopyFault: it is no file.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CopyFault("refused", f"{path} is {kind_of(status.st_mode)}, and no file")
        while data := os.read(fd, DATA_BYTES):
            yield data
    finally:
        os.close(fd)


class _Walk:
    def __init__(self, path: str, counts: Counts) -> None:
        self._path = path
        self._counts = counts
        self._folders: list[tuple[int, str, Iterator[str]]] = []  # descriptor, path, names that are left

    def records(self) -> Iterator[bytes]:
        yield from self._entry(None, self._path, self._path)
        while self._folders:
            fd, path, names = self._folders[-1]
            name = next(names, None)
            if name is None:
                self._folders.pop()
                os.close(fd)
                yield record(FOLDER_END)
            else:
                yield from self._entry(fd, name, f"{path}/{name}")
        yield record(DONE)

    def close(self) -> None:
        for fd, _, _ in self._folders:
            os.close(fd)
        self._folders.clear()

    def _entry(self, folder: int | None, name: str, path: str) -> Iterator[bytes]:
        shown = b"" if folder is None else os.fsencode(name)
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            match stat.S_IFMT(status.st_mode):
                case stat.S_IFREG:
                    yield from self._file(folder, name, path, shown)
                case stat.S_IFDIR:
                    yield self._folder(folder, name, path, shown)
                case stat.S_IFLNK:
                    target = os.readlink(os.fsencode(name), dir_fd=folder)
                    self._counts.links += 1
                    yield headed(LINK, _head(status), shown, target)
                case _ if folder is None:
                    raise CopyFault("refused", f"{path} is {kind_of(status.st_mode)}, which cannot be copied")
                case _:
                    yield self._left_out(path, kind_of(status.st_mode))
        except FileNotFoundError:
            if folder is None:
                raise
            yield self._left_out(path, "gone meanwhile")
        except OSError as error:
            if error.filename is not None and error.filename != path:
                error.filename = path  # it has the name alone
            raise

    def _file(self, folder: int | None, name: str, path: str, shown: bytes) -> Iterator[bytes]:
        fd = os.open(name, _OPEN | os.O_NONBLOCK, dir_fd=folder)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CopyFault("refused", f"{path} became {kind_of(status.st_mode)} while it was copied")
            yield headed(FILE, _head(status), shown)
            self._counts.files += 1
            yield from self._content(fd, status)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(fd)

    def _folder(self, folder: int | None, name: str, path: str, shown: bytes) -> bytes:
        if len(self._folders) >= MAX_DEPTH:
            raise CopyFault("limit", f"{path} is in more than {MAX_DEPTH} folders, which cannot be copied")
        fd = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=folder)
        try:
            head = _head(os.fstat(fd))
            names = sorted(os.listdir(fd), key=os.fsencode)
        except BaseException:
            os.close(fd)
            raise
        self._folders.append((fd, path.rstrip("/"), iter(names)))
        self._counts.folders += 1
        return headed(FOLDER, head, shown)

    def _content(self, fd: int, status: os.stat_result) -> Iterator[bytes]:
        """The data of a file, up to the size that it had when it was opened, and its end.

        A file of procfs says that it is empty; it is read to its end.
        """
        size = status.st_size
        at = 0
        if size == 0:
            while data := os.read(fd, DATA_BYTES):
                yield self._data(at, data)
                at += len(data)
            size = at
        is_dense = status.st_blocks * 512 >= size
        while at < size:
            at, end = (at, size) if is_dense else _next_data(fd, at, size)
            while at < end:
                data = os.pread(fd, min(DATA_BYTES, end - at), at)
                if not data:
                    size = end = at  # it was cut meanwhile, or is one of sysfs, which are said to have a page
                    break
                yield self._data(at, data)
                at += len(data)
        yield record(FILE_END, OFFSET.pack(size))

    def _data(self, at: int, data: bytes) -> bytes:
        self._counts.bytes += len(data)
        return record(DATA, OFFSET.pack(at) + data)

    def _left_out(self, path: str, why: str) -> bytes:
        line = f"{path}: {why}"
        self._counts.skip(line)
        return record(SKIPPED, os.fsencode(line)[:4096])


def _next_data(fd: int, at: int, size: int) -> tuple[int, int]:
    """Where the next data of the file begins and ends, looked for from `at` on; at its size, if a hole is the rest."""
    try:
        begin = os.lseek(fd, at, os.SEEK_DATA)
        return min(begin, size), min(os.lseek(fd, begin, os.SEEK_HOLE), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        if error.errno == errno.EINVAL:
            return at, size  # this file system knows of no holes
        raise


def _head(status: os.stat_result) -> Head:
    return Head(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
