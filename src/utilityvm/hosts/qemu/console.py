"""The VM's log: what the guest wrote to its console, and QEMU to its standard error. Bounded, and it outlives QEMU.

A guest may write for ever, QEMU bounds nothing, and the VM may outlive us. So QEMU writes into a pipe, and at its other
end a shell has `head` fill one file after the other: the newest is `console.log`, the one before it `console.log.1`.
The shell, which handles what a guest chose, has no capability and can gain none.
It ends when QEMU does; what it cannot store (a full disk) it throws away, so that the guest never waits for it.
docs/decisions/0002-console-log.md says what else was weighed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from utilityvm.hosts.qemu.privileges import powerless
from utilityvm.machine import runtime
from utilityvm.machine.programs import spawn

NAME: Final = "console.log"
LIMIT_BYTES: Final = 512 << 10  # of each of the two files
_OLDER: Final = f"{NAME}.1"
# Without stdbuf the last 4 KiB would not be in the file before the pipe is closed.
_WRITER: Final = """\
while stdbuf -o0 head -c "$1" >"$0" && [ "$(wc -c <"$0")" -ge "$1" ]; do mv -f "$0" "$0.1"; done
exec cat >/dev/null
"""


def start_writer(folder: Path, *, keeps: Sequence[int] = ()) -> tuple[int, int]:
    """Start the writer of the log in `folder`; give its pid, and the descriptor that QEMU has to write to.

    It holds the descriptors `keeps` open for as long as QEMU runs.

    Raises:
        SetupError: it could not be started.
    """
    reader, writer = os.pipe()
    try:
        with runtime.entered(folder) as here:
            pid = spawn(
                [*powerless(), "/bin/sh", "-c", _WRITER, NAME, str(LIMIT_BYTES)],
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                stdin=reader,
                pass_fds=keeps,
                cwd=here,
            )
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    return pid, writer


def read(folder: Path) -> bytes:
    """The last 512 KiB to 1 MiB of the log, or all there is; nothing if there is no log."""
    parts: list[bytes] = []
    for name in (_OLDER, NAME):
        with suppress(FileNotFoundError):
            parts.append(runtime.record(folder, name))
    return b"".join(parts)


def remove(folder: Path) -> None:
    for name in (_OLDER, NAME):
        (folder / name).unlink(missing_ok=True)
