"""What the guest tells of a program that it keeps, and what its refusals to do something with one mean."""

from __future__ import annotations

from dataclasses import dataclass

from utilityvm.errors import GuestRefused, ProgramNotFound, UtilityVMError, WrongState
from utilityvm.guests import answers


def list_them(vm: str | None) -> str:
    """What to do when there is no such program."""
    return f"list the guest's programs: uvm programs {vm or 'NAME'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """A program that the guest keeps, as it was when it was asked. Times are seconds since 1970, the guest's.

    Of each stream the bytes from `…_begin` to `…_end` are kept: those before were dropped.
    """

    number: int
    id: str
    name: str | None
    command: tuple[str, ...]  # cut, if it is long
    user: str | None
    pid: int | None
    started: float
    ended: float | None  # None: it runs
    exit_code: int | None  # negative for the signal that killed it
    out_of_memory: bool  # something of it was killed because it used all of the memory that it may
    takes_input: bool
    ring_bytes: int
    stdout_begin: int
    stdout_end: int
    stderr_begin: int
    stderr_end: int
    followers: int
    has_terminal: bool = False

    @property
    def is_running(self) -> bool:
        return self.exit_code is None


def typed(error: GuestRefused) -> UtilityVMError:
    match error.kind:
        case "no_program":
            return ProgramNotFound(str(error), remedy=list_them(error.vm))
        case "ended":
            return WrongState(str(error))
        case "running":
            return WrongState(str(error), remedy="kill it first")
    return error


def info_of(told: answers.Program) -> ProgramInfo:
    return ProgramInfo(
        number=told.number,
        id=str(told.id),
        name=None if told.name is None else str(told.name),
        command=tuple(map(str, told.argv)),
        user=None if told.user is None else str(told.user),
        pid=told.pid,
        started=told.started_ms / 1000,
        ended=None if told.ended_ms is None else told.ended_ms / 1000,
        exit_code=told.exit_code,
        out_of_memory=told.out_of_memory,
        takes_input=told.stdin,
        ring_bytes=told.ring_bytes,
        stdout_begin=told.out_begin,
        stdout_end=told.out_end,
        stderr_begin=told.err_begin,
        stderr_end=told.err_end,
        followers=told.follows,
        has_terminal=told.terminal,
    )
