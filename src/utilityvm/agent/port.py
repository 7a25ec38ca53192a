"""The virtio-serial port: one descriptor, both directions, and a host that comes and goes.

With no host connected the port reads as end of file, and poll(2) says HUP for as long: waiting for that level would
spin. The driver wakes its waiters when the host comes or goes, so an edge (EPOLLET) is waited for instead. EPOLLOUT is
among what is asked for because a host that comes and says nothing changes only that.

A close and an open by the host can come as one, and then no HUP is seen at all: what is said to a host carries the
number of its *session*, and a new one begins with each negotiate request (see `serve`).

Source: Linux drivers/char/virtio_console.c, port_fops_read, port_fops_poll, handle_control_message (PORT_OPEN).
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Final

PORT_NAME: Final = "org.utilityvm.bridge"
_READ_BYTES: Final = 65536
_LOOK_AGAIN_S: Final = 0.02
_WRITE_LOOK_MS: Final = 1000


def find_port(
    name: str = PORT_NAME, *, timeout_s: float, ports: str = "/sys/class/virtio-ports", dev: str = "/dev"
) -> str:
    """The device of the port called `name`. The driver makes it soon after it finds its controller: it is waited for.

    Raises:
        FileNotFoundError: the VM has no such port.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for entry in os.listdir(ports) if os.path.isdir(ports) else ():
            try:
                with open(f"{ports}/{entry}/name") as file:
                    found = file.read().strip()
            except OSError:
                continue  # a port without a name
            if found == name and os.path.exists(f"{dev}/{entry}"):
                return f"{dev}/{entry}"
        if time.monotonic() >= deadline:
            raise FileNotFoundError(f"no virtio-serial port {name}")
        time.sleep(_LOOK_AGAIN_S)


class Port:
    """Blocking reads and writes on the port's descriptor (or on a socket, in tests). One thread reads, any write."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._edges = select.epoll()
        self._edges.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET)
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)
        self._write_lock = threading.Lock()
        self._at_end = False
        self._hangups = 0
        self.session = 0  # which host is spoken to

    def read(self) -> bytes:
        """What the host sent. Empty: it hung up, or there is none; the next read then waits for a change."""
        if self._at_end:
            self._edges.poll()
            self._at_end = False
        while True:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                self._edges.poll()
                continue
            except OSError:
                data = b""  # the port was unplugged, or the test's peer reset its connection
            if not data:
                self._at_end = True
                self._hangups += 1
                self.session += 1
            return data

    def begin_session(self) -> int:
        """The number of a new session: what was meant for the host before is not sent any more."""
        self.session += 1
        return self.session

    def write(self, data: bytes, *, session: int) -> bool:
        """Write all of `data` to the host of `session`, or nothing if another has come. False: that host is gone.

        A host that does not read holds the caller up until it reads or hangs up.
        """
        with self._write_lock:
            if session != self.session:
                return False
            # From here only a hang-up ends it: half a frame would harm the one who is still there.
            hangups = self._hangups
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    for _, events in self._writable.poll(_WRITE_LOOK_MS):
                        if events & (select.POLLHUP | select.POLLERR):
                            return False
                    if hangups != self._hangups:
                        return False
                except OSError:
                    return False
            return True
