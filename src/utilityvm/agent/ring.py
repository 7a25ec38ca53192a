"""The last part of what a program wrote: both of its streams, in the order in which they were read, with offsets.

A stream's offset counts its bytes from the program's start. A reader asks for what comes after its offsets; if the ring
has dropped some of that, the next piece begins at a larger offset, which tells how much is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

STREAMS: Final[Sequence[str]] = ("out", "err")
PIECE_COST: Final = 256  # bytes that a piece counts for beside its data: what it takes in memory, roughly
_PIECE_BYTES: Final = 32768


class Piece(NamedTuple):
    """Some bytes of one stream."""

    stream: str
    offset: int
    data: bytes


class _Held:
    """A piece in the ring. The oldest may have lost its beginning, and the newest may grow."""

    __slots__ = ("begin", "data", "place", "stream")

    def __init__(self, stream: str, begin: int, place: int) -> None:
        self.stream = stream
        self.begin = begin  # the offset of its first byte
        self.data = bytearray()
        self.place = place  # of its first byte, among all that was ever written

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


class Cursor:
    """How far one reader has come."""

    def __init__(self, offsets: Mapping[str, int]) -> None:
        self.offsets = {stream: offsets.get(stream, 0) for stream in STREAMS}
        self.number = 0  # of the piece that is looked at next


class Ring:
    """Holds `size` bytes at the most, each piece counting `PIECE_COST` more; and what a reader needs beyond that.

    Not thread-safe.

    A *place* is a position among all that was ever written, the cost of the pieces included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ends: dict[str, int] = dict.fromkeys(STREAMS, 0)  # the offset after the last byte of each
        self.end_place = 0
        self._pieces: deque[_Held] = deque()
        self._first = 0  # the number of the oldest piece
        self._largest = min(_PIECE_BYTES, size // 4)

    @property
    def begins(self) -> dict[str, int]:
        """The offset of the first byte that is held of each stream; its end if none is."""
        begins = dict(self.ends)
        for piece in reversed(self._pieces):
            begins[piece.stream] = piece.begin
        return begins

    def room(self, taken: Iterable[int]) -> int:
        """How many bytes can be added so that nothing is dropped that comes after one of these places."""
        oldest = min(taken, default=self.end_place)
        free = self.size - (self.end_place - oldest) - PIECE_COST
        return max(0, free * self._largest // (self._largest + PIECE_COST))

    def add(self, stream: str, data: bytes, taken: Iterable[int] = ()) -> None:
        """Add bytes, and drop as many of the oldest as there are too many, but nothing after one of these places."""
        needed = min(taken, default=None)
        rest = memoryview(data)
        while rest:
            last = self._pieces[-1] if self._pieces else None
            if last is None or last.stream != stream or len(last.data) >= self._largest:
                self.end_place += PIECE_COST
                last = _Held(stream, self.ends[stream], self.end_place)
                self._pieces.append(last)
            size = min(len(rest), self._largest - len(last.data))
            last.data += rest[:size]
            rest = rest[size:]
            self.ends[stream] += size
            self.end_place += size
            self._drop(needed)

    def _drop(self, needed: int | None) -> None:
        least = self.end_place - self.size
        if needed is not None:
            least = min(least, needed)
        while (oldest := self._pieces[0]).place + len(oldest.data) <= least:
            self._pieces.popleft()
            self._first += 1
        if (cut := least - oldest.place) > 0:
            del oldest.data[:cut]
            oldest.begin += cut
            oldest.place += cut

    def place_of(self, cursor: Cursor) -> int:
        """The place up to which the reader has everything."""
        for piece in self._pieces:
            if cursor.offsets[piece.stream] < piece.end:
                return piece.place + max(0, cursor.offsets[piece.stream] - piece.begin)
        return self.end_place

    def next(self, cursor: Cursor, at_most: int) -> tuple[Piece, int] | None:
        """The next piece for a reader, and the place after it. None: there is none yet."""
        cursor.number = max(cursor.number, self._first)
        while cursor.number - self._first < len(self._pieces):
            piece = self._pieces[cursor.number - self._first]
            begin = max(cursor.offsets[piece.stream], piece.begin)
            if begin < piece.end:
                at = begin - piece.begin
                data = bytes(piece.data[at : at + at_most])
                cursor.offsets[piece.stream] = begin + len(data)
                return Piece(piece.stream, begin, data), piece.place + at + len(data)
            if piece is self._pieces[-1]:
                break  # it may grow
            cursor.number += 1
        return None
