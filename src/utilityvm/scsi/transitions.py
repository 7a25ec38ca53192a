"""What can happen to a disk and to a mount, as two tables. Pure: no I/O, no asyncio, no backend.

Every step that leaves the process has a state of its own, which the journal holds before the step is sent, and takes
three answers: done, refused, none. After "none" there is a state that says what must be looked for, and the probe's two
answers lead out of it. The code changes states through `next_disk_state` and `next_mount_state` and nowhere else;
the docs are printed from these tables, and the tests walk all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from utilityvm.errors import WrongState


class DiskState(StrEnum):
    RESERVED = "reserved"  # the slot is ours; nothing was sent, or what was sent was refused
    ATTACHING = "attaching"  # sent to the host
    ATTACH_UNKNOWN = "attach unknown"  # no answer: it may be on the bus
    ATTACHED = "attached"  # on the bus; mounts may come and go
    RESIZING = "resizing"  # sent to the host; on the bus all the while, and so are its mounts
    RESIZE_UNKNOWN = "resize unknown"  # no answer: it may have grown
    EJECTING = "ejecting"  # sent to the guest
    EJECT_UNKNOWN = "eject unknown"  # no answer: the guest may still have it
    EJECTED = "ejected"  # the guest let go; it is still on the bus
    DETACHING = "detaching"  # sent to the host
    DETACH_UNKNOWN = "detach unknown"  # no answer: it may still be on the bus
    DETACHED = "detached"  # the slot is free


class MountState(StrEnum):
    RESERVED = "reserved"  # the guest path is ours; nothing was sent, or what was sent was refused
    MOUNTING = "mounting"  # sent to the guest
    MOUNT_UNKNOWN = "mount unknown"  # no answer: it may be mounted
    MOUNTED = "mounted"  # at its guest path
    UNMOUNTING = "unmounting"  # sent to the guest
    UNMOUNT_UNKNOWN = "unmount unknown"  # no answer: it may still be mounted
    UNMOUNTED = "unmounted"  # the guest path is free


class Event(StrEnum):
    BEGIN = "begin"  # the next step on its way in or out is about to be sent
    RESIZE = "resize"  # a resize is about to be sent
    DONE = "done"  # the peer says that it happened
    REFUSED = "refused"  # the peer says that it did not
    NO_ANSWER = "no answer"  # the connection or the deadline went first
    FOUND = "found"  # a probe saw it there; of a resize: that it grew
    ABSENT = "absent"  # a probe saw that it is not there; that it did not grow
    UNUSED = "unused"  # nobody holds it, and nothing was ever sent
    WANTED = "wanted"  # somebody asked for it anew while it was on its way out


class ReservationState(StrEnum):
    PENDING = "pending"  # its caller waits for it
    HELD = "held"  # its caller has it
    RELEASING = "releasing"  # its caller gave it back; what only it kept is being undone
    OVERRULING = "overruling"  # so, whatever the guest says: only in the journal


_D, _M, _E = DiskState, MountState, Event

DISK_TABLE: Final[Mapping[tuple[DiskState, Event], DiskState]] = {
    (_D.RESERVED,       _E.BEGIN):     _D.ATTACHING,
    (_D.RESERVED,       _E.UNUSED):    _D.DETACHED,  # never attached: still frees the slot
    (_D.ATTACHING,      _E.DONE):      _D.ATTACHED,
    (_D.ATTACHING,      _E.REFUSED):   _D.RESERVED,
    (_D.ATTACHING,      _E.NO_ANSWER): _D.ATTACH_UNKNOWN,
    (_D.ATTACH_UNKNOWN, _E.FOUND):     _D.ATTACHED,
    (_D.ATTACH_UNKNOWN, _E.ABSENT):    _D.RESERVED,
    (_D.ATTACHED,       _E.RESIZE):    _D.RESIZING,
    (_D.RESIZING,       _E.DONE):      _D.ATTACHED,
    (_D.RESIZING,       _E.REFUSED):   _D.ATTACHED,
    (_D.RESIZING,       _E.NO_ANSWER): _D.RESIZE_UNKNOWN,
    (_D.RESIZE_UNKNOWN, _E.FOUND):     _D.ATTACHED,
    (_D.RESIZE_UNKNOWN, _E.ABSENT):    _D.ATTACHED,
    (_D.ATTACHED,       _E.BEGIN):     _D.EJECTING,
    (_D.EJECTING,       _E.DONE):      _D.EJECTED,
    (_D.EJECTING,       _E.REFUSED):   _D.ATTACHED,
    (_D.EJECTING,       _E.NO_ANSWER): _D.EJECT_UNKNOWN,
    (_D.EJECT_UNKNOWN,  _E.FOUND):     _D.ATTACHED,
    (_D.EJECT_UNKNOWN,  _E.ABSENT):    _D.EJECTED,
    (_D.EJECTED,        _E.BEGIN):     _D.DETACHING,  # also when it is wanted again: the guest has no device any more
    (_D.DETACHING,      _E.DONE):      _D.DETACHED,
    (_D.DETACHING,      _E.REFUSED):   _D.EJECTED,
    (_D.DETACHING,      _E.NO_ANSWER): _D.DETACH_UNKNOWN,
    (_D.DETACH_UNKNOWN, _E.FOUND):     _D.EJECTED,
    (_D.DETACH_UNKNOWN, _E.ABSENT):    _D.DETACHED,
    (_D.DETACHED,       _E.WANTED):    _D.RESERVED,  # as a new attachment in the same slot
}  # fmt: skip

MOUNT_TABLE: Final[Mapping[tuple[MountState, Event], MountState]] = {
    (_M.RESERVED,        _E.BEGIN):     _M.MOUNTING,
    (_M.RESERVED,        _E.UNUSED):    _M.UNMOUNTED,  # never mounted: still frees the guest path
    (_M.MOUNTING,        _E.DONE):      _M.MOUNTED,
    (_M.MOUNTING,        _E.REFUSED):   _M.RESERVED,
    (_M.MOUNTING,        _E.NO_ANSWER): _M.MOUNT_UNKNOWN,
    (_M.MOUNT_UNKNOWN,   _E.FOUND):     _M.MOUNTED,
    (_M.MOUNT_UNKNOWN,   _E.ABSENT):    _M.RESERVED,
    (_M.MOUNTED,         _E.BEGIN):     _M.UNMOUNTING,
    (_M.UNMOUNTING,      _E.DONE):      _M.UNMOUNTED,
    (_M.UNMOUNTING,      _E.REFUSED):   _M.MOUNTED,
    (_M.UNMOUNTING,      _E.NO_ANSWER): _M.UNMOUNT_UNKNOWN,
    (_M.UNMOUNT_UNKNOWN, _E.FOUND):     _M.MOUNTED,
    (_M.UNMOUNT_UNKNOWN, _E.ABSENT):    _M.UNMOUNTED,
    (_M.UNMOUNTED,       _E.WANTED):    _M.RESERVED,
}  # fmt: skip

# In these states the disk is on the bus and the guest may use it.
ON_BUS: Final = frozenset({_D.ATTACHED, _D.RESIZING, _D.RESIZE_UNKNOWN})
# The answer is out. Found at a restart, or after a mistake of ours, it counts as none.
WAITING: Final = frozenset({_D.ATTACHING, _D.RESIZING, _D.EJECTING, _D.DETACHING})

_S = TypeVar("_S", DiskState, MountState)


def next_disk_state(state: DiskState, event: Event) -> DiskState:
    """The state of a disk after `event`.

    Raises:
        WrongState: the table has no such row; names the state, the event and the events that this state takes.
    """
    return _next(DISK_TABLE, state, event)


def next_mount_state(state: MountState, event: Event) -> MountState:
    """The state of a mount after `event`.

    Raises:
        WrongState: as `next_disk_state`.
    """
    return _next(MOUNT_TABLE, state, event)


def _next(table: Mapping[tuple[_S, Event], _S], state: _S, event: Event) -> _S:
    try:
        return table[state, event]
    except KeyError:
        takes = sorted(known for begin, known in table if begin is state)
        raise WrongState(f"{event} in state {state}; it takes {', '.join(takes) or 'nothing'}") from None


def disk_table_markdown() -> str:
    """The table of disk states, for the docs."""
    return _markdown(DISK_TABLE)


def mount_table_markdown() -> str:
    """The table of mount states, for the docs."""
    return _markdown(MOUNT_TABLE)


def _markdown(table: Mapping[tuple[_S, Event], _S]) -> str:
    lines = ["| in state | when | comes |", "|---|---|---|"]
    lines += [f"| {begin} | {event} | {end} |" for (begin, event), end in table.items()]
    return "\n".join(lines)
