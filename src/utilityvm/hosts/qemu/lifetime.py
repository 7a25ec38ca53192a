"""Know that a process ended, and never take another one for it.

A pid alone names whoever has it now. A pid with the kernel's start time names one process of this boot; a pidfd keeps
naming it, so that a signal through it can only reach that process. Children of ours are reaped elsewhere
(machine/children.py): what is looked at here may be anybody's child.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Self

from utilityvm.errors import VMGone
from utilityvm.machine import oserrors
from utilityvm.machine.processes import started_at


class Watch:
    """An eye on one process: `ended` resolves when it is gone."""

    def __init__(self, pid: int, started: str) -> None:
        """Raises:
        VMGone: the process that had this pid since `started` is not there any more.
        SetupError: it cannot be told: this process has too many files open, or may not look.
        """
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
            is_it = started_at(pid) == started
        except ProcessLookupError:
            is_it = False
        except OSError as error:
            raise oserrors.as_ours(error, f"cannot watch process {pid}") from error
        except BaseException:
            self._close()
            raise
        if not is_it:
            self._close()
            raise VMGone(f"process {pid} has ended")
        self.pid = pid
        self.started = started
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_end)

    @classmethod
    def child(cls, pid: int) -> Self | None:
        """Watch a process that we have just started; None if it has ended already."""
        started = started_at(pid)
        try:
            return None if started is None else cls(pid, started)
        except VMGone:
            return None

    async def wait(self, *, timeout_s: float) -> bool:
        """Has it ended, within `timeout_s` seconds?"""
        await asyncio.wait([self.ended], timeout=timeout_s)
        return self.ended.done()

    def kill(self) -> None:
        """End it at once. No error if it has ended."""
        if not self.ended.done() and self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def close(self) -> None:
        """Look away. `ended` never resolves then. Twice is once."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            self._close()

    def _on_end(self) -> None:
        self.close()
        self.ended.set_result(None)

    def _close(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)
