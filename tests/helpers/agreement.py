"""Do the journal, QEMU, the guest and the host's kernel all say the same of a VM's disks?

Each is asked by itself, and not through the manager, which is compared with them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from utilityvm import UtilityVM
from utilityvm.hosts.qemu.blockdev import LOG_SET, ROOT_SET, parse_opaque
from utilityvm.hosts.qemu.disk import LOCK_BYTE
from utilityvm.machine import paths as places
from utilityvm.scsi.ports import DiskRecord, MountRecord, ReservationRecord
from utilityvm.store import SqliteJournal, Store

_FLOCK = struct.Struct("hhqqi4x")
_TIMEOUT_S = 10.0


async def check_agreement(vm: UtilityVM, images: Iterable[Path]) -> None:
    """Everything that there is of `images`, and of disks at all, is where the manager says, and nowhere else."""
    await check_journal(vm)
    await _check_qemu(vm)
    await _check_guest(vm)
    attached = {Path(slot.host_path) for slot in vm.scsi_slots()}
    opened = _opened_by(vm.process.pid)
    for image in images:
        assert is_locked(image) is (image in attached), f"our lock on {image.name}"
        assert (image in opened) is (image in attached), f"QEMU's descriptors of {image.name}"


async def check_journal(vm: UtilityVM) -> None:
    with Store.open() as store:
        records = SqliteJournal(store, store.get(vm.name)).read()
    slots = {(slot.slot, slot.host_path, "attached", slot.size_bytes) for slot in vm.scsi_slots()}
    disks = [record for record in records if isinstance(record, DiskRecord)]
    assert {(disk.slot, disk.host_path, disk.state, disk.size_bytes) for disk in disks} == slots
    mounts = [record for record in records if isinstance(record, MountRecord)]
    assert {(mount.guest_path, mount.state) for mount in mounts} == {
        (mount.guest_path, "mounted") for mount in vm.scsi_mounts()
    }
    reservations = [record for record in records if isinstance(record, ReservationRecord)]
    assert {(one.reservation, one.state) for one in reservations} == {
        (held.id, "held") for held in vm.scsi_reservations()
    }
    # A disk is attached exactly while somebody holds it.
    assert {disk.attachment for disk in disks} == {one.attachment for one in reservations}
    assert {mount.mount for mount in mounts} == {one.mount for one in reservations if one.mount}


async def _check_qemu(vm: UtilityVM) -> None:
    ask = vm._host._qmp.execute
    fdsets, nodes, devices, blocks = (
        await ask("query-fdsets", timeout_s=_TIMEOUT_S),
        await ask("query-named-block-nodes", {"flat": True}, timeout_s=_TIMEOUT_S),
        await ask("qom-list", {"path": "/machine/peripheral"}, timeout_s=_TIMEOUT_S),
        await ask("query-block", timeout_s=_TIMEOUT_S),
    )
    sets = {one["fdset-id"]: parse_opaque(one["fds"][0]["opaque"]) for one in fdsets if one["fds"]}
    assert {one["fdset-id"] for one in fdsets} == {*sets}, "an fdset without a descriptor"
    ours = {number: parsed for number, parsed in sets.items() if number not in (ROOT_SET, LOG_SET)}
    assert sorted(parsed[1] for parsed in ours.values() if parsed) == [slot.slot for slot in vm.scsi_slots()]
    numbers = {*map(str, ours), str(ROOT_SET)}
    named = {node["node-name"] for node in nodes if not node["node-name"].startswith("#")}
    assert named == {f"n{number}" for number in numbers}
    assert {one["name"] for one in devices if one["name"][0] == "d"} == {f"d{number}" for number in numbers}
    inserted = [block["inserted"] for block in blocks if "inserted" in block]
    assert {one["node-name"] for one in inserted} == named
    sizes = {one["node-name"]: one["image"]["virtual-size"] for one in inserted}
    by_slot = {parsed[1]: sizes[f"n{number}"] for number, parsed in ours.items() if parsed}
    assert by_slot == {slot.slot: slot.size_bytes for slot in vm.scsi_slots()}


async def _check_guest(vm: UtilityVM) -> None:
    ours = {str(mount.guest_path) for mount in vm.scsi_mounts()}
    assert {one["MountPath"] for one in await vm._guest.mounts()} == ours
    lines = [line.split() for line in (await read_in_guest(vm, "/proc/mounts")).splitlines()]
    assert {path for device, path, *_ in lines if device.startswith("/dev/sd") and path != "/"} <= ours
    assert ours <= {path for _, path, *_ in lines}


async def read_in_guest(vm: UtilityVM, *paths: str) -> str:
    """What the files in the guest hold, one after the other. One program, as a process costs it 40 ms or more."""
    done = await vm.run(["cat", *paths])
    assert done.exit_code == 0, done.stderr.decode()
    return done.stdout.decode()


async def sizes_in_guest(vm: UtilityVM) -> list[int]:
    """The bytes of each SCSI disk that the guest's kernel knows, beside its root disk."""
    lines = [line.split() for line in (await read_in_guest(vm, "/proc/partitions")).splitlines()]
    return [int(line[2]) * 1024 for line in lines if line and line[3].startswith("sd") and line[3] != "sda"]


async def until_guest_has_no_disks(vm: UtilityVM) -> None:
    """Its kernel hears of a disk that went by an event, and takes its time."""
    async with asyncio.timeout(_TIMEOUT_S):
        while await sizes_in_guest(vm):
            pass


def is_locked(image: Path) -> bool:
    """Does an attachment have our lock on it?"""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, LOCK_BYTE, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
    finally:
        os.close(fd)


def _opened_by(pid: int) -> set[Path]:
    opened = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed since
            opened.add(entry.readlink())
    return opened


def folders(name: str) -> tuple[set[str], set[str]]:
    """The names in the runtime folder of a VM, and in the state folder."""
    return {path.name for path in places.vm_dir(name).iterdir()}, {path.name for path in places.state_dir().iterdir()}
