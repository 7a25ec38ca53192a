"""The input and the output of a kept program, as asyncio's streams: what its handle has."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.errors import GuestBusy, GuestRefused, InvalidRequest, UtilityVMError, WrongState
from utilityvm.guests import answers
from utilityvm.guests.bridge_client import again
from utilityvm.guests.loops import of_one_loop
from utilityvm.machine.oserrors import typed_errors

BUFFER_BYTES: Final = 1 << 20  # of output that its reader has not taken
_LINE_BYTES: Final = 65536
_DRAINED_BYTES: Final = 65536

Notify = Callable[[int, dict[str, Any]], None]


@typed_errors
@of_one_loop
class ProgramOutput:
    """One of a program's two streams, as it comes. One reader at a time; lines end with a newline, as the bytes do.

    `offset` is that of the next byte that will be read, counted from the program's start. `lost` is how many bytes
    were dropped by the guest before we could have them: only if nobody followed the program.
    """

    def __init__(self, offset: int = 0) -> None:
        """Use `UtilityVM.start_program` or `program`."""
        self.offset = offset
        self.lost = 0
        self._buffer = bytearray()
        self._has_ended = False
        self._error: UtilityVMError | None = None
        self._changed = asyncio.Event()  # there is more, or the end
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes, as soon as there are some; with -1 all until its end. Empty at its end.

        Raises:
            VMGone: the VM ended, or was let go of. What came before can be read first.
        """
        if n < 0:
            whole = bytearray()
            while piece := await self.read(BUFFER_BYTES):
                whole += piece
            return bytes(whole)
        if n == 0:
            return b""
        await self._until_more_than(0)
        return self._take(n)

    async def readexactly(self, n: int) -> bytes:
        """`n` bytes.

        Raises:
            asyncio.IncompleteReadError: the stream ended before; it has what came.
            VMGone: as `read`.
        """
        whole = bytearray()
        while len(whole) < n:
            piece = await self.read(n - len(whole))
            if not piece:
                raise asyncio.IncompleteReadError(bytes(whole), n)
            whole += piece
        return bytes(whole)

    async def readline(self) -> bytes:
        """A line with its newline; the last may have none. Empty at its end.

        A line of more than 64 KiB comes in pieces.

        Raises:
            VMGone: as `read`.
        """
        searched = 0
        while True:
            found = self._buffer.find(b"\n", searched, _LINE_BYTES)
            if found >= 0:
                return self._take(found + 1)
            searched = len(self._buffer)
            if searched >= _LINE_BYTES or self._has_ended:
                return self._take(_LINE_BYTES)
            await self._until_more_than(searched)

    def at_eof(self) -> bool:
        """Has all of it been read?"""
        return self._has_ended and not self._buffer

    def __aiter__(self) -> ProgramOutput:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def _until_more_than(self, size: int) -> None:
        while len(self._buffer) <= size and not self._has_ended:
            if self._error is not None:
                raise again(self._error)
            self._changed.clear()
            await self._changed.wait()

    def _take(self, at_most: int) -> bytes:
        data = bytes(self._buffer[:at_most])
        del self._buffer[:at_most]
        self.offset += len(data)
        if len(self._buffer) < BUFFER_BYTES:
            self._has_room.set()
        return data

    # For `kept`, which follows the program.

    async def _put(self, at: int, data: bytes) -> None:
        """Add what comes at that offset; returns when there is room for more."""
        gap = at - self.offset - len(self._buffer)
        if gap > 0 and not self._buffer:
            self.offset, self.lost = at, self.lost + gap
        elif gap > 0:  # what is before it was not read yet: it is told of early
            self.offset, self.lost = self.offset + gap, self.lost + gap
        self._buffer += data
        self._changed.set()
        if len(self._buffer) >= BUFFER_BYTES:
            self._has_room.clear()
        await self._has_room.wait()

    def _end(self, error: UtilityVMError | None = None) -> None:
        """It is at its end, or nothing more can be had, and why."""
        self._has_ended, self._error = error is None, error
        self._changed.set()
        self._has_room.set()


@typed_errors
@of_one_loop
class ProgramInput:
    """A program's input, as asyncio's StreamWriter. What is written is kept until the guest has it, also if the
    connection to the guest ends meanwhile.
    """

    def __init__(self) -> None:
        """Use `UtilityVM.start_program` or `program`."""
        self._kept = bytearray()  # what the program has not taken
        self._kept_at = 0  # the offset of its first byte
        self._sent_at = 0
        self._taken_at = 0
        self._is_closing = False
        self._has_told_end = False
        self._will_go_on = False
        self._has_begun = False
        self._is_over = False
        self._why_not: UtilityVMError | None = None
        self._send: Callable[[dict[str, Any]], None] | None = None
        self._changed = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Give it to the program. Await `drain` before there is too much that it has not taken.

        Raises:
            WrongState: it was closed.
            GuestBusy: another handle writes the program's input.
            NotSupported: the program was started without input.
        """
        if self._why_not:
            raise again(self._why_not)
        if self._is_closing:
            raise WrongState("the program's input was closed")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InvalidRequest(f"input is bytes, and not {type(data).__name__}", remedy="encode it: text.encode()")
        if not self._is_over:
            self._kept += data
            if not self._will_go_on:  # what is written before the loop runs again goes in one message
                self._will_go_on = True
                asyncio.get_running_loop().call_soon(self._go_on)

    def writelines(self, data: Iterable[bytes]) -> None:
        """`write` each."""
        for one in data:
            self.write(one)

    async def drain(self) -> None:
        """Return when at most 64 KiB are left that the program has not taken; also if it takes no more.

        Raises:
            VMGone: the VM ended, or was let go of.
        """
        await self._until(_DRAINED_BYTES)

    def close(self) -> None:
        """What was written is the last of it: the program reads its end then."""
        self._is_closing = True
        self._go_on()

    def write_eof(self) -> None:
        """`close`."""
        self.close()

    def is_closing(self) -> bool:
        return self._is_closing

    async def wait_closed(self) -> None:
        """Return when the program has taken all of it.

        Raises:
            VMGone: as `drain`.
        """
        await self._until(0)

    async def _until(self, left: int) -> None:
        while len(self._kept) > left and not self._is_over:
            if self._why_not:
                raise again(self._why_not)
            self._changed.clear()
            await self._changed.wait()

    def _go_on(self) -> None:
        self._will_go_on = False
        if self._send is None or self._is_over:
            return
        end = self._kept_at + len(self._kept)
        while self._sent_at < end and (room := self._taken_at + messages.INPUT_WINDOW_BYTES - self._sent_at) > 0:
            room = min(messages.CHUNK_BYTES, room)
            at = self._sent_at - self._kept_at
            data = bytes(self._kept[at : at + room])
            try:
                self._send({"Data": base64.b64encode(data).decode()})
            except GuestRefused:
                return  # the connection is full; it goes on when the program takes what is in it
            self._sent_at += len(data)
        if self._is_closing and self._sent_at == end and not self._has_told_end:
            self._send({"Data": "", "Eof": True})
            self._has_told_end = True

    # For `kept`, which follows the program.

    def _begin(self, started: answers.Started, send: Callable[[dict[str, Any]], None]) -> None:
        """A connection to it begins: go on with the byte that the guest lacks."""
        if not started.feeds:
            text = f"another handle writes the input of program {started.program.number}"
            self._why_not = GuestBusy(text, remedy="write it through one handle")
            return
        if not self._has_begun:
            self._kept_at = started.given_at  # what an earlier host gave is not ours
        elif not self._kept_at <= started.given_at <= self._sent_at:
            self._why_not = WrongState(f"another handle has written the input of program {started.program.number}")
            return
        self._has_begun, self._sent_at, self._has_told_end = True, started.given_at, False
        self._send = send
        self._took(started.taken_at)

    def _took(self, total: int) -> None:
        """So many bytes in all were taken by the program. It may be heard before the connection has begun here."""
        self._taken_at = max(self._taken_at, total)
        taken = min(self._taken_at, self._sent_at)
        if taken > self._kept_at:
            del self._kept[: taken - self._kept_at]
            self._kept_at = taken
        self._changed.set()
        self._go_on()

    def _pause(self) -> None:
        """The connection is gone."""
        self._send = None

    def _end(self, error: UtilityVMError | None = None) -> None:
        """The program has ended, or nothing more can be given, and why."""
        self._send = None
        self._is_over, self._why_not = error is None, error or self._why_not
        self._kept.clear()
        self._changed.set()
