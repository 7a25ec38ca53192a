"""What is to be written to the journal, and when: intents before they are sent, outcomes with whatever comes next."""

from __future__ import annotations

from collections.abc import Sequence

from utilityvm.errors import StoreError
from utilityvm.log import BoundLogger
from utilityvm.scsi.ports import DiskRecord, Journal, MountRecord, Record, ReservationRecord


class Ledger:
    """Keeps outcomes back until the next intent, or until a caller is told, whichever is first.

    Until then the journal holds the intent, which a later owner probes: nothing is lost by its being behind, and each
    write saved is a third of a step's own cost.
    """

    def __init__(self, journal: Journal, log: BoundLogger) -> None:
        self._journal = journal
        self._log = log
        self._unwritten: dict[str, tuple[Record, bool]] = {}  # outcomes that the journal lacks; True: forget it

    def note(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        """This is so now; it is written later."""
        for record in put:
            self._unwritten[_key(record)] = (record, False)
        for record in drop:
            self._unwritten[_key(record)] = (record, True)

    def intend(self, intent: Record) -> None:
        """Write down what is about to be sent, with all that was noted.

        Raises:
            StoreError: the journal took nothing; the step must not be sent. What was noted is kept.
        """
        self._write([intent])

    def flush(self) -> None:
        """Write what was noted. If the journal does not take it now, the next write has it."""
        if not self._unwritten:
            return
        try:
            self._write()
        except StoreError as error:
            self._log.warning("the journal is behind: %s", error)

    def _write(self, intents: Sequence[Record] = ()) -> None:
        put = [record for record, gone in self._unwritten.values() if not gone]
        drop = [record for record, gone in self._unwritten.values() if gone]
        self._journal.write([*put, *intents], drop)
        self._unwritten.clear()


def _key(record: Record) -> str:
    match record:
        case DiskRecord():
            return f"disk {record.attachment}"
        case MountRecord():
            return f"mount {record.mount}"
        case ReservationRecord():
            return f"reservation {record.reservation}"
