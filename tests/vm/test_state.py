"""The table of a VM's states, walked whole."""

from __future__ import annotations

import pytest

from utilityvm.errors import WrongState
from utilityvm.vm import state as states
from utilityvm.vm.state import OVER, TABLE, Event, State, next_state

ENDS = {State.REMOVED, State.CLOSED}
RUNS = [state for state in State if state not in OVER]


def ahead(start: State, without: frozenset[Event] = frozenset()) -> set[State]:
    seen = {start}
    for _ in TABLE:
        seen |= {end for (begin, event), end in TABLE.items() if begin in seen and event not in without}
    return seen


@pytest.mark.parametrize("state", State)
def test_every_state_is_reached_from_the_first(state: State) -> None:
    assert state in ahead(State.STARTING)


@pytest.mark.parametrize("state", State)
def test_nothing_is_left_of_a_vm_at_the_end_of_every_way(state: State) -> None:
    assert ahead(state) & ENDS


@pytest.mark.parametrize("state", RUNS)
def test_a_vm_may_die_in_every_state_in_which_it_runs(state: State) -> None:
    assert next_state(state, Event.DIED) is State.ENDED


@pytest.mark.parametrize("state", State)
def test_what_has_ended_never_runs_again(state: State) -> None:
    if state in OVER:
        assert ahead(state) <= OVER


def test_a_save_that_fails_leads_back_to_running_and_nowhere_else() -> None:
    failed = next_state(State.SAVING, Event.NOT_SAVED)
    assert State.RUNNING in ahead(failed, frozenset({Event.STOP, Event.DIED, Event.CLOSE}))
    assert State.ENDED not in ahead(failed, frozenset({Event.STOP, Event.DIED, Event.SAVE, Event.REST}))


def test_a_vm_that_is_being_saved_is_not_let_go_of() -> None:
    for event in (Event.CLOSE, Event.STOP, Event.REST):
        assert (State.SAVING, event) not in TABLE


@pytest.mark.parametrize("state", State)
def test_events_outside_the_table_are_refused(state: State) -> None:
    for event in Event:
        if (state, event) not in TABLE:
            with pytest.raises(WrongState, match=state):
                next_state(state, event)


def test_the_printed_table_has_a_line_for_each_row() -> None:
    assert states.table_markdown().count("\n") == len(TABLE) + 1
