"""The command `uvm`.

Each noun has a file: `vm`, `disk`, `template`, `image`, `upkeep`, `doctor`, `completion`. They are loaded when they
are used, and what they need of the library when they run, so that a command which only reads the store (`ps`, `ls`,
`path`) is done in a blink.

What a command prints: on a terminal, tables and progress; into a pipe, plain lines of tab-separated fields without a
heading; with `--json`, one JSON document. Progress, warnings and errors go to the standard error. An error is one line
`error: …`, with a `hint: …` line where there is something to do about it; with `--json` it is a JSON object. The exit
codes are in `exitcodes`.
"""

from __future__ import annotations

import click

from utilityvm.cli.group import LazyGroup

COMMANDS = {
    "doctor": "doctor",
    "start": "vm",
    "ps": "vm",
    "stop": "vm",
    "exec": "vm",
    "log": "vm",
    "attach": "disk",
    "ls": "disk",
    "path": "disk",
    "resize": "disk",
    "detach": "disk",
    "template": "template",
    "clone": "template",
    "image": "image",
    "repair": "upkeep",
    "gc": "upkeep",
    "completion": "completion",
}

EPILOG = """\b
Exit codes:
  0    done
  1    refused by the hypervisor or the guest, or another error
  2    wrong usage, or a value that cannot be
  3    no such VM, disk, reservation or template
  4    busy: owned, in use, or taken by another
  5    no answer in time; the outcome is unknown
  6    this machine lacks something, or the store cannot be used
  7    the VM is not running
  8    the disk image is damaged or unsafe, or a template is
  130  interrupted
`uvm exec` ends with the program's own code; 125 means that uvm failed, 127 that the program could not be started.
"""


@click.group(
    cls=LazyGroup,
    commands_in=COMMANDS,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="utilityvm", prog_name="uvm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Log to the standard error what is sent and answered.")
def main(debug: bool) -> None:
    """Small VMs, and disks that come and go while they run."""
    from utilityvm.cli.output import log_to_stderr

    log_to_stderr(debug=debug)
