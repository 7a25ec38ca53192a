"""Commands and groups as `uvm` needs them: loaded when they are used, with one way out.

Whatever ends a command comes to `LazyGroup.main`, which tells it once, in the form that was asked for, and ends the
process with a documented code.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from utilityvm import introduce
from utilityvm.cli import exitcodes, output, words
from utilityvm.errors import UtilityVMError

_begun = "uvm"  # the command that was given: click does not always say in which one it found a mistake


class Failed(Exception):
    """Errors that end the process with a code of the command's choice: the first is the worst."""

    def __init__(self, errors: Sequence[UtilityVMError], code: int | None = None) -> None:
        super().__init__(str(errors[0]))
        self.errors = errors
        self.code = exitcodes.code_of(errors[0]) if code is None else code


class _Interrupted(BaseException):
    """Ctrl-C, which click would answer with an empty line."""


class _Helpful(click.Command):
    """Prints its help as everything is printed."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        def show(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
            if is_asked and not ctx.resilient_parsing:
                output.write(ctx.get_help())
                ctx.exit()

        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = show
        return option


class Command(_Helpful):
    """A command that knows which of the words after its name are its own."""

    def own_words(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The words that may be options: those before `--`."""
        return args[: args.index("--")] if "--" in args else args

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        global _begun
        _begun = ctx.command_path
        output.begin(as_json="--json" in self.own_words(ctx, args))
        introduce(ctx.command_path)  # to those who find a VM in use
        words.speak_of(self.get_params(ctx))
        return super().parse_args(ctx, args)


class Group(_Helpful, click.Group):
    """A group of commands; without one it prints its help."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            output.echo_error(ctx.get_help())
            ctx.exit(exitcodes.USAGE)
        return super().parse_args(ctx, args)


class LazyGroup(Group):
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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> NoReturn:
        """Run, and end the process with a documented code; an error is one line on the standard error."""
        given = list(sys.argv[1:] if args is None else args)
        global _begun
        _begun = "uvm"
        output.begin(as_json="--json" in given)  # until the command is known
        if "_UVM_COMPLETE" in os.environ:
            importlib.import_module("utilityvm.cli.completion")  # how it is quoted
        try:
            result = super().main(given, *rest, **{"prog_name": "uvm", **settings, "standalone_mode": False})
            code = result if isinstance(result, int) else exitcodes.OK
            output.tell_warnings()
        except UtilityVMError as error:
            code = exitcodes.code_of(error)
            _tell([error], code)
        except Failed as failure:
            code = failure.code
            _tell(failure.errors, code)
        except click.ClickException as failure:
            code = failure.exit_code
            context = failure.ctx if isinstance(failure, click.UsageError) else None
            hint = f"{context.command_path if context else _begun} --help"
            output.tell_errors([output.Told(type(failure).__name__, _sentence(failure.format_message()), hint)], code)
        except (_Interrupted, KeyboardInterrupt, click.Abort):
            code = exitcodes.INTERRUPTED
        sys.exit(code)


def _sentence(text: str) -> str:
    """What click says, written as our own errors are: a small letter first, and no full stop."""
    head = text[:1].lower() + text[1:]
    return head.removesuffix(".")


def _tell(errors: Sequence[UtilityVMError], code: int) -> None:
    told = [
        output.Told(type(error).__name__, words.spoken(str(error)), error.remedy and words.spoken(error.remedy))
        for error in errors
    ]
    output.tell_errors(told, code)
