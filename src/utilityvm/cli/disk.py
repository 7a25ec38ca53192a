"""Disks: attach, ls, path, resize, detach."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import click

from utilityvm.cli import output
from utilityvm.cli.group import Command
from utilityvm.cli.options import (
    attached_argument,
    complete_attached,
    json_option,
    mount_options,
    run,
    timeout_option,
    vm_argument,
    wait_option,
)
from utilityvm.cli.output import OutputFailed, age, print_fields, print_json, print_table, say
from utilityvm.cli.owners import opened, run_with, served, told
from utilityvm.cli.values import SIZE, Place, place, scratch_size, without_mode
from utilityvm.errors import UtilityVMError
from utilityvm.text import count, size

if TYPE_CHECKING:
    from typing import Never

    from utilityvm import CallerKey, DiskInfo, ForceArgument, SCSIMount, UtilityVM, Verity

HOLDER = "cli"
_KEY_BYTES = (32, 64)
_LONGEST_KEY = max(_KEY_BYTES)
TIMEOUT_S = 60.0


@click.command("attach", cls=Command, short_help="Attach a disk, and mount it in the guest.")
@vm_argument
@click.argument("disk", metavar="DISK[:GUEST_PATH][:ro|:rw]", shell_complete=lambda *_: [_file_completion()])
@click.option("--guest-path", metavar="PATH", help="Where to mount it, if the path has a colon.")
@click.option("--mount", "generated", is_flag=True, help="Mount it at a path that uvm chooses.")
@click.option("--read-only", is_flag=True, help="As :ro. Nobody can write to it, and other VMs may read it too.")
@click.option("--holder", default=HOLDER, metavar="H", help=f"Who the reservation is for.  [default: {HOLDER}]")
@mount_options
@click.option("--physical", is_flag=True, help="DISK is a block device of this host.")
@click.option(
    "--format",
    "image_format",
    metavar="F",
    help="raw, qcow2, vpc, vhdx or vmdk.  [default: as its header said when it was first opened]",
)
@click.option(
    "--sector-size",
    type=click.Choice(["512", "4096"]),
    help="The sector size that the guest sees. Use 4096 for an image of a disk with such sectors.",
)
@click.option(
    "--access",
    type=click.Choice(["noop", "group", "individual"]),
    default="individual",
    help="Whom to grant access to the image file: nobody, all VMs of the group, or only this VM.  "
    "[default: individual]",
)
@click.option("--encrypt-scratch", is_flag=True, help="Encrypt with a random key that dies with the mount.")
@click.option(
    "--key-file",
    metavar="FILE",
    help="Encrypt with the 32 or 64 bytes of FILE (aes-xts-plain64); `-` is the standard input.",
)
@click.option(
    "--verity",
    "root_hash",
    metavar="HASH",
    help="Check each block against this root hash of dm-verity. Needs --verity-offset.",
)
@click.option("--verity-offset", type=SIZE, metavar="SIZE", help="Where on the disk the hash tree begins.")
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def attach_command(
    name: str,
    disk: str,
    guest_path: str | None,
    generated: bool,
    read_only: bool,
    physical: bool,
    access: str,
    holder: str,
    image_format: str | None,
    sector_size: str | None,
    encrypt_scratch: bool,
    key_file: str | None,
    root_hash: str | None,
    verity_offset: int | None,
    timeout_s: float,
    wait_s: float,
    as_json: bool,
    **settings: Any,
) -> None:
    """Attach a disk to the VM, and mount it at GUEST_PATH.

    Without GUEST_PATH the disk is attached only. With :ro it can only be read.

    With scratch:SIZE for DISK, as in scratch:10G:/work, an empty disk of that size is made, with a file system. It is
    removed when it is detached, or with the VM. A file of such a name is written as ./scratch:10G.

    A disk that is attached already is shared: each `uvm attach` takes one more reservation, and each `uvm detach` gives
    one back.
    """
    from utilityvm import ScratchKey

    where = place(disk) if guest_path is None else _placed_at(disk, guest_path)
    if where.mode == "rw" and read_only:
        raise click.UsageError("--read-only contradicts :rw")
    if generated and where.guest_path is not None:
        raise click.UsageError("--mount chooses the guest path, but one is given")
    if encrypt_scratch and key_file is not None:
        raise click.UsageError("--encrypt-scratch makes a key, but --key-file gives one")
    encryption = ScratchKey() if encrypt_scratch else None
    if (size_bytes := scratch_size(where.disk)) is not None:
        unfit = {
            ":ro": read_only or where.mode == "ro",
            "--physical": physical,
            "--format": image_format is not None,
            "--sector-size": sector_size is not None,
            "--access": access != "individual",
            "--key-file": key_file is not None,
            "--verity": root_hash is not None or verity_offset is not None,
            **{f"--{word.replace('_', '-')}": settings.pop(word) for word in ("partition", "reformat", "block_device")},
        }
        for option, is_given in unfit.items():
            if is_given:
                raise click.UsageError(f"{option} does not go with scratch:SIZE, a new disk with a file system")
        settings.pop("ensure_filesystem")

        def add(vm: UtilityVM) -> Awaitable[SCSIMount]:
            at = where.guest_path or _generated()
            return vm.add_scratch(size_bytes, at, encryption=encryption, holder=holder, timeout_s=timeout_s, **settings)

        run(_attach(name, add, holder=holder, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))
        return
    disk_settings: dict[str, Any] = {
        "host_path": where.disk,
        "guest_path": where.guest_path,
        "read_only": read_only or where.mode == "ro",
        "access": access,
        "format": image_format,
        "sector_size_bytes": int(sector_size) if sector_size else None,
        "encryption": encryption or (_key_of(key_file) if key_file is not None else None),
        "verity": _verity(root_hash, verity_offset),
        "physical": physical,
        **settings,
    }
    how: dict[str, Any] = {"holder": holder, "timeout_s": timeout_s}
    way = served(name, wait_s=wait_s)
    adding: Callable[[UtilityVM], Awaitable[SCSIMount]]
    if way is not None:
        how["generated"] = generated
        adding = partial(_add_there, settings={**disk_settings, **how})
    else:
        if generated:
            disk_settings["guest_path"] = _generated()
        adding = _adding(disk_settings, how)
    run_with(way, _attach(name, adding, holder=holder, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json))


def _generated() -> Any:
    from utilityvm import GENERATED

    return GENERATED


def _add_there(vm: Any, settings: dict[str, Any]) -> Awaitable[SCSIMount]:
    """For a VM that the server owns, which checks what is wrong by itself first."""
    adding: Awaitable[SCSIMount] = vm.add_scsi(**settings)
    return adding


def _adding(settings: dict[str, Any], how: dict[str, Any]) -> Callable[[UtilityVM], Awaitable[SCSIMount]]:
    """For a VM that this command owns. What is wrong by itself is told before the VM is waited for."""
    from utilityvm import DiskSpec

    spec = DiskSpec(**settings)
    spec.check()
    return lambda vm: vm.add(spec, **how)


def _placed_at(disk: str, guest_path: str) -> Place:
    if not os.path.lexists(disk) and place(disk).guest_path is not None:
        raise click.UsageError(f"--guest-path gives a guest path, and so does {disk}: leave one of them out")
    return Place(disk, without_mode(guest_path))


def _key_of(path: str) -> CallerKey:
    """The key in the file; `-` is the standard input, and /dev/fd/N a descriptor that the shell gave us."""
    from utilityvm import CallerKey
    from utilityvm.machine.hostpath import open_file

    def key_in(file: IO[bytes]) -> CallerKey:
        key = file.read(_LONGEST_KEY + 1)
        if len(key) not in _KEY_BYTES:
            has = f"more than {_LONGEST_KEY}" if len(key) > _LONGEST_KEY else len(key)
            raise click.UsageError(f"--key-file {path}: it has {has} bytes; a key has 32 or 64")
        return CallerKey(key)

    if not path:
        raise click.UsageError("--key-file: '' is not the path of a file")
    try:
        if path == "-":
            return key_in(sys.stdin.buffer)
        ours = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", path)
        with os.fdopen(os.dup(int(ours[1])) if ours else open_file(path, os.O_RDONLY), "rb") as file:
            return key_in(file)
    except OSError as error:
        context = click.get_current_context()
        raise click.BadParameter(f"'{path}': {error.strerror}", ctx=context, param_hint="'--key-file'") from error


def _verity(root_hash: str | None, offset: int | None) -> Verity | None:
    from utilityvm import Verity

    if root_hash is None and offset is None:
        return None
    if root_hash is None or offset is None:
        raise click.UsageError("--verity and --verity-offset go together")
    try:
        return Verity(root_hash=bytes.fromhex(root_hash), hash_offset_bytes=offset)
    except ValueError as error:
        raise click.UsageError(f"--verity {root_hash}: it is not written in hexadecimal digits") from error


async def _attach(
    name: str,
    add: Callable[[UtilityVM], Awaitable[SCSIMount]],
    *,
    holder: str,
    timeout_s: float,
    wait_s: float,
    as_json: bool,
) -> None:
    async with opened(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        mount = await add(vm)
        seconds = time.monotonic() - begun
        fields: dict[str, object] = {
            "reservation": mount.id,
            "slot": str(mount.slot),
            "guest_path": None if mount.guest_path is None else str(mount.guest_path),
            "references": mount.ref_count,
        }
        where = f", mounted at {mount.guest_path}" if mount.guest_path else ", attached only"
        say(f"{mount.host_path.name} at {mount.slot}{where} ({seconds * 1000:.0f} ms)")
        for text in mount.notes:
            output.remark(text)
        try:
            if as_json:
                document = {
                    "vm": name,
                    "host_path": str(mount.host_path),
                    "read_only": mount.read_only,
                    "holder": holder,
                }
                print_json({**document, **fields, "notes": mount.notes, "seconds": round(seconds, 4)})
            else:
                print_fields(fields)
        except OutputFailed as error:
            await _take_back(mount, error, timeout_s=timeout_s)


async def _take_back(mount: SCSIMount, failed: OutputFailed, *, timeout_s: float) -> Never:
    """Nobody learnt the reservation's name, so nobody would give it back."""
    try:
        await mount.release(timeout_s=timeout_s)
    except UtilityVMError as error:
        output.done(f"reservation {mount.id} of {mount.host_path} is held, because it could not be given back: {error}")
        raise failed from error
    raise OutputFailed(failed.reason, ", so the reservation was given back") from failed


@click.command("ls", cls=Command, short_help="List the VM's disks.")
@vm_argument
@click.option("--reservations", "-r", is_flag=True, help="Print a line for each reservation, with its name.")
@json_option
def ls_command(name: str, reservations: bool, as_json: bool) -> None:
    """List the VM's disks: slot, mode, guest paths, references, holders and age."""
    from utilityvm import list_disks

    rows, now = list_disks(name), time.time()
    if as_json:
        print_json([disk_document(row, now) for row in rows])
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
    if output.is_watched():
        for row in rows:
            for text in row.notes:
                output.remark(f"{row.slot}: {text}")


def disk_document(row: DiskInfo, now: float) -> dict[str, object]:
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
        "notes": list(row.notes),
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


@click.command("path", cls=Command, short_help="Print where a disk is mounted in the guest.")
@vm_argument
@attached_argument
@json_option
def path_command(name: str, disk: str, as_json: bool) -> None:
    """Print where the disk is mounted in the guest.

    DISK is any path of its image, its guest path, or in a clone the path that it has in the template.
    """
    from utilityvm import NotAttached, get_disk

    row = get_disk(name, disk)
    if not row.guest_paths:
        raise NotAttached(
            f"{row.host_path} is attached at {row.slot}, but is not mounted",
            vm=name,
            slot=row.slot,
            host_path=row.host_path,
            remedy=f"mount it: uvm attach {name} {disk}:/GUEST/PATH",
        )
    if as_json:
        print_json({"host_path": row.host_path, "slot": str(row.slot), "guest_paths": list(map(str, row.guest_paths))})
    else:
        output.write(str(row.guest_paths[0]))


@click.command("resize", cls=Command, short_help="Grow a disk while it is in use.")
@vm_argument
@attached_argument
@click.argument("size_bytes", metavar="SIZE", type=SIZE)
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def resize_command(name: str, disk: str, size_bytes: int, timeout_s: float, wait_s: float, as_json: bool) -> None:
    """Grow the disk to SIZE while it is in use: its image, and each file system that is mounted from all of it.

    SIZE is a number of bytes, or is written as 512M, 64MiB or 1.5G. A disk cannot shrink.
    """
    work = _resize(name, disk, size_bytes, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json)
    run_with(served(name, wait_s=wait_s), work)


async def _resize(name: str, disk: str, to_bytes: int, *, timeout_s: float, wait_s: float, as_json: bool) -> None:
    async with opened(name, wait_s=wait_s) as vm:
        begun = time.monotonic()
        row = await vm.find_scsi(disk, timeout_s=timeout_s)
        await vm.resize_scsi(disk, to_bytes, timeout_s=timeout_s)
        seconds = time.monotonic() - begun
        output.done(f"{row.host_path} has {size(to_bytes)} ({seconds * 1000:.0f} ms)")
        if as_json:
            print_json({"vm": name, "host_path": row.host_path, "size_bytes": to_bytes, "seconds": round(seconds, 4)})


@click.command("detach", cls=Command, short_help="Give a disk back; the last time detaches it.")
@vm_argument
@click.argument("disk", metavar="DISK|RESERVATION", shell_complete=complete_attached)
@click.option("--holder", metavar="H", help="Only a reservation of H.")
@click.option(
    "--force", is_flag=True, help="Although the guest uses it; if it does not let go, the host takes the disk away."
)
@timeout_option(TIMEOUT_S)
@wait_option
@json_option
def detach_command(
    name: str, disk: str, holder: str | None, force: bool, timeout_s: float, wait_s: float, as_json: bool
) -> None:
    """Give back one reservation: the one with that name, or the newest of the disk.

    DISK is any path of the image, its guest path, or in a clone the path that it has in the template. The last
    reservation of a disk unmounts it, removes it from the guest, and returns once QEMU has closed the file.
    """
    work = _detach(name, disk, holder=holder, force=force, timeout_s=timeout_s, wait_s=wait_s, as_json=as_json)
    run_with(served(name, wait_s=wait_s), work)


async def _detach(
    name: str, disk: str, *, holder: str | None, force: bool, timeout_s: float, wait_s: float, as_json: bool
) -> None:
    how: ForceArgument = "host" if force else False  # asks the guest first, and says so if the host had to act
    async with opened(name, wait_s=wait_s, needs_guest=not force) as vm:
        begun = time.monotonic()
        reservation = next((one for one in await told(vm.scsi_reservations()) if one.id == disk), None)
        if reservation is not None:
            row = next(view for view in await told(vm.scsi_slots()) if view.slot == reservation.slot)
            overruled = await reservation.release(force=how, timeout_s=timeout_s)
        else:
            row = await vm.find_scsi(disk, timeout_s=timeout_s)
            overruled = await vm.remove_scsi(disk, holder=holder, force=how, timeout_s=timeout_s)
        seconds, path = time.monotonic() - begun, row.host_path
        now = await told(vm.scsi_slots())
        left = next((view.references for view in now if view.attachment == row.attachment), 0)
        became = f"{count(left, 'reference')} left" if left else "detached"
        if overruled is not None:
            became = (
                f"taken away by the host, as the guest did not let go: {overruled}; what it had not written is lost"
            )
        output.done(f"{path}: {became} ({seconds * 1000:.0f} ms)")
        if as_json:
            document = {"vm": name, "host_path": path, "references": left, "seconds": round(seconds, 4)}
            print_json(document if overruled is None else {**document, "overruled": overruled})


def _file_completion() -> object:
    from click.shell_completion import CompletionItem

    return CompletionItem("", type="file")
