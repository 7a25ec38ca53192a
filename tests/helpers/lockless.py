"""A file system of one file, and without locks, as some network file systems are: FUSE's own protocol, in a thread.

Source: linux/fuse.h; the numbers of its requests, and the layout of its answers (7.31).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from utilityvm.machine.programs import find_program, run

NAME: Final = "disk.img"
_ROOT, _FILE = 1, 2
_LOOKUP, _GETATTR, _OPEN, _READ, _STATFS, _FLUSH, _INIT, _OPENDIR = 1, 3, 14, 15, 17, 25, 26, 27
_UNANSWERED: Final = frozenset({2, 36, 42})  # FORGET, INTERRUPT, BATCH_FORGET
_LOCKS: Final = frozenset({31, 32, 33})  # GETLK, SETLK, SETLKW
_DONE: Final = frozenset({18, 20, _FLUSH, 29, 34})  # RELEASE, FSYNC, FLUSH, RELEASEDIR, ACCESS
_POSIX_LOCKS: Final = 1 << 1  # "ask me": else the kernel keeps the locks itself
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def lockless(folder: Path, behind: Path) -> Iterator[Path]:
    """The file `behind`, read-only, at the path that is given, on a file system which refuses locks. Needs root.

    Raises:
        OSError: this kernel, or this user, may not mount FUSE.
    """
    folder.mkdir()
    source = os.open(behind, os.O_RDONLY | os.O_CLOEXEC)
    channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={channel},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    try:
        if _LIBC.mount(b"lockless", os.fsencode(folder), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mounting FUSE")
        server = threading.Thread(target=_serve, args=(channel, source))
        server.start()
        try:
            yield folder / NAME
        finally:
            run([find_program("umount", package="mount"), folder])
            server.join()
    finally:
        os.close(channel)
        os.close(source)


def _serve(channel: int, source: int) -> None:
    """Answer until it is unmounted."""
    while True:
        try:
            request = os.read(channel, 1 << 20)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno == errno.ENOENT:  # the request was taken back
                continue
            return  # ENODEV
        _, kind, unique, node = struct.unpack_from("<IIQQ", request)
        if kind in _UNANSWERED:
            continue
        answer = _answer(kind, node, request[40:], source)
        refused, body = (answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(channel, struct.pack("<IiQ", 16 + len(body), -refused, unique) + body)


def _answer(kind: int, node: int, body: bytes, source: int) -> bytes | int:
    match kind:
        case _ if kind == _INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, _POSIX_LOCKS, 12, 10, 1 << 16, 1, 0, 0, 0)
        case _ if kind == _LOOKUP:
            if body.rstrip(b"\0") != NAME.encode():
                return errno.ENOENT
            return struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE, source)
        case _ if kind == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + _attributes(node, source)
        case _ if kind in (_OPEN, _OPENDIR):
            return struct.pack("<QII", 1, 0, 0)
        case _ if kind == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(source, size, offset)
        case _ if kind == _STATFS:
            return struct.pack("<5Q4I24x", *[1 << 20] * 5, 4096, 255, 4096, 0)
        case _ if kind in _DONE:
            return b""
    return errno.ENOLCK if kind in _LOCKS else errno.ENOSYS


def _attributes(node: int, source: int) -> bytes:
    mode, size = (0o40755, 0) if node == _ROOT else (0o100666, os.fstat(source).st_size)
    return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
