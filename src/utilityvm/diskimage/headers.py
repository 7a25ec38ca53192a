"""Read the header of a disk image: which format it is in, how large its disk is, and what else it would pull in.

Nothing here opens a path, follows a name or starts a program, and a hostile image costs little: at most 4 MiB are
read whatever it claims, and 16 MiB of the log of a VHDX that must be replayed.
"""

from __future__ import annotations

from typing import Final

from utilityvm.diskimage import qcow2, vhd, vhdx, vmdk
from utilityvm.diskimage.image_header import ImageHeader, Table, driver_options
from utilityvm.diskimage.safety import LIMITS, Limits, Problem, Rule, check_safe, problems
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.errors import ConfigDiffers
from utilityvm.scsi.ports import DiskFormat

__all__ = [
    "LIMITS",
    "ImageHeader",
    "Limits",
    "Problem",
    "Rule",
    "Table",
    "check_safe",
    "detect",
    "driver_options",
    "problems",
    "read",
    "read_source",
]

# Formats that QEMU would find and we do not read. Taking such a file for a raw disk would be a mistake nobody asked
# for; who does mean the bytes as they are says raw.
_NOT_READ: Final = (
    (0, b"QED\0", "QED"),
    (0x40, b"\x7f\x10\xda\xbe", "VirtualBox VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
)


def read(fd: int, *, name: str, expected: DiskFormat | None = None) -> ImageHeader:
    """The header of the image behind `fd`, which stays open and is only read; `name` is its path, for messages.

    With `expected` the image is read as that format whatever else it looks like: a raw disk whose guest wrote a qcow2
    header into it stays raw (CVE-2008-2004), so keep the format of the first registration and give it here.
    Without, its first bytes decide, or for a fixed VHD a valid footer at the end. A raw disk with such a footer looks
    the same: give `expected` for raw disks that a guest can write to, and for physical disks always.

    Blocks for as long as the storage does: call it from a thread. Then `check_safe`.

    Raises:
        ConfigDiffers: it is not in the `expected` format.
        ImageDamaged: empty, cut short, impossible, or of a kind that we do not read.
        ImageUnsafe: a VMDK that is only the description of other files, or a name with a NUL byte.
        InvalidRequest: `fd` is neither a regular file nor a block device.
    """
    return read_source(Source.of_fd(fd, name=name), expected=expected)


def read_source(image: Source, *, expected: DiskFormat | None = None) -> ImageHeader:
    """As `read`, from bytes that need not be a file."""
    if not image.size_bytes:
        raise image.damaged("it is empty", remedy="make an image: qemu-img create, or truncate --size for a raw one")
    if expected is None:
        return _read_as(image, detect(image))
    if not _may_be(image, expected):
        raise ConfigDiffers(
            f"{image.name}: asked for as {expected}, and its header says {_seen(image)}",
            host_path=image.name,
            remedy="leave the format out, or give the one it has",
        )
    return _read_as(image, expected)


def detect(image: Source) -> DiskFormat:
    """The format that the image's bytes say; raw if they say nothing.

    Raises:
        ImageDamaged: they say a format that we do not read.
    """
    for format in (DiskFormat.QCOW2, DiskFormat.VHDX, DiskFormat.VMDK):
        if _may_be(image, format):
            return format
    if vhd.starts_dynamic(image) or vhd.ends_fixed(image):
        return DiskFormat.VHD
    for offset, magic, title in _NOT_READ:
        if image.read_up_to(offset, len(magic)) == magic:
            raise image.damaged(
                f"it is a {title} image, which is not read here",
                remedy="convert it: qemu-img convert -O qcow2; or give the format raw if its bytes are the disk",
            )
    return DiskFormat.RAW


def _may_be(image: Source, format: DiskFormat) -> bool:
    match format:
        case DiskFormat.RAW:
            return True
        case DiskFormat.QCOW2:
            return image.read_up_to(0, len(qcow2.MAGIC)) == qcow2.MAGIC
        case DiskFormat.VHD:
            return vhd.starts_dynamic(image) or vhd.has_footer(image)
        case DiskFormat.VHDX:
            return image.read_up_to(0, len(vhdx.MAGIC)) == vhdx.MAGIC
        case DiskFormat.VMDK:
            return vmdk.starts(image)


def _read_as(image: Source, format: DiskFormat) -> ImageHeader:
    match format:
        case DiskFormat.RAW:
            return ImageHeader(
                name=image.name,
                format=DiskFormat.RAW,
                subformat="",
                file_size_bytes=image.size_bytes,
                virtual_size_bytes=-(-image.size_bytes // SECTOR) * SECTOR,  # QEMU shows a last part as a whole sector
            )
        case DiskFormat.QCOW2:
            return qcow2.read(image)
        case DiskFormat.VHD:
            return vhd.read(image)
        case DiskFormat.VHDX:
            return vhdx.read(image)
        case DiskFormat.VMDK:
            return vmdk.read(image)


def _seen(image: Source) -> str:
    return next((format.value for format in reversed(DiskFormat) if _may_be(image, format)), DiskFormat.RAW.value)
