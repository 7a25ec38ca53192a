"""Programs that the guest keeps: programs, logs, kill. `exec --detach` starts them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command
from utilityvm.cli.options import json_option, vm_argument, wait_option
from utilityvm.cli.output import age, print_json, print_table
from utilityvm.cli.owners import opened, run_with, served
from utilityvm.cli.values import signal_number

if TYPE_CHECKING:
    from utilityvm import ProgramInfo

_SHOWN = 60  # characters of a command in a table


def which(text: str) -> int | str:
    """A program's number, or its name or id."""
    return int(text) if text.isascii() and text.isdigit() else text


@click.command("programs", cls=Command, short_help="List the programs that the guest keeps.")
@vm_argument
@wait_option
@json_option
def programs_command(name: str, wait_s: float, as_json: bool) -> None:
    """List the programs that `uvm exec --detach` started in the VM, those that have ended among them."""
    found = run_with(served(name, wait_s=wait_s), _programs(name, wait_s))
    if as_json:
        print_json([_document(info) for info in found])
        return
    now = time.time()
    print_table(
        ("NUMBER", "NAME", "STATE", "PID", "USER", "AGE", "COMMAND"),
        [
            (
                info.number,
                info.name,
                _state(info),
                info.pid if info.is_running else None,
                info.user or "root",
                age(now - info.started),
                " ".join(info.command)[:_SHOWN],
            )
            for info in found
        ],
    )


def _state(info: ProgramInfo) -> str:
    if info.exit_code is None:
        return "running"
    return "out of memory" if info.out_of_memory else f"exit {info.exit_code}"


def _document(info: ProgramInfo) -> dict[str, object]:
    import dataclasses

    return {**dataclasses.asdict(info), "running": info.is_running}


async def _programs(name: str, wait_s: float) -> list[ProgramInfo]:
    async with opened(name, wait_s=wait_s) as vm:
        return await vm.programs()


@click.command("logs", cls=Command, short_help="Print what a program in the guest wrote.")
@vm_argument
@click.argument("program")
@click.option("--follow", "-f", is_flag=True, help="Go on until the program ends.")
@wait_option
@json_option
def logs_command(name: str, program: str, follow: bool, wait_s: float, as_json: bool) -> None:
    """Print the output of PROGRAM, a number or name of `uvm programs`: the last of it, which the guest has kept.

    Its error output goes to the standard error. A warning says how much the guest has dropped. The program is not held
    back.
    """
    work = _logs(name, which(program), follow=follow, wait_s=wait_s, as_json=as_json)
    document = run_with(served(name, wait_s=wait_s), work)
    if as_json:
        print_json(document)


async def _logs(name: str, program: int | str, *, follow: bool, wait_s: float, as_json: bool) -> dict[str, object]:
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    expected = dict.fromkeys(kept, 0)
    lost = dict.fromkeys(kept, 0)
    async with opened(name, wait_s=wait_s) as vm:
        pieces = await vm.follow_program(program, live=follow)
        try:
            async for piece in pieces:
                if gap := piece.offset - expected[piece.stream]:
                    lost[piece.stream] += gap
                    output.warn(f"{gap} bytes of its {piece.stream} were dropped by the guest")
                expected[piece.stream] = piece.offset + len(piece.data)
                if as_json:
                    kept[piece.stream] += piece.data
                else:
                    output.write_bytes(piece.data, 1 if piece.stream == "stdout" else 2)
        finally:
            await pieces.aclose()
    texts = output.texts({stream: bytes(data) for stream, data in kept.items()})
    return {"exit_code": pieces.exit_code, **texts, "lost_bytes": lost}


@click.command("kill", cls=Command, short_help="End a program in the guest.")
@vm_argument
@click.argument("program")
@click.option("--signal", "-s", "signal_name", metavar="SIGNAL", help="Only send this signal, such as TERM or 15.")
@wait_option
@json_option
def kill_command(name: str, program: str, signal_name: str | None, wait_s: float, as_json: bool) -> None:
    """Kill PROGRAM, a number or name of `uvm programs`, with all that it started, and return when all of it has ended.

    With --signal send that signal to the program and its process group, and do not wait.
    """
    number = None if signal_name is None else signal_number(signal_name)
    killed = run_with(served(name, wait_s=wait_s), _kill(name, which(program), number, wait_s))
    output.done(f"program {killed} of {name} {'got the signal' if number else 'has ended'}")
    if as_json:
        print_json({"name": name, "number": killed, "signal": number or 9})


async def _kill(name: str, program: int | str, signal: int | None, wait_s: float) -> int:
    async with opened(name, wait_s=wait_s) as vm:
        found = await vm.program(program, follow=False)
        await (found.kill() if signal is None else found.send_signal(signal))
        return found.number
