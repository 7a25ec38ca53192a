"""What callers ask for: a VM, and disks for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict as fields_of
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Final, ForwardRef, Literal, Self, TypeAlias, TypeVar, Unpack, cast

from msgspec.structs import asdict

from utilityvm.errors import InvalidRequest
from utilityvm.guestimage.build import GuestImage
from utilityvm.hosts.qemu import QemuConfig
from utilityvm.machine.hostpath import HostPath, absolute
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.manager import AddRequest
from utilityvm.scsi.mount import checked_config, checked_guest_path, difference
from utilityvm.scsi.mount_config import MountConfig, MountSettings
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest, VMAccess
from utilityvm.vm import arguments


class _Generated(Enum):
    GENERATED = "generated"


GENERATED: Final = _Generated.GENERATED
"""As a guest path: mount it at a path made up from its slot, or where it is mounted in the same way already."""

SomeGuestPath: TypeAlias = str | PurePosixPath | Literal[_Generated.GENERATED]
GuestPath: TypeAlias = SomeGuestPath | None

F = TypeVar("F", bound=Callable[..., Any])


class DiskSettings(MountSettings, total=False):
    """The keywords of a call that adds a disk image."""

    access: VMAccess | str
    format: DiskFormat | str | None
    sector_size_bytes: int | None


def spelled_out(settings: type[MountSettings]) -> Callable[[F], F]:
    """Have the signature of a function that takes `settings` name each of them, with its default.

    So that `help`, editors, the reference and `arguments.checked` see them.
    """

    def mark(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        given = {one.name for one in own}
        first = [one for one in own if one.kind is not one.KEYWORD_ONLY]
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=_text_of(kind))
            for name, kind in {**MountSettings.__annotations__, **settings.__annotations__}.items()
            if name not in given
        ]
        cast(Any, function).__signature__ = signature.replace(
            parameters=[*first, *named, *(one for one in own if one.kind is one.KEYWORD_ONLY)]
        )
        return function

    return mark


def _text_of(annotation: Any) -> str:
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)


_DEFAULTS: Final[Mapping[str, object]] = {
    **asdict(MountConfig()),
    "access": VMAccess.INDIVIDUAL,
    "format": None,
    "sector_size_bytes": None,
}


LEAST_MEMORY_MIB: Final = 96
"""What the guest image boots with. With 84 MiB its kernel panics in the initramfs, "deadlocked on memory"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VMConfig:
    """What a VM is started with."""

    name: str
    memory_mib: int = 256
    cpus: int = 1
    controllers: int = 4  # virtual SCSI controllers of 64 disks each; the VM's root disk takes the first slot
    keep: bool = False  # outlive its owner
    accelerator: str | None = None  # kvm, hvf or tcg; None: the best that works
    confinement: str | None = None  # of QEMU: auto, require or off; None: UTILITYVM_CONFINEMENT, else auto

    def check(self) -> None:
        """Raise `InvalidRequest` if a value is invalid.

        Raises:
            InvalidRequest: names the value, and what it could be.
        """
        arguments.check_fields(self)
        if 0 < self.memory_mib < LEAST_MEMORY_MIB:
            raise InvalidRequest(
                f"a VM with {self.memory_mib} MiB of memory cannot boot: its kernel and initramfs need "
                f"{LEAST_MEMORY_MIB} MiB",
                vm=self.name,
                remedy=f"give it {LEAST_MEMORY_MIB} MiB or more; 256 MiB are the default",
            )
        self.for_qemu(None, uuid="").check()
        if not self.controllers:
            raise InvalidRequest(
                "a VM without a SCSI controller has no place for its root disk", vm=self.name, remedy="give it 1 to 4"
            )

    def for_qemu(self, image: GuestImage | None, *, uuid: str) -> QemuConfig:
        return QemuConfig(
            name=self.name,
            kernel=image.kernel if image else None,
            initramfs=image.initramfs if image else None,
            root=image.root if image else None,
            cmdline=image.cmdline if image else "",
            memory_mib=self.memory_mib,
            cpus=self.cpus,
            controllers=self.controllers,
            keep=self.keep,
            accelerator=self.accelerator,
            confinement=self.confinement,
            uuid=uuid,
        )

    def for_clone(self, root: Path, *, uuid: str) -> QemuConfig:
        """What a clone's QEMU is started with: no kernel, as that is in its memory already."""
        return replace(self.for_qemu(None, uuid=uuid), root=root)

    def to_json(self) -> dict[str, object]:
        return fields_of(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote; members that we do not know are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@typed_errors
@dataclass(frozen=True, init=False)
class DiskSpec:
    """A disk, and how it is mounted: the arguments of `UtilityVM.add_scsi` as a value.

    The settings of the mount are given as keywords, as they are to `add_scsi`, or as `mount`, or both; then the
    keywords come first.
    """

    host_path: HostPath
    guest_path: GuestPath  # None: attached only
    mount: MountConfig
    access: VMAccess | str
    format: DiskFormat | str | None
    sector_size_bytes: int | None
    physical: bool

    @spelled_out(MountSettings)
    def __init__(
        self,
        *,
        host_path: HostPath,
        guest_path: GuestPath = None,
        mount: MountConfig | None = None,
        access: VMAccess | str = VMAccess.INDIVIDUAL,
        format: DiskFormat | str | None = None,
        sector_size_bytes: int | None = None,
        physical: bool = False,
        **settings: Unpack[MountSettings],
    ) -> None:
        """Only `mount` is looked at yet: see `check`.

        Raises:
            InvalidRequest: `mount` is no MountConfig.
        """
        arguments.check("mount", mount, optional=True)
        given: dict[str, Any] = {**(asdict(mount) if mount is not None else {}), **settings}
        values = (host_path, guest_path, MountConfig(**given), access, format, sector_size_bytes, physical)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def read_only(self) -> bool:
        return self.mount.read_only

    def check(self) -> None:
        """Raises:
        InvalidRequest: a value is wrong by itself, whatever VM it is for.
        """
        self.request()

    def request(self) -> AddRequest:
        """What the manager is asked for.

        Raises:
            InvalidRequest: a value is wrong by itself.
        """
        arguments.check_fields(self)
        arguments.check_settings(asdict(self.mount))
        disk = DiskRequest(
            host_path=absolute(self.host_path),
            read_only=self.read_only,
            kind=AttachmentType.PASS_THRU if self.physical else AttachmentType.VIRTUAL_DISK,
            format=None if self.format is None else DiskFormat(self.format),
            access=VMAccess(self.access),
            sector_size_bytes=self.sector_size_bytes,
        )
        if self.guest_path is None:
            plain = MountConfig(read_only=self.read_only)
            if self.mount != plain:
                raise InvalidRequest(
                    f"{self.host_path}: {difference(plain, self.mount)} has no effect without a guest path",
                    host_path=disk.host_path,
                    remedy="give a guest path, or let one be chosen; without one the disk is only attached",
                )
            return AddRequest(disk=disk)
        mount = checked_config(self.mount, disk_read_only=self.read_only)
        if self.guest_path is GENERATED:
            return AddRequest(disk=disk, mount=mount)
        return AddRequest(disk=disk, mount=mount, guest_path=checked_guest_path(PurePosixPath(self.guest_path)))
