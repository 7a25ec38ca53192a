"""Our own standard input, for the guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

_READ_BYTES = 1 << 18  # a window of what a program may be ahead


async def own_input(*, whole: bool = False) -> AsyncIterator[bytes]:
    """What comes on our standard input, without holding up the loop; nothing reads ahead of the program.

    An input that cannot be read any more ends; with `whole`, which says that a part is worth nothing, that is an error.

    Raises:
        OSError: it cannot be read. Only with `whole`.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(0, _set, ready)
        except PermissionError:
            pass  # a file, which is always ready: epoll(7) does not take it
        except OSError:
            if whole:
                raise
            return  # closed
        else:
            try:
                await ready
            finally:
                loop.remove_reader(0)
        try:
            data = os.read(0, _READ_BYTES)
        except OSError:
            if whole:
                raise
            return
        if not data:
            return
        yield data


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
