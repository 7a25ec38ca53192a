"""Starts a program in the guest: in a session and a cgroup of its own, as an ordinary process, or with the reason."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import termios
from collections.abc import Mapping, Sequence
from typing import IO, Final

from utilityvm.agent.accounts import Account
from utilityvm.agent.cgroups import Family
from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import prepare_program

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
_HEAD_BYTES: Final = 256
_SHOWN: Final = 100  # characters
_WHY: Final = {
    errno.EMFILE: "the agent has as many files open as it may",
    errno.ENFILE: "the guest has as many files open as it can",
    errno.EAGAIN: "the guest has as many processes as it may",
    errno.ENOMEM: "the guest has no memory left",
    errno.ENOSPC: "the guest has no space left",
    errno.E2BIG: "its arguments and environment are too long",
    errno.ENOEXEC: "it is neither a program for this machine nor a script that begins with #!",
}


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    family: Family,
    account: Account | None = None,
    has_terminal: bool = False,
    refusal: str | None = None,
) -> subprocess.Popen[bytes]:
    """The program, started, as the first of `family`, and as the user of `account`; None: as the agent's, root.

    With `has_terminal` its standard input is one, which controls its session. A fault's message begins with `refusal`.

    Raises:
        Fault: it cannot be started, and why: "not_found", "invalid" (a word, a name or a value cannot be), "refused".
    """

    def prepare() -> None:
        family.enter()
        prepare_program()
        if has_terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if account:
            account.become()

    refusal = refusal or f"cannot run {argv[0][:_SHOWN]}"
    try:
        return subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
            bufsize=0,
            # Only so is all that it starts in its cgroup, for it may fork at once. Nothing in it waits for a thread.
            preexec_fn=prepare,
        )
    except OSError as error:
        kind = "not_found" if isinstance(error, FileNotFoundError) else "refused"
        raise Fault(f"{refusal}: {_reason(error, argv[0], env, cwd)}", kind=kind) from None
    except subprocess.SubprocessError:
        raise Fault(f"{refusal}: the kernel does not let it into its cgroup, or be its user") from None
    except ValueError as error:  # a NUL, or what is no text
        raise Fault(f"{refusal}: {error}", kind="invalid") from None


def why(error: OSError) -> str:
    """The reason, in words that say what has run out if something has."""
    return _WHY.get(error.errno or 0, error.strerror or str(error))


def _reason(error: OSError, name: str, env: Mapping[str, str], cwd: str) -> str:
    if error.filename == cwd and not os.path.isdir(cwd):
        return f"the folder to run it in, {cwd[:_SHOWN]}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and (path := _found(name, env, cwd)):
        return f"the interpreter that {path[:_SHOWN]} asks for{_interpreter(path)} is missing"
    return why(error)


def _found(name: str, env: Mapping[str, str], cwd: str) -> str | None:
    folders = [""] if "/" in name else os.get_exec_path(dict(env))
    paths = [os.path.join(cwd, folder, name) for folder in folders]
    return next((path for path in paths if os.path.isfile(path)), None)


def _interpreter(path: str) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return ""
    line = head.partition(b"\n")[0].removeprefix(b"#!").strip()
    return f", {line.decode(errors='replace')[:_SHOWN]}," if head.startswith(b"#!") else ""
