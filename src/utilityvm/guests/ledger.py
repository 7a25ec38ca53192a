"""What a guest that cannot be asked has mounted, as far as its answers tell.

hcsshim's gcs has no question for it, and does harm when it is told the wrong thing: a second Add at a path makes it
delete every file of the disk that is mounted there, an Add or a Remove of a disk
that is gone never ends, and it ejects a disk that is mounted. So before a message is sent to it, this says whether it
may be. Our own agent needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import PurePosixPath
from typing import NamedTuple

from utilityvm.bridge import hazards
from utilityvm.errors import (
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    RequestError,
)
from utilityvm.scsi.ports import DiskRecord, MountRecord, Record
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState


class Fact(StrEnum):
    """What is known of a guest path."""

    MOUNTED = "mounted"  # the guest said so
    NOT_MOUNTED = "not mounted"  # the guest said so
    UNKNOWN = "unknown"  # a message was sent and not answered


class _Path(NamedTuple):
    slot: Slot
    fact: Fact


class Ledger:
    """The paths and slots of one guest."""

    def __init__(self) -> None:
        self._paths: dict[PurePosixPath, _Path] = {}
        self._ejected: set[Slot] = set()
        self._ejecting: set[Slot] = set()  # asked for, and not answered
        self.vouched: set[PurePosixPath] = set()  # folders that hold mounts alone, says the caller

    def adopt(self, records: Iterable[Record]) -> None:
        """Take over what another owner of this VM wrote into its journal. Of what was not answered nothing is known."""
        slots: dict[str, Slot] = {}
        for record in records:
            if isinstance(record, DiskRecord):
                slots[record.attachment] = record.slot
                if record.state in (DiskState.EJECTING, DiskState.EJECT_UNKNOWN):
                    self._ejecting.add(record.slot)
                elif record.state not in (DiskState.RESERVED, DiskState.ATTACHED):
                    self._ejected.add(record.slot)
            elif isinstance(record, MountRecord) and record.attachment in slots:
                if record.state in (MountState.RESERVED, MountState.UNMOUNTED):
                    fact = Fact.NOT_MOUNTED
                else:
                    fact = Fact.MOUNTED if record.state == MountState.MOUNTED else Fact.UNKNOWN
                self.learn(slots[record.attachment], record.guest_path, fact)

    def check_path(self, path: PurePosixPath) -> None:
        """Is it a path where only mounts are?

        Raises:
            NotSupported: it may hold files of the guest's own.
        """
        if not hazards.is_for_mounts(path, self.vouched):
            reason, remedy = hazards.place_objection(path)
            raise NotSupported(reason, remedy=remedy)

    def before_mount(self, slot: Slot, path: PurePosixPath) -> None:
        """May it be told to mount?

        Raises:
            NotSupported: as `check_path`.
            GuestPathInUse: something is mounted there, or above or below it.
            OutcomeUnknown: something may be; unmount it first. Or the disk may be ejected; probe it first.
        """
        self.check_path(path)
        if slot in self._ejecting:
            raise OutcomeUnknown(
                f"the disk at {slot} may be ejected: this guest did not say",
                slot=slot,
                remedy="detach it, and attach it anew",
            )
        self._check_beside(slot, path)
        known = self._paths.get(path)
        if known and known.fact is Fact.MOUNTED:
            raise GuestPathInUse(f"{path} holds the disk at {known.slot} already", slot=slot)
        if known and known.fact is Fact.UNKNOWN:
            raise OutcomeUnknown(
                f"{path} may hold the disk at {known.slot}: this guest did not say, and cannot be asked",
                slot=slot,
                remedy="unmount it first",
            )
        self._ejected.discard(slot)

    def _check_beside(self, slot: Slot, path: PurePosixPath) -> None:
        used = (other for other, known in self._paths.items() if known.fact is not Fact.NOT_MOUNTED)
        if other := hazards.overlapping(path, used):
            raise GuestPathInUse(
                f"{path} overlaps with {other}, where the disk at {self._paths[other].slot} is: this guest may remove "
                "what is there along with it",
                slot=slot,
                remedy="choose a path beside it",
            )

    def before_unmount(self, slot: Slot, path: PurePosixPath) -> bool:
        """May it be told to unmount? False: it need not be, for it said that nothing is there, or the disk is gone.

        An unmount of a path where nothing is mounted removes the path, as a mount that fails does.

        Raises:
            InvalidRequest: another disk is mounted there.
            OutcomeUnknown: another disk may be, and would be unmounted.
            NotSupported, GuestPathInUse: it is not known to be mounted, and as `before_mount`.
        """
        known = self._paths.get(path)
        is_gone = known is None and slot in self._ejected | self._ejecting
        if is_gone or (known and known.fact is Fact.NOT_MOUNTED):
            return False
        if known is None or known.fact is Fact.UNKNOWN:
            self.check_path(path)
            self._check_beside(slot, path)
        if known is None:
            return True
        if known.slot != slot and known.fact is Fact.MOUNTED:
            raise InvalidRequest(f"{path} holds the disk at {known.slot}, not the one at {slot}", slot=slot)
        if known.slot != slot:
            raise OutcomeUnknown(
                f"{path} may hold the disk at {known.slot}: this guest did not say, and cannot be asked",
                slot=slot,
                remedy="unmount that one first",
            )
        return True

    def before_eject(self, slot: Slot) -> None:
        """May it be told to eject?

        Raises:
            GuestBusy: the disk is, or may be, mounted.
        """
        holders = [
            f"{'mounted' if known.fact is Fact.MOUNTED else 'perhaps mounted'} at {path}"
            for path, known in self._paths.items()
            if known.slot == slot and known.fact is not Fact.NOT_MOUNTED
        ]
        if holders:
            raise GuestBusy(f"{slot}: the disk is {', '.join(holders)}", holders=holders, slot=slot)
        self._ejecting.add(slot)

    def learn(self, slot: Slot, path: PurePosixPath, fact: Fact) -> None:
        """The outcome of a mount or an unmount."""
        self._paths[path] = _Path(slot, fact)

    @contextmanager
    def unmounting(self, slot: Slot, path: PurePosixPath) -> Iterator[None]:
        """An unmount is sent. If it is refused, the path is as it was; without an answer nothing is known."""
        before = self._paths.get(path)
        self.learn(slot, path, Fact.UNKNOWN)
        try:
            yield
        except (GuestRefused, RequestError):
            if before is None:
                del self._paths[path]
            else:
                self._paths[path] = before
            raise
        self.learn(slot, path, Fact.NOT_MOUNTED)

    @contextmanager
    def mounting(self, slot: Slot, path: PurePosixPath) -> Iterator[None]:
        """A mount is sent. If it is refused, nothing is mounted; without an answer nothing is known."""
        self.learn(slot, path, Fact.UNKNOWN)
        try:
            yield
        except (GuestRefused, RequestError):
            self.learn(slot, path, Fact.NOT_MOUNTED)
            raise
        self.learn(slot, path, Fact.MOUNTED)

    def learn_not_ejected(self, slot: Slot) -> None:
        """The guest refused to let go of the disk."""
        self._ejecting.discard(slot)

    def learn_ejected(self, slot: Slot) -> None:
        """The guest let go of the disk."""
        self._ejecting.discard(slot)
        self._ejected.add(slot)
        self._paths = {path: known for path, known in self._paths.items() if known.slot != slot}

    def may_be_ejected(self, slot: Slot) -> bool:
        """Was it asked to let go of the disk, and did not answer?"""
        return slot in self._ejecting

    def is_mounted(self, slot: Slot, path: PurePosixPath) -> bool:
        """Is the disk mounted there?

        Raises:
            OutcomeUnknown: this guest never said.
        """
        known = self._paths.get(path)
        if known and known.fact is not Fact.UNKNOWN:
            return known.fact is Fact.MOUNTED and known.slot == slot
        if slot in self._ejected | self._ejecting:
            return False  # nothing of it was mounted when it was told to eject
        raise OutcomeUnknown(f"whether {path} holds the disk at {slot}, this guest cannot be asked", slot=slot)

    def is_present(self, slot: Slot) -> bool:
        """Does the guest have the device?

        Raises:
            OutcomeUnknown: this guest never said.
        """
        if slot in self._ejected:
            return False
        if any(known.slot == slot and known.fact is Fact.MOUNTED for known in self._paths.values()):
            return True
        raise OutcomeUnknown(f"whether it has a disk at {slot}, this guest cannot be asked", slot=slot)
