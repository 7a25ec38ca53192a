"""The same API without `async`: the same classes, names and docstrings.

::

    from utilityvm.sync import UtilityVM

    with UtilityVM.start("worker") as vm:
        with vm.add_scsi("tools.vhdx", "/tools", read_only=True):
            result = vm.run(["ls", "/tools"])

Calls may be made from any thread, several at a time, also where an event loop runs (Jupyter). One event loop in a
thread of its own does the work (`portal`). `classes` and this file are written by `generate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utilityvm import (
        GENERATED as GENERATED,
    )
    from utilityvm import (
        AccessDenied as AccessDenied,
    )
    from utilityvm import (
        AlreadyAttached as AlreadyAttached,
    )
    from utilityvm import (
        AlreadyReleased as AlreadyReleased,
    )
    from utilityvm import (
        AttachmentType as AttachmentType,
    )
    from utilityvm import (
        CallerKey as CallerKey,
    )
    from utilityvm import (
        CommandResult as CommandResult,
    )
    from utilityvm import (
        ConfigDiffers as ConfigDiffers,
    )
    from utilityvm import (
        CopyResult as CopyResult,
    )
    from utilityvm import (
        DeadlineExceeded as DeadlineExceeded,
    )
    from utilityvm import (
        Difference as Difference,
    )
    from utilityvm import (
        DiskFormat as DiskFormat,
    )
    from utilityvm import (
        DiskInfo as DiskInfo,
    )
    from utilityvm import (
        DiskInUse as DiskInUse,
    )
    from utilityvm import (
        DiskNotFound as DiskNotFound,
    )
    from utilityvm import (
        DiskSettings as DiskSettings,
    )
    from utilityvm import (
        DiskSpec as DiskSpec,
    )
    from utilityvm import (
        Encryption as Encryption,
    )
    from utilityvm import (
        EscapingLinks as EscapingLinks,
    )
    from utilityvm import (
        Finding as Finding,
    )
    from utilityvm import (
        ForceArgument as ForceArgument,
    )
    from utilityvm import (
        GuestBusy as GuestBusy,
    )
    from utilityvm import (
        GuestImage as GuestImage,
    )
    from utilityvm import (
        GuestPath as GuestPath,
    )
    from utilityvm import (
        GuestPathInUse as GuestPathInUse,
    )
    from utilityvm import (
        GuestRecipe as GuestRecipe,
    )
    from utilityvm import (
        GuestRefused as GuestRefused,
    )
    from utilityvm import (
        Holder as Holder,
    )
    from utilityvm import (
        HostPath as HostPath,
    )
    from utilityvm import (
        HostRefused as HostRefused,
    )
    from utilityvm import (
        ImageDamaged as ImageDamaged,
    )
    from utilityvm import (
        ImageError as ImageError,
    )
    from utilityvm import (
        ImageUnsafe as ImageUnsafe,
    )
    from utilityvm import (
        InvalidRequest as InvalidRequest,
    )
    from utilityvm import (
        Leftover as Leftover,
    )
    from utilityvm import (
        LeftoverKind as LeftoverKind,
    )
    from utilityvm import (
        Limits as Limits,
    )
    from utilityvm import (
        Migrating as Migrating,
    )
    from utilityvm import (
        MountConfig as MountConfig,
    )
    from utilityvm import (
        MountSettings as MountSettings,
    )
    from utilityvm import (
        MountView as MountView,
    )
    from utilityvm import (
        NoControllers as NoControllers,
    )
    from utilityvm import (
        NoFreeSlot as NoFreeSlot,
    )
    from utilityvm import (
        NotAttached as NotAttached,
    )
    from utilityvm import (
        NotSupported as NotSupported,
    )
    from utilityvm import (
        OnBusy as OnBusy,
    )
    from utilityvm import (
        OutcomeUnknown as OutcomeUnknown,
    )
    from utilityvm import (
        Owner as Owner,
    )
    from utilityvm import (
        ProgramFailed as ProgramFailed,
    )
    from utilityvm import (
        ProgramInfo as ProgramInfo,
    )
    from utilityvm import (
        ProgramNotFound as ProgramNotFound,
    )
    from utilityvm import (
        ProgramPiece as ProgramPiece,
    )
    from utilityvm import (
        ProtocolError as ProtocolError,
    )
    from utilityvm import (
        QemuProcess as QemuProcess,
    )
    from utilityvm import (
        RequestError as RequestError,
    )
    from utilityvm import (
        Reservation as Reservation,
    )
    from utilityvm import (
        ReservationInfo as ReservationInfo,
    )
    from utilityvm import (
        SavedDisk as SavedDisk,
    )
    from utilityvm import (
        ScratchKey as ScratchKey,
    )
    from utilityvm import (
        ScsiEvent as ScsiEvent,
    )
    from utilityvm import (
        ScsiState as ScsiState,
    )
    from utilityvm import (
        SetupError as SetupError,
    )
    from utilityvm import (
        Slot as Slot,
    )
    from utilityvm import (
        SlotView as SlotView,
    )
    from utilityvm import (
        SomeGuestPath as SomeGuestPath,
    )
    from utilityvm import (
        StartFailed as StartFailed,
    )
    from utilityvm import (
        StoreDamaged as StoreDamaged,
    )
    from utilityvm import (
        StoreError as StoreError,
    )
    from utilityvm import (
        StoreTooNew as StoreTooNew,
    )
    from utilityvm import (
        Template as Template,
    )
    from utilityvm import (
        TemplateDamaged as TemplateDamaged,
    )
    from utilityvm import (
        TemplateDiffers as TemplateDiffers,
    )
    from utilityvm import (
        TemplateDisk as TemplateDisk,
    )
    from utilityvm import (
        TemplateExists as TemplateExists,
    )
    from utilityvm import (
        TemplateInUse as TemplateInUse,
    )
    from utilityvm import (
        TemplateNotFound as TemplateNotFound,
    )
    from utilityvm import (
        TooManyAttachments as TooManyAttachments,
    )
    from utilityvm import (
        UnsafePath as UnsafePath,
    )
    from utilityvm import (
        UtilityVMError as UtilityVMError,
    )
    from utilityvm import (
        Verity as Verity,
    )
    from utilityvm import (
        VMAccess as VMAccess,
    )
    from utilityvm import (
        VMConfig as VMConfig,
    )
    from utilityvm import (
        VMExists as VMExists,
    )
    from utilityvm import (
        VMGone as VMGone,
    )
    from utilityvm import (
        VMInfo as VMInfo,
    )
    from utilityvm import (
        VMNotFound as VMNotFound,
    )
    from utilityvm import (
        VMNotRunning as VMNotRunning,
    )
    from utilityvm import (
        VMOwned as VMOwned,
    )
    from utilityvm import (
        VMState as VMState,
    )
    from utilityvm import (
        WrongLoop as WrongLoop,
    )
    from utilityvm import (
        WrongState as WrongState,
    )
    from utilityvm import (
        errors as errors,
    )
    from utilityvm import (
        find_image as find_image,
    )
    from utilityvm import (
        find_leftovers as find_leftovers,
    )
    from utilityvm import (
        get_disk as get_disk,
    )
    from utilityvm import (
        get_image as get_image,
    )
    from utilityvm import (
        get_template as get_template,
    )
    from utilityvm import (
        get_vm as get_vm,
    )
    from utilityvm import (
        introduce as introduce,
    )
    from utilityvm import (
        list_disks as list_disks,
    )
    from utilityvm import (
        list_images as list_images,
    )
    from utilityvm import (
        list_templates as list_templates,
    )
    from utilityvm import (
        list_vms as list_vms,
    )
    from utilityvm import (
        read_console as read_console,
    )
    from utilityvm import (
        remove_images as remove_images,
    )
    from utilityvm.sync.classes import (
        Client as Client,
    )
    from utilityvm.sync.classes import (
        ClonePool as ClonePool,
    )
    from utilityvm.sync.classes import (
        MountedDisk as MountedDisk,
    )
    from utilityvm.sync.classes import (
        Program as Program,
    )
    from utilityvm.sync.classes import (
        ProgramInput as ProgramInput,
    )
    from utilityvm.sync.classes import (
        ProgramOutput as ProgramOutput,
    )
    from utilityvm.sync.classes import (
        ProgramPieces as ProgramPieces,
    )
    from utilityvm.sync.classes import (
        RemoteMount as RemoteMount,
    )
    from utilityvm.sync.classes import (
        RemotePieces as RemotePieces,
    )
    from utilityvm.sync.classes import (
        RemoteProgram as RemoteProgram,
    )
    from utilityvm.sync.classes import (
        RemoteVM as RemoteVM,
    )
    from utilityvm.sync.classes import (
        ScsiEvents as ScsiEvents,
    )
    from utilityvm.sync.classes import (
        SCSIMount as SCSIMount,
    )
    from utilityvm.sync.classes import (
        UtilityVM as UtilityVM,
    )
    from utilityvm.sync.classes import (
        connect as connect,
    )
    from utilityvm.sync.classes import (
        doctor as doctor,
    )
    from utilityvm.sync.classes import (
        examine_vm as examine_vm,
    )
    from utilityvm.sync.classes import (
        remove_leftover as remove_leftover,
    )
    from utilityvm.sync.classes import (
        remove_leftovers as remove_leftovers,
    )
    from utilityvm.sync.classes import (
        repair_vm as repair_vm,
    )

__all__ = [
    "GENERATED",
    "AccessDenied",
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
]

_OWN = frozenset(
    [
        "Client",
        "ClonePool",
        "MountedDisk",
        "Program",
        "ProgramInput",
        "ProgramOutput",
        "ProgramPieces",
        "RemoteMount",
        "RemotePieces",
        "RemoteProgram",
        "RemoteVM",
        "SCSIMount",
        "ScsiEvents",
        "UtilityVM",
        "connect",
        "doctor",
        "examine_vm",
        "remove_leftover",
        "remove_leftovers",
        "repair_vm",
    ]
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'utilityvm.sync' has no attribute {name!r}")
    module = importlib.import_module("utilityvm.sync.classes" if name in _OWN else "utilityvm")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
