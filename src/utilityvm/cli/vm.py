"""VMs: start, ps, stop, exec, log."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from utilityvm.cli import exitcodes
from utilityvm.cli.group import Failed
from utilityvm.cli.options import json_option, run, timeout_option, vm_argument, wait_option
from utilityvm.cli.output import age, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    import asyncio

    from utilityvm.store import Store, StoredVM
    from utilityvm.store.ownership import Owner
    from utilityvm.vm.config import VMConfig
    from utilityvm.vm.utility_vm import UtilityVM

BOOT_S = 120.0


@click.command("start")
@click.argument("name")
@click.option("--memory", "memory_mib", type=int, default=256, show_default=True, metavar="MIB", help="Its memory.")
@click.option("--cpus", type=int, default=1, show_default=True, metavar="N", help="Its processors.")
@click.option(
    "--controllers", type=int, default=4, show_default=True, metavar="N", help="Its SCSI controllers, of 64 disks each."
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Leave it running, for the commands that follow; or stay, and end it with Ctrl-C.",
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
    """Start a VM named NAME. Builds the guest image first if there is none."""
    from utilityvm.vm.config import VMConfig

    config = VMConfig(name=name, memory_mib=memory_mib, cpus=cpus, controllers=controllers, keep=keep)
    run(_start(config, key, timeout_s=timeout_s, as_json=as_json))


async def _start(config: VMConfig, key: str | None, *, timeout_s: float, as_json: bool) -> None:
    import asyncio

    from utilityvm.cli.image import ensure_image, find_image
    from utilityvm.vm.utility_vm import UtilityVM

    config.check()
    image = find_image(key) if key is not None else await asyncio.to_thread(ensure_image)
    begun = time.monotonic()
    say(f"starting {config.name}…")
    async with UtilityVM.start(config, image=image, timeout_s=timeout_s) as vm:
        seconds = time.monotonic() - begun
        say(f"{vm.name} is up ({seconds:.1f} s, {vm.process.accelerator})")
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
    }


@click.command("ps")
@json_option
def ps_command(as_json: bool) -> None:
    """List the VMs of this user, and the process that owns each."""
    from utilityvm.store.recover import open_store

    now = time.time()
    with open_store() as store:
        vms = [(vm, _disks(store, vm), _owner(vm)) for vm in store.vms()]
    if as_json:
        print_json(
            [
                {
                    "name": vm.name,
                    "state": _state(vm, owner),
                    "pid": vm.pid if vm.is_alive() else None,
                    "uuid": vm.uuid,
                    "memory_mib": vm.config.get("memory_mib"),
                    "cpus": vm.config.get("cpus"),
                    "keep": vm.config.get("keep"),
                    "accelerator": vm.process.get("accelerator") if vm.process else None,
                    "disks": disks,
                    "owner": owner.to_json() if owner else None,
                    "created": vm.created,
                    "age_s": round(now - vm.created, 1),
                }
                for vm, disks, owner in vms
            ]
        )
        return
    print_table(
        ("NAME", "STATE", "PID", "MIB", "CPUS", "DISKS", "AGE", "OWNER"),
        [
            (
                vm.name,
                _state(vm, owner),
                vm.pid if vm.is_alive() else None,
                vm.config.get("memory_mib"),
                vm.config.get("cpus"),
                disks,
                age(now - vm.created),
                f"{owner.pid} {owner.command}" if owner else None,
            )
            for vm, disks, owner in vms
        ],
    )


def _disks(store: Store, vm: StoredVM) -> int | None:
    """How many it has; None: its journal cannot be read."""
    from utilityvm.errors import StoreError
    from utilityvm.store import SqliteJournal
    from utilityvm.store.view import slots

    try:
        return len(slots(SqliteJournal(store, vm).read()))
    except StoreError:
        return None


def _owner(vm: StoredVM) -> Owner | None:
    from utilityvm.machine import paths
    from utilityvm.store.catalog import is_plain
    from utilityvm.store.ownership import owner_of

    return owner_of(paths.vm_dir(vm.name), vm.owner) if is_plain(vm.name) else None


def _state(vm: StoredVM, owner: Owner | None) -> str:
    """The VM's state as it is: one that was being started or stopped by a process that died is dead."""
    from utilityvm.store import VMState

    is_left = vm.state in (VMState.STARTING, VMState.STOPPING) and owner is None and not vm.is_alive()
    return VMState.DEAD if is_left else vm.seen_state


@click.command("stop")
@vm_argument
@click.option(
    "--force", is_flag=True, help="Kill it at once, whoever uses it. What the guest has not written out is lost."
)
@wait_option
@json_option
def stop_command(name: str, force: bool, wait_s: float, as_json: bool) -> None:
    """End the VM, in whatever state it is, and remove all that is left of it."""
    from utilityvm.vm.utility_vm import UtilityVM

    begun = time.monotonic()
    for line in run(UtilityVM.remove(name, wait_s=wait_s, force=force)):
        click.echo(f"warning: {line}", err=True)
    say(f"{name} is gone ({time.monotonic() - begun:.1f} s)")
    if as_json:
        print_json({"name": name, "stopped": True})


class _ExecCommand(click.Command):
    """Takes options up to the program's name; up to `--`, where that is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@click.command("exec", cls=_ExecCommand)
@vm_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--no-stdin", "-n", is_flag=True, help="Give the program no input.")
@click.option("--cwd", metavar="PATH", help="The guest's folder to run it in.")
@click.option("--env", "-e", "variables", multiple=True, metavar="NAME=VALUE", help="A variable for it. Repeatable.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Then it is killed."
)
@wait_option
@json_option
def exec_command(
    name: str,
    command: tuple[str, ...],
    no_stdin: bool,
    cwd: str | None,
    variables: tuple[str, ...],
    timeout_s: float | None,
    wait_s: float,
    as_json: bool,
) -> int:
    """Run a program in the guest: uvm exec NAME -- CMD...

    Its input, output and errors are ours, and its exit code (128 + N if signal N killed it). The VM is ours while the
    program runs: other commands wait in the queue.
    """
    from utilityvm.errors import GuestRefused, UtilityVMError

    env: dict[str, str] = {}
    for variable in variables:
        key, equals, value = variable.partition("=")
        if not key or not equals:
            raise click.UsageError(f"{variable!r} is not NAME=VALUE")
        env[key] = value
    words = list(command[1:] if command[0] == "--" else command)
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    try:
        code = run(
            _exec(name, words, stdin=not no_stdin, cwd=cwd, env=env, limits=(timeout_s, wait_s), as_json=as_json)
        )
    except UtilityVMError as error:
        started = not isinstance(error, GuestRefused)
        raise Failed(error, exitcodes.EXEC_FAILED if started else exitcodes.EXEC_NOT_STARTED) from error
    return 128 - code if code < 0 else code


async def _exec(
    name: str,
    command: list[str],
    *,
    stdin: bool,
    cwd: str | None,
    env: dict[str, str],
    limits: tuple[float | None, float],
    as_json: bool,
) -> int:
    import base64

    from utilityvm.vm.utility_vm import UtilityVM

    timeout_s, wait_s = limits
    async with UtilityVM.open(name, wait_s=wait_s) as vm:
        given = _own_input() if stdin else None
        if not as_json:
            return await vm.run_streaming(
                command,
                stdin=given,
                stdout=lambda data: _pass_on(data, 1),
                stderr=lambda data: _pass_on(data, 2),
                env=env,
                cwd=cwd,
                timeout_s=timeout_s,
            )
        out, err = bytearray(), bytearray()
        code = await vm.run_streaming(
            command, stdin=given, stdout=out.extend, stderr=err.extend, env=env, cwd=cwd, timeout_s=timeout_s
        )
    document: dict[str, object] = {"exit_code": code}
    for stream, data in (("stdout", bytes(out)), ("stderr", bytes(err))):
        try:
            document[stream] = data.decode()
        except UnicodeDecodeError:
            document[f"{stream}_base64"] = base64.b64encode(data).decode()
    print_json(document)
    return code


def _pass_on(data: bytes, descriptor: int) -> None:
    import os

    while data:
        data = data[os.write(descriptor, data) :]


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _own_input() -> AsyncIterator[bytes]:
    """What comes on our standard input, without holding up the loop; nothing reads ahead of the program."""
    import asyncio
    import os

    loop = asyncio.get_running_loop()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(0, _set, ready)
        except PermissionError:
            pass  # a file, which is always ready: epoll(7) does not take it
        except OSError:
            return  # closed
        else:
            try:
                await ready
            finally:
                loop.remove_reader(0)
        try:
            data = os.read(0, 32768)
        except OSError:
            return
        if not data:
            return
        yield data


@click.command("log")
@vm_argument
@click.option("--lines", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@json_option
def log_command(name: str, lines: int | None, as_json: bool) -> None:
    """Print the VM's console and QEMU's messages: the last 512 KiB at least. Also of a VM that died."""
    from utilityvm.hosts.qemu import console
    from utilityvm.machine import paths
    from utilityvm.store.recover import open_store

    with open_store() as store:
        store.get(name)
    text = console.read(paths.vm_dir(name)).decode(errors="replace")
    kept = text.splitlines()
    if lines is not None:
        kept = kept[max(0, len(kept) - lines) :]
    if as_json:
        print_json({"name": name, "lines": kept})
        return
    for line in kept:
        # The guest wrote it: what would steer the terminal is not passed on.
        shown = "".join(character if character.isprintable() or character == "\t" else "" for character in line)
        click.echo(shown if sys.stdout.isatty() else line)
