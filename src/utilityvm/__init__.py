"""Hot-pluggable, shared, guest-mounted SCSI disks for running utility VMs.

::

    async with UtilityVM.start(VMConfig(name="worker")) as vm:
        async with vm.add_scsi("tools.vhdx", "/tools", read_only=True) as tools:
            result = await vm.run(["ls", "/tools"])

What there is: `list_vms`, `list_disks`, `list_templates`, `list_images`, and `get_vm` and its like. Keeping a host in
order: `doctor`, `find_leftovers`, `examine_vm`, `repair_vm`. `list_…`, `get_…` and `find_…` read files and block for
some milliseconds: in an event loop call `asyncio.to_thread`.

Every error is a `UtilityVMError`. After a `RequestError` nothing was sent and nothing changed; after `HostRefused` and
`GuestRefused` the VM is as it was; after `OutcomeUnknown` the next call finds out first. All may be tried again.

Names are loaded when they are first used, so that `import utilityvm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utilityvm import errors as errors
    from utilityvm.client.remote import Adding, Client, RemoteMount, RemotePieces, RemoteProgram, RemoteVM, connect
    from utilityvm.errors import (
        AccessDenied,
        AlreadyAttached,
        AlreadyReleased,
        ConfigDiffers,
        DeadlineExceeded,
        DiskInUse,
        DiskNotFound,
        GuestBusy,
        GuestPathInUse,
        GuestRefused,
        HostRefused,
        ImageDamaged,
        ImageError,
        ImageUnsafe,
        InvalidRequest,
        Migrating,
        NoControllers,
        NoFreeSlot,
        NotAttached,
        NotSupported,
        OutcomeUnknown,
        ProgramFailed,
        ProgramNotFound,
        ProtocolError,
        RequestError,
        SetupError,
        StartFailed,
        StoreDamaged,
        StoreError,
        StoreTooNew,
        TemplateDamaged,
        TemplateDiffers,
        TemplateExists,
        TemplateInUse,
        TemplateNotFound,
        TooManyAttachments,
        UnsafePath,
        UtilityVMError,
        VMExists,
        VMGone,
        VMNotFound,
        VMNotRunning,
        VMOwned,
        WrongLoop,
        WrongState,
    )
    from utilityvm.guestimage.build import GuestImage
    from utilityvm.guestimage.custom import GuestRecipe
    from utilityvm.guestimage.listing import find_image, get_image, list_images
    from utilityvm.guests.copying import CopyResult, EscapingLinks
    from utilityvm.guests.follow import ProgramPiece, ProgramPieces
    from utilityvm.guests.kept import Program
    from utilityvm.guests.program import CommandResult, Limits, OutputSink
    from utilityvm.guests.programinfo import ProgramInfo
    from utilityvm.guests.streams import ProgramInput, ProgramOutput
    from utilityvm.hosts.qemu import QemuProcess
    from utilityvm.machine.hostpath import HostPath
    from utilityvm.machine.processes import introduce
    from utilityvm.scsi.document import SavedDisk, ScsiState
    from utilityvm.scsi.events import ScsiEvent, ScsiEvents
    from utilityvm.scsi.mount_config import CallerKey, Encryption, MountConfig, MountSettings, ScratchKey, Verity
    from utilityvm.scsi.ports import AttachmentType, DiskFormat, Holder, VMAccess
    from utilityvm.scsi.reservation import ForceArgument, Reservation
    from utilityvm.scsi.slot import Slot
    from utilityvm.scsi.views import MountView, SlotView
    from utilityvm.server.run import serve
    from utilityvm.store.catalog import VMState
    from utilityvm.store.ownership import Owner
    from utilityvm.store.view import DiskInfo, ReservationInfo
    from utilityvm.templates.catalog import Template, TemplateDisk
    from utilityvm.templates.listing import get_template, list_templates
    from utilityvm.upkeep.findings import Finding, doctor
    from utilityvm.upkeep.images import remove_images
    from utilityvm.upkeep.leftovers import Leftover, LeftoverKind, find_leftovers, remove_leftover, remove_leftovers
    from utilityvm.upkeep.repair import Difference, examine_vm, repair_vm
    from utilityvm.vm.acquiring import Acquiring
    from utilityvm.vm.config import GENERATED, DiskSettings, DiskSpec, GuestPath, SomeGuestPath, VMConfig
    from utilityvm.vm.listing import VMInfo, get_disk, get_vm, list_disks, list_vms, read_console
    from utilityvm.vm.mount import MountedDisk, OnBusy, SCSIMount
    from utilityvm.vm.pool import ClonePool
    from utilityvm.vm.utility_vm import UtilityVM

__all__ = [
    "GENERATED",
    "AccessDenied",
    "Acquiring",
    "Adding",
    "AlreadyAttached",
    "AlreadyReleased",
    "AttachmentType",
    "CallerKey",
    "Client",
    "ClonePool",
    "CommandResult",
    "ConfigDiffers",
    "CopyResult",
    "DeadlineExceeded",
    "Difference",
    "DiskFormat",
    "DiskInUse",
    "DiskInfo",
    "DiskNotFound",
    "DiskSettings",
    "DiskSpec",
    "Encryption",
    "EscapingLinks",
    "Finding",
    "ForceArgument",
    "GuestBusy",
    "GuestImage",
    "GuestPath",
    "GuestPathInUse",
    "GuestRecipe",
    "GuestRefused",
    "Holder",
    "HostPath",
    "HostRefused",
    "ImageDamaged",
    "ImageError",
    "ImageUnsafe",
    "InvalidRequest",
    "Leftover",
    "LeftoverKind",
    "Limits",
    "Migrating",
    "MountConfig",
    "MountSettings",
    "MountView",
    "MountedDisk",
    "NoControllers",
    "NoFreeSlot",
    "NotAttached",
    "NotSupported",
    "OnBusy",
    "OutcomeUnknown",
    "OutputSink",
    "Owner",
    "Program",
    "ProgramFailed",
    "ProgramInfo",
    "ProgramInput",
    "ProgramNotFound",
    "ProgramOutput",
    "ProgramPiece",
    "ProgramPieces",
    "ProtocolError",
    "QemuProcess",
    "RemoteMount",
    "RemotePieces",
    "RemoteProgram",
    "RemoteVM",
    "RequestError",
    "Reservation",
    "ReservationInfo",
    "SCSIMount",
    "SavedDisk",
    "ScratchKey",
    "ScsiEvent",
    "ScsiEvents",
    "ScsiState",
    "SetupError",
    "Slot",
    "SlotView",
    "SomeGuestPath",
    "StartFailed",
    "StoreDamaged",
    "StoreError",
    "StoreTooNew",
    "Template",
    "TemplateDamaged",
    "TemplateDiffers",
    "TemplateDisk",
    "TemplateExists",
    "TemplateInUse",
    "TemplateNotFound",
    "TooManyAttachments",
    "UnsafePath",
    "UtilityVM",
    "UtilityVMError",
    "VMAccess",
    "VMConfig",
    "VMExists",
    "VMGone",
    "VMInfo",
    "VMNotFound",
    "VMNotRunning",
    "VMOwned",
    "VMState",
    "Verity",
    "WrongLoop",
    "WrongState",
    "connect",
    "doctor",
    "errors",
    "examine_vm",
    "find_image",
    "find_leftovers",
    "get_disk",
    "get_image",
    "get_template",
    "get_vm",
    "introduce",
    "list_disks",
    "list_images",
    "list_templates",
    "list_vms",
    "read_console",
    "remove_images",
    "remove_leftover",
    "remove_leftovers",
    "repair_vm",
    "serve",
]

_MODULES = {
    "utilityvm.server.run": ("serve",),
    "utilityvm.vm.listing": ("VMInfo", "get_disk", "get_vm", "list_disks", "list_vms", "read_console"),
    "utilityvm.store.view": ("DiskInfo", "ReservationInfo"),
    "utilityvm.store.catalog": ("VMState",),
    "utilityvm.store.ownership": ("Owner",),
    "utilityvm.templates.listing": ("get_template", "list_templates"),
    "utilityvm.guestimage.listing": ("find_image", "get_image", "list_images"),
    "utilityvm.upkeep.images": ("remove_images",),
    "utilityvm.upkeep.findings": ("Finding", "doctor"),
    "utilityvm.upkeep.leftovers": ("Leftover", "LeftoverKind", "find_leftovers", "remove_leftover", "remove_leftovers"),
    "utilityvm.upkeep.repair": ("Difference", "examine_vm", "repair_vm"),
    "utilityvm.machine.processes": ("introduce",),
    "utilityvm.guests.follow": ("ProgramPiece", "ProgramPieces"),
    "utilityvm.guests.kept": ("Program",),
    "utilityvm.guests.programinfo": ("ProgramInfo",),
    "utilityvm.guests.copying": ("CopyResult", "EscapingLinks"),
    "utilityvm.guests.program": ("CommandResult", "Limits", "OutputSink"),
    "utilityvm.guests.streams": ("ProgramInput", "ProgramOutput"),
    "utilityvm.client.remote": (
        "Adding",
        "Client",
        "RemoteMount",
        "RemotePieces",
        "RemoteProgram",
        "RemoteVM",
        "connect",
    ),
    "utilityvm.hosts.qemu": ("QemuProcess",),
    "utilityvm.machine.hostpath": ("HostPath",),
    "utilityvm.scsi.reservation": ("ForceArgument", "Reservation"),
    "utilityvm.vm.config": ("GENERATED", "DiskSettings", "DiskSpec", "GuestPath", "SomeGuestPath", "VMConfig"),
    "utilityvm.scsi.mount_config": (
        "CallerKey",
        "Encryption",
        "MountConfig",
        "MountSettings",
        "ScratchKey",
        "Verity",
    ),
    "utilityvm.vm.mount": ("MountedDisk", "OnBusy", "SCSIMount"),
    "utilityvm.scsi.events": ("ScsiEvent", "ScsiEvents"),
    "utilityvm.scsi.document": ("SavedDisk", "ScsiState"),
    "utilityvm.scsi.views": ("MountView", "SlotView"),
    "utilityvm.scsi.ports": (
        "AttachmentType",
        "DiskFormat",
        "Holder",
        "VMAccess",
    ),
    "utilityvm.scsi.slot": ("Slot",),
    "utilityvm.vm.acquiring": ("Acquiring",),
    "utilityvm.vm.pool": ("ClonePool",),
    "utilityvm.templates.catalog": ("Template", "TemplateDisk"),
    "utilityvm.guestimage.build": ("GuestImage",),
    "utilityvm.guestimage.custom": ("GuestRecipe",),
    "utilityvm.vm.utility_vm": ("UtilityVM",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'utilityvm' has no attribute {name!r}")
    value: object
    if name == "errors":
        value = importlib.import_module("utilityvm.errors")
    else:
        try:
            value = getattr(importlib.import_module(_MODULE_OF.get(name, "utilityvm.errors")), name)
        except ModuleNotFoundError as error:
            if error.name != "fcntl":
                raise
            setup_error = importlib.import_module("utilityvm.errors").SetupError
            raise setup_error(
                f"utilityvm.{name} runs VMs on QEMU, which needs a Unix system",
                remedy="on Windows use utilityvm.hosts.hcs: see docs/coming-from-hcsshim.md",
            ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
