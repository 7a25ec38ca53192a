"""What is to be written to the journal, and when: intents before they are sent, outcomes with whatever comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from utilityvm.errors import StoreError
from utilityvm.log import BoundLogger
from utilityvm.scsi.ports import DiskRecord, Journal, MountRecord, Record, ReservationRecord


class Ledger:
    """Keeps outcomes back until the next intent, or until a caller is told, whichever is first.

    Until then the journal holds the intent, which a later owner probes: nothing is lost by its being behind, and each
    write saved is a third of a step's own cost.

    One write at a time, in the order of asking: what was noted later is never overtaken by what was noted before.
    """

    def __init__(self, journal: Journal, log: BoundLogger) -> None:
        self._journal = journal
        self._log = log
        self._unwritten: dict[str, tuple[Record, bool]] = {}  # outcomes that the journal lacks; True: forget it
        self._turn = asyncio.Lock()
        self._done = 0  # writes that came to an end, either way
        self._failure: tuple[int, StoreError] | None = None  # the last one, and which write it was

    def note(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        """This is so now; it is written later."""
        for record in put:
            self._unwritten[_key(record)] = (record, False)
        for record in drop:
            self._unwritten[_key(record)] = (record, True)

    async def intend(self, intent: Record) -> None:
        """Write down what is about to be sent, with all that was noted. Other things may change meanwhile.

        Raises:
            StoreError: the journal took nothing; the step must not be sent. What was noted is kept.
        """
        await self._write([intent])

    async def flush(self) -> None:
        """Write what was noted. If the journal does not take it now, the next write has it."""
        if not self._unwritten:
            return
        try:
            await self._write()
        except StoreError as error:
            self._log.warning("the journal is behind: %s", error)
        except Exception as error:  # a mistake of ours
            self._log.error("the journal is behind: %r", error)

    async def _write(self, intents: Sequence[Record] = ()) -> None:
        begun = self._done
        async with self._turn:
            if self._failure is not None and self._failure[0] > begun:
                raise self._failure[1]  # the store failed while this waited: it is not waited for once more
            noted = dict(self._unwritten)
            put = [record for record, gone in noted.values() if not gone]
            drop = [record for record, gone in noted.values() if gone]
            try:
                if put or drop or intents:
                    await self._journal.write([*put, *intents], drop)
            except StoreError as error:
                self._failure = (self._done + 1, error)
                raise
            finally:
                self._done += 1
            for key, was in noted.items():
                if self._unwritten.get(key) is was:  # and was not noted anew meanwhile
                    del self._unwritten[key]


def _key(record: Record) -> str:
    match record:
        case DiskRecord():
            return f"disk {record.attachment}"
        case MountRecord():
            return f"mount {record.mount}"
        case ReservationRecord():
            return f"reservation {record.reservation}"
