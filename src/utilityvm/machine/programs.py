"""The only place that starts a program. Nothing here goes through a shell."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from utilityvm.errors import SetupError
from utilityvm.log import logger
from utilityvm.machine import children, oserrors
from utilityvm.machine.threads import in_thread

_log = logger(__name__)


class CommandFailed(SetupError):
    """A program that we ran failed; `command` can be pasted into a shell, `output` is what it said."""

    def __init__(self, command: Sequence[str], status: int, output: str) -> None:
        self.command = shlex.join(command)
        self.status = status
        self.output = output.strip()
        last = self.output.splitlines()[-1] if self.output else "it said nothing"
        super().__init__(f"{command[0]} ended with status {status}: {last}", remedy=f"it was run as: {self.command}")


def find_program(name: str, *, package: str) -> Path:
    """Where the program is, also outside a plain user's PATH (/usr/sbin, /sbin).

    Raises:
        SetupError: it is not installed; the remedy names the Debian package.
    """
    for path in (None, "/usr/local/sbin:/usr/sbin:/sbin"):
        if found := shutil.which(name, path=path):
            return Path(found)
    raise SetupError(f"{name} is not installed", remedy=f"apt-get install {package}")


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    pass_fds: Sequence[int] = (),
    timeout_s: float | None = None,
    umask: int = -1,
) -> bytes:
    """Run a program to its end and give what it wrote to its standard output. A `umask` of -1 is ours.

    Raises:
        CommandFailed: it ended with another status than 0, or not within `timeout_s` seconds (and was killed).
        SetupError: it could not be started.
    """
    words = [str(word) for word in command]
    _log.debug("run %s", shlex.join(words))
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            pass_fds=pass_fds,
            timeout=timeout_s,
            umask=umask,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(words, -9, f"no end after {timeout_s} s") from error
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot start {words[0]}") from error
    if done.returncode:
        raise CommandFailed(words, done.returncode, (done.stderr or done.stdout).decode(errors="replace"))
    return done.stdout


def spawn(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    cwd: Path = Path("/"),
) -> int:
    """Start a program that runs beside us, and give its pid. It is reaped when it ends; nobody has to wait for it.

    It has a session of its own (a terminal's Ctrl-C is not for it), works in `cwd`, makes files that only its user may
    read, and inherits no descriptor but those given.

    Raises:
        SetupError: it could not be started.
    """
    words = [str(word) for word in command]
    _log.debug("spawn %s", shlex.join(words))
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as error:
        raise oserrors.as_ours(error, f"cannot start {words[0]}") from error
    process.returncode = 0  # Popen would warn of a program that outlives its object
    children.reap(process.pid)
    return process.pid


async def run_async(
    command: Sequence[str | Path], *, stdin: bytes | None = None, timeout_s: float | None = None
) -> bytes:
    """`run` without holding up the event loop."""
    return await in_thread(partial(run, command, stdin=stdin, timeout_s=timeout_s))
