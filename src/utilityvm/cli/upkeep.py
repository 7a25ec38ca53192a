"""Upkeep: repair, gc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command, Failed
from utilityvm.cli.options import json_option, run, vm_argument, wait_option
from utilityvm.cli.output import print_json, print_table, say
from utilityvm.text import size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from utilityvm import Leftover, UtilityVMError

apply_option = click.option("--apply", "is_applied", is_flag=True, help="Do it. Without this option nothing changes.")


@click.command("repair", cls=Command, short_help="Make the VM's journal, QEMU and guest agree.")
@vm_argument
@apply_option
@wait_option
@json_option
def repair_command(name: str, is_applied: bool, wait_s: float, as_json: bool) -> None:
    """List where the VM's journal, its QEMU and its guest disagree; with --apply, make them agree.

    A half-done step is finished if a reservation needs it, and undone otherwise. Reservations of dead processes are
    given back. A disk that the journal does not know is detached unless the guest uses it.
    """
    run(_repair(name, is_applied=is_applied, wait_s=wait_s, as_json=as_json))


async def _repair(name: str, *, is_applied: bool, wait_s: float, as_json: bool) -> None:
    from utilityvm import examine_vm, repair_vm

    found = await examine_vm(name, wait_s=wait_s)
    done = await repair_vm(name, wait_s=wait_s) if is_applied else []
    if as_json:
        differences = [{"slot": str(one.slot or "") or None, "what": one.what, "remedy": one.remedy} for one in found]
        print_json({"name": name, "differences": differences, "done": done})
        return
    print_table(("SLOT", "WHAT", "REMEDY"), [(one.slot, one.what, one.remedy) for one in found])
    for line in done:
        say(line)
    if not found:
        say("the journal, QEMU and the guest agree")
    elif not is_applied:
        say(f"nothing was changed; to do it: uvm repair {name} --apply")


@click.command("gc", cls=Command, short_help="List leftovers, or remove them.")
@apply_option
@json_option
def gc_command(is_applied: bool, as_json: bool) -> None:
    """List leftovers of VMs, clones and builds that no longer exist; with --apply, remove them.

    Leftovers are dead VMs, runtime folders, overlays of clones, half-made templates, guest images that nothing uses,
    and files of interrupted builds. Your own disk images are never removed.
    """
    from utilityvm import find_leftovers

    found = find_leftovers()
    removed, failed = run(_remove(found)) if is_applied and found else ([], {})
    if removed:
        output.done(f"removed {', '.join(f'{one.kind} {one.name}' for one in removed)}")
    _print_leftovers(found, removed, failed, is_applied=is_applied, as_json=as_json)
    if failed:
        raise Failed(list(failed.values()))


async def _remove(found: list[Leftover]) -> tuple[list[Leftover], dict[str, UtilityVMError]]:
    from utilityvm import UtilityVMError, remove_leftovers

    results = list(zip(found, await remove_leftovers(found), strict=True))
    removed = [one for one, result in results if result is True]
    return removed, {str(one.path): result for one, result in results if isinstance(result, UtilityVMError)}


def _print_leftovers(
    found: list[Leftover],
    removed: list[Leftover],
    failed: Mapping[str, UtilityVMError],
    *,
    is_applied: bool,
    as_json: bool,
) -> None:
    if as_json:
        errors = {path: str(error) for path, error in failed.items()}
        gone = {one.path for one in removed}
        print_json(
            [{**_document(one), "removed": one.path in gone, "error": errors.get(str(one.path))} for one in found]
        )
        return
    print_table(
        ("KIND", "NAME", "SIZE", "PATH"), [(one.kind, one.name, size(one.size_bytes), one.path) for one in found]
    )
    total = size(sum(one.size_bytes for one in (removed if is_applied else found)))
    if is_applied:
        say(f"removed {len(removed)} of {len(found)}, {total}")
    elif found:
        say(f"nothing was removed; to free {total}: uvm gc --apply")
    else:
        say("nothing is left over")


def _document(one: Leftover) -> dict[str, object]:
    return {"kind": one.kind.value, "name": one.name, "path": str(one.path), "size_bytes": one.size_bytes}
