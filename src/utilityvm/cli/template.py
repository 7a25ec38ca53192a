"""Templates and clones: template save, ls, show, verify, rm; clone."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command, Group
from utilityvm.cli.options import json_option, run, timeout_option, vm_argument, wait_option
from utilityvm.cli.output import age, print_fields, print_json, print_table, say
from utilityvm.cli.owners import opened
from utilityvm.cli.values import Count
from utilityvm.text import size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from utilityvm import DiskSpec, Slot, Template

SAVE_S = 120.0
CLONE_S = 60.0


def _complete_template(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from utilityvm import list_templates

    return [CompletionItem(one.name) for one in list_templates() if one.name.startswith(incomplete)]


@click.group("template", cls=Group)
def template_command() -> None:
    """Save VMs as templates, from which clones start."""


@template_command.command("save")
@vm_argument
@click.argument("template", metavar="TEMPLATE")
@timeout_option(SAVE_S)
@wait_option
@json_option
def save_command(name: str, template: str, timeout_s: float, wait_s: float, as_json: bool) -> None:
    """Save the VM, with its disks, as TEMPLATE. The VM cannot run again; its clones can."""
    run(_save(name, template, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))


async def _save(name: str, template: str, *, timeout_s: float, wait_s: float, as_json: bool) -> None:
    async with opened(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        saved = await vm.save_as_template(template, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
    output.done(f"{name} is saved as template {saved.name} ({seconds:.1f} s)")
    if as_json:
        print_json({**_document(saved, []), "seconds": round(seconds, 3)})
    else:
        print_fields({"name": saved.name, "size": size(saved.disk_bytes()), "folder": saved.folder})


@template_command.command("ls")
@json_option
def ls_command(as_json: bool) -> None:
    """List the templates."""
    from utilityvm import list_templates

    rows = [(template, template.users()) for template in list_templates()]
    if as_json:
        print_json([_document(template, users) for template, users in rows])
        return
    now = time.time()
    print_table(
        ("NAME", "MEMORY", "CPUS", "DISKS", "SIZE", "USERS", "AGE", "ACCELERATOR"),
        [
            (
                template.name,
                f"{template.memory_mib} MiB",
                template.cpus,
                len(template.disks),
                size(template.disk_bytes()),
                len(users),
                age(now - template.created),
                template.accelerator,
            )
            for template, users in rows
        ],
    )


@template_command.command("show")
@click.argument("template", shell_complete=_complete_template)
@json_option
def show_command(template: str, as_json: bool) -> None:
    """Show what the template is made of, and what depends on it."""
    from utilityvm import get_template

    found = get_template(template)
    document, users = _document(found, found.users()), found.users()
    if as_json:
        print_json(document)
        return
    disks = document.pop("disks")
    assert isinstance(disks, list)
    print_fields({**document, "users": ", ".join(users)})
    print_table(("SLOT", "MODE", "SIZE", "GUEST PATHS", "FILES"), [_disk_row(disk) for disk in disks])


def _disk_row(disk: Mapping[str, object]) -> tuple[object, ...]:
    paths, files = disk["guest_paths"], disk["files"]
    assert isinstance(paths, list)
    assert isinstance(files, list)
    assert isinstance(disk["size_bytes"], int)
    mode = "ro" if disk["read_only"] else "rw"
    return disk["slot"], mode, size(disk["size_bytes"]), " ".join(paths), " over ".join(files)


@template_command.command("verify", short_help="Compare the template with what was saved.")
@click.argument("template", shell_complete=_complete_template)
@json_option
def verify_command(template: str, as_json: bool) -> None:
    """Compare every file of the template, and the disks under it, with what was saved."""
    from utilityvm import TemplateDamaged, get_template

    differences = get_template(template).verify()
    if as_json:
        print_json({"name": template, "differences": differences})
    elif not differences:
        print_fields({"name": template, "verdict": "as it was saved"})
    if differences:
        raise TemplateDamaged(
            f"template {template}: {'; '.join(differences)}",
            remedy=f"remove it and save it anew: uvm template rm {template}",
        )


@template_command.command("rm")
@click.argument("template", shell_complete=_complete_template)
@json_option
def rm_command(template: str, as_json: bool) -> None:
    """Remove the template. Its disks stay, and may be written to again."""
    from utilityvm import get_template

    get_template(template).remove()
    if as_json:
        print_json({"name": template})


@click.command("clone", cls=Command, short_help="Start VMs from a template.")
@click.argument("template", shell_complete=_complete_template)
@click.argument("name")
@click.option("--count", type=Count(1, 1000), default=1, metavar="N", help="Start N of them, named NAME-1 to NAME-N.")
@click.option(
    "--replace",
    "replacements",
    multiple=True,
    metavar="SLOT=DISK",
    help="Put another disk of the same size at a slot that has no mount, such as 0:2=other.qcow2. Repeatable.",
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Leave it running for other commands, or stay until Ctrl-C ends it.",
)
@timeout_option(CLONE_S)
@json_option
def clone_command(
    template: str,
    name: str,
    count: int,
    replacements: tuple[str, ...],
    keep: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Start a VM named NAME that continues where TEMPLATE was saved."""
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    replace = _replacements(template, replacements)
    if replace and count > 1 and any(not disk.read_only for disk in replace.values()):
        raise click.UsageError("a disk that is written to can replace that of one clone only")
    run(_clone(template, names, replace, keep=keep, timeout_s=timeout_s, as_json=as_json))


async def _clone(
    template: str, names: list[str], replace: Mapping[Slot, DiskSpec], *, keep: bool, timeout_s: float, as_json: bool
) -> None:
    import asyncio
    from contextlib import AsyncExitStack

    from utilityvm import UtilityVM

    rows: list[dict[str, object]] = []
    async with AsyncExitStack() as closing:
        try:
            for name in names:
                begun = time.monotonic()
                vm = await UtilityVM.clone(template, name, keep=keep, replace=replace, timeout_s=timeout_s)
                closing.push_async_callback(vm.close)
                seconds = time.monotonic() - begun
                output.done(f"{name} is up ({seconds * 1000:.0f} ms)")
                rows.append({"name": name, "uuid": vm.uuid, "pid": vm.process.pid, "seconds": round(seconds, 3)})
        finally:
            if rows and (keep or len(rows) == len(names)):  # also if the next failed: these run
                _print_clones(rows, is_one=len(names) == 1, as_json=as_json)
        if not keep:
            say("Ctrl-C ends it")
            await asyncio.Event().wait()


def _print_clones(rows: list[dict[str, object]], *, is_one: bool, as_json: bool) -> None:
    if as_json:
        print_json(rows[0] if is_one else rows)
    else:
        print_table(("NAME", "PID", "SECONDS"), [(row["name"], row["pid"], row["seconds"]) for row in rows])
    sys.stdout.flush()


def _replacements(template: str, texts: tuple[str, ...]) -> dict[Slot, DiskSpec]:
    """A replacement is as writable as the disk whose place it takes."""
    from utilityvm import DiskSpec, Slot, get_template

    if not texts:
        return {}
    modes = {disk.slot: disk.read_only for disk in get_template(template).disks}
    result = {}
    for text in texts:
        slot_text, equals, disk = text.partition("=")
        if not equals or not disk:
            raise click.UsageError(f"--replace {text}: write it as SLOT=DISK, such as 0:2=other.qcow2")
        slot = Slot.parse(slot_text)
        if slot in result:
            raise click.UsageError(f"--replace: slot {slot} twice")
        physical = Path(disk).is_block_device()
        result[slot] = DiskSpec(host_path=disk, read_only=modes.get(slot, False), physical=physical)
    return result


def _document(template: Template, users: list[str]) -> dict[str, object]:
    return {
        "name": template.name,
        "uuid": template.uuid,
        "vm": template.vm,
        "created": template.created,
        "memory_mib": template.memory_mib,
        "cpus": template.cpus,
        "controllers": template.controllers,
        "qemu": template.qemu_version,
        "machine": template.machine,
        "accelerator": template.accelerator,
        "kernel": template.kernel,
        "size_bytes": template.disk_bytes(),
        "folder": str(template.folder),
        "parent": template.parent,
        "users": users,
        "disks": [
            {
                "slot": str(disk.slot),
                "read_only": disk.read_only,
                "size_bytes": disk.size_bytes,
                "guest_paths": [str(path) for path in disk.guest_paths],
                "files": list(disk.host_paths),
            }
            for disk in template.disks
        ],
    }
