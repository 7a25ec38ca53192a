"""What commands print, and where: tables for people, tabs for pipes, JSON for programs, steps on the standard error.

All that is printed goes through here. A standard output that cannot be written to is an error like any other.
"""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import click

from utilityvm.errors import UtilityVMError
from utilityvm.text import clean

_NARROWEST = 8  # columns that a cut field keeps


class OutputFailed(UtilityVMError):
    """The standard output cannot be written to."""

    def __init__(self, reason: str, then: str = "") -> None:
        super().__init__(f"cannot write to the standard output: {reason}{then}")
        self.reason = reason

    @classmethod
    def because(cls, error: OSError | ValueError) -> OutputFailed:
        if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EBADF):
            return cls(error.strerror or str(error))
        return cls("it is closed")


@dataclass(frozen=True, slots=True)
class Told:
    """An error, as it is printed."""

    kind: str
    message: str
    hint: str | None


@dataclass(slots=True)
class _Command:
    """The command that prints."""

    as_json: bool = False
    done: list[str] = field(default_factory=list)  # what it has changed
    warnings: list[str] = field(default_factory=list)  # to be told with the result: JSON stands alone
    failures: list[tuple[str, list[str]]] = field(default_factory=list)  # logged, with the errors that they tell of


_command = _Command()


def begin(*, as_json: bool) -> None:
    """A command begins."""
    global _command
    _command = _Command(as_json=as_json)


def write(text: str) -> None:
    """A line of the result.

    Raises:
        OutputFailed: it cannot be written.
    """
    try:
        click.echo(text, color=_is_coloured(sys.stdout))
    except (OSError, ValueError) as error:
        _let_go_of_stdout()
        raise OutputFailed.because(error) from error


def write_bytes(data: bytes, descriptor: int) -> None:
    """Pass on a program's output as it is.

    Raises:
        OutputFailed: it cannot be written.
    """
    import select

    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # whoever reads it made it non-blocking
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
        except OSError as error:
            raise OutputFailed.because(error) from error


def texts(streams: Mapping[str, bytes]) -> dict[str, object]:
    """Each stream for a JSON document: its text, or, as `NAME_base64`, what is none."""
    found: dict[str, object] = {}
    for name, data in streams.items():
        try:
            found[name] = data.decode()
        except UnicodeDecodeError:
            found[f"{name}_base64"] = base64.b64encode(data).decode()
    return found


def _let_go_of_stdout() -> None:
    """What Python still holds of the output must not fail again at the exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_json(document: object) -> None:
    text = json.dumps(document, indent=2 if sys.stdout.isatty() else None, default=str)
    write(text.replace("\x7f", "\\u007f"))  # the one control character that JSON lets stand


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns under headings on a terminal, as wide as that; elsewhere one row a line, its fields between tabs."""
    texts = [[_field(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in texts:
            write("\t".join(row))
        return
    widths = [max(_width(row[column]) for row in [list(heads), *texts]) for column in range(len(heads))]
    widths = _fitting(widths, [_width(head) for head in heads], shutil.get_terminal_size().columns)
    write(click.style(_line(heads, widths), bold=True))
    for row in texts:
        write(_line(row, widths))


def print_fields(fields: Mapping[str, object]) -> None:
    """One thing: `name  value` lines on a terminal, else the values between tabs."""
    if not sys.stdout.isatty():
        write("\t".join(_field(value) for value in fields.values()))
        return
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if value is not None:
            write(f"{name:<{width}}  {_field(value)}")


def print_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """Many things that are known of one: `name  value` lines, on a terminal in columns, else with a tab between."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        if value is not None:
            write(f"{name:<{width}}  {_field(value)}" if sys.stdout.isatty() else f"{name}\t{_field(value)}")


def echo_error(text: str) -> None:
    """A line for people. If the standard error cannot be written to, nobody can be told."""
    with suppress(OSError, ValueError):
        click.echo(text, err=True, color=_is_coloured(sys.stderr))


def is_watched() -> bool:
    """Does a person watch the command?"""
    return not _command.as_json and sys.stderr.isatty()


def say(text: str) -> None:
    """A step, for people who watch."""
    if is_watched():
        echo_error(clean(text))


def done(text: str) -> None:
    """What the command has changed: a step, and what is told if its result cannot be printed."""
    _command.done.append(clean(text))
    say(text)


def undone() -> None:
    """What the command has changed is as it was."""
    _command.done.clear()


def note(text: str) -> None:
    """What people have to know, also those who read it later: that a command waits, and for whom."""
    if not _command.as_json:
        echo_error(clean(text))


def remark(text: str) -> None:
    """What people have to know of the result; in a JSON document it stands with that."""
    if not _command.as_json:
        echo_error(f"{_label('note:', 'cyan')} {clean(text)}")


def warn(text: str) -> None:
    if _command.as_json:
        _command.warnings.append(text)
    else:
        echo_error(f"{_label('warning:', 'yellow')} {clean(text)}")


def _tell_failures(errors: Sequence[Told] = ()) -> None:
    """What the library logged of what failed, unless the command's own errors say it."""
    told = " ".join(one.message for one in errors)
    for text, causes in _command.failures:
        if not any(" ".join(clean(cause).split()) in told for cause in causes):
            warn(text)
    _command.failures.clear()


def tell_warnings() -> None:
    """At the end of a command that succeeded."""
    _tell_failures()
    if _command.warnings:
        echo_error(json.dumps({"warnings": _command.warnings}))


def tell_errors(errors: Sequence[Told], code: int) -> None:
    """At the end of one that failed. The first error is the one that decided the exit code."""
    # A guest's words are clean already; those of a file's name, or of QEMU, may not be.
    errors = [
        Told(one.kind, " ".join(clean(one.message).split()), one.hint and " ".join(clean(one.hint).split()))
        for one in errors
    ]
    if errors[0].kind == OutputFailed.__name__ and _command.done:
        errors = [
            Told(errors[0].kind, f"{errors[0].message}; this was done: {'; '.join(_command.done)}", errors[0].hint)
        ]
    _tell_failures(errors)
    if _command.as_json:
        first, *others = ({"error": one.kind, "message": one.message, "hint": one.hint} for one in errors)
        document: dict[str, object] = {**first, "exit_code": code}
        if others:
            document["others"] = others
        if _command.warnings:
            document["warnings"] = _command.warnings
        echo_error(json.dumps(document))
        return
    for one in errors:
        echo_error(f"{_label('error:', 'red')} {one.message}")
        if one.hint:
            echo_error(f"{_label('hint:', 'cyan')} {one.hint}")


def age(seconds: float) -> str:
    """How long ago, in one unit: `42s`, `17m`, `5h`, `3d`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds // size))}{unit}"
    return f"{int(seconds // 86400)}d"


def log_to_stderr(*, debug: bool) -> None:
    """Warnings as `warning: …` lines; with `debug` all that the library logs."""
    handler: logging.Handler = _Warnings()
    if debug:
        handler = logging.StreamHandler()  # the standard error as it is now
        handler.setFormatter(_Clean("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("utilityvm")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.DEBUG if debug else logging.WARNING)


class _Clean(logging.Formatter):
    """What is sent and answered holds names and words of others."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return clean(text, len(text))


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = clean(record.getMessage())
        if causes := getattr(record, "errors", None) if record.levelno >= logging.ERROR else None:
            _command.failures.append((text, causes))  # the command is likely to end with that error
        elif record.levelno < logging.WARNING:  # of `uvm serve`, which says what it does
            echo_error(text)
        else:
            warn(text)


def _is_coloured(stream: Any) -> bool | None:
    """False: without colours. None: with them on a terminal, and nowhere else. Source: https://no-color.org."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def _label(text: str, colour: str) -> str:
    return click.style(text, fg=colour, bold=True)


def _field(value: Any) -> str:
    text = "-" if value is None or value == "" else str(value)
    # A name of somebody's choosing must not end the line, nor reach the terminal as a command.
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cut = [_cut(text, width) for text, width in zip(row, widths, strict=True)]
    return "  ".join(text + " " * (width - _width(text)) for text, width in zip(cut, widths, strict=True)).rstrip()


def _fitting(widths: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """The widths, the widest of them cut until the line fits; none to less than its heading."""
    fitting = list(widths)
    while sum(fitting) + 2 * (len(fitting) - 1) > room:
        spare = [width - max(head, _NARROWEST) for width, head in zip(fitting, least, strict=True)]
        if max(spare) <= 0:
            break
        widest = max((width for width, left in zip(fitting, spare, strict=True) if left > 0))
        fitting[next(at for at, width in enumerate(fitting) if width == widest and spare[at] > 0)] -= 1
    return fitting


def _cut(text: str, width: int) -> str:
    """At most so wide: what is too long loses its middle, for names differ at their ends."""
    if _width(text) <= width:
        return text
    head, tail = "", ""
    for character in text:
        if _width(head + character) > (width - 1) // 3:
            break
        head += character
    for character in reversed(text):
        if _width(character + tail) > width - 1 - _width(head):
            break
        tail = character + tail
    return f"{head}…{tail}"


def _width(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
