"""What commands print, and where: tables for people, tabs for pipes, JSON for programs, steps on the standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from utilityvm.text import clean


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None, default=str))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns under headings on a terminal; elsewhere one row a line, its fields between tabs, without headings."""
    texts = [[_field(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in texts:
            click.echo("\t".join(row))
        return
    widths = [max(len(row[column]) for row in [list(heads), *texts]) for column in range(len(heads))]
    click.echo(click.style(_line(heads, widths), bold=True))
    for row in texts:
        click.echo(_line(row, widths))


def print_fields(fields: Mapping[str, object]) -> None:
    """One thing: `name  value` lines on a terminal, else the values between tabs."""
    if not sys.stdout.isatty():
        click.echo("\t".join(_field(value) for value in fields.values()))
        return
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if value is not None:
            click.echo(f"{name:<{width}}  {_field(value)}")


def say(text: str) -> None:
    """A step, for people who watch: on the standard error, if that is a terminal."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def age(seconds: float) -> str:
    """How long ago, in one unit: `42s`, `17m`, `5h`, `3d`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds // size))}{unit}"
    return f"{int(seconds // 86400)}d"


def size(count: int) -> str:
    """A number of bytes in a unit that keeps it short."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def log_to_stderr(*, debug: bool) -> None:
    """Warnings as `warning: …` lines; with `debug` all that the library logs, as it is."""
    handler = logging.StreamHandler()  # the standard error as it is now
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s") if debug else _Short())
    ours = logging.getLogger("utilityvm")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.DEBUG if debug else logging.WARNING)


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {clean(record.getMessage())}"


def _field(value: Any) -> str:
    text = "-" if value is None or value == "" else str(value)
    # A name of somebody's choosing must not end the line, nor reach the terminal as a command.
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
