"""VMs: start, stop, exec, shell, log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from utilityvm.cli import exitcodes, output
from utilityvm.cli.group import Command, Failed
from utilityvm.cli.options import (
    json_option,
    run,
    timeout_option,
    vm_argument,
    vms_argument,
    wait_option,
)
from utilityvm.cli.output import print_fields, print_json, say
from utilityvm.cli.owners import opened, run_with, served, stopped
from utilityvm.cli.values import MEMORY, SECONDS, Count, limit
from utilityvm.text import clean

if TYPE_CHECKING:
    from utilityvm import Limits, UtilityVM, UtilityVMError, VMConfig

BOOT_S = 120.0


@click.command("start", cls=Command, short_help="Start a VM.")
@click.argument("name")
@click.option(
    "--memory",
    "memory_mib",
    type=MEMORY,
    default=256,
    metavar="SIZE",
    help="Memory, such as 512M or 2G.  [default: 256M]",
)
@click.option("--cpus", type=Count(1, 255), default=1, show_default=True, metavar="N", help="Its number of processors.")
@click.option(
    "--controllers",
    type=Count(1, 4),
    default=4,
    show_default=True,
    metavar="N",
    help="Its number of SCSI controllers; each takes 64 disks.",
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Leave it running for other commands, or stay until Ctrl-C ends it.",
)
@click.option("--image", "key", metavar="KEY", help="Boot this guest image of `uvm image ls`.")
@timeout_option(BOOT_S)
@json_option
def start_command(
    name: str,
    memory_mib: int,
    cpus: int,
    controllers: int,
    keep: bool,
    key: str | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Start a VM named NAME. If there is no guest image yet, it is built first."""
    from utilityvm import VMConfig

    config = VMConfig(name=name, memory_mib=memory_mib, cpus=cpus, controllers=controllers, keep=keep)
    run(_start(config, key, timeout_s=timeout_s, as_json=as_json))


async def _start(config: VMConfig, key: str | None, *, timeout_s: float, as_json: bool) -> None:
    import asyncio

    from utilityvm import UtilityVM, get_image
    from utilityvm.cli.image import ensure_image

    config.check()
    image = get_image(key) if key is not None else await asyncio.to_thread(ensure_image)
    begun = time.monotonic()
    say(f"starting {config.name}…")
    async with UtilityVM.start(config, image=image, timeout_s=timeout_s) as vm:
        seconds = time.monotonic() - begun
        output.done(f"{vm.name} is up ({seconds:.1f} s, {vm.process.accelerator})")
        if as_json:
            print_json({**_description(vm), "seconds": round(seconds, 3)})
        elif not sys.stdout.isatty():
            print_fields({"name": vm.name, "pid": vm.process.pid, "accelerator": vm.process.accelerator})
        sys.stdout.flush()
        if config.keep:
            return
        say("Ctrl-C ends it")
        try:
            raise await vm.wait()
        except asyncio.CancelledError:
            await vm.stop()
            raise


def _description(vm: UtilityVM) -> dict[str, object]:
    process = vm.process
    return {
        "name": vm.name,
        "uuid": vm.uuid,
        "pid": process.pid,
        "keep": vm.config.keep,
        "memory_mib": vm.config.memory_mib,
        "cpus": vm.config.cpus,
        "controllers": vm.config.controllers,
        "accelerator": process.accelerator,
        "accelerator_reason": process.accelerator_reason,
        "walls": process.walls,
        "without": process.without,
    }


@click.command("stop", cls=Command, short_help="End VMs and remove what is left of them.")
@vms_argument
@click.option("--all", "everything", is_flag=True, help="End all VMs of this user.")
@click.option(
    "--force", is_flag=True, help="Kill them at once, also while other processes use them. Unwritten data is lost."
)
@wait_option
@json_option
def stop_command(names: tuple[str, ...], everything: bool, force: bool, wait_s: float, as_json: bool) -> None:
    """End the VMs, in whatever state they are, and remove all that is left of them.

    Each guest is asked to write out its data and to power off. One that fails does not keep the others.
    """
    from utilityvm import list_vms

    if bool(names) == everything:
        raise click.UsageError("--all takes no names" if everything else "give the names of VMs, or --all")
    names = tuple(vm.name for vm in list_vms()) if everything else tuple(dict.fromkeys(names))
    failed = run(_stop(names, force=force, wait_s=wait_s))
    stopped = [name for name in names if name not in failed]
    if as_json and (everything or stopped or len(names) > 1):
        documents = [{"name": name, "stopped": name not in failed} for name in names]
        print_json(documents[0] if len(names) == 1 and not everything else documents)
    if failed:
        raise Failed(list(failed.values()))


async def _stop(names: tuple[str, ...], *, force: bool, wait_s: float) -> dict[str, UtilityVMError]:
    """What went wrong with each."""
    import asyncio

    from utilityvm.errors import UtilityVMError

    failed: dict[str, UtilityVMError] = {}

    async def stop(name: str) -> None:
        begun = time.monotonic()
        try:
            lost = await stopped(name, wait_s=wait_s, force=force)
        except UtilityVMError as error:
            failed[name] = error
            return
        output.done(f"{name} is gone ({time.monotonic() - begun:.1f} s)")
        for line in lost:
            output.warn(line)

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(stop(name))
    return {name: failed[name] for name in names if name in failed}


class _ExecCommand(Command):
    """Its options stand before or after NAME. The next word begins the program, which gets all the rest; so does `--`.

    No word means something else because of one that follows it.
    """

    def own_words(self, ctx: click.Context, args: list[str]) -> list[str]:
        before, name, after, _ = self._divided(ctx, args)
        return [*before, *name, *after]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        before, name, after, program = self._divided(ctx, args)
        if program[:1] == ["--"]:
            program = program[1:]
        if program:  # else something is missing, and what that is, is said of what was typed
            args = [*before, *after, "--", *name, *program]
        return super().parse_args(ctx, args)

    def _divided(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
        """The options before NAME, NAME, the options behind it, and the program with a `--` before it."""
        before, rest = self._options(ctx, args)
        if rest[:1] == ["--"]:
            return before, rest[1:2], [], rest[2:]
        after, program = self._options(ctx, rest[1:])
        return before, rest[:1], after, program

    def _options(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        """The options at the beginning, with their values; and what follows."""
        with_value = {
            word
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and not option.is_flag
            for word in option.opts
        }
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] not in ("-", "--"):
            word, at = args[at], at + 1
            if word.startswith("--"):
                at += word in with_value
            else:  # of `-ne A=B` the last letter takes the next word; of `-eA=B` none does
                takes = next((place for place in range(1, len(word)) if f"-{word[place]}" in with_value), None)
                at += takes == len(word) - 1
        return args[:at], args[at:]


@click.command("exec", cls=_ExecCommand, short_help="Run a program in the guest.")
@vm_argument
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="PROGRAM [ARGUMENT]...")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal, which is ours: -it runs a shell as ssh does.")
@click.option("--interactive", "-i", is_flag=True, help="Pass it our input, as without it too: for -it.")
@click.option("--no-stdin", "-n", is_flag=True, help="Give the program no input.")
@click.option("--cwd", metavar="GUEST_PATH", help="The folder in the guest to run it in.")
@click.option(
    "--env",
    "-e",
    "variables",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set a variable for it. NAME alone passes on uvm's own, which keeps the value out of `ps`. Repeatable.",
)
@click.option("--timeout", "timeout_s", type=SECONDS, metavar="SECONDS", help="Kill it after so long.")
@click.option("--user", "-u", metavar="USER", help="Run it as this user of the guest, a name or a number.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="What it may use with all that it starts: memory=64M, pids=100, cpus=0.5. Repeatable.",
)
@click.option("--detach", "-d", is_flag=True, help="Let it go on in the guest, without input, and print its number.")
@click.option("--name", "program_name", metavar="TEXT", help="With --detach: a name for `uvm logs` and `uvm kill`.")
@wait_option
@json_option
def exec_command(
    name: str,
    program: tuple[str, ...],
    tty: bool,
    interactive: bool,
    no_stdin: bool,
    cwd: str | None,
    variables: tuple[str, ...],
    timeout_s: float | None,
    user: str | None,
    limits: tuple[str, ...],
    detach: bool,
    program_name: str | None,
    wait_s: float,
    as_json: bool,
) -> int:
    """Run a program in the guest.

    Options of uvm stand before PROGRAM. All that follows belongs to the program; a `--` before it is allowed.

    uvm passes its standard input to the program, prints its output and errors, and ends with its exit code. Other
    commands can use the VM meanwhile, if utilityvm[server] is installed; otherwise they wait. With --detach it goes on
    after uvm: see `uvm programs`.
    """
    from utilityvm.errors import DeadlineExceeded, GuestRefused, UtilityVMError

    how = {"cwd": cwd, "env": dict(map(_variable, variables)), "user": user, "limits": _limits(limits)}
    if detach and timeout_s is not None:
        raise click.UsageError("--timeout: a program that is detached goes on; end it with `uvm kill`")
    if program_name is not None and not detach:
        raise click.UsageError("--name: only a program that is detached has a name; add --detach")
    if no_stdin and (interactive or tty):
        raise click.UsageError("--no-stdin: --interactive and --tty give the program our input")
    if tty:
        from utilityvm.cli.terminal import check_terminal

        for word, is_given in {"detach": detach, "json": as_json, "timeout": timeout_s is not None}.items():
            if is_given:
                raise click.UsageError(f"--{word} cannot be used with --tty")
        check_terminal()
    begun: list[bool] = []
    try:
        if tty:
            work = _at_terminal(name, list(program), how, wait_s=wait_s)
        elif detach:
            work = _detach(name, list(program), how, program_name, wait_s=wait_s, as_json=as_json)
        else:
            times = timeout_s, wait_s
            work = _exec(name, list(program), begun, how, stdin=not no_stdin, times=times, as_json=as_json)
        # A terminal does not go through the server, which lets go of the VM for us.
        code = run(work) if tty else run_with(served(name, wait_s=wait_s), work, loop=not detach)
    except UtilityVMError as error:
        code = exitcodes.EXEC_FAILED
        if isinstance(error, GuestRefused) and error.kind in _NOT_STARTED:
            code = _NOT_STARTED[error.kind]
        elif isinstance(error, DeadlineExceeded) and begun and timeout_s is not None:
            code = exitcodes.EXEC_TIMEOUT
        raise Failed([error], code) from error
    return 128 - code if code < 0 else code


# The kinds of a guest's no to starting a program.
_NOT_STARTED = {"not_found": exitcodes.EXEC_NOT_FOUND, "refused": exitcodes.EXEC_NOT_EXECUTABLE}


def _variable(text: str) -> tuple[str, str]:
    import os

    name, equals, value = text.partition("=")
    if not name:
        raise click.UsageError(f"--env {text!r}: write it as NAME=VALUE, or NAME to pass on your own")
    if not equals:
        own = os.environ.get(name)
        if own is None:
            raise click.UsageError(f"--env {name}: there is no such variable to pass on; set one with NAME=VALUE")
        value = own
    return name, value


async def _at_terminal(name: str, command: list[str], how: dict[str, Any], *, wait_s: float) -> int:
    from utilityvm.cli.terminal import at_terminal

    async with opened(name, wait_s=wait_s) as vm:
        return await at_terminal(vm, command, how)


@click.command("shell", cls=Command, short_help="Run a shell in the guest, at this terminal.")
@vm_argument
@click.option("--user", "-u", metavar="USER", help="Be this user of the guest, a name or a number.")
@click.option("--cwd", metavar="GUEST_PATH", help="The folder in the guest to begin in.")
@wait_option
def shell_command(name: str, user: str | None, cwd: str | None, wait_s: float) -> int:
    """Run a login shell in the guest: bash, or sh if there is none. It is `uvm exec -it NAME` of that shell.

    It ends with `exit` or Ctrl-D, and uvm ends with its exit code. If uvm is ended, so is the shell. While it runs,
    other commands that need the VM wait.
    """
    from utilityvm.cli.terminal import check_terminal

    check_terminal()
    code = run(_at_terminal(name, list(_SHELL), {"user": user, "cwd": cwd}, wait_s=wait_s))
    return 128 - code if code < 0 else code


_SHELL = ("/bin/sh", "-c", "if [ -x /bin/bash ]; then exec /bin/bash -l; fi; exec /bin/sh -l")


def _limits(texts: tuple[str, ...]) -> Limits | None:
    from utilityvm import InvalidRequest, Limits

    if not texts:
        return None
    values = list(map(limit, texts))
    if twice := next((name for at, (name, _) in enumerate(values) if name in dict(values[:at])), None):
        raise click.UsageError(f"--limit: {_told(twice)} is given twice")
    limits = Limits(**dict(values))  # type: ignore[arg-type]  # by the field's type
    try:
        limits.told()
    except InvalidRequest as error:
        raise click.UsageError(f"--limit: {_told(str(error))}; {error.remedy}") from None
    return limits


def _told(text: str) -> str:
    """A limit, as `--limit` calls it."""
    return text.replace("memory_bytes", "memory")


async def _detach(
    name: str, command: list[str], how: dict[str, Any], program_name: str | None, *, wait_s: float, as_json: bool
) -> int:
    async with opened(name, wait_s=wait_s) as vm:
        program = await vm.start_program(command, name=program_name, follow=False, **how)
    output.done(f"program {program.number} runs in {name}")
    if as_json:
        print_json({"name": name, "number": program.number, "id": program.id, "pid": program.pid})
    else:
        output.write(str(program.number))
    return 0


async def _exec(
    name: str,
    command: list[str],
    begun: list[bool],
    how: dict[str, Any],
    *,
    stdin: bool,
    times: tuple[float | None, float],
    as_json: bool,
) -> int:
    from utilityvm.cli.own_input import own_input

    timeout_s, wait_s = times
    async with opened(name, wait_s=wait_s) as vm:
        begun.append(True)
        given = own_input() if stdin else None
        if not as_json:
            return await vm.run_streaming(
                command,
                stdin=given,
                stdout=lambda data: output.write_bytes(data, 1),
                stderr=lambda data: output.write_bytes(data, 2),
                timeout_s=timeout_s,
                **how,
            )
        out, err = bytearray(), bytearray()
        code = await vm.run_streaming(
            command, stdin=given, stdout=out.extend, stderr=err.extend, timeout_s=timeout_s, **how
        )
    print_json({"exit_code": code, **output.texts({"stdout": bytes(out), "stderr": bytes(err)})})
    return code


@click.command("log", cls=Command, short_help="Print the VM's console.")
@vm_argument
@click.option("--lines", "-n", type=Count(), metavar="N", help="Only the last N lines.")
@json_option
def log_command(name: str, lines: int | None, as_json: bool) -> None:
    """Print the VM's console and QEMU's messages: at least the last 512 KiB. It works for a VM that died, too."""
    from utilityvm import read_console

    kept = [clean(line, len(line)) for line in read_console(name).splitlines()]  # the guest chose what is in it
    if lines is not None:
        kept = kept[max(0, len(kept) - lines) :]
    if as_json:
        print_json({"name": name, "lines": kept})
        return
    for line in kept:
        output.write(line)
