"""Disks: attach, ls, path, resize, detach."""

from __future__ import annotations

import os
import time
from typing import IO, TYPE_CHECKING

import click

from utilityvm.cli.options import attached_argument, json_option, run, timeout_option, vm_argument, wait_option
from utilityvm.cli.output import age, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    from utilityvm.scsi.ports import Verity
    from utilityvm.store.view import SlotRow
    from utilityvm.vm.config import DiskSpec

HOLDER = "cli"
_LONGEST_KEY = 64
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
TIMEOUT_S = 60.0


@click.command("attach")
@vm_argument
@click.argument("disk", metavar="DISK[:GUEST_PATH]", shell_complete=lambda *_: [_file_completion()])
@click.option("--read-only", is_flag=True, help="Neither the guest nor QEMU can write to it; others may read it too.")
@click.option("--option", "-o", "options", multiple=True, metavar="O", help="A mount option. Repeatable.")
@click.option("--physical", is_flag=True, help="DISK is a block device of this host.")
@click.option(
    "--access",
    type=click.Choice(["noop", "group", "individual"]),
    default="individual",
    show_default=True,
    help="Give the VM a right to the image's file: none, its group, or this VM alone.",
)
@click.option("--holder", default=HOLDER, show_default=True, metavar="H", help="Who the reservation is for.")
@click.option(
    "--format",
    "image_format",
    metavar="F",
    help="raw, qcow2, vpc, vhdx or vmdk; else what its header said when it was first opened.",
)
@click.option(
    "--sector-size",
    type=click.Choice(["512", "4096"]),
    help="The guest sees sectors of so many bytes. 4096: the image is a copy of a disk with such sectors.",
)
@click.option("--partition", type=int, default=0, metavar="N", help="Mount the N-th partition. 0: the whole disk.")
@click.option("--filesystem", metavar="F", help="Mount as this file system, and no other.")
@click.option("--ensure-filesystem", is_flag=True, help="Make a file system if the disk is blank.")
@click.option("--reformat", is_flag=True, help="With --ensure-filesystem: make it in any case. The data is lost.")
@click.option("--block-device", is_flag=True, help="Publish the device itself at GUEST_PATH.")
@click.option("--encrypt-scratch", is_flag=True, help="Encrypt with a random key that dies with the mount.")
@click.option(
    "--key-file",
    type=click.File("rb"),
    metavar="FILE",
    help="Encrypt with the 32 or 64 bytes of FILE (-: the standard input), for aes-xts-plain64.",
)
@click.option(
    "--verity",
    "root_hash",
    metavar="HASH",
    help="Check each block against dm-verity's root hash; with --verity-offset.",
)
@click.option(
    "--verity-offset", type=click.IntRange(min=0), metavar="BYTES", help="Where on the disk the hash tree begins."
)
@click.option("--mount", "generated", is_flag=True, help="Mount it at a path of uvm's choosing.")
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def attach_command(
    name: str,
    disk: str,
    read_only: bool,
    options: tuple[str, ...],
    physical: bool,
    access: str,
    holder: str,
    image_format: str | None,
    sector_size: str | None,
    partition: int,
    filesystem: str | None,
    ensure_filesystem: bool,
    reformat: bool,
    block_device: bool,
    encrypt_scratch: bool,
    key_file: IO[bytes] | None,
    root_hash: str | None,
    verity_offset: int | None,
    generated: bool,
    timeout_s: float,
    wait_s: float,
    as_json: bool,
) -> None:
    """Reserve a disk for the VM: it is attached, and mounted at GUEST_PATH.

    Without GUEST_PATH it is attached only. A disk that is attached is shared, and counted. Each reservation is given
    back by one `uvm detach`.
    """
    from utilityvm.scsi.ports import CallerKey, ScratchKey, VMAccess
    from utilityvm.vm.config import GENERATED, DiskSpec

    host_path, guest_path = split_disk(disk)
    if encrypt_scratch and key_file is not None:
        raise click.UsageError("--encrypt-scratch makes a key, and --key-file gives one")
    if generated and guest_path is not None:
        raise click.UsageError("--mount chooses the guest path, and one was given")
    spec = DiskSpec(
        host_path=host_path,
        guest_path=GENERATED if generated else guest_path,
        read_only=read_only,
        options=options,
        access=VMAccess(access),
        partition=partition,
        format=image_format,
        sector_size_bytes=int(sector_size) if sector_size else None,
        filesystem=filesystem,
        ensure_filesystem=ensure_filesystem,
        reformat=reformat,
        block_device=block_device,
        encryption=ScratchKey()
        if encrypt_scratch
        else CallerKey(key_file.read(_LONGEST_KEY + 1))
        if key_file
        else None,
        verity=_verity(root_hash, verity_offset),
        physical=physical,
    )
    run(_attach(name, spec, holder=holder, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))


def _verity(root_hash: str | None, offset: int | None) -> Verity | None:
    from utilityvm.scsi.ports import Verity

    if root_hash is None and offset is None:
        return None
    if root_hash is None or offset is None:
        raise click.UsageError("--verity and --verity-offset go together")
    try:
        return Verity(root_hash=bytes.fromhex(root_hash), hash_offset_bytes=offset)
    except ValueError as error:
        raise click.UsageError(f"--verity {root_hash}: not a number in hexadecimal digits") from error


async def _attach(name: str, spec: DiskSpec, *, holder: str, timeout_s: float, wait_s: float, as_json: bool) -> None:
    from utilityvm.vm.utility_vm import UtilityVM

    spec.request()  # what is wrong by itself is told before the VM is waited for
    async with UtilityVM.open(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        mount = await vm.add(spec, holder=holder, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
        fields: dict[str, object] = {
            "reservation": mount.id,
            "slot": str(mount.slot),
            "guest_path": None if mount.guest_path is None else str(mount.guest_path),
            "references": mount.ref_count,
        }
        where = f", mounted at {mount.guest_path}" if mount.guest_path else ", attached only"
        say(f"{mount.host_path.name} at {mount.slot}{where} ({seconds * 1000:.0f} ms)")
        if as_json:
            document = {"vm": name, "host_path": str(mount.host_path), "read_only": mount.read_only, "holder": holder}
            print_json({**document, **fields, "seconds": round(seconds, 4)})
        else:
            print_fields(fields)


@click.command("ls")
@vm_argument
@click.option("--reservations", "-r", is_flag=True, help="A line for each reservation, with its name.")
@json_option
def ls_command(name: str, reservations: bool, as_json: bool) -> None:
    """List the VM's disks: slot, mode, guest paths, references, holders, age."""
    rows, now = _rows(name), time.time()
    if as_json:
        print_json([_document(row, now) for row in rows])
    elif reservations:
        print_table(
            ("RESERVATION", "SLOT", "DISK", "GUEST PATH", "HOLDER", "AGE"),
            [
                (one.id, row.slot, row.host_path, one.guest_path, one.holder, age(now - one.since))
                for row in rows
                for one in row.reservations
            ],
        )
    else:
        print_table(
            ("SLOT", "DISK", "FORMAT", "MODE", "STATE", "GUEST PATHS", "REFS", "HOLDERS", "AGE"),
            [
                (
                    row.slot,
                    row.host_path,
                    row.format,
                    "ro" if row.read_only else "rw",
                    row.state,
                    ",".join(map(str, row.guest_paths)),
                    row.references,
                    ",".join(dict.fromkeys(row.holders)),
                    age(now - row.since),
                )
                for row in rows
            ],
        )


def _document(row: SlotRow, now: float) -> dict[str, object]:
    return {
        "slot": str(row.slot),
        "controller": row.slot.controller,
        "lun": row.slot.lun,
        "host_path": row.host_path,
        "format": row.format,
        "read_only": row.read_only,
        "size_bytes": row.size_bytes,
        "sector_size_bytes": row.sector_size_bytes,
        "state": row.state,
        "guest_paths": [str(path) for path in row.guest_paths],
        "references": row.references,
        "reservations": [
            {
                "reservation": one.id,
                "holder": one.holder,
                "pid": one.pid,
                "guest_path": None if one.guest_path is None else str(one.guest_path),
                "since": one.since,
            }
            for one in row.reservations
        ],
        "since": row.since,
        "age_s": round(now - row.since, 1),
    }


@click.command("path")
@vm_argument
@attached_argument
@json_option
def path_command(name: str, disk: str, as_json: bool) -> None:
    """Print where the disk is mounted in the guest."""
    from utilityvm.errors import NotAttached

    row = _find(_rows(name), disk, vm=name)
    if not row.guest_paths:
        raise NotAttached(
            f"{row.host_path} is attached at {row.slot}, and mounted nowhere",
            vm=name,
            slot=row.slot,
            host_path=row.host_path,
            remedy=f"mount it: uvm attach {name} {disk}:/GUEST/PATH",
        )
    if as_json:
        print_json({"host_path": row.host_path, "slot": str(row.slot), "guest_paths": list(map(str, row.guest_paths))})
    else:
        click.echo(str(row.guest_paths[0]))


@click.command("resize")
@vm_argument
@attached_argument
@click.argument("size", metavar="SIZE")
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def resize_command(name: str, disk: str, size: str, timeout_s: float, wait_s: float, as_json: bool) -> None:
    """Grow the disk to SIZE while it is in use: its image, and what is mounted from all of it.

    SIZE is in bytes, or ends in K, M, G or T (of 1024). A disk cannot shrink.
    """
    run(_resize(name, disk, size_bytes(size), timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))


async def _resize(name: str, disk: str, to_bytes: int, *, timeout_s: float, wait_s: float, as_json: bool) -> None:
    from utilityvm.vm.utility_vm import UtilityVM

    async with UtilityVM.open(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        await vm.resize_scsi(disk, to_bytes, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
        say(f"{disk}: {to_bytes} bytes ({seconds * 1000:.0f} ms)")
        if as_json:
            print_json({"vm": name, "host_path": disk, "size_bytes": to_bytes, "seconds": round(seconds, 4)})


def size_bytes(text: str) -> int:
    """Bytes, of a number that may end in K, M, G or T."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not (number.isascii() and number.isdigit()):
        raise click.UsageError(f"{text!r} is no size: give bytes, or a whole number and one of K, M, G and T")
    return int(number) << _UNITS.get(unit, 0)


@click.command("detach")
@vm_argument
@click.argument("disk", metavar="DISK|RESERVATION")
@click.option("--holder", metavar="H", help="Only a reservation of H.")
@click.option("--force", is_flag=True, help="Unmount and eject what the guest still uses.")
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def detach_command(
    name: str, disk: str, holder: str | None, force: bool, timeout_s: float, wait_s: float, as_json: bool
) -> None:
    """Give back one reservation: the one of that name, or the newest of the disk.

    The last one of a disk unmounts it, lets the guest forget it, and returns when its file is closed.
    """
    run(_detach(name, disk, holder=holder, force=force, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))


async def _detach(
    name: str, disk: str, *, holder: str | None, force: bool, timeout_s: float, wait_s: float, as_json: bool
) -> None:
    from utilityvm.machine.hostpath import absolute
    from utilityvm.vm.utility_vm import UtilityVM

    async with UtilityVM.open(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        reservation = next((one for one in vm.scsi_reservations() if one.id == disk), None)
        if reservation is not None:
            await reservation.release(force=force, timeout_s=timeout_s)
        else:
            await vm.remove_scsi(disk, holder=holder, force=force, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
        path = str(reservation.host_path) if reservation else absolute(disk)
        left = next((view.references for view in vm.scsi_slots() if view.host_path == path), 0)
        say(f"{path}: {f'{left} references left' if left else 'detached'} ({seconds * 1000:.0f} ms)")
        if as_json:
            print_json({"vm": name, "host_path": path, "references": left, "seconds": round(seconds, 4)})


def split_disk(text: str) -> tuple[str, str | None]:
    """`DISK[:GUEST_PATH]`: split at the last `:/`. A path that is there as it stands is a disk, whatever it holds.

    What stands behind another colon of a path that is not there was meant as a guest path; it is refused as one.
    """
    if os.path.lexists(text):
        return text, None
    for mark in (":/", ":"):
        before, found, _ = text.rpartition(mark)
        if found and (mark == ":/" or os.path.lexists(before)):
            return before, text[len(before) + 1 :]
    return text, None


def _rows(name: str) -> list[SlotRow]:
    """The disks of a VM that runs, from the store alone.

    Raises:
        VMNotFound, VMNotRunning: as they say.
    """
    from utilityvm.errors import VMNotRunning
    from utilityvm.store import SqliteJournal
    from utilityvm.store.recover import open_store
    from utilityvm.store.view import slots

    with open_store() as store:
        vm = store.get(name)
        if not vm.is_alive():
            raise VMNotRunning(
                f"VM {name} is {vm.seen_state}: its QEMU does not run",
                vm=name,
                remedy=f"see why: uvm log {name}; clear it away: uvm stop {name}",
            )
        return slots(SqliteJournal(store, vm).read())


def _find(rows: list[SlotRow], disk: str, *, vm: str) -> SlotRow:
    """The row of the disk that the path leads to; or, if it leads nowhere any more, that was attached by this path."""
    from utilityvm.errors import NotAttached
    from utilityvm.machine.hostpath import absolute, identity_of

    path, identity = absolute(disk), identity_of(disk)
    row = next((row for row in rows if row.identity == identity), None)
    row = row or next((row for row in rows if row.host_path == path), None)
    if row is None:
        raise NotAttached(
            f"{disk} is not attached to VM {vm}", vm=vm, host_path=path, remedy=f"see what is: uvm ls {vm}"
        )
    return row


def _file_completion() -> object:
    from click.shell_completion import CompletionItem

    return CompletionItem("", type="file")
