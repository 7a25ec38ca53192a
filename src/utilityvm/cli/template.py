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
from utilityvm.cli.output import age, print_fields, print_json, print_table, say, size
from utilityvm.cli.owners import opened
from utilityvm.cli.values import Count

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from utilityvm.scsi.slot import Slot
    from utilityvm.templates.catalog import Template
    from utilityvm.vm.config import DiskSpec

SAVE_S = 120.0
CLONE_S = 60.0


def _complete_template(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from utilityvm.templates import catalog

    return [CompletionItem(name) for name in catalog.names() if name.startswith(incomplete)]


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
    from utilityvm.store.recover import open_store
    from utilityvm.templates import catalog

    with open_store() as store:
        rows = [(template, catalog.users(template, store)) for template in catalog.every()]
    if as_json:
        print_json([_document(template, users) for template, users in rows])
        return
    now = time.time()
    print_table(
        ("NAME", "MEMORY", "CPUS", "DISKS", "SIZE", "USERS", "AGE", "ACCELERATOR"),
        [
            (
                template.name,
                f"{template.manifest.memory_mib} MiB",
                template.manifest.cpus,
                len(template.manifest.disks),
                size(template.disk_bytes()),
                len(users),
                age(now - template.manifest.created),
                template.manifest.accelerator,
            )
            for template, users in rows
        ],
    )


@template_command.command("show")
@click.argument("template", shell_complete=_complete_template)
@json_option
def show_command(template: str, as_json: bool) -> None:
    """Show what the template is made of, and what depends on it."""
    found, users = _with_users(template)
    document = _document(found, users)
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


@template_command.command("verify")
@click.argument("template", shell_complete=_complete_template)
@json_option
def verify_command(template: str, as_json: bool) -> None:
    """Compare every file of the template, and the disks under it, with what was saved."""
    from utilityvm.errors import TemplateDamaged
    from utilityvm.templates import catalog

    found = catalog.load(template)
    differences = catalog.verify(found)
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
    from utilityvm.store.recover import open_store
    from utilityvm.templates import catalog

    with open_store() as store:
        catalog.remove(template, store)
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

    from utilityvm.vm.utility_vm import UtilityVM

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
    from utilityvm.scsi.slot import Slot
    from utilityvm.templates import catalog
    from utilityvm.vm.config import DiskSpec

    if not texts:
        return {}
    modes = {disk.slot: disk.read_only for disk in catalog.load(template).manifest.disks}
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


def _with_users(name: str) -> tuple[Template, list[str]]:
    from utilityvm.store.recover import open_store
    from utilityvm.templates import catalog

    template = catalog.load(name)
    with open_store() as store:
        return template, catalog.users(template, store)


def _document(template: Template, users: list[str]) -> dict[str, object]:
    manifest = template.manifest
    return {
        "name": manifest.name,
        "uuid": manifest.uuid,
        "vm": manifest.vm,
        "created": manifest.created,
        "memory_mib": manifest.memory_mib,
        "cpus": manifest.cpus,
        "controllers": manifest.controllers,
        "qemu": manifest.qemu_version,
        "machine": manifest.machine,
        "accelerator": manifest.accelerator,
        "kernel": manifest.kernel,
        "size_bytes": template.disk_bytes(),
        "folder": str(template.folder),
        "parent": manifest.parent.name if manifest.parent else None,
        "users": users,
        "disks": [
            {
                "slot": str(disk.slot),
                "read_only": disk.read_only,
                "size_bytes": disk.size_bytes,
                "guest_paths": [mount.guest_path for mount in disk.mounts],
                "files": [layer.path for layer in disk.layers],
            }
            for disk in manifest.disks
        ],
    }
