"""Programs with a terminal: our real agent and its pseudo-terminals, and the bridge between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from guest_end import FakeSerialPort
from utilityvm.agent import serve
from utilityvm.errors import InvalidRequest, NotSupported, VMGone, WrongLoop
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.guests.kept import Program

from .conftest import StartAgent
from .test_kept import get, start

PATIENCE_S = 60.0


@pytest_asyncio.fixture
async def guest(port: FakeSerialPort, start_agent: StartAgent) -> AsyncGenerator[BridgeGuest]:
    """Our host end, connected to our agent; what it keeps is ended."""
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S, vm="one")
    yield guest
    await guest.close()
    last = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    for info in await last.kept.list():
        await last.kept.kill(info.number, timeout_s=PATIENCE_S)
    await last.close()


async def at_terminal(guest: BridgeGuest, script: str, **settings: object) -> Program:
    return await start(guest, "sh", "-c", script, terminal=(24, 80), **settings)


def runs(pid: int) -> bool:
    """One that has ended may still be there: who reaps it here is not ours to say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Reader:
    """Reads what a program shows, up to and with a text; what comes behind that is for the next time."""

    def __init__(self, program: Program) -> None:
        self._stream = program.stdout
        self._pending = b""

    async def until(self, text: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            while text not in self._pending:
                piece = await self._stream.read(1000)
                assert piece, f"it ended after {self._pending!r}"
                self._pending += piece
        seen, _, self._pending = self._pending.partition(text)
        return seen + text


def type_in(program: Program, data: bytes) -> None:
    assert program.stdin is not None
    program.stdin.write(data)


async def test_it_has_a_terminal_of_that_size_and_session(guest: BridgeGuest) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size && echo $TERM && (: < /dev/tty) && echo err >&2; exit 3"
    program = await at_terminal(guest, script)
    assert (await program.stdout.read()).split() == [b"24", b"80", b"xterm-256color", b"err"]
    assert await program.stderr.read() == b""
    assert await program.wait() == 3
    assert program.info.has_terminal


async def test_a_new_size_is_told_to_what_runs_in_the_foreground(guest: BridgeGuest) -> None:
    program = await at_terminal(guest, "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.02; done")
    shown = Reader(program)
    await shown.until(b"ready")
    await program.resize(33, 121)
    assert b"33 121" in await shown.until(b"121")
    await program.wait(timeout_s=PATIENCE_S)
    await program.resize(1, 1)  # it has ended: nobody looks
    for rows, cols in ((0, 80), (24, 65536), (True, 80), (24, "80")):
        with pytest.raises(InvalidRequest, match="no size of a terminal"):
            await program.resize(rows, cols)  # type: ignore[arg-type]
    other = await start(guest, "true")
    with pytest.raises(InvalidRequest, match="has no terminal"):
        await other.resize(24, 80)


async def test_keys_are_signals_for_the_job_in_the_foreground(guest: BridgeGuest) -> None:
    """Ctrl-C ends the job and not the shell; Ctrl-Z stops it, and `fg` goes on with it; Ctrl-D ends the shell."""
    program = await start(guest, "bash", "--norc", "-i", terminal=(24, 80), env={"PS1": "ready> "})
    shown = Reader(program)
    await shown.until(b"ready> ")
    type_in(program, b"sh -c 'echo be\"\"gun; exec sleep 1000'\n")
    await shown.until(b"begun")
    type_in(program, b"\x03")
    await shown.until(b"ready> ")
    type_in(program, b"echo code $?; (trap 'echo on; exit 7' CONT; echo stop''pable; while :; do sleep 0.02; done)\n")
    await shown.until(b"stoppable")
    type_in(program, b"\x1a")
    await shown.until(b"Stopped")
    type_in(program, b"fg\n")
    await shown.until(b"\non")
    await shown.until(b"ready> ")
    type_in(program, b"\x04")
    await program.stdout.read()
    assert await program.wait(timeout_s=PATIENCE_S) == 7


async def test_the_end_of_the_input_is_ctrl_d(guest: BridgeGuest) -> None:
    program = await at_terminal(guest, "cat; echo done")
    type_in(program, b"a line\n")
    assert program.stdin is not None
    program.stdin.close()
    assert (await program.stdout.read()).split(b"\r\n") == [b"a line", b"a line", b"done", b""]
    assert await program.wait(timeout_s=PATIENCE_S) == 0


async def test_output_is_whole_when_it_ends(guest: BridgeGuest) -> None:
    """More than a terminal holds, and nothing of it is lost with the terminal."""
    program = await at_terminal(guest, "stty -opost; seq 30000")
    assert await program.stdout.read() == b"".join(b"%d\n" % number for number in range(1, 30001))


async def test_what_was_at_the_terminal_ends_with_it(guest: BridgeGuest) -> None:
    program = await at_terminal(guest, "sleep 1000 & echo $!; wait")
    pid = int(await program.stdout.readline())
    await program.kill()
    assert await program.wait() == -signal.SIGKILL
    assert not runs(pid)


async def test_a_program_that_lets_go_of_its_terminal_costs_nothing(guest: BridgeGuest) -> None:
    """Its terminal is at its end, and the agent does not spin until it ends."""
    program = await at_terminal(guest, "exec < /dev/null > /dev/null 2>&1; sleep 0.5; exit 4")
    before = os.times()
    assert await program.wait(timeout_s=PATIENCE_S) == 4
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.4
    type_in(program, b"nobody reads it\n")


async def test_the_next_owner_goes_on_at_the_terminal(guest: BridgeGuest, port: FakeSerialPort) -> None:
    program = await at_terminal(guest, "echo first; read line; echo got $line; stty size")
    shown = Reader(program)
    first = await shown.until(b"first\r\n")
    await guest.close()
    with pytest.raises(VMGone):
        await program.stdout.read()
    other = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    found = await get(other, program.number, stdout=len(first))
    await found.resize(50, 132)
    type_in(found, b"it\n")
    assert (await found.stdout.read()).split(b"\r\n") == [b"it", b"got it", b"50 132", b""]
    await other.close()


async def test_an_agent_that_knows_no_terminals_is_told_as_too_old(
    port: FakeSerialPort, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "VERSION", 3)
    await start_agent()
    guest = await BridgeGuest.connect(port.path, timeout_s=PATIENCE_S)
    with pytest.raises(NotSupported, match="too old to give a program a terminal"):
        await at_terminal(guest, "true")
    assert await guest.kept.list() == []
    await guest.close()


async def test_another_loop_is_refused_at_once(guest: BridgeGuest) -> None:
    program = await start(guest, "cat", stdin=True)
    assert program.stdin is not None

    async def elsewhere() -> None:
        assert program.stdin is not None
        for call in (program.wait, program.kill, program.stdout.read, program.stdin.drain):
            with pytest.raises(WrongLoop):
                await call()
        with pytest.raises(WrongLoop):
            program.stdin.write(b"x")

    def in_thread() -> None:
        asyncio.run(elsewhere())
        assert program.stdin is not None
        with pytest.raises(WrongLoop):
            program.stdin.close()

    await asyncio.to_thread(in_thread)
    assert await program.communicate(b"here", timeout_s=PATIENCE_S) == (b"here", b"")
