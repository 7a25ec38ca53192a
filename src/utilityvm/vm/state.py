"""What a VM is to the process that owns it, as a table. Pure: no I/O, no asyncio.

What the store says (`store.VMState`) is for the next owner, who cannot ask this one; this is what the owner's own calls
go by. The code changes states through `next_state` and nowhere else; the docs are printed from the table, and the tests
walk all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from utilityvm.errors import WrongState


class State(StrEnum):
    STARTING = "starting"  # it is being put together; nobody has it in hand, and its death is told by who does that
    RUNNING = "running"  # calls are taken
    WAITING = "waiting"  # its processors are stopped, in a pool; every call but `wake` and its end is refused
    SAVING = "saving"  # it is becoming a template: frozen, or about to be
    RESUMING = "resuming"  # saving it failed; it is being thawed, for as long as that takes, and calls wait for that
    STOPPING = "stopping"  # its guest is asked to power off, or it is killed
    ENDED = "ended"  # its QEMU has ended, or must not run on; something of it is left to be removed
    REMOVED = "removed"  # nothing is left of it
    CLOSED = "closed"  # this owner let go of it; it runs on


class Event(StrEnum):
    UP = "up"  # the guest answers
    REST = "rest"  # a pool puts it aside
    WAKE = "wake"  # a pool hands it out
    SAVE = "save"  # it is to become a template
    SAVED = "saved"  # the template is there: from here on there is no way back
    NOT_SAVED = "not saved"  # it failed, or was cancelled
    RESUMED = "resumed"  # it runs as before
    STOP = "stop"  # its end is asked for
    DIED = "died"  # its QEMU ended, or its connection
    CLEARED = "cleared"  # the last of it was removed
    CLOSE = "close"  # its owner lets go


_S, _E = State, Event

TABLE: Final[Mapping[tuple[State, Event], State]] = {
    (_S.STARTING, _E.UP):        _S.RUNNING,
    (_S.STARTING, _E.DIED):      _S.ENDED,
    (_S.STARTING, _E.CLOSE):     _S.CLOSED,  # opening it failed
    (_S.RUNNING,  _E.REST):      _S.WAITING,
    (_S.RUNNING,  _E.SAVE):      _S.SAVING,
    (_S.RUNNING,  _E.STOP):      _S.STOPPING,
    (_S.RUNNING,  _E.DIED):      _S.ENDED,
    (_S.RUNNING,  _E.CLOSE):     _S.CLOSED,
    (_S.WAITING,  _E.WAKE):      _S.RUNNING,
    (_S.WAITING,  _E.STOP):      _S.STOPPING,
    (_S.WAITING,  _E.DIED):      _S.ENDED,
    (_S.WAITING,  _E.CLOSE):     _S.CLOSED,
    (_S.SAVING,   _E.SAVED):     _S.ENDED,
    (_S.SAVING,   _E.NOT_SAVED): _S.RESUMING,
    (_S.SAVING,   _E.DIED):      _S.ENDED,
    (_S.RESUMING, _E.RESUMED):   _S.RUNNING,
    (_S.RESUMING, _E.STOP):      _S.STOPPING,
    (_S.RESUMING, _E.DIED):      _S.ENDED,
    (_S.RESUMING, _E.CLOSE):     _S.CLOSED,  # the next owner thaws it
    (_S.STOPPING, _E.DIED):      _S.ENDED,
    (_S.ENDED,    _E.CLEARED):   _S.REMOVED,
}  # fmt: skip

OVER: Final = frozenset({State.ENDED, State.REMOVED, State.CLOSED})
REFUSING: Final = OVER | {State.WAITING, State.STOPPING}


def next_state(state: State, event: Event) -> State:
    """The state of a VM after `event`.

    Raises:
        WrongState: the table has no such row; names the state, the event and the events that this state takes.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        takes = sorted(known for begin, known in TABLE if begin is state)
        raise WrongState(f"a VM that is {state} takes no {event!r}: {', '.join(takes) or 'nothing'}") from None


def table_markdown() -> str:
    """The table, for the docs."""
    lines = ["| in state | when | comes |", "|---|---|---|"]
    lines += [f"| {begin} | {event} | {end} |" for (begin, event), end in TABLE.items()]
    return "\n".join(lines)
