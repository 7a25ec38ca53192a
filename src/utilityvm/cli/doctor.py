"""The machine: doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from utilityvm.cli import exitcodes, output
from utilityvm.cli.group import Command
from utilityvm.cli.options import json_option, run
from utilityvm.cli.output import print_json, print_table

if TYPE_CHECKING:
    from utilityvm import Finding


@click.command("doctor", cls=Command, short_help="Check what this machine needs to run VMs.")
@json_option
def doctor_command(as_json: bool) -> int:
    """Check everything that VMs need on this machine, and say how to fix what is missing.

    The exit code is 1 if VMs cannot run.
    """
    from utilityvm import doctor

    findings = run(doctor())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    return exitcodes.ERROR if any(finding.verdict == "fault" for finding in findings) else exitcodes.OK


def _print(findings: list[Finding]) -> None:
    if not sys.stdout.isatty():
        print_table((), [(finding.verdict, finding.what, finding.detail, finding.fix) for finding in findings])
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        output.write(f"{finding.verdict:<5}  {finding.what:<{width}}  {finding.detail}")
        if finding.fix:
            output.write(f"{'':<{width + 9}}fix: {finding.fix}")
