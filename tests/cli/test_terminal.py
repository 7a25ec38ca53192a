"""`exec -t` at a real pseudo-terminal: what it shows, what keys do, and that it is put back however uvm ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import termios
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

import at_terminal
from guest_end import AgentThread, FakeDisks, FakeSerialPort
from screen import Terminal
from utilityvm.guests.bridge_guest import BridgeGuest

from .conftest import Uvm

PATIENCE_S = 15.0
SHELL = ("bash", "--norc", "-i")


class Guest:
    """Our real agent, in this process."""

    def __init__(self, port: FakeSerialPort) -> None:
        self.port = port
        self.is_lost = False

    async def lose(self) -> None:
        """Nothing answers any more."""
        self.is_lost = True
        await self.port.__aexit__(None, None, None)

    async def at(self, terminal: Terminal, *command: str) -> None:
        await terminal.run(sys.executable, at_terminal.__file__, str(self.port.path), *command)

    async def programs(self) -> list[str]:
        guest = await BridgeGuest.connect(self.port.path, timeout_s=PATIENCE_S)
        try:
            return [info.command[0] for info in await guest.kept.list()]
        finally:
            await guest.close()


@pytest_asyncio.fixture
async def guest() -> AsyncGenerator[Guest]:
    with tempfile.TemporaryDirectory(prefix="uvm-test-") as folder:
        async with FakeSerialPort(Path(folder) / "agent.sock") as port:
            AgentThread(await port.plug(), FakeDisks())
            guest = Guest(port)
            yield guest
            if guest.is_lost:
                return
            last = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
            for info in await last.kept.list():
                await last.kept.kill(info.number, timeout_s=PATIENCE_S)
            await last.close()


@pytest_asyncio.fixture
async def terminal() -> AsyncGenerator[Terminal]:
    terminal = Terminal()
    yield terminal
    if terminal.process is not None and terminal.process.returncode is None:
        terminal.process.kill()
        await terminal.end()
    terminal.close()


async def test_a_shell_is_used_as_at_any_terminal(guest: Guest, terminal: Terminal) -> None:
    """Size, Ctrl-C, Ctrl-Z and Ctrl-D; then the terminal is as before, and the guest keeps nothing of it."""
    terminal.resize(30, 100)
    terminal.before = termios.tcgetattr(terminal.theirs)
    await guest.at(terminal, *SHELL)
    await terminal.until_shown("ready>")
    assert not terminal.is_as_before
    terminal.type("stty size; echo $TERM\n")
    await terminal.until_shown("30 100\nxterm\n")
    terminal.resize(40, 120)
    terminal.type("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.02; done; echo larger\n")
    await terminal.until_shown("\nlarger")
    terminal.type("sh -c 'echo be\"\"gun; exec sleep 1000'\n")
    await terminal.until_shown("\nbegun")
    terminal.type("\x03")
    terminal.type("sh -c 'echo stop\"\"pable; exec sleep 1000'\n")
    await terminal.until_shown("\nstoppable")
    terminal.type("\x1a")
    await terminal.until_shown("Stopped")
    terminal.type("exit\n")
    await terminal.until_shown("There are stopped jobs")
    terminal.type("exit 3\n")
    assert await terminal.end() == 3
    assert terminal.is_as_before
    assert await guest.programs() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
async def test_the_terminal_is_put_back_when_uvm_is_ended(
    guest: Guest, terminal: Terminal, number: signal.Signals
) -> None:
    await guest.at(terminal, *SHELL)
    await terminal.until_shown("ready>")
    assert terminal.process is not None
    terminal.process.send_signal(number)
    await terminal.end()
    await terminal.until(lambda: terminal.is_as_before, "as before")
    if number != signal.SIGKILL:  # then nobody could end it
        assert await guest.programs() == []


async def test_the_terminal_is_put_back_when_the_guest_is_lost(guest: Guest, terminal: Terminal) -> None:
    await guest.at(terminal, *SHELL)
    await terminal.until_shown("ready>")
    await guest.lose()
    terminal.type("x")
    assert await terminal.end() != 0
    assert terminal.is_as_before


async def test_one_who_uses_the_terminal_after_a_kill_is_not_disturbed(guest: Guest, terminal: Terminal) -> None:
    """The guard puts back what uvm left, and nothing that somebody else has set meanwhile."""
    await guest.at(terminal, *SHELL)
    await terminal.until_shown("ready>")
    assert terminal.process is not None
    os.kill(terminal.process.pid, signal.SIGSTOP)
    other = termios.tcgetattr(terminal.theirs)
    other[3] |= termios.ECHO
    termios.tcsetattr(terminal.theirs, termios.TCSANOW, other)
    terminal.process.kill()
    await terminal.end()
    await asyncio.sleep(0.3)  # the guard has nothing to do, and says nothing when it has not
    assert termios.tcgetattr(terminal.theirs) == other


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("exec -it v sh", "no terminal"),
        ("exec -t v sh", "no terminal"),
        ("shell v", "no terminal"),
        ("exec -t --json v sh", "--json"),
        ("exec -td v sh", "--detach"),
        ("exec -t --timeout 3 v sh", "--timeout"),
        ("exec -tn v sh", "--no-stdin"),
        ("exec -in v sh", "--no-stdin"),
    ],
)
def test_what_cannot_be_is_said(uvm: Uvm, words: str, text: str) -> None:
    done = uvm(*words.split())
    assert done.exit_code == 2, done.stderr
    assert text in done.stderr
