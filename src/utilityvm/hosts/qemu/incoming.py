"""A QEMU that begins where a saved one stood: its memory, its devices' state, and its disks, all by descriptor.

The memory is a file that is mapped privately: what the VM writes is its own, and what it leaves alone is shared with
every other VM of that file. The disks are on the command line, not hot-plugged: QEMU's monitor reads a byte a turn
(qmp.py), and a VM of many disks would spend more time on being told of them than on starting.

A disk is a chain of layers, the top one first; each has a descriptor set of its own. The top's set names the
attachment, as for a disk that was hot-plugged, and the sets below name whose they are, so that they go with it.

Source: docs/decisions/0008-device-state-without-memory.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from utilityvm.diskimage import headers
from utilityvm.errors import TemplateDamaged
from utilityvm.hosts.qemu import blockdev
from utilityvm.scsi.ports import AttachmentType
from utilityvm.scsi.slot import Slot

_READ_ONLY_FILE: Final = (8, 2)  # since then QEMU maps memory privately from a file that it may not write to


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A file or block device of a disk's chain, open and locked."""

    fd: int
    path: Path  # for messages
    header: headers.ImageHeader
    kind: AttachmentType
    locks: bool  # see `blockdev.layer_node`


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingDisk:
    """A disk that the saved VM had. The guest sees no difference: slot, serial, size and mode are those it knows."""

    attachment: str
    slot: Slot
    serial: str
    read_only: bool
    size_bytes: int
    logical_block_bytes: int | None
    layers: tuple[Layer, ...]  # the top one first; only it is written to


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What a VM continues from. The descriptors stay the caller's."""

    memory: int
    state: int
    disks: tuple[IncomingDisk, ...]

    def fds(self) -> list[int]:
        return [self.memory, self.state, *(layer.fd for disk in self.disks for layer in disk.layers)]


def needs_writable_memory(qemu_version: str) -> bool:
    """Must QEMU have the right to write to the file that it maps privately?"""
    numbers = tuple(int(part) for part in qemu_version.split(".")[:2])
    return numbers < _READ_ONLY_FILE


def memory_backend(path: str, *, memory_mib: int, qemu_version: str) -> str:
    """The VM's RAM, as a `-object`."""
    mode = "" if needs_writable_memory(qemu_version) else ",readonly=on,rom=off"
    return f"memory-backend-file,id=ram,size={memory_mib}M,share=off,mem-path={path}{mode}"


def words(incoming: Incoming, *, first_number: int) -> list[str]:
    """The words of the command line that bring the disks and the state. The VM stays paused."""
    result: list[str] = []
    number = first_number
    for disk in incoming.disks:
        numbers = range(number, number + len(disk.layers))
        number = numbers.stop
        for layer, fdset in zip(disk.layers, numbers, strict=True):
            is_top = fdset == numbers.start
            name = blockdev.opaque(disk.attachment, disk.slot) if is_top else blockdev.base_opaque(disk.attachment)
            result += ["-add-fd", f"fd={layer.fd},set={fdset},opaque={name}"]
        result += ["-blockdev", _json(_node(disk, numbers)), "-device", _json(_device(disk, numbers.start))]
    return [*result, "-global", "migration.x-events=on", "-incoming", f"fd:{incoming.state}"]


def _node(disk: IncomingDisk, numbers: Sequence[int]) -> dict[str, object]:
    """The node of the top layer, with those below inside."""
    below: dict[str, object] | None = None
    for depth in range(len(disk.layers) - 1, -1, -1):
        read_only = disk.read_only or depth > 0
        below = blockdev.layer_node(
            headers.driver_options(disk.layers[depth].header),
            disk.layers[depth].kind,
            file=f"/dev/fdset/{numbers[depth]}",
            read_only=read_only,
            locks=disk.layers[depth].locks,
            backing=below,
            is_backing=depth > 0,
        )
    assert below is not None, f"a disk without layers: {disk.slot}"
    return {"node-name": blockdev.node_name(numbers[0]), **below}


def _device(disk: IncomingDisk, number: int) -> dict[str, object]:
    return blockdev.device_of(
        number, disk.slot, serial=disk.serial, read_only=disk.read_only, logical_block_bytes=disk.logical_block_bytes
    )


def not_taken(said: str, *, vm: str) -> TemplateDamaged:
    """What to raise when QEMU ended over the saved state; `said` is its last words."""
    return TemplateDamaged(
        f"QEMU does not take the saved state: {said}",
        vm=vm,
        remedy="make the template again from a VM that was started",
    )


def check(disks: Sequence[IncomingDisk], found: Sequence[Mapping[str, Any]], *, vm: str) -> None:
    """Compare QEMU's devices with what the guest knows; `found` is the answer of `query-block`.

    QEMU itself takes any size and mode, and the guest would find out by losing data.

    Raises:
        TemplateDamaged: names the first difference.
    """
    nodes = {inserted["node-name"]: inserted for one in found if (inserted := one.get("inserted"))}
    number = blockdev.FIRST_NUMBER
    for disk in disks:
        node = nodes.get(blockdev.node_name(number))
        number += len(disk.layers)
        path = disk.layers[0].path
        if node is None:
            raise TemplateDamaged(f"QEMU has nothing at {disk.slot}, where {path} was", vm=vm, slot=disk.slot)
        size = node["image"]["virtual-size"]
        if (size, node["ro"]) != (disk.size_bytes, disk.read_only):
            raise TemplateDamaged(
                f"{path} is a {'read-only' if node['ro'] else 'writable'} disk of {size} bytes, and the template's at "
                f"{disk.slot} is a {'read-only' if disk.read_only else 'writable'} one of {disk.size_bytes}",
                vm=vm,
                slot=disk.slot,
                host_path=path,
                remedy="a clone's disk must be as large as the template's, to the byte",
            )


def _json(document: dict[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"))
