"""What programs wrote that the guest keeps, as frames: sixteen bytes and a payload.

The stream, three zero bytes, the payload's length as 32 bits and its place in that stream as 64 bits, the highest
first. A place that is further than the last frame's end tells that the guest has dropped what lies between.

    1  standard output
    2  standard error
    3  the end: a `KeptProgram`'s exit code, as JSON; null: it runs on
    4  the end: a `Problem` as JSON
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import msgspec

from utilityvm.errors import UtilityVMError
from utilityvm.server.problems import problem_of
from utilityvm.vm.utility_vm import UtilityVM

HEADER: Final = struct.Struct(">B3xIQ")
STDOUT, STDERR, ENDED, FAILED = 1, 2, 3, 4


async def follow(use: AbstractAsyncContextManager[UtilityVM], which: int | str, query: Any) -> AsyncIterator[bytes]:
    """An empty piece once the program is followed, then the frames. Its caller has to close it."""
    async with use as vm:
        pieces = await vm.follow_program(
            which, stdout_offset=query.stdout, stderr_offset=query.stderr, live=query.live == "true"
        )
        try:
            yield b""
            async for piece in pieces:
                yield _frame(STDOUT if piece.stream == "stdout" else STDERR, piece.data, piece.offset)
            yield _frame(ENDED, msgspec.json.encode(pieces.exit_code))
        except UtilityVMError as error:
            yield _frame(FAILED, msgspec.json.encode(problem_of(error)))
        finally:
            await pieces.aclose()


def _frame(stream: int, payload: bytes, at: int = 0) -> bytes:
    return HEADER.pack(stream, len(payload), at) + payload
