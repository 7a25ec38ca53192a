"""What the header of a disk image says: one value for all formats, and where in the file it keeps its tables."""

from __future__ import annotations

from dataclasses import dataclass

from utilityvm.scsi.ports import DiskFormat


@dataclass(frozen=True, slots=True)
class Table:
    """A table that QEMU loads into memory when it opens the image."""

    name: str
    offset: int  # bytes from the start of the file
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image says about itself. Nothing here is trusted: `check_safe` decides what may be attached.

    Names of other files are shown as QEMU would take them; utilityvm opens none of them.
    """

    name: str  # what messages call the image; the host path
    format: DiskFormat
    subformat: str  # qcow2: "v2", "v3"; VHD, VHDX: "fixed", "dynamic", "differencing"; VMDK: its createType; raw: ""
    file_size_bytes: int
    virtual_size_bytes: int  # the disk's size, as the format's specification says
    other_size_bytes: int | None = None  # dynamic VHD: what a QEMU shows in its place, by the geometry
    cluster_size_bytes: int | None = None  # qcow2 cluster, VHD and VHDX block, VMDK grain; None: the format has none
    backing: str | None = None  # the file under this one: qcow2 backing file; VHD, VHDX, VMDK parent
    backing_format: str | None = None  # what the image says its backing file's format is, as QEMU's driver name
    needs_parent: bool = False  # VHD, VHDX or VMDK that holds only differences from a parent
    data_file: str | None = None  # qcow2: the file that holds the data; "" when the image has one and does not name it
    extents: tuple[str, ...] = ()  # VMDK: the extent lines of its descriptor
    dirty: bool = False  # qcow2: refcounts are stale after a crash; VHDX: the log has to be replayed first
    corrupt: bool = False  # qcow2: QEMU marked it so
    encryption: str | None = None
    features: frozenset[str] = frozenset()
    unknown_features: tuple[str, ...] = ()  # what a reader must understand, and we do not
    tables: tuple[Table, ...] = ()
    snapshots: int = 0
    memory_bytes: int = 0  # what QEMU needs to open it, beyond the tables: dirty bitmaps, the repair of a dirty qcow2
    disputes: tuple[str, ...] = ()  # where two readers of this image would disagree; each a full sentence
    write_refusal: str | None = None  # why QEMU could not write to it


def driver_options(header: ImageHeader) -> dict[str, object]:
    """The driver that QEMU's `blockdev-add` is told, and what it must be told beyond the file.

    `"backing": null` goes to every format that has such a member, also when the header names no backing file:
    the file may change between our reading of it and QEMU's. A chain that is allowed replaces the null by a node.

    A fixed VHD is the bytes before its footer. QEMU's own driver would take another size for some creators, and believe
    what the guest writes into the first sector, so it gets the bytes, and their number.

    Source: QEMU qapi/block-core.json, BlockdevOptionsGenericCOWFormat, …GenericFormat, …Raw.
    """
    if header.format is DiskFormat.VHD and header.subformat == "fixed":
        return {"driver": DiskFormat.RAW.value, "size": header.virtual_size_bytes}
    backing: dict[str, object] = {"backing": None} if header.format in (DiskFormat.QCOW2, DiskFormat.VMDK) else {}
    return {"driver": header.format.value, **backing}
