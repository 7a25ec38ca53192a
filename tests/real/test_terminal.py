"""A shell of a real guest at a real pseudo-terminal."""

from __future__ import annotations

import sys

import pytest

from real_vms import Start
from screen import Terminal

pytestmark = pytest.mark.real


async def test_a_shell_in_the_guest_is_used_as_at_any_terminal(start: Start) -> None:
    vm = await start("shelled", keep=True)
    await vm.close()
    terminal = Terminal(30, 100)
    try:
        await terminal.run(sys.executable, "-c", "from utilityvm.cli import main; main()", "shell", "shelled")
        await terminal.until_shown("#")
        terminal.type("stty size; uname -n; tty\n")
        await terminal.until_shown("/dev/pts/")
        assert "30 100" in terminal.shown()
        terminal.type("sh -c 'echo be\"\"gun; exec sleep 1000'\n")
        await terminal.until_shown("\nbegun")
        terminal.resize(40, 120)
        terminal.type("\x03stty size; exit 5\n")
        await terminal.until_shown("40 120")
        assert await terminal.end() == 5
        assert terminal.is_as_before
    finally:
        terminal.close()
