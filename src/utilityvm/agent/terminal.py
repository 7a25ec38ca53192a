"""The pseudo-terminal of a program that has one: the agent holds the end at which a person would sit.

Whatever that end writes goes through the kernel's line discipline, so that Ctrl-C is SIGINT for the job in the
foreground. The program's session is controlled by the terminal: when its leader ends, the others get SIGHUP.

Source: Linux tty_ioctl(4), pty(7).
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from utilityvm.agent.faults import Fault
from utilityvm.bridge import messages

TYPE: Final = "xterm-256color"  # TERM, if the host does not say
END_OF_INPUT: Final = b"\x04"  # Ctrl-D
_SIZE: Final = struct.Struct("HHHH")


class Size(NamedTuple):
    rows: int
    cols: int

    @classmethod
    def of(cls, given: object) -> Size:
        """The size that a request has.

        Raises:
            Fault: it has none.
        """
        if not isinstance(given, Mapping):
            raise Fault("Terminal must have Rows and Cols", kind="invalid")
        return cls(_count(given, "Rows"), _count(given, "Cols"))


def _count(given: Mapping[Any, Any], name: str) -> int:
    value = given.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= messages.MAX_TERMINAL:
        raise Fault(f"{name} of a terminal must be a number of 1 to {messages.MAX_TERMINAL}", kind="invalid")
    return value


def start(run: Callable[[int], subprocess.Popen[bytes]], size: Size, *, owner: int | None) -> subprocess.Popen[bytes]:
    """Start a program in a terminal of that size; `run` gets the end that is the program's.

    What is given has the agent's end as `stdin` and `stdout`, which does not block, and no `stderr`. `owner` is the
    user that the terminal belongs to.

    Raises:
        OSError: there is no terminal left.
        what `run` raises.
    """
    ours, theirs = os.openpty()
    try:
        resize(ours, size)
        if owner is not None:
            os.fchown(theirs, owner, -1)
        process = run(theirs)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    os.set_blocking(ours, False)
    process.stdout = os.fdopen(ours, "rb", buffering=0)
    process.stdin = os.fdopen(os.dup(ours), "wb", buffering=0)
    return process


def resize(fd: int, size: Size) -> None:
    """The job in the foreground gets SIGWINCH, if that is another size than before."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _SIZE.pack(size.rows, size.cols, 0, 0))
