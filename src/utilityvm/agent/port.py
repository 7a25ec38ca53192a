"""The virtio-serial port: one descriptor, both directions, and a host that comes and goes.

With no host connected it reads as end of file, and poll says HUP for as long: waiting for the level would spin, so we
wait for the edge. A close and an open by the host can come as one, and then no HUP is seen at all: the session begins
anew when a negotiate request does (see `Serve`).
"""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path
from typing import Final

PORT_NAME: Final = "org.utilityvm.bridge"
_READ_BYTES: Final = 65536


def find_port(name: str = PORT_NAME, *, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> Path:
    """The device of the port called `name`.

    Raises:
        FileNotFoundError: the VM has no such port.
    """
    for entry in (sysfs / "class/virtio-ports").glob("*/name"):
        if entry.read_text().strip() == name:
            return dev / entry.parent.name
    raise FileNotFoundError(f"no virtio-serial port {name}")


class Port:
    """Blocking reads and writes on the port's descriptor (or on a socket, in tests)."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._edges = select.epoll()
        self._edges.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET)
        self._changed = threading.Condition()
        self._write_lock = threading.Lock()
        self.session = 0  # counts the hosts that came

    def read(self) -> bytes:
        """What the host sent; empty means that it hung up, and the next read waits for the next host."""
        while True:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                self._wait_edge()
                continue
            if not data:
                self._new_session()
            return data

    def wait_host(self) -> None:
        """Wait for the next edge: after an end of file, that is a host that connects."""
        self._wait_edge()

    def _wait_edge(self) -> None:
        self._edges.poll()
        with self._changed:
            self._changed.notify_all()

    def _new_session(self) -> None:
        with self._changed:
            self.session += 1
            self._changed.notify_all()

    def begin_session(self) -> int:
        """A host began anew on the same port: what was meant for the one before must not reach it."""
        self._new_session()
        return self.session

    def write(self, data: bytes, *, session: int) -> bool:
        """Write all of `data` to the host of `session`. False: that host is gone, and the rest was dropped."""
        with self._write_lock:
            rest = memoryview(data)
            while rest:
                if session != self.session:
                    return False
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    with self._changed:
                        if session == self.session:
                            # The reader's thread sees the edge; the bound covers an edge that came just before.
                            self._changed.wait(0.02)
                except OSError:
                    return False
            return True
