"""The command `uvm`.

Each noun has a file: `vm`, `program`, `disk`, `template`, `image`, `upkeep`, `doctor`, `completion`; `commands` lists
them. They are loaded when they are used, and so is what they need of the library: a command that only reads
the store (`ps`, `ls`, `path`) loads no event loop.

What a command prints: on a terminal, tables and progress; into a pipe, lines of tab-separated fields without a heading;
with `--json`, one JSON document. Progress, warnings and errors go to the standard error. An error is one line
`error: …`, with a `hint: …` line where there is something to do about it; with `--json` it is a JSON object, which
stands alone. The exit codes are in `exitcodes`.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """What the installed `uvm` calls. Ctrl-C is quiet at any moment, and ends it with 130."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as under nohup(1)
    if is_ours:
        signal.signal(signal.SIGINT, _leave)
    code: int | str | None = 130
    _open_what_is_closed()
    try:
        from utilityvm.cli.commands import uvm

        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        uvm.main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        pass  # between two steps of ours; the commands themselves clean up
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _leave)
    sys.exit(code)


def _leave(*_: object) -> None:
    """End at once: nothing was begun, or all is done."""
    os._exit(130)


def _open_what_is_closed() -> None:
    """Standard streams that were closed (`>&-`) are open again, on nothing: else the next file that is opened, such as
    the store, would get their number, and what is printed. Writing to the standard output fails, as it should.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal's encoding does not
