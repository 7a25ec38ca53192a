"""What QEMU is told of a disk: a node over its file, and a SCSI disk on the node.

Every layer has an explicit driver, so that nothing is probed; an image's own names of other files are overridden
(`backing: null`); the protocol layer opens our descriptor and nothing else. It takes `read-only` from the node above it
(and `auto-read-only` is off unless asked for), and QEMU refuses a descriptor whose access mode is another.

Names are short because their length is time (qmp.py): the fdset's number names everything, `n7` the node and `d7` the
device of set 7. A number is used once, because an old DEVICE_DELETED names the device by it. Which attachment it is
stands in the set's `opaque`, and the set is made first and removed last: so every half-made attachment has one.

Source: QEMU qapi/block-core.json, BlockdevOptions; hw/scsi/scsi-disk.c.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from utilityvm.diskimage import headers
from utilityvm.hosts.qemu.disk import QemuDisk
from utilityvm.hosts.qemu.qmp import Command
from utilityvm.scsi.ports import AttachmentType, DiskFormat
from utilityvm.scsi.slot import Slot

DEFAULT_BLOCK_BYTES: Final = 512
ROOT_SET, LOG_SET = 0, 1  # fdsets that are not attachments
FIRST_NUMBER: Final = LOG_SET + 1
_BASE: Final = "below:"
_SET_PATH: Final = "/dev/fdset/"
_FORMATS: Final = frozenset(format.value for format in DiskFormat)
_NAMING: Final = frozenset({DiskFormat.QCOW2, DiskFormat.VMDK})  # a data file; extents
_PROTOCOLS: Final = frozenset({"file", "host_device"})
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def node_name(number: int) -> str:
    return f"n{number}"


def device_id(number: int) -> str:
    return f"d{number}"


def revision(number: int) -> str:
    """What the device of a hot-plugged disk says is its revision: another one for each attachment.

    A Linux guest may still have the device of the last disk at a slot when the next disk comes to it, and take the one
    for the other. What it was told when it found the device, and what the disk says now, tell them apart. Of a clone's
    disks it remembers what the template's said, so those say nothing (agent/inquiry.py).
    """
    digits = (number // len(_DIGITS) ** place % len(_DIGITS) for place in (2, 1, 0))
    return "u" + "".join(_DIGITS[digit] for digit in digits)


def opaque(attachment: str, slot: Slot) -> str:
    return f"{attachment}@{slot}"


def base_opaque(attachment: str) -> str:
    """The `opaque` of a set for a file below the top one, which goes when the attachment goes."""
    return f"{_BASE}{attachment}"


def parse_opaque(text: str) -> tuple[str, Slot] | None:
    """The attachment and the slot that an fdset is for; None if it is for something else."""
    attachment, at, slot = text.rpartition("@")
    return (attachment, Slot.parse(slot)) if at else None


def parse_base(text: str) -> str | None:
    """The attachment that the fdset of a lower file belongs to; None if it is for something else."""
    return text.removeprefix(_BASE) if text.startswith(_BASE) else None


def node(disk: QemuDisk, number: int, *, locks: bool) -> dict[str, object]:
    """The arguments of `blockdev-add`."""
    described = layer_node(
        headers.driver_options(disk.header),
        disk.request.kind,
        file=f"{_SET_PATH}{number}",
        read_only=disk.request.read_only,
        locks=locks,
    )
    return {"node-name": node_name(number), **described}


def layer_node(
    options: Mapping[str, object],
    kind: AttachmentType,
    *,
    file: str,
    read_only: bool,
    locks: bool,
    backing: Mapping[str, object] | None = None,
    is_backing: bool = False,
) -> dict[str, object]:
    """A node without its name: a driver (`driver_options`) over a file, and over `backing` if that is given.

    `locks`: its file system has locks; without, QEMU refuses a file that it is to lock. `is_backing`: it is to be under
    another, which takes nodes of formats only.
    """
    # Writable is the default; what the guest trims is given back to the host's file system.
    mode: dict[str, object] = {"read-only": True} if read_only else {"discard": "unmap"}
    below = {"driver": "host_device" if kind is AttachmentType.PASS_THRU else "file", "filename": file}
    if not locks:
        below["locking"] = "off"
    if options == {"driver": DiskFormat.RAW.value} and not is_backing:
        return {**below, **mode}  # a layer `raw` over it would add nothing
    chain = {} if backing is None else {"backing": backing}
    return {**options, **mode, **chain, "file": below}


def device(disk: QemuDisk, number: int, slot: Slot) -> dict[str, object]:
    """The arguments of `device_add`."""
    described = device_of(
        number,
        slot,
        serial=disk.serial,
        read_only=disk.request.read_only,
        logical_block_bytes=disk.logical_block_bytes,
    )
    return {**described, "ver": revision(number)}


def device_of(
    number: int, slot: Slot, *, serial: str, read_only: bool, logical_block_bytes: int | None
) -> dict[str, object]:
    """The device over node `number`.

    The serial is its identity to the guest: in VPD page 0x80, and again in 0x83, so that a world wide name would add
    nothing but its length. A full host disk is an I/O error in the guest: QEMU's default would pause the whole VM, and
    with it all other disks.
    """
    return {
        "driver": "scsi-hd",
        "id": device_id(number),
        "bus": f"scsi{slot.controller}.0",
        "scsi-id": 0,
        "lun": slot.lun,
        "drive": node_name(number),
        "serial": serial,
        **({} if read_only else {"werror": "report"}),
        **_block_sizes(logical_block_bytes),
    }


def _block_sizes(logical_bytes: int | None) -> dict[str, object]:
    """A physical disk of 4096-byte sectors must have them in the guest too."""
    if logical_bytes in (None, DEFAULT_BLOCK_BYTES):
        return {}
    return {"logical_block_size": logical_bytes, "physical_block_size": logical_bytes}


def attach(disk: QemuDisk, number: int, slot: Slot, attachment: str, *, locks: bool) -> list[Command]:
    """All of an attach. After a refusal of one, those behind it name what does not exist, and are refused too."""
    return [
        ("add-fd", {"fdset-id": number, "opaque": opaque(attachment, slot)}),
        ("blockdev-add", node(disk, number, locks=locks)),
        ("device_add", device(disk, number, slot)),
    ]


def may_name_files(disk: QemuDisk) -> bool:
    """Has its format a place for the names of other files, which QEMU opens whatever it is told of the node?"""
    return disk.format in _NAMING


def not_given(nodes: Sequence[Mapping[str, Any]], sets: Collection[int]) -> list[str]:
    """The files that QEMU has open for its nodes and was not given, as `query-named-block-nodes` tells them.

    Each descriptor of `sets` is under one node at the most: an image may name that of another disk, too.
    """
    found: list[str] = []
    seen: set[int] = set()
    for one in nodes:
        if one["drv"] in _FORMATS:
            continue  # over another node, which is listed as well
        name = str(one.get("file") or one["drv"])
        number = name.removeprefix(_SET_PATH)
        is_ours = one["drv"] in _PROTOCOLS and name.startswith(_SET_PATH) and number.isdecimal() and int(number) in sets
        if not is_ours or int(number) in seen:
            found.append(name)
        elif is_ours:
            seen.add(int(number))
    return found


def remove_node(number: int) -> Command:
    return ("blockdev-del", {"node-name": node_name(number)})


def remove_set(number: int) -> Command:
    return ("remove-fd", {"fdset-id": number})
