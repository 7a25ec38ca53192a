"""The root command: which commands there are, and in which module each is."""

from __future__ import annotations

import click

from utilityvm.cli import exitcodes, output
from utilityvm.cli.group import LazyGroup

COMMANDS = {
    "start": "vm",
    "ps": "listing",
    "inspect": "listing",
    "stop": "vm",
    "exec": "vm",
    "shell": "vm",
    "cp": "copy",
    "programs": "program",
    "logs": "program",
    "kill": "program",
    "log": "vm",
    "attach": "disk",
    "ls": "disk",
    "path": "disk",
    "resize": "disk",
    "detach": "disk",
    "template": "template",
    "clone": "template",
    "image": "image",
    "doctor": "doctor",
    "repair": "upkeep",
    "gc": "upkeep",
    "serve": "serve",
    "completion": "completion",
}


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from importlib.metadata import version

        output.write(f"uvm {version('utilityvm')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    commands_in=COMMANDS,
    epilog=exitcodes.HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, help="Log what is sent and answered to the standard error.")
def uvm(debug: bool) -> None:
    """Small VMs, and disks that come and go while they run."""
    output.log_to_stderr(debug=debug)
