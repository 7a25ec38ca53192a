"""cp: files between this host and the guest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command
from utilityvm.cli.options import json_option, wait_option
from utilityvm.cli.output import print_json
from utilityvm.cli.owners import opened, run_with, served
from utilityvm.cli.values import SECONDS, SIZE
from utilityvm.text import size

if TYPE_CHECKING:
    from utilityvm import CopyResult, EscapingLinks

_IN_GUEST = re.compile(r"([^:/.][^:/]*):(.*)", re.DOTALL)
_MAX_SIZE = 16 << 30


def place(text: str) -> tuple[str | None, str]:
    """The VM, or None for this host; and the path there. As with docker cp, `./a:b` is a file of this host."""
    found = _IN_GUEST.fullmatch(text)
    return (found[1], found[2]) if found else (None, text)


@click.command("cp", cls=Command, short_help="Copy files to or from the guest.")
@click.argument("source")
@click.argument("target")
@click.option(
    "--links",
    type=click.Choice(["refuse", "skip", "keep"]),
    default="refuse",
    show_default=True,
    help="From the guest: what becomes of symbolic links that lead out of what is copied, such as all absolute ones.",
)
@click.option(
    "--max-size",
    "max_bytes",
    type=SIZE,
    default=_MAX_SIZE,
    metavar="SIZE",
    help="From the guest: refuse more data than this.  [default: 16G]",
)
@click.option("--timeout", "timeout_s", type=SECONDS, metavar="SECONDS", help="How long it may take.")
@wait_option
@json_option
def cp_command(
    source: str,
    target: str,
    links: EscapingLinks,
    max_bytes: int,
    timeout_s: float | None,
    wait_s: float,
    as_json: bool,
) -> None:
    """Copy a file, a link or a folder: uvm cp FILE VM:/PATH, or uvm cp VM:/PATH FILE.

    If TARGET is a folder, the copy keeps its name in it; else TARGET is its name, and the folder above must be there.
    SOURCE that ends with /. means what is in the folder. Modes, times, links and holes are kept, owners if uvm or the
    agent is root. No file has its name before it is complete.

    - in place of FILE is the standard input or output, for the bytes of one file.
    """
    (from_vm, from_path), (to_vm, to_path) = place(source), place(target)
    if (from_vm is None) == (to_vm is None):
        what = "both are in VMs" if from_vm else "none is in a VM"
        raise click.UsageError(f"one of {source!r} and {target!r} has to be VM:/PATH, and {what}")
    if as_json and to_path == "-" and to_vm is None:
        raise click.UsageError("--json: the standard output is for the file")
    name = from_vm or to_vm or ""
    if to_vm is not None:
        work = _put(name, from_path, to_path, timeout_s=timeout_s, wait_s=wait_s)
    else:
        times = timeout_s, wait_s
        work = _get(name, from_path, to_path, links=links, max_bytes=max_bytes, times=times)
    done = run_with(served(name, wait_s=wait_s), work, loop=True)
    _tell(name, done, as_json=as_json)


async def _put(name: str, source: str, guest_path: str, *, timeout_s: float | None, wait_s: float) -> CopyResult:
    from utilityvm import InvalidRequest
    from utilityvm.cli.own_input import own_input

    async with opened(name, wait_s=wait_s) as vm:
        if source != "-":
            return await vm.put(source, guest_path, timeout_s=timeout_s)
        try:
            return await vm.put(own_input(whole=True), guest_path, timeout_s=timeout_s)
        except OSError as error:
            raise InvalidRequest(f"cannot read the standard input: {error.strerror}") from error


async def _get(
    name: str,
    guest_path: str,
    target: str,
    *,
    links: EscapingLinks,
    max_bytes: int,
    times: tuple[float | None, float],
) -> CopyResult:
    timeout_s, wait_s = times
    async with opened(name, wait_s=wait_s) as vm:
        if target != "-":
            return await vm.get(guest_path, target, links=links, max_bytes=max_bytes, timeout_s=timeout_s)
        return await vm.get(
            guest_path, lambda data: output.write_bytes(data, 1), max_bytes=max_bytes, timeout_s=timeout_s
        )


def _tell(name: str, done: CopyResult, *, as_json: bool) -> None:
    for line in done.skipped:
        output.warn(f"left out: {line}")
    if (more := done.skipped_count - len(done.skipped)) > 0:
        output.warn(f"{more} more were left out")
    counts = {"files": done.files, "folders": done.folders, "links": done.links}
    output.done(f"copied {', '.join(f'{n} {what}' for what, n in counts.items() if n)} ({size(done.size_bytes)})")
    if as_json:
        print_json({"name": name, **counts, "size_bytes": done.size_bytes, "skipped": done.skipped_count})
