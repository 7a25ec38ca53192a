"""A real pseudo-terminal with a command at it, and what a person would see there."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE_S = 60.0


class Terminal:
    """A terminal with a command at it. `screen` is what a person sees."""

    def __init__(self, rows: int = 24, cols: int = 80) -> None:
        pyte: Any = pytest.importorskip("pyte")
        self.ours, self.theirs = os.openpty()
        os.set_blocking(self.ours, False)
        self.screen = pyte.Screen(cols, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(rows, cols)
        self.before = termios.tcgetattr(self.theirs)
        self.process: asyncio.subprocess.Process | None = None

    async def run(self, *words: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            "setsid",
            "--ctty",
            *words,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def resize(self, rows: int, cols: int) -> None:
        termios.tcsetwinsize(self.ours, (rows, cols))
        self.screen.resize(rows, cols)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def shown(self) -> str:
        while True:
            try:
                data = os.read(self.ours, 65536)
            except OSError:
                break
            self._stream.feed(data)
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    async def until(self, is_so: Callable[[], object], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not is_so():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not {what}; the screen shows\n{self.shown()}") from None

    async def until_shown(self, text: str) -> None:
        await self.until(lambda: text in self.shown(), f"shown: {text}")

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before

    async def end(self) -> int:
        process = self.process
        assert process is not None
        # Looked at meanwhile: a full terminal would hold it up.
        await self.until(lambda: (self.shown(), process.returncode)[1] is not None, "ended")
        assert process.returncode is not None
        return process.returncode

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)
