"""`exec -t` and `shell`: a program in the guest at our own terminal.

While it runs our terminal is raw: each key goes to the guest, whose terminal makes Ctrl-C a signal. It is put back
however we end. A guard, a process of its own, does that if we are killed; it touches a terminal only if that is still
as we left it, for by then it may be somebody else's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from utilityvm.cli import output

if TYPE_CHECKING:
    from utilityvm import Program, UtilityVM

_READ_BYTES = 65536
_END_S = 5.0
_DEFAULT_SIZE = (24, 80)


def check_terminal() -> None:
    """Raises:
    UsageError: our standard input is no terminal.
    """
    if not os.isatty(0):
        raise click.UsageError("the standard input is no terminal; leave out --tty, or run it from a terminal")


def terminal_size() -> tuple[int, int]:
    """Rows and columns of our terminal; of one that says nothing, 24 and 80."""
    with suppress(OSError):
        rows, cols = termios.tcgetwinsize(0)
        if rows and cols:
            return rows, cols
    return _DEFAULT_SIZE


async def at_terminal(vm: UtilityVM, command: list[str], how: dict[str, Any]) -> int:
    """Run a program at our terminal to its end, and give its exit code. If this fails or is cancelled, it is killed."""
    env = {"TERM": os.environ.get("TERM") or "xterm", **(how.get("env") or {})}
    program = await vm.start_program(command, terminal=terminal_size(), **{**how, "env": env})
    try:
        with raw_terminal() as make_raw, _resized(program, make_raw):
            typing = asyncio.ensure_future(_type(program))
            try:
                while data := await program.stdout.read(_READ_BYTES):
                    output.write_bytes(data, 1)
                return await program.wait()
            finally:
                typing.cancel()
                await asyncio.wait([typing])
    finally:
        await _end(program)


async def _end(program: Program) -> None:
    """Nobody is at its terminal any more."""
    from utilityvm import UtilityVMError

    with suppress(UtilityVMError):
        if program.returncode is None:
            await program.kill(timeout_s=_END_S)
        await program.forget(timeout_s=_END_S)


async def _type(program: Program) -> None:
    """What is typed goes to the program."""
    from utilityvm.cli.own_input import own_input

    assert program.stdin is not None
    async for data in own_input():
        program.stdin.write(data)
        await program.stdin.drain()
    program.stdin.close()


@contextmanager
def _resized(program: Program, make_raw: Callable[[], None]) -> Iterator[None]:
    """The guest's terminal has the size of ours, whenever that changes; and ours is raw again after a stop."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    async def tell() -> None:
        from utilityvm import UtilityVMError

        while True:
            await changed.wait()
            changed.clear()
            with suppress(UtilityVMError):  # it has ended, or the VM has: that is told elsewhere
                await program.resize(*terminal_size())

    def go_on() -> None:
        make_raw()
        changed.set()

    changed.set()  # it may have changed while the program was started
    telling = asyncio.ensure_future(tell())
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    loop.add_signal_handler(signal.SIGCONT, go_on)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        loop.remove_signal_handler(signal.SIGCONT)
        telling.cancel()


@contextmanager
def raw_terminal() -> Iterator[Callable[[], None]]:
    """Our terminal is raw in the block; gives what makes it so again. It is put back also if we are killed."""
    before = termios.tcgetattr(0)
    guard: subprocess.Popen[bytes] | None = None
    try:
        tty.setraw(0)
        raw = termios.tcgetattr(0)
        guard = _guarded(before, raw)
        yield lambda: termios.tcsetattr(0, termios.TCSANOW, raw)
    finally:
        # At once: to wait until an output that is stopped goes on would hold us up for ever.
        termios.tcsetattr(0, termios.TCSANOW, before)
        if guard is not None and guard.stdin is not None:
            guard.stdin.close()
            guard.wait()


def _guarded(before: list[Any], raw: list[Any]) -> subprocess.Popen[bytes]:
    """The guard. It ends when its standard input does, by us or by our death."""
    terminal = os.dup(0)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, repr((terminal, before, raw))],
            stdin=subprocess.PIPE,
            pass_fds=[terminal],
            process_group=0,  # what ends all of our group does not end it
        )
    finally:
        os.close(terminal)


# In another process group than the one in the foreground, the terminal can be set only if SIGTTOU is ignored.
_GUARD = """
import ast, os, signal, sys, termios
for name in ("INT", "TERM", "HUP", "QUIT", "TTOU", "TTIN", "TSTP"):
    signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
terminal, before, raw = ast.literal_eval(sys.argv[1])
os.read(0, 1)
if termios.tcgetattr(terminal) == raw:
    termios.tcsetattr(terminal, termios.TCSANOW, before)
"""
