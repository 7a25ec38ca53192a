"""Programs in the guest that are told of templates, for what only they know: a service's keys, its caches, its locks.

Each executable in the folder is run with one word, in the order of their names: `save` before the VM is frozen, `thaw`
(in the opposite order) when it goes on as what it was, `clone` in a clone before anybody is given it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final

from utilityvm.agent import cgroups
from utilityvm.agent.faults import Fault
from utilityvm.agent.launch import ENVIRONMENT, start, why

FOLDER: Final = "/etc/utilityvm/template.d"
SAVE, THAW, CLONE = "save", "thaw", "clone"
_SHOWN_BYTES: Final = 1000


def found(folder: str = FOLDER) -> list[str]:
    """The hooks, in order: executable files whose names do not begin with a dot."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    paths = (f"{folder}/{name}" for name in names if not name.startswith("."))
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def run(paths: Sequence[str], word: str, deadline: float, *, env: Mapping[str, str] | None = None) -> None:
    """Run each with `word`; the first that fails is the last that is run.

    Raises:
        Fault: it failed, or did not end in time and was killed with all that it started. Names it.
    """
    for path in paths:
        _run(path, word, deadline, {**ENVIRONMENT, **(env or {})})


def _run(path: str, word: str, deadline: float, env: dict[str, str]) -> None:
    what = f"the hook {path} {word}"
    refusal = f"{what} cannot be run"
    try:
        # A file and not a pipe: what the hook leaves running may hold it open for as long as it likes.
        output = os.memfd_create("hook", os.MFD_CLOEXEC)
    except OSError as error:
        raise Fault(f"{refusal}: {why(error)}") from None
    family = None
    try:
        try:
            family = cgroups.here().make()
        except OSError as error:
            raise Fault(f"{refusal}: {why(error)}") from None
        process = start([path, word], env=env, cwd="/", stdout=output, stderr=output, family=family, refusal=refusal)
        if not _ends(process, deadline):
            family.kill(process.pid)
            process.wait()
            raise Fault(f"{what} did not end in time and was killed{_said(output)}", kind="timeout")
        if process.returncode < 0:
            raise Fault(f"{what} was ended by {_signal(-process.returncode)}{_said(output)}")
        if process.returncode:
            raise Fault(f"{what} ended with {process.returncode}{_said(output)}")
    finally:
        os.close(output)
        if family:
            family.leave()


def _ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _said(output: int) -> str:
    size = os.fstat(output).st_size
    text = os.pread(output, _SHOWN_BYTES, max(0, size - _SHOWN_BYTES)).decode(errors="replace").strip()
    return f": {text}" if text else ""
