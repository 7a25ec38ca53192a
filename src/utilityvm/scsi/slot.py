"""A slot is where one disk sits on the VM's SCSI bus; here is also which slots are free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from utilityvm.errors import AlreadyAttached, InvalidRequest, NoControllers, NoFreeSlot

MAX_CONTROLLERS: Final = 4
LUNS_PER_CONTROLLER: Final = 64

_TEXT: Final = re.compile(r"([0-9]+):([0-9]+)")


class Slot(NamedTuple):
    """A virtual SCSI controller (0-3) and a logical unit number on it (0-63)."""

    controller: int
    lun: int

    @classmethod
    def checked(cls, controller: int, lun: int) -> Slot:
        """The slot, if the numbers are in range.

        Raises:
            InvalidRequest: controller outside 0-3, or LUN outside 0-63.
        """
        if not 0 <= controller < MAX_CONTROLLERS or not 0 <= lun < LUNS_PER_CONTROLLER:
            raise InvalidRequest(
                f"slot {controller}:{lun} does not exist",
                remedy=f"controllers are 0-{MAX_CONTROLLERS - 1}, LUNs 0-{LUNS_PER_CONTROLLER - 1}",
            )
        return cls(controller, lun)

    @classmethod
    def parse(cls, text: str) -> Slot:
        """The slot written as `controller:lun`.

        Raises:
            InvalidRequest: other text, or numbers out of range.
        """
        if not (match := _TEXT.fullmatch(text)):
            raise InvalidRequest(f"{text!r} is not a slot", remedy="write it as CONTROLLER:LUN, such as 0:3")
        return cls.checked(int(match[1]), int(match[2]))

    @property
    def number(self) -> int:
        return self.controller * LUNS_PER_CONTROLLER + self.lun

    def __str__(self) -> str:
        return f"{self.controller}:{self.lun}"


class FreeSlots:
    """The free slots of a VM. Lowest first, controller by controller; a step costs the same however full it is."""

    def __init__(self, controllers: int, *, reserved: Iterable[Slot] = ()) -> None:
        """All slots of `controllers` (0-4) controllers are free but those in `reserved`.

        Raises:
            InvalidRequest: more than 4 controllers, fewer than 0, or a reserved slot that does not exist.
        """
        if not 0 <= controllers <= MAX_CONTROLLERS:
            raise InvalidRequest(f"{controllers} SCSI controllers", remedy=f"a VM has 0 to {MAX_CONTROLLERS} of them")
        self.controllers = controllers
        self.capacity = controllers * LUNS_PER_CONTROLLER
        self._free = (1 << self.capacity) - 1
        for slot in reserved:
            self.take(slot)

    @property
    def count(self) -> int:
        return self._free.bit_count()

    def take_lowest(self) -> Slot:
        """Take the lowest free slot.

        Raises:
            NoControllers: there is no controller at all.
            NoFreeSlot: every slot is taken.
        """
        if not self.capacity:
            raise NoControllers("the VM has no SCSI controller", remedy="start it with 1 to 4 controllers")
        if not self._free:
            raise NoFreeSlot(f"no free slot ({self.capacity} of {self.capacity} used)")
        index = (self._free & -self._free).bit_length() - 1
        self._free &= ~(1 << index)
        return Slot(*divmod(index, LUNS_PER_CONTROLLER))

    def take(self, slot: Slot) -> None:
        """Take this very slot.

        Raises:
            InvalidRequest: the VM has no such slot.
            AlreadyAttached: it is taken.
        """
        if slot not in self:
            where = Slot.checked(*slot)  # names the range when the numbers are impossible anywhere
            if where.controller >= self.controllers:
                raise InvalidRequest(f"slot {where}: the VM has {self.controllers} SCSI controllers")
            raise AlreadyAttached(f"slot {where} is taken", slot=where)
        self._free &= ~(1 << slot.number)

    def give_back(self, slot: Slot) -> None:
        """Make `slot` free again; it must have been taken."""
        assert slot not in self, f"slot {slot} was free already"
        self._free |= 1 << slot.number

    def __contains__(self, slot: Slot) -> bool:
        controller, lun = slot
        inside = 0 <= controller < self.controllers and 0 <= lun < LUNS_PER_CONTROLLER
        return inside and bool(self._free >> slot.number & 1)
