"""Read the header of a disk image: which format it is in, how large its disk is, and what else it would pull in.

Nothing here opens a path, follows a name or starts a program, and a hostile image costs little: at most 4 MiB are
read whatever it claims, and 16 MiB of the log of a VHDX that must be replayed.
"""

from __future__ import annotations

from utilityvm.diskimage import foreign, qcow2, vhd, vhdx, vmdk
from utilityvm.diskimage.image_header import ImageHeader, Table, driver_options
from utilityvm.diskimage.safety import LIMITS, Limits, Problem, Rule, check_safe, problems
from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.errors import ConfigDiffers, ImageDamaged, ImageUnsafe
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
    "may_be",
    "problems",
    "read",
    "read_source",
]


def read(fd: int, *, name: str, expected: DiskFormat | None = None) -> ImageHeader:
    """The header of the image behind `fd`, which stays open and is only read; `name` is its path, for messages.

    With `expected` the image is read as that format whatever else it looks like: a raw disk whose guest wrote a qcow2
    header into it stays raw (CVE-2008-2004), so keep the format of the first registration and give it here.
    Without, its bytes decide (see `detect`), and what they say is a guess: give `expected` for raw disks that a guest
    has written to, and for physical disks always.

    Blocks for as long as the storage does: call it from a thread. Then `check_safe`.

    Raises:
        ConfigDiffers: it is not in the `expected` format.
        ImageDamaged: empty, cut short, impossible, or of a kind that is not read here.
        ImageUnsafe: it looks like two formats, is a VMDK that only describes other files, or names one with a NUL byte.
        InvalidRequest: `fd` is neither a regular file nor a block device.
    """
    return read_source(Source.of_fd(fd, name=name), expected=expected)


def read_source(image: Source, *, expected: DiskFormat | None = None) -> ImageHeader:
    """As `read`, from bytes that need not be a file."""
    if not image.size_bytes:
        raise image.damaged("it is empty", remedy="make an image: qemu-img create, or truncate --size for a raw one")
    if expected is None:
        return _read_as(image, detect(image))
    if not may_be(image, expected):
        raise ConfigDiffers(
            f"{image.name}: asked for as {expected}, and its header says {_seen(image)}",
            host_path=image.name,
            remedy="leave the format out, or give the one it has",
        )
    return _read_as(image, expected)


def detect(image: Source) -> DiskFormat:
    """The format that the image's bytes say; raw if they say nothing, and its name promises nothing else.

    Raises:
        ImageDamaged: it is something that is no disk, such as an archive, or not what its name promises.
        ImageUnsafe: they say two formats.
    """
    found = _seen(image)
    if found is not DiskFormat.VHD and found is not DiskFormat.RAW and vhd.ends_fixed(image):
        raise _ambiguous(image, found.value)
    if found is DiskFormat.VHD and vhd.starts_dynamic(image) and vhd.ends_fixed(image):
        raise _ambiguous(image, "a dynamic vpc")
    if found is DiskFormat.RAW and (other := foreign.recognise(image)) is not None:
        raise image.damaged(f"it is {other.title}", remedy=other.remedy)
    promised = foreign.promised(image.name)
    if promised is not None and promised != found:
        raise _broken_promise(image, found, promised)
    if promised is None and found is DiskFormat.RAW and (behind := vhd.misplaced_footer(image)) is not None:
        raise image.damaged(
            f"a VHD ends with its footer, and {behind} bytes are behind the one in it",
            remedy="restore it from a good copy, or give the format raw if all its bytes are the disk",
        )
    return found


def _ambiguous(image: Source, first: str) -> ImageUnsafe:
    return image.unsafe(
        f"it starts as {first} and ends as a fixed vpc",
        remedy="give the format that it has: raw, vpc, or the other; a guest can write either mark into its disk",
    )


def _broken_promise(image: Source, found: DiskFormat, promised: DiskFormat | str) -> ImageDamaged:
    said = f"a {promised} image" if isinstance(promised, DiskFormat) else promised
    seen = "no format that is known here" if found is DiskFormat.RAW else f"a {found} image"
    reason = f"its name says that it is {said}, and its bytes say {seen}"
    if promised is DiskFormat.VHD and (behind := vhd.misplaced_footer(image)) is not None:
        reason += f"; a VHD ends with its footer, and {behind} bytes are behind that"
    return image.damaged(
        reason,
        remedy="restore it from a good copy if it was cut short; else rename it, or give the format that it has"
        f" (such as {found})",
    )


def may_be(image: Source, format: DiskFormat) -> bool:
    """Has the image the marks of that format? Every image may be raw."""
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


def _seen(image: Source) -> DiskFormat:
    """The format by magic alone. A damaged VHD is one all the same."""
    magics = (DiskFormat.QCOW2, DiskFormat.VHDX, DiskFormat.VMDK, DiskFormat.VHD)
    return next((format for format in magics if may_be(image, format)), DiskFormat.RAW)
