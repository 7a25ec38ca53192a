"""Logs: one logger a module, with the fields of the thing bound once.

The field names are those of the journal and of `--json`: `vm`, `slot`, `host_path`, `guest_path`,
`references`, `reservation`. A record carries them as `record.fields`; the text shows them behind the
message, so that a plain handler loses nothing. `record.errors` are the texts of the errors that it tells of.
Calls may raise these as well: a handler that shows both can tell each once.
"""

from __future__ import annotations

import logging

# A program that sets up no logging hears nothing of ours: what it has to know, it is told by results and errors.
logging.getLogger("utilityvm").addHandler(logging.NullHandler())


class BoundLogger:
    """A logger with fields; `bind` gives a child with more of them."""

    def __init__(self, target: logging.Logger, fields: dict[str, object]) -> None:
        self._target = target
        self.fields = fields

    def bind(self, **fields: object) -> BoundLogger:
        return BoundLogger(self._target, {**self.fields, **fields})

    def debug(self, message: str, *args: object, **fields: object) -> None:
        self._log(logging.DEBUG, message, args, fields)

    def info(self, message: str, *args: object, **fields: object) -> None:
        self._log(logging.INFO, message, args, fields)

    def warning(self, message: str, *args: object, **fields: object) -> None:
        self._log(logging.WARNING, message, args, fields)

    def error(self, message: str, *args: object, **fields: object) -> None:
        self._log(logging.ERROR, message, args, fields)

    def is_enabled_for(self, level: int) -> bool:
        return self._target.isEnabledFor(level)

    def _log(self, level: int, message: str, args: tuple[object, ...], fields: dict[str, object]) -> None:
        if not self._target.isEnabledFor(level):
            return
        all_fields = {key: value for key, value in {**self.fields, **fields}.items() if value is not None}
        text = message % args if args else message
        shown = " ".join(f"{key}={value}" for key, value in all_fields.items())
        extra = {"fields": all_fields, "errors": [str(arg) for arg in args if isinstance(arg, BaseException)]}
        self._target.log(level, "%s", f"{text} [{shown}]" if shown else text, extra=extra, stacklevel=3)


def logger(name: str, **fields: object) -> BoundLogger:
    """The logger of module `name` with `fields` bound."""
    return BoundLogger(logging.getLogger(name), fields)
