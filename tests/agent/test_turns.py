"""Few children at once, none waits beyond its deadline, and one that found no memory is tried again alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm.agent import turns
from utilityvm.agent.faults import Fault
from utilityvm.agent.turns import OutOfMemoryError, Turns

HANG_S = 30.0
A_WHILE_S = 0.05
NO_MEMORY = "no memory"


def soon() -> float:
    return time.monotonic() + HANG_S


class Task:
    """A call of `take` in a thread, whose child runs until it is told how to end."""

    def __init__(self, gate: Turns, *, deadline: float = 0.0) -> None:
        self.given: list[object] = []
        self._gate, self._deadline = gate, deadline or soon()
        self._begun = threading.Semaphore(0)
        self._ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.given.append(self._gate.take("looking", self._child, self._deadline))
        except Fault as fault:
            self.given.append(fault)

    def _child(self) -> str:
        self._begun.release()
        if (end := self._ends.get(timeout=HANG_S)) == NO_MEMORY:
            raise OutOfMemoryError
        return end

    def begins(self, *, within: float = HANG_S) -> bool:
        """Does its child begin?"""
        return self._begun.acquire(timeout=within)

    def end(self, how: str) -> None:
        self._ends.put(how)

    def finish(self, how: str = "found") -> object:
        self.end(how)
        self._thread.join(HANG_S)
        return self.given[0]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Sets what the guest has to spare; nothing at first."""
    file = tmp_path / "meminfo"
    monkeypatch.setattr(turns, "_MEMINFO", str(file))
    monkeypatch.setattr(turns, "_PATIENCE_S", 0.02)
    return file.write_text


def test_one_more_than_go_at_once_waits_until_one_is_done(memory: object) -> None:
    gate = Turns(at_once=2)
    first, second = Task(gate), Task(gate)
    assert first.begins()
    assert second.begins()
    third = Task(gate)
    assert not third.begins(within=A_WHILE_S)
    assert first.finish() == "found"
    assert third.begins()
    assert [third.finish(), second.finish()] == ["found", "found"]


def test_what_waited_a_while_goes_too_where_there_is_memory(memory: Callable[[str], object]) -> None:
    memory("MemTotal: 1000000 kB\nMemAvailable:   1000000 kB\n")
    gate = Turns(at_once=1)
    slow = Task(gate)  # its storage does not answer
    assert slow.begins()
    other = Task(gate)
    assert other.begins()
    assert [other.finish(), slow.finish()] == ["found", "found"]


@pytest.mark.parametrize("meminfo", ["MemAvailable: 69631 kB\n", "MemAvailable: ?\n", "MemFree: 1000000 kB\n"])
def test_and_waits_on_where_there_is_none_or_it_cannot_be_told(memory: Callable[[str], object], meminfo: str) -> None:
    memory(meminfo)
    gate = Turns(at_once=1)
    slow = Task(gate)
    assert slow.begins()
    told = Task(gate, deadline=time.monotonic() + 0.1).finish()
    assert isinstance(told, Fault)
    assert told.kind == "timeout"
    assert "looking did not begin in time: 1 others were at it" in told.message
    assert told.remedy
    memory("MemAvailable: 69632 kB\n")  # 64 MiB, and 4 for the one that runs
    other = Task(gate)
    assert other.begins()
    assert [other.finish(), slow.finish()] == ["found", "found"]


def test_what_found_no_memory_is_tried_again_when_nothing_else_runs(memory: object) -> None:
    gate = Turns(at_once=2)
    beside, unlucky = Task(gate), Task(gate)
    assert unlucky.begins()
    assert beside.begins()
    unlucky.end(NO_MEMORY)
    assert not unlucky.begins(within=A_WHILE_S), "another still runs"
    later = Task(gate)
    assert not later.begins(within=A_WHILE_S), "what came later went before it"
    assert beside.finish() == "found"
    assert unlucky.begins()
    assert not later.begins(within=A_WHILE_S), "it is not alone"
    assert unlucky.finish() == "found"
    assert later.finish() == "found"


def test_what_finds_no_memory_alone_either_is_told_that_the_guest_has_too_little(
    memory: Callable[[str], object],
) -> None:
    memory("MemAvailable: 5120 kB\n")
    gate = Turns()

    def child() -> None:
        raise OutOfMemoryError

    with pytest.raises(Fault, match="looking takes more memory than the guest has: 5 MiB are free") as caught:
        gate.take("looking", child, soon())
    assert caught.value.kind == "refused"
    assert "--memory" in str(caught.value.remedy)
    assert Task(gate).finish() == "found"


def test_two_that_found_no_memory_are_alone_one_after_the_other(memory: object) -> None:
    gate = Turns(at_once=2)
    pair = [Task(gate), Task(gate)]
    for task in pair:
        assert task.begins()
    for task in pair:
        task.end(NO_MEMORY)
    deadline = soon()
    while not (first := next((task for task in pair if task.begins(within=0.001)), None)):
        assert time.monotonic() < deadline
    (second,) = (task for task in pair if task is not first)
    assert not second.begins(within=A_WHILE_S)
    assert [first.finish(), second.finish()] == ["found", "found"]


def test_what_waits_to_be_alone_in_vain_is_out_of_the_others_way(memory: object) -> None:
    gate = Turns(at_once=2)
    beside = Task(gate)
    assert beside.begins()
    unlucky = Task(gate, deadline=time.monotonic() + 0.2)
    told = unlucky.finish(NO_MEMORY)
    assert isinstance(told, Fault)
    assert told.kind == "timeout"
    assert Task(gate).finish() == "found"
    assert beside.finish() == "found"


def test_what_fails_gives_its_turn_back(memory: object) -> None:
    gate = Turns(at_once=1)

    def child() -> None:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            gate.take("looking", child, soon())
    assert Task(gate).finish() == "found"
