"""The state tables, walked whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from utilityvm.errors import WrongState
from utilityvm.scsi import transitions
from utilityvm.scsi.transitions import (
    DISK_TABLE,
    MOUNT_TABLE,
    DiskState,
    Event,
    MountState,
    next_disk_state,
    next_mount_state,
)

TABLES: dict[str, tuple[Mapping[Any, Any], Any, Any, Any]] = {
    "disk": (DISK_TABLE, DiskState, DiskState.DETACHED, next_disk_state),
    "mount": (MOUNT_TABLE, MountState, MountState.UNMOUNTED, next_mount_state),
}
ADDING = {DiskState.ATTACHING, MountState.MOUNTING}
SETBACKS = {Event.REFUSED, Event.NO_ANSWER, Event.WANTED}
NOT_NEEDED = {Event.RESIZE}
ANSWERS = [{Event.DONE, Event.REFUSED, Event.NO_ANSWER}, {Event.FOUND, Event.ABSENT}]
STATES = [(name, state) for name, (_, states, _, _) in TABLES.items() for state in states]


def ahead_without_adding(table: Mapping[Any, Any], start: Any) -> set[Any]:
    seen = {start}
    while True:
        ahead = {
            end for (begin, event), end in table.items() if begin in seen and event not in SETBACKS | NOT_NEEDED
        } - ADDING
        if ahead <= seen:
            return seen
        seen |= ahead


@pytest.mark.parametrize(("name", "state"), STATES)
def test_every_state_can_be_let_go_without_adding_anything(name: str, state: Any) -> None:
    table, _, final, _ = TABLES[name]
    assert final in ahead_without_adding(table, state)


@pytest.mark.parametrize(("name", "state"), STATES)
def test_every_state_is_reached_from_the_first(name: str, state: Any) -> None:
    table, states, _, _ = TABLES[name]
    seen = {states.RESERVED}
    for _ in table:
        seen |= {end for (begin, _), end in table.items() if begin in seen}
    assert state in seen


@pytest.mark.parametrize(("name", "state"), STATES)
def test_events_outside_the_table_are_refused(name: str, state: Any) -> None:
    table, _, _, step = TABLES[name]
    for event in Event:
        if (state, event) not in table:
            with pytest.raises(WrongState, match=state) as caught:
                step(state, event)
            takes = sorted(other for begin, other in table if begin is state) or ["nothing"]
            assert str(caught.value).endswith(f"it takes {', '.join(takes)}")


@pytest.mark.parametrize(("name", "state"), STATES)
def test_a_question_takes_every_answer(name: str, state: Any) -> None:
    table = TABLES[name][0]
    for answers in ANSWERS:
        assert {event for begin, event in table if begin is state} & answers in (set(), answers)


@pytest.mark.parametrize(("name", "state"), STATES)
def test_no_answer_leads_to_a_question_and_not_to_a_guess(name: str, state: Any) -> None:
    table = TABLES[name][0]
    if unknown := table.get((state, Event.NO_ANSWER)):
        assert {event for begin, event in table if begin is unknown} == ANSWERS[1]


@pytest.mark.parametrize(("name", "state"), STATES)
def test_a_refused_step_leads_back_to_where_it_began(name: str, state: Any) -> None:
    table = TABLES[name][0]
    if (refused := table.get((state, Event.REFUSED))) is not None:
        assert state in (table.get((refused, Event.BEGIN)), table.get((refused, Event.RESIZE)))


def test_the_printed_tables_have_a_line_for_each_row() -> None:
    assert transitions.disk_table_markdown().count("\n") == len(DISK_TABLE) + 1
    assert transitions.mount_table_markdown().count("\n") == len(MOUNT_TABLE) + 1
