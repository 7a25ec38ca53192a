"""The server in the foreground."""

from __future__ import annotations

import logging

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command
from utilityvm.cli.options import json_option


@click.command("serve", cls=Command, short_help="Run the server in the foreground.")
@json_option
def serve_command(as_json: bool) -> None:
    """Run the server in the foreground until Ctrl-C. The VMs run on then.

    Commands and other clients use a VM through it at the same time. The first command that needs a server starts one;
    this one stays when no VM is left. A VM that is not in use is let go of as soon as a process needs to own it.
    """
    from utilityvm import VMOwned, serve

    ours = logging.getLogger("utilityvm")
    if ours.level > logging.INFO:
        ours.setLevel(logging.INFO)

    def ready() -> None:
        if as_json:
            output.print_json({"ready": True})
        else:
            output.done("the server answers")

    if not serve(forever=True, ready=ready):
        raise VMOwned("another process is the server already", remedy="`uvm ps` names it, beside the VMs that it owns")
