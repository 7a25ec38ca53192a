"""The library's words for its arguments, as the command line calls them: `timeout_s` is `--timeout` here."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

_QUOTES = "\"'"
_options: dict[str, str] = {}  # by the argument's name


def speak_of(parameters: Iterable[click.Parameter]) -> None:
    """From now on, those of a command's parameters."""
    _options.clear()
    for option in parameters:
        if isinstance(option, click.Option):
            word = max(option.opts, key=len)
            _options.update(dict.fromkeys((option.name or word, word.removeprefix("--").replace("-", "_")), word))


def spoken(text: str) -> str:
    """`text` with the names of arguments replaced by the options that set them.

    `force=True` is `--force`, `filesystem="xfs"` is `--filesystem xfs`. A bare name is replaced only if it has an
    underscore: else it may be a word of English.
    """
    return _ARGUMENT.sub(_option, text)


_ARGUMENT = re.compile(
    r"""(?<![\w/.-])([a-z]+(?:_[a-z]+)*)(?:=(True|"[^"]*"|'[^']*'|[A-Za-z0-9_./:-]*[A-Za-z0-9_/]))?(?![\w=/-])"""
)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    option = _options.get(name)
    if option is None or (value is None and "_" not in name):
        return found[0]
    return option if value in (None, "True") else f"{option} {value.strip(_QUOTES)}"
