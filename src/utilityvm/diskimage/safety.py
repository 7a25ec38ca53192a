"""What an image must not do to the host: the rules, and the check of a header against them.

The rules are those that others were hurt without: a name in a header that made the hypervisor open a file of the
host, sizes that ate its memory, two readers that saw two disks in one image.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from utilityvm.diskimage.image_header import ImageHeader
from utilityvm.errors import ImageDamaged, ImageUnsafe, NotSupported, UtilityVMError
from utilityvm.scsi.ports import DiskFormat


class Rule(StrEnum):
    """Why an image is refused."""

    FOREIGN_NAME = "foreign name"  # a json: or protocol name, which QEMU would take for more than a file
    BACKING_FILE = "backing file"  # CVE-2014-0134, CVE-2015-5163
    DATA_FILE = "data file"  # CVE-2024-32498
    PARENT = "parent"  # a differencing VHD, VHDX or VMDK
    DISPUTED = "disputed"  # QEMU and others, or two parts of the image, see different disks
    TWO_SIZES = "two sizes"  # QEMU shows another size than the format's specification says
    UNKNOWN_FEATURE = "unknown feature"  # to be understood by every reader, and we do not
    ENCRYPTED = "encrypted"
    CORRUPT = "corrupt"
    LOG = "log"  # to be replayed, and the disk is to be read-only
    READ_ONLY_FORMAT = "read-only format"  # to be written, and QEMU cannot
    EMPTY = "empty"
    VIRTUAL_SIZE = "virtual size"  # GHSA-2w87-5qcj-j6gx
    CLUSTER_SIZE = "cluster size"
    TABLE_SIZE = "table size"
    TABLE_OUTSIDE = "table outside"  # behind the end of the file: cut short, or made up
    SNAPSHOTS = "snapshots"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large an image may be. The defaults fit what Hyper-V, VMware and qemu-img make for 64 TiB."""

    virtual_size_bytes: int = 64 << 40
    cluster_size_bytes: int = 256 << 20  # VHDX; QEMU keeps single blocks of it in memory
    grain_size_bytes: int = 2 << 20  # VMDK, where QEMU allows 1 GiB and allocates it for a write
    table_bytes: int = 64 << 20
    snapshots: int = 4096
    memory_bytes: int = 64 << 20


LIMITS: Final = Limits()

_PROTOCOL: Final = re.compile(r"[^:/]*:")


@dataclass(frozen=True, slots=True)
class Problem:
    """One rule that an image breaks."""

    rule: Rule
    reason: str
    remedy: str
    error: type[UtilityVMError] = ImageUnsafe


def check_safe(header: ImageHeader, *, read_only: bool, allow_backing: bool = False, limits: Limits = LIMITS) -> None:
    """Return if a hypervisor may be given this image; then it opens no file but this one and needs bounded memory.

    With `allow_backing` a qcow2 backing file is no reason to refuse: the caller has registered the chain, opens and
    checks each file of it, and gives QEMU the node. A name that is more than a path is refused even so.

    The guest or others may change the file after it was read, so read it again each time it is opened. Against who
    changes it between our look and QEMU's stands what the host gives QEMU: an explicit driver, `driver_options`, and
    rights to this file alone. QEMU has no option against a qcow2 data file or VMDK extents; the host sees them as
    nodes that it did not name (`query-named-block-nodes`), and as a header that is no longer equal to this one but
    for `dirty` and the file's size.

    Raises:
        ImageUnsafe: it would make QEMU open something else, take too much memory, or see another disk than we do.
        ImageDamaged: it is cut short, or marked as corrupt.
        NotSupported: it is encrypted, or cannot be attached as `read_only` says.
    """
    for problem in problems(header, read_only=read_only, allow_backing=allow_backing, limits=limits):
        raise problem.error(f"{header.name}: {problem.reason}", host_path=header.name, remedy=problem.remedy)


def problems(
    header: ImageHeader, *, read_only: bool, allow_backing: bool = False, limits: Limits = LIMITS
) -> Iterator[Problem]:
    """Every rule that the image breaks, the gravest first; `check_safe` raises the first of them."""
    yield from _other_files(header, allow_backing=allow_backing)
    yield from _readers(header)
    yield from _use(header, read_only=read_only)
    yield from _sizes(header, limits)


def is_plain_name(name: str) -> bool:
    """Does QEMU take this name for the path of a file, and for nothing more?

    Source: QEMU block.c, path_has_protocol: a colon before any slash makes a protocol of what is before it.
    """
    return _PROTOCOL.match(name) is None


def _other_files(header: ImageHeader, *, allow_backing: bool) -> Iterator[Problem]:
    for name in (header.backing, header.data_file):
        if name is not None and not header.needs_parent and not is_plain_name(name):
            yield Problem(
                Rule.FOREIGN_NAME,
                f"it names {name!r}, which is not the path of a file",
                "use an image that stands alone: qemu-img convert, on a host that you trust with that name",
            )
    if header.data_file is not None:
        yield Problem(
            Rule.DATA_FILE,
            f"its data is in another file, {header.data_file!r}",
            "copy it into one file: qemu-img convert -f qcow2 -O qcow2",
        )
    if header.needs_parent:
        parent = repr(header.backing) if header.backing else "that it does not name"
        yield Problem(
            Rule.PARENT,
            f"it holds only what differs from a parent, {parent}",
            "merge the two with the tool that made them, or convert the pair with qemu-img",
        )
    elif header.backing is not None and not allow_backing:
        yield Problem(
            Rule.BACKING_FILE,
            f"it lies over a backing file, {header.backing!r}",
            "allow the chain, or flatten it: qemu-img convert -f qcow2 -O qcow2",
        )


def _readers(header: ImageHeader) -> Iterator[Problem]:
    for dispute in header.disputes:
        yield Problem(
            Rule.DISPUTED,
            f"it can be read in two ways. {dispute}",
            "convert a copy that you trust with qemu-img convert, and attach the result",
        )
    if header.other_size_bytes is not None:
        yield Problem(
            Rule.TWO_SIZES,
            f"its footer says {header.virtual_size_bytes} bytes, and QEMU may show {header.other_size_bytes}, by its"
            " geometry",
            f"convert it by its footer: qemu-img convert -O qcow2 --image-opts {shlex.quote(_by_footer(header.name))}",
        )
    for feature in header.unknown_features:
        yield Problem(Rule.UNKNOWN_FEATURE, f"it uses {feature}, which is unknown here", "convert it with its maker")


def _by_footer(name: str) -> str:
    """How qemu-img is told to take the size that the footer of a VHD says. A comma in a value is doubled."""
    return "driver=vpc,force_size_calc=current_size,file.filename=" + name.replace(",", ",,")


def _use(header: ImageHeader, *, read_only: bool) -> Iterator[Problem]:
    if header.encryption is not None:
        yield Problem(
            Rule.ENCRYPTED,
            f"it is encrypted ({header.encryption}) by its format",
            "decrypt it with qemu-img convert, and let the guest encrypt what it mounts",
            NotSupported,
        )
    if header.corrupt:
        yield Problem(
            Rule.CORRUPT, "QEMU has marked it as corrupt", "qemu-img check -r all -f qcow2, on a copy", ImageDamaged
        )
    if read_only and header.format is DiskFormat.VHDX and header.dirty:
        yield Problem(
            Rule.LOG,
            "its log must be replayed before it can be read, and it is to be attached read-only",
            "attach it writable once, or: qemu-img check -r all -f vhdx",
            NotSupported,
        )
    if not read_only and header.write_refusal is not None:
        yield Problem(
            Rule.READ_ONLY_FORMAT,
            f"it cannot be written: {header.write_refusal}",
            "attach it read-only, or convert it: qemu-img convert -O qcow2",
            NotSupported,
        )


def _sizes(header: ImageHeader, limits: Limits) -> Iterator[Problem]:
    size = header.virtual_size_bytes
    if not header.virtual_size_bytes:
        yield Problem(Rule.EMPTY, "it holds a disk of 0 bytes", "resize it: qemu-img resize", ImageDamaged)
    if size > limits.virtual_size_bytes:
        yield Problem(
            Rule.VIRTUAL_SIZE,
            f"it claims a disk of {size} bytes, and {limits.virtual_size_bytes} are allowed",
            "raise the limit if you made this image",
        )
    grain_limit = limits.grain_size_bytes if header.format is DiskFormat.VMDK else limits.cluster_size_bytes
    if header.cluster_size_bytes is not None and header.cluster_size_bytes > grain_limit:
        yield Problem(
            Rule.CLUSTER_SIZE,
            f"it claims blocks of {header.cluster_size_bytes} bytes, and {grain_limit} are allowed",
            "convert it with qemu-img, which makes smaller ones",
        )
    for table in header.tables:
        if table.size_bytes > limits.table_bytes:
            yield Problem(
                Rule.TABLE_SIZE,
                f"{table.name} has {table.size_bytes} bytes, and {limits.table_bytes} are allowed",
                "convert it with qemu-img, with larger clusters",
            )
        if table.end > header.file_size_bytes:
            yield Problem(
                Rule.TABLE_OUTSIDE,
                f"it is cut short: {table.name} ends at {table.end}, and the file at {header.file_size_bytes}",
                "restore it from a good copy",
                ImageDamaged,
            )
    if header.snapshots > limits.snapshots:
        yield Problem(
            Rule.SNAPSHOTS,
            f"it has {header.snapshots} snapshots, and {limits.snapshots} are allowed",
            "delete some: qemu-img snapshot -d",
        )
    if header.memory_bytes > limits.memory_bytes:
        yield Problem(
            Rule.MEMORY,
            f"to open it takes {header.memory_bytes} bytes of memory, and {limits.memory_bytes} are allowed",
            "repair it (qemu-img check -r all) and remove dirty bitmaps (qemu-img bitmap --remove)",
        )
