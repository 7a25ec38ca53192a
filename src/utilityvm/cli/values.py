"""How values are written on the command line: sizes, times, and a disk with its place in the guest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _Int = click.ParamType[int]
    _Float = click.ParamType[float]
else:  # click 8.1 has no type arguments
    _Int = _Float = click.ParamType

MIB = 1 << 20
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DIGITS = 20  # more than any number that is taken has
_DECIMAL = ("KB", "MB", "GB", "TB")  # of 1000 to some, of 1024 to others
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)(?:([KMGT])(?:iB)?)?|([0-9]{1,20})B", re.IGNORECASE | re.ASCII)
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(s|m|h)?", re.ASCII)
_DECIMAL_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?", re.ASCII)
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600}


class Size(_Int):
    """`256M`, `1G`, `64MiB`, `1.5G`; a number alone is in `unit`. Gives units: bytes, or MiB."""

    name = "size"

    def __init__(self, unit: int = 1) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value)
        found = _SIZE.fullmatch(text)
        if found is None:
            advice = (
                "units are of 1024: write M or MiB" if text[-2:].upper() in _DECIMAL else "write 256M, 64MiB or 1.5G"
            )
            self.fail(f"{text!r} is not a size; {advice}", param, ctx)
        number, letter = found[1] or found[3], (found[2] or "").upper()
        is_bare = found[1] and not letter
        size = Fraction(number) * (self._unit if is_bare else 1 << _UNITS[letter])
        if size % self._unit:
            what = "bytes" if self._unit == 1 else "MiB"
            self.fail(f"{text!r} is not a whole number of {what}", param, ctx)
        return int(size) // self._unit


class Seconds(_Float):
    """`30`, `0.5`, `90s`, `5m`, `1h`; gives seconds."""

    name = "seconds"

    def __init__(self, *, zero: bool = False) -> None:
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        found = _TIME.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not a time: write it as 30, 0.5, 90s, 5m or 1h", param, ctx)
        seconds = float(found[1]) * _SECONDS[found[2]]
        if not seconds and not self._zero:
            self.fail("it must be more than 0", param, ctx)
        return seconds


class Count(_Int):
    """A whole number from `least` to `most`."""

    name = "count"

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
            self.fail(f"{text!r} is not a whole number", param, ctx)
        number = int(text)
        if number < self._least or (self._most is not None and number > self._most):
            bounds = f"{self._least} or more" if self._most is None else f"{self._least} to {self._most}"
            self.fail(f"{number} is out of range; write {bounds}", param, ctx)
        return number


# The guest's, which is Linux whatever this system is. Source: signal(7).
_SIGNALS = {
    "HUP": 1, "INT": 2, "QUIT": 3, "ABRT": 6, "KILL": 9, "USR1": 10, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
    "CHLD": 17, "CONT": 18, "STOP": 19, "TSTP": 20, "WINCH": 28,
}  # fmt: skip
_MAX_SIGNAL = 64


def signal_number(text: str) -> int:
    """The number of a signal of the guest: `TERM`, `SIGTERM` or `15`.

    Raises:
        click.UsageError: there is no such signal.
    """
    number = int(text) if text.isascii() and text.isdigit() else _SIGNALS.get(text.upper().removeprefix("SIG"), 0)
    if not 0 < number <= _MAX_SIGNAL:
        raise click.UsageError(f"--signal {text!r}: write a name such as TERM, or a number from 1 to {_MAX_SIGNAL}")
    return number


def limit(text: str) -> tuple[str, int | float]:
    """A limit of a program: `memory=64M`, `pids=100` or `cpus=0.5`, as the field of `Limits` and its value.

    Raises:
        click.UsageError: it is none.
    """
    name, equals, value = text.partition("=")
    try:
        match name:
            case "memory" if equals:
                return "memory_bytes", Size().convert(value, None, None)
            case "pids" if value.isascii() and value.isdigit():
                return "pids", int(value)
            case "cpus" if _DECIMAL_NUMBER.fullmatch(value):
                return "cpus", float(value)
    except click.BadParameter as error:
        raise click.UsageError(f"--limit {text!r}: {error.message}") from None
    raise click.UsageError(f"--limit {text!r}: write it as memory=64M, pids=100 or cpus=0.5")


SIZE = Size()
MEMORY = Size(MIB)
SECONDS = Seconds()
WAIT = Seconds(zero=True)


@dataclass(frozen=True, slots=True)
class Place:
    """A disk of this host, and where it goes in the guest."""

    disk: str
    guest_path: str | None = None
    mode: str | None = None  # ro or rw; None: nothing was said


def without_mode(guest_path: str) -> str:
    """A guest path as it is; one that ends like a mode would be mounted writable by somebody who meant `:ro`.

    Raises:
        click.UsageError: it ends so.
    """
    if re.search("[:,](ro|rw)$", guest_path):
        raise click.UsageError(
            f"guest path {guest_path} ends in what looks like a mode; write DISK:GUEST_PATH:ro, or give --read-only"
        )
    return guest_path


def scratch_size(disk: str) -> int | None:
    """The size of a scratch disk that is to be made: `scratch:10G`. None: it is the path of a disk.

    Raises:
        click.UsageError: it is no size.
    """
    size = disk.removeprefix("scratch:")
    if size == disk or os.path.lexists(disk):
        return None
    try:
        return SIZE.convert(size, None, None)
    except click.BadParameter as error:
        raise click.UsageError(f"{disk}: {error.message}") from None


def place(text: str) -> Place:
    """`DISK[:GUEST_PATH][:ro|:rw]`.

    A path that is there as it stands is a disk, whatever it holds. Else the disk ends at the last `:/`.

    Raises:
        click.UsageError: what follows the guest path is no mode. A guest path with a colon is an option's value.
    """
    if os.path.lexists(text):
        return Place(text)
    disk, found, rest = text.rpartition(":/")
    if found and disk:
        guest_path, colon, mode = rest.partition(":")
        if not colon:
            return Place(disk, without_mode(f"/{guest_path}"))
        if mode in ("ro", "rw"):
            return Place(disk, f"/{guest_path}", mode)
        raise click.UsageError(
            f"{text}: {mode!r} after the guest path is neither 'ro' nor 'rw'; give other mount options with --option, "
            "and a guest path that has a colon with --guest-path"
        )
    disk, colon, rest = text.rpartition(":")
    if colon and rest in ("ro", "rw"):
        return Place(disk, None, rest)
    if colon and os.path.lexists(disk):
        return Place(disk, rest)  # it was meant as a guest path, and is refused as one
    return Place(text)
