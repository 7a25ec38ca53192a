"""Where a guest is reached, and how: it listens and we dial, or it dials and we listen."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from utilityvm.errors import DeadlineExceeded, NotSupported, VMGone
from utilityvm.machine import oserrors, sockets
from utilityvm.machine.sockets import Listener

GCS_VSOCK_PORT: Final = 0x40000000  # where hcsshim's gcs finds its host
_BACKLOG: Final = 4
# What says that there is nobody; anything else says something about us.
_MISSING: Final = frozenset(
    (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENODEV, errno.EHOSTUNREACH, errno.ETIMEDOUT)
)


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A vsock port. `cid` is the guest's when we dial; when we listen it is not looked at."""

    cid: int
    port: int = GCS_VSOCK_PORT

    def __str__(self) -> str:
        return f"vsock {self.cid}:{self.port:#x}"


Address: TypeAlias = Path | Listener | VsockAddress
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Source(Protocol):
    """Gives connections to one guest, one after the other."""

    async def open(self, *, timeout_s: float, vm: str | None) -> Streams:
        """A new connection.

        Raises:
            VMGone: there is nobody to connect to.
            DeadlineExceeded: nobody came within `timeout_s` seconds.
            SetupError: this process cannot connect to anybody: it has too many files open.
        """
        ...

    def close(self) -> None:
        """No more connections. Twice is once."""
        ...


class Dial:
    """The guest (or QEMU, for it) listens at `address`."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def open(self, *, timeout_s: float, vm: str | None) -> Streams:
        """See `Source.open`."""
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(self._address, VsockAddress):
                    return await _dial_vsock(self._address)
                connection = await sockets.connect(self._address, timeout_s=timeout_s, vm=vm)
                try:
                    return await asyncio.open_unix_connection(sock=connection)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address} took no connection within {timeout_s:g} s", vm=vm) from None
        except OSError as error:
            if error.errno in _MISSING:
                raise VMGone(f"nobody answers at {self._address}: {error.strerror}", vm=vm) from error
            raise oserrors.as_ours(error, f"cannot connect to {self._address}", vm=vm) from error

    def close(self) -> None:
        """See `Source.close`."""


async def _dial_vsock(address: VsockAddress) -> Streams:
    connection = _vsock()
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (address.cid, address.port))
        return await asyncio.open_connection(sock=connection)
    except BaseException:
        connection.close()
        raise


class Listen:
    """The guest dials us at `address`, as hcsshim's gcs does, and again when it was started again."""

    def __init__(self, address: Address) -> None:
        """Listen from now on.

        Raises:
            NotSupported: this system has no vsock.
            OSError: the address is taken, or is not ours to take.
        """
        self._path = address if isinstance(address, Path) else None
        self._address = address
        self._socket = _vsock() if isinstance(address, VsockAddress) else socket.socket(socket.AF_UNIX)
        try:
            self._socket.setblocking(False)
            if isinstance(address, VsockAddress):
                self._socket.bind((socket.VMADDR_CID_ANY, address.port))
            else:
                self._socket.bind(str(address))
            self._socket.listen(_BACKLOG)
        except BaseException:
            self._socket.close()
            raise

    async def open(self, *, timeout_s: float, vm: str | None) -> Streams:
        """See `Source.open`."""
        try:
            async with asyncio.timeout(timeout_s):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        except TimeoutError:
            raise DeadlineExceeded(f"no guest dialled {self._address} within {timeout_s:g} s", vm=vm) from None
        except OSError as error:
            raise VMGone(f"{self._address}: {error.strerror or error}", vm=vm) from error
        return await asyncio.open_connection(sock=connection)

    def close(self) -> None:
        """See `Source.close`."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if self._path:
            with contextlib.suppress(OSError):
                self._path.unlink()


class Given:
    """One connection that was made already; there is no other when it ends."""

    def __init__(self, streams: Streams) -> None:
        self._streams: Streams | None = streams

    async def open(self, *, timeout_s: float, vm: str | None) -> Streams:
        """See `Source.open`."""
        if self._streams is None:
            raise VMGone("the guest hung up, and its connection was not ours to make again", vm=vm)
        streams, self._streams = self._streams, None
        return streams

    def close(self) -> None:
        """See `Source.close`."""
        if self._streams:
            self._streams[1].close()
            self._streams = None


def _vsock() -> socket.socket:
    if not hasattr(socket, "AF_VSOCK"):
        raise NotSupported("this system has no vsock", remedy="reach the guest through a Unix socket")
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
