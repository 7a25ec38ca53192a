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

from typing import Final

from utilityvm.diskimage import headers
from utilityvm.hosts.qemu.disk import QemuDisk
from utilityvm.hosts.qemu.qmp import Command
from utilityvm.scsi.ports import AttachmentType, DiskFormat
from utilityvm.scsi.slot import Slot

DEFAULT_BLOCK_BYTES: Final = 512


def node_name(number: int) -> str:
    return f"n{number}"


def device_id(number: int) -> str:
    return f"d{number}"


def opaque(attachment: str, slot: Slot) -> str:
    return f"{attachment}@{slot}"


def parse_opaque(text: str) -> tuple[str, Slot] | None:
    """The attachment and the slot that an fdset is for; None if it is for something else."""
    attachment, at, slot = text.rpartition("@")
    return (attachment, Slot.parse(slot)) if at else None


def node(disk: QemuDisk, number: int) -> dict[str, object]:
    """The arguments of `blockdev-add`."""
    file = f"/dev/fdset/{number}"
    common = {
        "node-name": node_name(number),
        # Writable is the default; what the guest trims is given back to the host's file system.
        **({"read-only": True} if disk.request.read_only else {"discard": "unmap"}),
    }
    if disk.request.kind is AttachmentType.PASS_THRU:
        return {"driver": "host_device", **common, "filename": file}
    if disk.format is DiskFormat.RAW:
        return {"driver": "file", **common, "filename": file}  # a layer `raw` over it would add nothing
    return {
        "driver": disk.format.value,
        **common,
        **headers.driver_options(disk.header),
        "file": {"driver": "file", "filename": file},
    }


def device(disk: QemuDisk, number: int, slot: Slot) -> dict[str, object]:
    """The arguments of `device_add`.

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
        "serial": disk.serial,
        **({} if disk.request.read_only else {"werror": "report"}),
        **_block_sizes(disk.logical_block_bytes),
    }


def _block_sizes(logical_bytes: int | None) -> dict[str, object]:
    """A physical disk of 4096-byte sectors must have them in the guest too."""
    if logical_bytes in (None, DEFAULT_BLOCK_BYTES):
        return {}
    return {"logical_block_size": logical_bytes, "physical_block_size": logical_bytes}


def attach(disk: QemuDisk, number: int, slot: Slot, attachment: str) -> list[Command]:
    """All of an attach. After a refusal of one, those behind it name what does not exist, and are refused too."""
    return [
        ("add-fd", {"fdset-id": number, "opaque": opaque(attachment, slot)}),
        ("blockdev-add", node(disk, number)),
        ("device_add", device(disk, number, slot)),
    ]


def remove_node(number: int) -> Command:
    return ("blockdev-del", {"node-name": node_name(number)})


def remove_set(number: int) -> Command:
    return ("remove-fd", {"fdset-id": number})
