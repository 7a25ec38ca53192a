"""The documents that hcsshim sends about SCSI disks, to HCS and to the system in the VM: the same, to the byte.

A disk is put on the bus by a `ModifySettingRequest` with a resource path; it is mounted by a guest request, which goes
to the guest by itself (over the bridge) or inside a `ModifySettingRequest` that HCS hands on. Every field that is zero
is left out: a disk at LUN 0 has no `Lun`.

Whose documents: the seed's have functions of their own (`seed_request`), and of guest requests `Dialect` says whose.
Ours is what a right client of today's HCS and guests sends; the recorded ones are exact, with their defects, for
reading along and for comparing. Each function says where they differ.

    >>> from utilityvm.hosts.hcs import documents as d
    >>> d.encode(d.detach_request(d.Slot(2, 9), schema=d.Schema.SEED))
    '{"ResourcePath":"VirtualMachine/Devices/Scsi/2/Attachments/9","RequestType":"Remove"}'
    >>> d.encode(d.mount_request("linux", d.Slot(0, 1), "/data"))
    '{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/data","Lun":1}}'

Source: hcsshim internal/uvm/scsi.go and modify.go (2021), internal/uvm/scsi/backend.go and
internal/controller/device/scsi (2026), as recorded in tests/vectors/hcs_*.json.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, TypeAlias

import msgspec

from utilityvm.errors import InvalidRequest, NotSupported, TooManyAttachments
from utilityvm.hosts.hcs.gojson import encode
from utilityvm.scsi.ports import AttachmentType
from utilityvm.scsi.slot import MAX_CONTROLLERS, Slot

__all__ = [
    "CONTROLLER_GUIDS",
    "Attachment",
    "Dialect",
    "GuestMount",
    "GuestOS",
    "GuestRequest",
    "LinuxDisk",
    "ModifySettingRequest",
    "Part",
    "RequestType",
    "ResourceType",
    "Schema",
    "Scsi",
    "ScsiDevice",
    "Slot",
    "WindowsDisk",
    "attach_request",
    "check_expressible",
    "controller_name",
    "detach_request",
    "eject_request",
    "encode",
    "forwarded",
    "mount_request",
    "parse_evd",
    "resource_path",
    "scsi_section",
    "seed_add_request",
    "seed_remove_request",
    "seed_request",
    "split",
    "unmount_request",
]


class Schema(StrEnum):
    """How a document names a controller."""

    SEED = "seed"  # by its number, as hcsshim did until 2021
    HEAD = "head"  # by a GUID of its own, so that the guest finds it under that name


class Dialect(StrEnum):
    """Whose guest requests to write. The recorded ones are exact, defects included."""

    OURS = "ours"
    MANAGER = "manager"  # hcsshim internal/uvm/scsi
    CONTROLLER = "controller"  # hcsshim internal/controller/device/scsi


class GuestOS(StrEnum):
    """What runs in the VM."""

    LINUX = "linux"
    WINDOWS = "windows"


class RequestType(StrEnum):
    ADD = "Add"
    REMOVE = "Remove"


class ResourceType(StrEnum):
    MAPPED_VIRTUAL_DISK = "MappedVirtualDisk"
    MAPPED_VIRTUAL_DISK_FOR_CONTAINER_SCRATCH = "MappedVirtualDiskForContainerScratch"
    SCSI_DEVICE = "SCSIDevice"


# UUID version 5 of the controller's number, in a namespace of hcsshim's.
# Source: hcsshim internal/protocol/guestrequest/types.go
_CONTROLLERS: Final = uuid.UUID("d422512d-2bf2-4752-809d-7b82b5fcb1b4")
CONTROLLER_GUIDS: Final = tuple(str(uuid.uuid5(_CONTROLLERS, str(number))) for number in range(MAX_CONTROLLERS))


class _Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="pascal"):
    """Fields in the order in which Go writes them; one that is zero is not written."""


class Attachment(_Document, frozen=True, kw_only=True):
    """A disk on a controller. Source: HCS schema, Attachment."""

    type: str = ""
    path: str = ""
    ignore_flushes: bool = False
    caching_mode: str = ""
    no_write_hardening: bool = False
    disable_expansion_optimization: bool = False
    ignore_relative_locator: bool = False
    capture_io_attribution_context: bool = False
    read_only: bool = False
    support_compressed_volumes: bool = False
    always_allow_sparse_files: bool = False
    extensible_virtual_disk_type: str = ""


class Scsi(_Document, frozen=True, kw_only=True):
    """A controller of a compute-system document, with its disks by LUN. Source: HCS schema, Scsi."""

    attachments: dict[str, Attachment] = {}


class LinuxDisk(_Document, frozen=True, kw_only=True):
    """`LCOWMappedVirtualDisk`: a mount in a Linux guest."""

    mount_path: str = ""
    lun: int = 0
    controller: int = 0
    partition: int = 0
    read_only: bool = False
    encrypted: bool = False
    options: tuple[str, ...] = ()
    block_dev: bool = False
    ensure_filesystem: bool = False
    filesystem: str = ""


class WindowsDisk(_Document, frozen=True, kw_only=True):
    """`WCOWMappedVirtualDisk`: a mount in a Windows guest. It has no controller: it means number 0."""

    container_path: str = ""
    lun: int = 0


class ScsiDevice(_Document, frozen=True, kw_only=True):
    """`SCSIDevice`: the device that a Linux guest is to let go of."""

    controller: int = 0
    lun: int = 0


class GuestRequest(_Document, frozen=True, kw_only=True):
    """What the system in the VM is asked for."""

    request_type: str = ""
    resource_type: str = ""
    settings: LinuxDisk | WindowsDisk | ScsiDevice | None = None


class ModifySettingRequest(_Document, frozen=True, kw_only=True):
    """What HCS is asked for. Source: HCS schema, ModifySettingRequest."""

    resource_path: str = ""
    request_type: str = ""
    settings: Attachment | None = None
    guest_request: GuestRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMount:
    """How a guest is to mount a disk, in the words of today's hcsshim (its `mountConfig`)."""

    partition: int = 0
    read_only: bool = False
    encrypted: bool = False
    block_dev: bool = False
    options: Sequence[str] | None = None  # None and () are the same on the wire
    ensure_filesystem: bool = False
    filesystem: str = ""
    format_with_refs: bool = False  # Windows: a container's scratch disk, formatted with ReFS whatever is on it


# On the host's bus.


def controller_name(controller: int, schema: Schema) -> str:
    """What a document calls the controller.

    Raises:
        InvalidRequest: there is no such controller.
    """
    if not 0 <= controller < MAX_CONTROLLERS:
        raise InvalidRequest(f"there is no controller {controller}", remedy="controllers are 0 to 3")
    return CONTROLLER_GUIDS[controller] if schema is Schema.HEAD else str(controller)


def resource_path(slot: Slot, schema: Schema) -> str:
    """The path of what is at `slot`.

    Raises:
        InvalidRequest: the slot does not exist.
    """
    controller, lun = Slot.checked(*slot)
    return f"VirtualMachine/Devices/Scsi/{controller_name(controller, schema)}/Attachments/{lun}"


def attach_request(slot: Slot, attachment: Attachment, *, schema: Schema = Schema.HEAD) -> ModifySettingRequest:
    """Put a disk on the bus.

    Raises:
        InvalidRequest: the slot does not exist.
    """
    return ModifySettingRequest(
        resource_path=resource_path(slot, schema), request_type=RequestType.ADD, settings=attachment
    )


def detach_request(slot: Slot, *, schema: Schema = Schema.HEAD) -> ModifySettingRequest:
    """Take what is at `slot` off the bus.

    Raises:
        InvalidRequest: the slot does not exist.
    """
    return ModifySettingRequest(resource_path=resource_path(slot, schema), request_type=RequestType.REMOVE)


def scsi_section(attachments: Mapping[Slot, Attachment], *, schema: Schema = Schema.HEAD) -> dict[str, Scsi]:
    """`VirtualMachine.Devices.Scsi` of a compute-system document. Its keys are in Go's order: as text, so 10 before 9.

    Raises:
        InvalidRequest: a slot does not exist.
    """
    controllers: dict[str, dict[str, Attachment]] = {}
    for (controller, lun), attachment in attachments.items():
        Slot.checked(controller, lun)
        controllers.setdefault(controller_name(controller, schema), {})[str(lun)] = attachment
    return {name: Scsi(attachments=dict(sorted(controllers[name].items()))) for name in sorted(controllers)}


_EVD: Final = re.compile(r"evd://([^/]+)/(.+)", re.DOTALL)


def parse_evd(path: str, *, strict: bool = True) -> tuple[str, str]:
    """The type and the path of an extensible virtual disk, from `evd://TYPE/PATH`.

    Not `strict`: as hcsshim reads it, where `evd://` may be missing, the path may be empty, and in `EVD://t/x` the type
    is `EVD:`.

    Raises:
        InvalidRequest: it is no such path.
    """
    if strict:
        if (match := _EVD.fullmatch(path)) and ":" not in match[1]:
            return match[1], match[2]
    else:
        kind, separator, mount_path = path.removeprefix("evd://").partition("/")
        if kind and separator:
            return kind, mount_path
    raise InvalidRequest(
        f"{path!r} is no extensible virtual disk", host_path=path, remedy="write it as evd://TYPE/PATH"
    )


# In the guest.


def mount_request(
    os: str, slot: Slot, path: str, config: GuestMount | None = None, *, dialect: Dialect = Dialect.OURS
) -> GuestRequest:
    """Mount the disk at `slot` in the guest.

    The manager's dialect cuts controller and LUN to 8 bits for a Linux guest, lets a Windows guest have `block_dev`
    (and does not send it), and asks a Linux guest for a ReFS scratch disk, which that refuses. The controller's does
    not check anything for a Windows guest, not even the controller: the guest then mounts the disk of that LUN on
    controller 0.

    Raises:
        NotSupported: this guest cannot be told so, or is neither Linux nor Windows.
        InvalidRequest: the slot or the partition does not exist.
    """
    config = config or GuestMount()
    resource = (
        ResourceType.MAPPED_VIRTUAL_DISK_FOR_CONTAINER_SCRATCH
        if config.format_with_refs
        else ResourceType.MAPPED_VIRTUAL_DISK
    )
    check_expressible(os, slot, config, dialect=dialect)
    settings: LinuxDisk | WindowsDisk
    if os == GuestOS.WINDOWS:
        settings = WindowsDisk(container_path=path, lun=slot[1])
    else:
        settings = _linux_disk(slot, path, config)
    return GuestRequest(request_type=RequestType.ADD, resource_type=resource, settings=settings)


def unmount_request(
    os: str, slot: Slot, path: str, config: GuestMount | None = None, *, dialect: Dialect = Dialect.OURS
) -> GuestRequest:
    """Unmount what `mount_request` mounted. Ours and the controller's say again all that the mount said.

    The manager's dialect leaves out `Encrypted` (the guest then forgets its dm-crypt device), the options and the file
    system, and unmounts in a Windows guest whatever the config and the controller are.

    Raises:
        NotSupported: this guest cannot be told so, or is neither Linux nor Windows.
        InvalidRequest: the slot or the partition does not exist.
    """
    config = config or GuestMount()
    if dialect is Dialect.MANAGER:
        check_expressible(os, Slot(0, slot[1]), GuestMount(), dialect=dialect)
        config = GuestMount(partition=config.partition, read_only=config.read_only, block_dev=config.block_dev)
    else:
        check_expressible(os, slot, config, dialect=dialect)
    settings: LinuxDisk | WindowsDisk
    if os == GuestOS.WINDOWS:
        settings = WindowsDisk(container_path=path, lun=slot[1])
    else:
        settings = _linux_disk(slot, path, config)
    return GuestRequest(
        request_type=RequestType.REMOVE, resource_type=ResourceType.MAPPED_VIRTUAL_DISK, settings=settings
    )


def eject_request(os: str, slot: Slot, *, dialect: Dialect = Dialect.OURS) -> GuestRequest | None:
    """Make the guest let go of the device at `slot`. None: a Windows guest has no such request, and needs none.

    Raises:
        NotSupported: the guest is neither Linux nor Windows.
        InvalidRequest: the slot does not exist.
    """
    if os == GuestOS.WINDOWS:
        return None
    check_expressible(os, slot, GuestMount(), dialect=dialect)
    return GuestRequest(
        request_type=RequestType.REMOVE,
        resource_type=ResourceType.SCSI_DEVICE,
        settings=ScsiDevice(controller=slot[0] & 0xFF, lun=slot[1] & 0xFF),
    )


def forwarded(request: GuestRequest) -> ModifySettingRequest:
    """The guest request as HCS takes it, to hand it on to the guest."""
    return ModifySettingRequest(guest_request=request)


def check_expressible(os: str, slot: Slot | None, config: GuestMount, *, dialect: Dialect = Dialect.OURS) -> None:
    """Refuse what a guest of this system cannot be told; `slot` None is a slot that is not chosen yet.

    Raises:
        NotSupported: says what, and what would be.
        InvalidRequest: the slot or the partition does not exist.
    """
    if os not in (GuestOS.LINUX, GuestOS.WINDOWS):
        raise NotSupported(f"a guest of system {os!r} is not known", remedy="it is linux or windows")
    if dialect is Dialect.OURS:
        if slot is not None:
            Slot.checked(*slot)
        if config.partition < 0:
            raise InvalidRequest(
                f"partition {config.partition} is invalid: partitions count from 1", remedy="0 is the whole disk"
            )
    refused = _refused_by_windows if os == GuestOS.WINDOWS else _refused_by_linux
    if what := refused(slot, config, dialect):
        raise NotSupported(f"a {os.title()} guest cannot be told of {what}", slot=slot, remedy=_REMEDY[os])


_REMEDY: Final[Mapping[str, str]] = {
    GuestOS.WINDOWS: "mount the whole disk plainly, from controller 0; or attach it only",
    GuestOS.LINUX: "format it with ensure_filesystem and one of Linux's file systems",
}


def _refused_by_windows(slot: Slot | None, config: GuestMount, dialect: Dialect) -> str | None:
    if dialect is Dialect.CONTROLLER:
        return None
    ours = dialect is Dialect.OURS
    for wanted, what in (
        (slot is not None and slot[0] != 0, f"controller {slot and slot[0]}"),
        (config.partition, f"partition {config.partition}"),
        (config.encrypted, "encryption"),
        (config.options, f"the options {list(config.options or ())}"),
        (config.ensure_filesystem, "making a file system"),
        (config.filesystem, f"the file system {config.filesystem}"),
        (ours and config.block_dev, "a raw block device"),
    ):
        if wanted:
            return what
    return None


def _refused_by_linux(slot: Slot | None, config: GuestMount, dialect: Dialect) -> str | None:
    return "a ReFS scratch disk" if dialect is Dialect.OURS and config.format_with_refs else None


def _linux_disk(slot: Slot, path: str, config: GuestMount) -> LinuxDisk:
    return LinuxDisk(
        mount_path=path,
        controller=slot[0] & 0xFF,  # Go's uint8; ours were checked before
        lun=slot[1] & 0xFF,
        partition=config.partition,
        read_only=config.read_only,
        encrypted=config.encrypted,
        options=tuple(config.options or ()),
        block_dev=config.block_dev,
        ensure_filesystem=config.ensure_filesystem,
        filesystem=config.filesystem,
    )


# As the seed did both at once.


def seed_add_request(
    *,
    os: str,
    controller: int,
    lun: int,
    host_path: str,
    uvm_path: str = "",
    read_only: bool = False,
    guest_options: Sequence[str] | None = None,
    attachment_type: str = AttachmentType.VIRTUAL_DISK,
) -> ModifySettingRequest:
    """What the seed's `AddSCSI` sends: attach, and with a `uvm_path` also mount.

    For a Windows guest it drops the options without a word. `HcsGuest` refuses them.

    Raises:
        TooManyAttachments: a controller above 0, as in the seed; `HcsHost` uses all of them.
        InvalidRequest: the slot does not exist.
    """
    slot = Slot.checked(controller, lun)
    if controller > 0:
        raise TooManyAttachments(f"the seed adds disks to controller 0 only, and {slot} is the next slot", slot=slot)
    guest: GuestRequest | None = None
    if uvm_path:
        settings: LinuxDisk | WindowsDisk = (
            WindowsDisk(container_path=uvm_path, lun=lun)
            if os == GuestOS.WINDOWS
            else LinuxDisk(mount_path=uvm_path, lun=lun, read_only=read_only, options=tuple(guest_options or ()))
        )
        guest = GuestRequest(
            request_type=RequestType.ADD, resource_type=ResourceType.MAPPED_VIRTUAL_DISK, settings=settings
        )
    return ModifySettingRequest(
        resource_path=resource_path(slot, Schema.SEED),
        request_type=RequestType.ADD,
        settings=Attachment(type=attachment_type, path=host_path, read_only=read_only),
        guest_request=guest,
    )


def seed_remove_request(*, os: str, controller: int, lun: int, uvm_path: str = "") -> ModifySettingRequest:
    """What the seed's `RemoveSCSI` sends: unmount and eject, then detach.

    A disk that is not mounted is ejected too. For a Windows guest the seed then sends the Linux settings, which that
    does not understand; `HcsGuest` sends nothing.

    Raises:
        InvalidRequest: the slot does not exist.
    """
    slot = Slot.checked(controller, lun)
    settings: LinuxDisk | WindowsDisk = (
        WindowsDisk(container_path=uvm_path, lun=lun)
        if os == GuestOS.WINDOWS and uvm_path
        else LinuxDisk(mount_path=uvm_path, lun=lun, controller=controller)
    )
    return ModifySettingRequest(
        resource_path=resource_path(slot, Schema.SEED),
        request_type=RequestType.REMOVE,
        guest_request=GuestRequest(
            request_type=RequestType.REMOVE, resource_type=ResourceType.MAPPED_VIRTUAL_DISK, settings=settings
        ),
    )


def seed_request(
    *,
    op: str,
    os: str,
    controller: int,
    lun: int,
    host_path: str = "",
    uvm_path: str = "",
    read_only: bool = False,
    guest_options: Sequence[str] | None = None,
    attachment_type: str = AttachmentType.VIRTUAL_DISK,
) -> ModifySettingRequest:
    """The seed's document for `add`, `add_physical` or `remove`, from the fields of a recording.

    Raises:
        InvalidRequest: another `op`, or a slot that does not exist.
        TooManyAttachments: as `seed_add_request`.
    """
    match op:
        case "add" | "add_physical":
            return seed_add_request(
                os=os,
                controller=controller,
                lun=lun,
                host_path=host_path,
                uvm_path=uvm_path,
                read_only=read_only,
                guest_options=guest_options,
                attachment_type=AttachmentType.PASS_THRU if op == "add_physical" else attachment_type,
            )
        case "remove":
            return seed_remove_request(os=os, controller=controller, lun=lun, uvm_path=uvm_path)
        case _:
            raise InvalidRequest(f"there is no seed request {op!r}", remedy="add, add_physical or remove")


Peer: TypeAlias = Literal["hcs", "gcs"]


@dataclass(frozen=True, slots=True)
class Part:
    """One of the documents that a request is split into, and whom it goes to."""

    to: Peer
    document: ModifySettingRequest | GuestRequest

    @property
    def json(self) -> str:
        """As it travels: to HCS with HTML escapes, over the bridge without."""
        return encode(self.document, escape_html=self.to == "hcs")


def split(request: ModifySettingRequest) -> list[Part]:
    """The request as two, for a VM whose guest is connected to us directly, in the order in which they are sent.

    Add: the host's, then the guest's. Remove: the other way round. See `modify` for what happens when one fails.
    """
    if request.guest_request is None:
        return [Part("hcs", request)]
    host = Part("hcs", msgspec.structs.replace(request, guest_request=None))
    guest = Part("gcs", request.guest_request)
    if not request.resource_path:
        return [guest]
    return [host, guest] if request.request_type == RequestType.ADD else [guest, host]
