"""Programs in the guest, as `UtilityVM` runs them."""

from __future__ import annotations

from collections.abc import Sequence

from utilityvm.errors import ProgramFailed
from utilityvm.guests.program import CommandResult, as_text

_SHOWN = 300  # characters of what a program said last


def finished(
    result: CommandResult[bytes], command: Sequence[str], *, check: bool, text: bool, vm: str
) -> CommandResult[bytes] | CommandResult[str]:
    """The result of a program, as text if that is wanted.

    Raises:
        ProgramFailed: with `check`, it ended with another code than 0.
    """
    shown: CommandResult[bytes] | CommandResult[str] = as_text(result) if text else result
    if check and result.exit_code:
        raise ProgramFailed(
            f"{command[0]} {_how(result.exit_code)}{_last_words(result.stderr)}",
            exit_code=result.exit_code,
            stdout=shown.stdout,
            stderr=shown.stderr,
            vm=vm,
        )
    return shown


def _how(exit_code: int) -> str:
    return f"ended with {exit_code}" if exit_code > 0 else f"was killed by signal {-exit_code}"


def _last_words(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:_SHOWN]}" if lines else ""
