"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import click
from msgspec.structs import fields

from utilityvm import MountConfig
from utilityvm.cli.values import SECONDS, WAIT, Count

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

WAIT_S = 30.0


def _complete_vm(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from utilityvm import UtilityVMError, list_vms

    try:
        return [CompletionItem(vm.name, help=vm.state) for vm in list_vms() if vm.name.startswith(incomplete)]
    except UtilityVMError:
        return []


def complete_attached(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from utilityvm import UtilityVMError, list_disks

    try:
        rows = list_disks(ctx.params["name"])
    except (UtilityVMError, KeyError):
        return []
    here = f"{Path.cwd()}/"
    names = [
        (name, row.slot)
        for row in rows
        for name in (row.host_path, row.host_path.removeprefix(here), *map(str, row.guest_paths))
    ]
    return [
        CompletionItem(name, help=str(slot))
        for name, slot in dict.fromkeys(names)
        if name.startswith(incomplete) and name.isprintable() and (incomplete or name.startswith("/"))
    ]


def vm_argument(command: F) -> F:
    """NAME: a VM that there is."""
    return click.argument("name", shell_complete=_complete_vm)(command)


def vms_argument(command: F) -> F:
    """[NAME]...: VMs that there are."""
    return click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete_vm)(command)


def attached_argument(command: F) -> F:
    """DISK: one that is attached."""
    return click.argument("disk", shell_complete=complete_attached)(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def wait_option(command: F) -> F:
    return click.option(
        "--wait",
        "wait_s",
        type=WAIT,
        default=WAIT_S,
        metavar="SECONDS",
        help=f"How long to wait while another process uses the VM.  [default: {WAIT_S:g}]",
    )(command)


def timeout_option(default_s: float) -> Callable[[F], F]:
    return click.option(
        "--timeout",
        "timeout_s",
        type=SECONDS,
        default=default_s,
        metavar="SECONDS",
        help=f"How long it may take.  [default: {default_s:g}]",
    )


# Settings of a mount that are written in another way: `:ro`, --encrypt-scratch and --key-file, --verity.
WRITTEN_OTHERWISE: Final = {"read_only", "encryption", "verity"}


def mount_options(command: F) -> F:
    """An option for each setting of a mount, as `MountConfig` declares it."""
    settings = [field for field in fields(MountConfig) if field.name not in WRITTEN_OTHERWISE]
    for field in reversed(settings):
        kind, meta = get_args(field.type)
        text = str(meta.description)
        for other in settings:
            if "_" in other.name:
                text = text.replace(other.name, _option(other.name))
        word = _option(field.name)
        if kind is bool:
            option = click.option(word, field.name, is_flag=True, help=text)
        elif kind == tuple[str, ...]:  # --options is given one by one
            short, word = f"-{word[2]}", word.removesuffix("s")
            option = click.option(word, short, field.name, multiple=True, metavar="O", help=f"{text} Repeatable.")
        elif kind is int:
            option = click.option(word, field.name, type=Count(), default=field.default, metavar="N", help=text)
        else:
            option = click.option(word, field.name, default=field.default, metavar=word[2].upper(), help=text)
        command = option(command)
    return command


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work in an event loop. Ctrl-C, SIGTERM and SIGHUP cancel it, and it cleans up before it returns.

    Each further one does the same and no more: whatever the work takes back, it finishes.
    """
    import asyncio  # late: commands that only read the store do without it
    import signal

    interrupted = False

    async def until_interrupted() -> T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup(1)
                asyncio.get_running_loop().add_signal_handler(number, interrupt)
        return await work

    try:
        return asyncio.run(until_interrupted())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
