"""Under whose rights QEMU runs, and how it gets rid of ours.

Started by a plain user, QEMU runs as that user: it can do less only by its own seccomp filter. Started by root, each VM
gets a user id that no other process and no account has, so that a QEMU which a guest has taken over can neither
signal nor trace another one. `setpriv` (util-linux) drops the rights between fork and exec: QEMU's own `-runas`
dies under its own filter, and Python may not run code there in a process with threads.

A VM that must not outlive its owner is killed by the kernel when the owner's thread ends (PR_SET_PDEATHSIG). The order
matters: a change of user clears the signal, so `setpriv` sets it last; and an owner that died before that would
never be noticed, so a shell compares its parent with the owner once the signal is set, and only then becomes QEMU.

Which user id is free, userids.py knows.

Source: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from utilityvm.machine.processes import started_at
from utilityvm.machine.programs import find_program

_SETPRIV_S: Final = 0.0005
# argv[0] of the script is the owner's pid.
_UNLESS_ORPHANED: Final = '[ "$PPID" = "$0" ] && exec "$@"'
_ALWAYS: Final = 'exec "$@"'
_ONCE_TOLD: Final = 'read -r told && exec "$@" </dev/null'  # else the owner has died
FILES: Final = 8192  # open at a time: 256 disks over 30 layers each
THREADS: Final = 2048  # of a user id that no other process has: 255 processors, and those that wait for storage


@dataclass(frozen=True, slots=True)
class Identity:
    """A user id that is its group id as well, and the groups beside it. `drops`: it is not ours."""

    uid: int
    groups: tuple[int, ...] = ()
    drops: bool = True


def is_used_by(pid: int, who: Identity) -> bool:
    """Does the process run under the identity yet? False as well when it has ended."""
    return who.uid in user_ids_of(f"/proc/{pid}")


def await_use(pid: int, who: Identity) -> None:
    """Return when the process runs under the identity, or has ended. Blocks for about a millisecond."""
    while started_at(pid) is not None and not is_used_by(pid, who):
        time.sleep(_SETPRIV_S)  # nobody tells when setpriv has run


def launcher(setpriv: Path, who: Identity, *, dies_with_us: bool, is_told: bool = False) -> list[str]:
    """The words to put before a command so that it runs as `who`, can gain no right and leaves no core file.

    `is_told`: it begins when a line is written to its standard input, and ends without one. For a process of another
    pid namespace, which cannot see whether its owner is still there.
    """
    words = [str(setpriv), "--no-new-privs", "--inh-caps=-all"]
    if who.drops:
        words += [f"--reuid={who.uid}", f"--regid={who.uid}", "--bounding-set=-all"]
        words += [f"--groups={','.join(map(str, who.groups))}"] if who.groups else ["--clear-groups"]
    if dies_with_us:
        words += ["--pdeathsig=KILL"]
    script = _ONCE_TOLD if is_told else _UNLESS_ORPHANED if dies_with_us else _ALWAYS
    return [*words, "/bin/sh", "-c", _limits(who) + script, str(os.getpid())]


def _limits(who: Identity) -> str:
    """No core file, and no more files and threads than a VM can need; a lower limit of ours stays as it is."""
    limits = {"-c": 0, "-n": FILES, **({"-p": THREADS} if who.drops else {})}
    return "".join(f"ulimit {which} {most} 2>/dev/null; " for which, most in limits.items())


def powerless() -> list[str]:
    """The words to put before a command so that it has no capability, though it is root's, and can gain no right."""
    words = [str(find_program("setpriv", package="util-linux")), "--no-new-privs", "--inh-caps=-all"]
    return [*words, "--bounding-set=-all"] if os.geteuid() == 0 else words


def user_ids_of(process: str) -> set[int]:
    """The real, effective, saved and file system user ids of a process of /proc; none if it has ended."""
    try:
        status = os.open(f"{process}/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return set()
    try:
        text = os.read(status, 4096)  # of each process of the machine at each start: so no more is read, nor cut up
    except ProcessLookupError:
        return set()
    finally:
        os.close(status)
    return set(map(int, text.partition(b"\nUid:")[2].partition(b"\n")[0].split()))
