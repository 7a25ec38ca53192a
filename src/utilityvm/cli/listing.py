"""What there is to see of VMs: ps, inspect."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from utilityvm.cli.disk import disk_document
from utilityvm.cli.group import Command
from utilityvm.cli.options import json_option, vm_argument
from utilityvm.cli.output import age, print_json, print_pairs, print_table
from utilityvm.text import count

if TYPE_CHECKING:
    from utilityvm import VMInfo


@click.command("ps", cls=Command, short_help="List the VMs of this user.")
@json_option
def ps_command(as_json: bool) -> None:
    """List the VMs of this user, and the process that owns each."""
    from utilityvm import list_vms

    vms, now = list_vms(), time.time()
    if as_json:
        print_json([{**_document(vm, now), "disks": None if vm.disks is None else len(vm.disks)} for vm in vms])
        return
    print_table(
        ("NAME", "STATE", "PID", "MIB", "CPUS", "DISKS", "AGE", "OWNER"),
        [
            (
                vm.name,
                vm.state,
                vm.pid,
                vm.memory_mib,
                vm.cpus,
                None if vm.disks is None else len(vm.disks),
                age(now - vm.created),
                _owner(vm),
            )
            for vm in vms
        ],
    )


@click.command("inspect", cls=Command, short_help="Show all that is known of a VM.")
@vm_argument
@json_option
def inspect_command(name: str, as_json: bool) -> None:
    """Show all that is known of a VM: its state, its owner, the walls around it, and its disks with their holders."""
    from utilityvm import get_vm

    vm, now = get_vm(name), time.time()
    if as_json:
        disks = None if vm.disks is None else [disk_document(disk, now) for disk in vm.disks]
        print_json({**_document(vm, now), "template": vm.template, "disks": disks})
        return
    print_pairs(
        [
            ("name", vm.name),
            ("state", vm.state),
            ("uuid", vm.uuid),
            ("pid", vm.pid),
            ("memory", None if vm.memory_mib is None else f"{vm.memory_mib} MiB"),
            ("cpus", vm.cpus),
            ("accelerator", vm.accelerator),
            ("keep", None if vm.keep is None else "yes" if vm.keep else "no"),
            ("template", vm.template),
            ("age", age(now - vm.created)),
            ("owner", _owner(vm)),
            ("network", "none"),
            *(("wall", layer) for layer in vm.walls),
            *(("no wall", f"{layer} ({why})") for layer, why in vm.without.items()),
            *_disks(vm, now),
        ]
    )


def _disks(vm: VMInfo, now: float) -> list[tuple[str, object]]:
    if vm.disks is None:
        return [("disks", "its journal cannot be read; see uvm repair")]
    told: list[tuple[str, object]] = []
    for disk in vm.disks:
        words = [str(disk.slot), disk.host_path, str(disk.format), "ro" if disk.read_only else "rw", str(disk.state)]
        words += [f"at {path}" for path in disk.guest_paths]
        words.append(count(disk.references, "reference"))
        told.append(("disk", ", ".join(words)))
        for one in disk.reservations:
            told.append(("held by", f"{one.holder or one.id} since {age(now - one.since)}"))
        told += [("note", text) for text in disk.notes]
    return told


def _owner(vm: VMInfo) -> str | None:
    return f"{vm.owner.pid} {vm.owner.command}" if vm.owner else None


def _document(vm: VMInfo, now: float) -> dict[str, object]:
    return {
        "name": vm.name,
        "state": vm.state,
        "pid": vm.pid,
        "uuid": vm.uuid,
        "memory_mib": vm.memory_mib,
        "cpus": vm.cpus,
        "keep": vm.keep,
        "accelerator": vm.accelerator,
        "owner": vm.owner.to_json() if vm.owner else None,
        "created": vm.created,
        "age_s": round(now - vm.created, 1),
        "walls": vm.walls,
        "without": vm.without,
    }
