"""What the manager asks of others: a host, a guest, a journal. It knows them only through these Protocols.

Each step that leaves the process has three answers, and every backend gives them the same way:

* it returns: the step is **done**, and is true on the other side now;
* it raises `HostRefused`, `GuestRefused` or `ImageError` (or any `RequestError`): it is **refused**, and the other side
  is as it was;
* it raises anything else (`OutcomeUnknown`, `ProtocolError`, `VMGone`, …): **no answer**; the manager probes before
  it takes the next step.

The manager never cancels a step that it has sent; it stops waiting for it. Steps on different disks come at the
same time, and a backend must take them so: that is how batches become fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final, Protocol, TypeAlias

from utilityvm.errors import InvalidRequest
from utilityvm.scsi.mount_config import CallerKey as CallerKey
from utilityvm.scsi.mount_config import Encryption as Encryption
from utilityvm.scsi.mount_config import MountConfig as MountConfig
from utilityvm.scsi.mount_config import ScratchKey as ScratchKey
from utilityvm.scsi.mount_config import Verity as Verity
from utilityvm.scsi.slot import Slot


class AttachmentType(StrEnum):
    """How a disk is attached; the values are those of HCS documents."""

    VIRTUAL_DISK = "VirtualDisk"  # an image file
    PASS_THRU = "PassThru"  # a physical disk: a block device on Linux
    EXTENSIBLE_VIRTUAL_DISK = "ExtensibleVirtualDisk"  # HCS only: `evd://type/path`


class DiskFormat(StrEnum):
    """The format of an image file; the values are QEMU's driver names."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VHD = "vpc"
    VHDX = "vhdx"
    VMDK = "vmdk"


class VMAccess(StrEnum):
    """Which right to the disk's file the VM is given on top of what it has."""

    NOOP = "noop"  # none
    GROUP = "group"  # to the group of all VMs, on the file itself
    INDIVIDUAL = "individual"  # to this VM alone, and gone with the attachment


SECTOR_SIZES: Final = (512, 4096)  # the sizes of a disk's logical sectors that guests know


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRequest:
    """A disk as the caller asks for it."""

    host_path: str  # as the caller wrote it; HCS documents carry it to the byte
    read_only: bool
    kind: AttachmentType = AttachmentType.VIRTUAL_DISK
    format: DiskFormat | None = None  # None: what was decided when it was first opened, by its header
    access: VMAccess = VMAccess.INDIVIDUAL
    sector_size_bytes: int | None = None  # of an image, in the guest; None: 512. A physical disk has its own

    def __post_init__(self) -> None:
        """Raises:
        InvalidRequest: a sector size that no disk has, or one for a disk that has its own.
        """
        size = self.sector_size_bytes
        if size is None:
            return
        if size not in SECTOR_SIZES:
            raise InvalidRequest(
                f"sectors of {size} bytes: a disk has {' or '.join(map(str, SECTOR_SIZES))}",
                host_path=self.host_path,
                remedy="leave the sector size out, unless the image is a copy of a disk of 4096-byte sectors",
            )
        if self.kind is not AttachmentType.VIRTUAL_DISK:
            raise InvalidRequest(
                f"{self.host_path}: sectors of {size} bytes for a disk that has its own",
                host_path=self.host_path,
                remedy="leave the sector size out: it is for image files",
            )


class OpenDisk(Protocol):
    """A disk that a host backend has opened and checked. Opening a disk does not attach it."""

    @property
    def identity(self) -> str:
        """The same text for the same disk, however its path is spelled. Stable while the disk exists."""
        ...

    @property
    def format(self) -> DiskFormat: ...

    @property
    def size_bytes(self) -> int:
        """The disk's size as the guest will see it."""
        ...

    def close(self) -> None:
        """Let go of what was opened. An attachment made from it stays. Twice is once."""
        ...


class HostBackend(Protocol):
    """What talks to the hypervisor."""

    async def open(self, request: DiskRequest) -> OpenDisk:
        """Open and check the disk. Nothing is attached, and a refusal leaves nothing open.

        Raises:
            RequestError: no such disk, no right to it, in use by the host, not supported here.
            ImageError: damaged, unsafe, or of another format than asked.
        """
        ...

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        """Put `disk` on the bus at `slot` under the name `attachment`, which no attachment had before.

        Raises:
            InvalidRequest: there is no such slot, or another host's backend opened the disk.
            AlreadyAttached: the slot, or the name, is taken.
            DiskInUse: the disk is attached, here or in another VM, and one of the two would write.
        """
        ...

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        """Take it off the bus. Returns when the device, its file and its locks are gone. Gone before: no error."""
        ...

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        """Is the attachment on the bus? False also means that no trace of it is left.

        A half-made attachment (a node without a device) is finished off by the probe and reported as absent.
        """
        ...

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        """Grow the image and tell the guest's device. Returns the size in bytes that the disk has then.

        Never shrinks: the size that the disk really has is compared first, and if it is as large or larger, nothing is
        sent.

        Raises:
            InvalidRequest: not whole sectors.
            NotAttached: there is no such attachment.
            NotSupported: a read-only disk, or one that this host cannot grow.
        """
        ...

    async def size(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        """The size in bytes that the guest's device has. Asked after a resize that got no answer.

        Raises:
            NotAttached: there is no such attachment.
            NotSupported: this host grows no disks, and so need not be asked.
        """
        ...


class GuestBackend(Protocol):
    """What talks to the system inside the VM. Every step may be sent again after an unknown outcome."""

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        """Refuse, before anything is sent, what this guest cannot express.

        Raises:
            NotSupported: says what, and what would be.
        """
        ...

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        """The guest path in the one spelling that this guest has for it; nothing is sent.

        Raises:
            InvalidRequest: there cannot be such a path in this guest, or it is the system's own.
            NotSupported: mounting there may do harm in this guest.
        """
        ...

    def check_force(self, slot: Slot) -> None:
        """Refuse a forced release that this guest can never do, whatever is mounted and whoever uses it.

        Asked before the reservation is touched. A guest whose agent knows no force raises here, and need not be asked
        again: `unmount` and `eject` come with `force` only after this has returned. Sends nothing.

        Raises:
            NotSupported: says what to do instead.
        """
        ...

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        """Mount the partition at `guest_path`; a refusal changes nothing there.

        Gives what the caller should know of it, a sentence each: that it is read-only, say, though that was not asked.

        Raises:
            GuestPathInUse: something is mounted there, be it this very disk.
        """
        ...

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        """Unmount and flush. Nothing mounted there is done.

        `force` detaches lazily what is still in use, and unmounts what cannot be flushed any more.

        Raises:
            InvalidRequest: another disk is mounted there; it stays.
            GuestBusy: in use, and not `force`; names the users, and everything is as it was.
        """
        ...

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        """Flush, and make the guest forget the device. No such device is done. `force`: also if it cannot be flushed.

        Raises:
            GuestBusy: a mount, a mapping or an open file uses it, and not `force`.
        """
        ...

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        """Is the disk at `slot` mounted (or published) at `guest_path`?"""
        ...

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        """Does the guest have a device at `slot`?"""
        ...

    async def check_grow(self, slot: Slot, *, size_bytes: int, timeout_s: float) -> None:
        """Refuse, before the host grows the disk to `size_bytes`, what could not grow with it. Changes nothing.

        Raises:
            GuestRefused: a file system that is mounted cannot; names it.
            NotSupported: this guest grows nothing.
        """
        ...

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        """After the device grew: reread its size, and grow what is mounted from the whole disk."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a reservation. `pid` and `started` are None for a named holder, which outlives processes."""

    name: str
    pid: int | None = None
    started: str | None = None  # the kernel's start time of that pid, so that a reused pid is not the holder


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """A disk as the journal keeps it."""

    attachment: str
    slot: Slot
    host_path: str
    identity: str
    kind: AttachmentType
    format: DiskFormat
    access: VMAccess
    read_only: bool
    size_bytes: int
    state: str  # a DiskState
    since: float  # seconds since the epoch when the slot was taken
    sector_size_bytes: int | None = None  # as it was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    """A mount as the journal keeps it. A caller's key is not in it: `config.encryption` is only its kind."""

    mount: str
    attachment: str
    guest_path: PurePosixPath
    config: MountConfig
    state: str  # a MountState
    since: float
    notes: tuple[str, ...] = ()  # what the guest said when it was mounted


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRecord:
    """A reservation as the journal keeps it."""

    reservation: str
    attachment: str
    mount: str | None  # None: attached only
    holder: Holder
    state: str  # a ReservationState
    since: float


Record: TypeAlias = DiskRecord | MountRecord | ReservationRecord


class Journal(Protocol):
    """Where the manager writes down what it is about to do, and what came of it."""

    async def write(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        """Store `put` (in place of a record of the same id) and forget `drop`: all of it, or nothing.

        True on return even if the process is killed the next instant. Called before each step is sent, so it must be
        quick; it may wait for another process, but never blocks the event loop. The manager makes one call at a time.

        Raises:
            StoreError: nothing was written; the step is not sent.
        """
        ...

    def read(self) -> Sequence[Record]:
        """Every record of this VM, disks first, then mounts, then reservations."""
        ...
