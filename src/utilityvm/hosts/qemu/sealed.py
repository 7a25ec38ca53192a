"""A template's memory that no clone can write to: a sealed copy, shared by the clones that one process starts.

QEMU before 8.2 maps memory privately from a file only if it may write to that file too. One that its guest has taken
over could then write to what all clones read. The seals of a memfd hold for every descriptor of it, whoever opens it
and how: private mappings are possible, and nothing else that writes.

The copy takes the RAM that the template's memory has, once for all clones of this process, and is gone with the last.
Clones of another process have a copy of their own.

Source: memfd_create(2); fcntl(2), F_ADD_SEALS; Linux, mm/memfd.c, memfd_wait_for_pins; QEMU 7.2, softmmu/physmem.c,
file_ram_open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import weakref
from typing import Final

from utilityvm.hosts.qemu.memory import copy_data
from utilityvm.machine import forks, patience
from utilityvm.machine.fileid import FileId
from utilityvm.machine.threads import aside

SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_SEAL_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.01

_lock = threading.Lock()
_filling: dict[FileId, threading.Lock] = {}
_known: weakref.WeakValueDictionary[FileId, Sealed] = weakref.WeakValueDictionary()


class Sealed:
    """A sealed copy. Its descriptor is closed when nobody has this object any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, aside, os.close, fd)  # the last close gives the memory back, which takes a while


def copy_of(source: int) -> Sealed:
    """The copy of that file, which never changes: one for all who have it at a time. Blocks.

    Raises:
        OSError: no memory, or the file's storage fails.
    """
    file = FileId.of(source)
    with _lock:
        filling = _filling.setdefault(file, threading.Lock())
    with filling:  # of one file; others do not wait
        if (known := _known.get(file)) is not None:
            return known
        fd = os.memfd_create("utilityvm-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, os.fstat(source).st_size)
            copy_data(source, fd)
            _seal(fd)
        except BaseException:
            os.close(fd)
            raise
        _known[file] = sealed = Sealed(forks.keep_from(fd))
        return sealed


def _seal(fd: int) -> None:
    """The kernel refuses while it has a hold of a page itself, such as to move it, and gives up after 150 ms."""
    until = time.monotonic() + patience.left_s(_SEAL_S)
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= until:
                raise
            time.sleep(_LOOK_AGAIN_S)
        else:
            return
