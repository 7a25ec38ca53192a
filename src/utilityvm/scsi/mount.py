"""A mount: one partition of a disk at one guest path, and who shares it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from msgspec.structs import asdict, replace

from utilityvm.bridge.guest_path import mountable
from utilityvm.errors import ConfigDiffers, InvalidRequest, UtilityVMError
from utilityvm.scsi.ports import CallerKey, MountConfig, MountRecord, ScratchKey
from utilityvm.scsi.reservation import NOBODY, Force, force_of
from utilityvm.scsi.transitions import Event, MountState, ReservationState, next_mount_state

if TYPE_CHECKING:
    from utilityvm.scsi.disk import Disk
    from utilityvm.scsi.reservation import Claim

GENERATED_BELOW: Final = PurePosixPath("/run/mounts/scsi")


def checked_guest_path(path: PurePosixPath) -> PurePosixPath:
    """The path in its one spelling.

    Raises:
        InvalidRequest: relative, with `..`, too long, or the system's own (`bridge.guest_path`).
    """
    text = str(path) if path.parts else ""
    try:
        return mountable(text)
    except ValueError as why:
        raise InvalidRequest(f"guest path {text!r} {why}", remedy="choose another, such as /mnt/data") from None


def checked_config(config: MountConfig, *, disk_read_only: bool) -> MountConfig:
    """The config as it will be mounted: read-only on a read-only disk, and free of contradictions.

    Raises:
        InvalidRequest: it contradicts itself or the disk.
    """
    if isinstance(config.options, str) or not all(isinstance(option, str) for option in config.options):
        raise InvalidRequest("mount options must be a sequence of words")
    if config.partition < 0:
        raise InvalidRequest(
            f"partition {config.partition} is invalid: partitions count from 1", remedy="0 is the whole disk"
        )
    if disk_read_only and not config.read_only:
        config = replace(config, read_only=True)
    for wrong, what in (
        (config.reformat and not config.ensure_filesystem, "reformat=True without ensure_filesystem=True"),
        (config.ensure_filesystem and config.read_only, "ensure_filesystem=True on a read-only disk or mount"),
        (config.ensure_filesystem and config.block_device, "ensure_filesystem=True with block_device=True"),
        (
            isinstance(config.encryption, ScratchKey) and config.read_only,
            "a fresh random key on a read-only disk or mount",
        ),
        (config.verity is not None and config.encryption is not None, "dm-verity and encryption on one mount"),
        (config.block_device and config.filesystem is not None, "a file system with block_device=True"),
    ):
        if wrong:
            raise InvalidRequest(f"{what} is a contradiction", remedy="leave one of the two out")
    if config.verity is not None and not config.read_only:
        raise InvalidRequest("dm-verity needs a read-only mount", remedy="add read_only=True")
    return replace(config, options=tuple(config.options))


def _shared_by(config: MountConfig) -> dict[str, object]:
    """What two requests must agree on to share a mount. Options compare without order."""
    return {**asdict(config), "options": frozenset(config.options), "reformat": None}


def same_mount(one: MountConfig, other: MountConfig) -> bool:
    """Would one mount serve both? A request to reformat shares with nobody."""
    return not other.reformat and _shared_by(one) == _shared_by(other)


def without_reformat(config: MountConfig) -> MountConfig:
    """What is kept of a mount. `reformat` belongs to the claim that asked for it, and not to the mount."""
    return replace(config, reformat=False) if config.reformat else config


def difference(one: MountConfig, other: MountConfig) -> str:
    """The settings that keep one mount from serving both, as `other` wants them."""
    wanted = {name: getattr(other, name) for name, value in asdict(one).items() if value != getattr(other, name)}
    return ", ".join(setting(name, value) for name, value in wanted.items()) or "reformat=True"


def setting(name: str, value: object) -> str:
    """A setting as a caller writes it. Keys and hashes are not shown."""
    if value is None or isinstance(value, (bool, int, str)):
        return f"{name}={value}"
    return f"{name}={','.join(map(str, value)) or None}" if isinstance(value, tuple) else f"another {name}"


def check_beside(one: MountConfig, other: MountConfig, *, where: str) -> None:
    """Refuse `other` if it cannot be mounted from the same partition beside `one`.

    Raises:
        ConfigDiffers: names what they differ in.
    """
    if one.partition != other.partition or one.block_device or other.block_device:
        return
    for name in ("read_only", "filesystem", "verity"):
        if getattr(one, name) != getattr(other, name):
            raise ConfigDiffers(
                f"{where} is mounted with {setting(name, getattr(one, name))}, "
                f"not with {setting(name, getattr(other, name))}",
                remedy="release it first, or ask for the same",
            )
    if one.encryption is not None or other.encryption is not None:
        raise ConfigDiffers(
            f"{where} is encrypted, and has one mount", remedy="ask for the same mount, without another path"
        )
    if other.reformat:
        raise ConfigDiffers(f"{where} is mounted, so it was not formatted", remedy="release it first")


@dataclass(eq=False, slots=True)
class Mount:
    """One mount of one disk. Its claims are the reservations that want it. `config` never says `reformat`."""

    id: str
    disk: Disk
    guest_path: PurePosixPath
    config: MountConfig
    since: float
    state: MountState = MountState.RESERVED
    claims: dict[str, Claim] = field(default_factory=dict)
    doubt: UtilityVMError | None = None  # why the last step's outcome is unknown
    notes: tuple[str, ...] = ()  # what the guest said when it was mounted

    @property
    def is_wanted(self) -> bool:
        return bool(self.claims)

    @property
    def force(self) -> Force:
        """How far may its unmount go?"""
        if self.disk.overruled is not None:
            return Force.HOST
        return force_of(one for one in self.disk.leaving.values() if one.mount is self or one.holder is NOBODY)

    @property
    def config_to_send(self) -> MountConfig:
        """`config`, with `reformat` only while a caller that asked for it waits for this mount to be made.

        Once it was made there may be data on it, which belongs to whoever asks for the mount next.
        """
        is_asked = any(claim.reformat and claim.state is ReservationState.PENDING for claim in self.claims.values())
        return replace(self.config, reformat=True) if is_asked else self.config

    def after(self, event: Event) -> MountState:
        return next_mount_state(self.state, event)

    def record(self, state: MountState | None = None) -> MountRecord:
        config = self.config
        if isinstance(config.encryption, CallerKey):
            config = replace(config, encryption=CallerKey(b""))
        return MountRecord(
            mount=self.id,
            attachment=self.disk.id,
            guest_path=self.guest_path,
            config=config,
            state=state or self.state,
            since=self.since,
            notes=self.notes,
        )
