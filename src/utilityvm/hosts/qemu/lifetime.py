"""Know that a process ended, and never take another one for it.

A pid alone names whoever has it now. A pid with the kernel's start time names one process of this boot; a pidfd keeps
naming it, so that a signal through it can only reach that process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Self

from utilityvm.errors import VMGone
from utilityvm.machine.processes import started_at


class Watch:
    """An eye on one process: `ended` resolves when it is gone. A child of ours is reaped then."""

    def __init__(self, pid: int, started: str) -> None:
        """Raises:
        VMGone: the process that had this pid since `started` is not there any more.
        """
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1
        if self._pidfd < 0 or started_at(pid) != started:
            self._reap_and_close()
            raise VMGone(f"process {pid} has ended")
        self.pid = pid
        self.started = started
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_end)

    @classmethod
    def child(cls, pid: int) -> Self | None:
        """Watch a process that we have started and not reaped; None (and it is reaped) if it has ended already."""
        started = started_at(pid)
        if started is None:
            os.waitpid(pid, 0)
            return None
        try:
            return cls(pid, started)
        except VMGone:  # it ended since, and is reaped
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
            self._reap_and_close()

    def _on_end(self) -> None:
        self.close()
        self.ended.set_result(None)

    def _reap_and_close(self) -> None:
        if self._pidfd >= 0:
            with suppress(ChildProcessError):  # not a child of ours: its parent reaps it
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            os.close(self._pidfd)
            self._pidfd = -1
