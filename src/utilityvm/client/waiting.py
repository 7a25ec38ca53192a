"""A connection whose waits are the event loop's."""

from __future__ import annotations

import asyncio
import socket

from utilityvm.client.wire import PIECE_BYTES


class Waiting:
    """A connected socket, in an event loop. Implements `wire.Transport`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    async def send(self, data: bytes, *, timeout_s: float | None) -> None:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def receive(self, *, timeout_s: float | None) -> bytes:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().sock_recv(self._connection, PIECE_BYTES)

    def close(self) -> None:
        self._connection.close()
