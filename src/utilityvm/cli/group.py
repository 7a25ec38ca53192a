"""A click group that loads a command's module when the command is used, and ends in one line when it fails."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from utilityvm.cli import exitcodes
from utilityvm.errors import UtilityVMError
from utilityvm.machine import oserrors
from utilityvm.text import clean


class Failed(Exception):
    """An error that ends the process with another code than its kind says."""

    def __init__(self, error: UtilityVMError, code: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.code = code


class LazyGroup(click.Group):
    """`commands_in` says which module of `utilityvm.cli` has which command, as a variable of its name."""

    def __init__(self, *args: Any, commands_in: Mapping[str, str], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._commands_in = commands_in

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._commands_in)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._commands_in:
            return None
        module = importlib.import_module(f"utilityvm.cli.{self._commands_in[cmd_name]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> NoReturn:
        """Run, and end the process with a documented code; an error is one line on the standard error."""
        words = list(sys.argv[1:] if args is None else args)
        own = words[: words.index("--")] if "--" in words else words
        try:
            code = super().main(words, *rest, **{**settings, "standalone_mode": False})
        except (UtilityVMError, Failed) as failure:
            error = failure.error if isinstance(failure, Failed) else failure
            code = failure.code if isinstance(failure, Failed) else exitcodes.code_of(error)
            _tell(type(error).__name__, str(error), error.remedy, code, as_json="--json" in own)
        except click.ClickException as failure:
            code = failure.exit_code
            context = failure.ctx if isinstance(failure, click.UsageError) else None
            hint = f"{context.command_path} --help" if context else None
            _tell(type(failure).__name__, failure.format_message(), hint, code, as_json="--json" in own)
        except (KeyboardInterrupt, click.Abort):
            code = exitcodes.INTERRUPTED
        except BrokenPipeError:
            # Who read our output has enough. What Python still holds of it must not fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = exitcodes.ERROR
        except OSError as failure:
            error = oserrors.as_ours(failure, "uvm")
            code = exitcodes.code_of(error)
            _tell(type(error).__name__, str(error), error.remedy, code, as_json="--json" in own)
        sys.exit(code if isinstance(code, int) else exitcodes.OK)


def _tell(kind: str, message: str, hint: str | None, code: int, *, as_json: bool) -> None:
    # A guest's words are clean already; those of a file's name, or of QEMU, may not be.
    text, hint = " ".join(clean(message).split()), hint and " ".join(clean(hint).split())
    if as_json:
        import json

        click.echo(json.dumps({"error": kind, "message": text, "hint": hint, "exit_code": code}), err=True)
        return
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {text}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True)
