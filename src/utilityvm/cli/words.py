"""The library's words for its arguments, as the command line calls them: `timeout_s` is `--timeout` here."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

_QUOTES = "\"'"
_CALLS = {"add_scsi": "uvm attach without --physical", "add_scsi_physical_disk": "--physical"}
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

    `force=True` is `--force`, `filesystem="xfs"` is `--filesystem xfs`, `force=False` and `filesystem=None` are `no
    --force` and `no --filesystem`. A bare name is replaced only if it has an underscore or stands in parentheses: else
    it may be a word of English.
    """
    return _ARGUMENT.sub(_option, text)


_ARGUMENT = re.compile(
    r"""(?<![\w/.-])([a-z]+(?:_[a-z]+)*)(?:=(True|"[^"]*"|'[^']*'|[A-Za-z0-9_./:-]*[A-Za-z0-9_/]))?(?![\w=/-])"""
)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if name in _CALLS and value is None:
        return _CALLS[name]
    option = _options.get(name)
    text, (begin, end) = found.string, found.span()
    is_alone = text[begin - 1 : begin] == "(" and text[end : end + 1] == ")"
    if option is None or (value is None and "_" not in name and not is_alone):
        return found[0]
    if value in ("False", "None"):
        return f"no {option}"
    return option if value in (None, "True") else f"{option} {value.strip(_QUOTES)}"
