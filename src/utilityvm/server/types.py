"""What goes over the wire, as types: the OpenAPI document is made from them. They need nothing that a client lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from utilityvm.guests.programinfo import ProgramInfo
    from utilityvm.scsi.views import MountView, SlotView
    from utilityvm.store import StoredVM
    from utilityvm.vm.config import DiskSpec
    from utilityvm.vm.mount import SCSIMount

LONGEST_S: Final = 86_400.0
MOST_WORDS: Final = 4096

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=255, description="The name of a VM.")]
Id: TypeAlias = Annotated[
    str, Meta(pattern="^[0-9a-f]{12,32}$", description="Made by the client, from random bits; the same in each retry.")
]
SlotText: TypeAlias = Annotated[str, Meta(pattern="^[0-3]:[0-9]{1,2}$", description="CONTROLLER:LUN")]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.001, le=LONGEST_S)]
Wait: TypeAlias = Annotated[
    float, Meta(ge=0, le=LONGEST_S, description="How long to wait, in seconds, while another process owns the VM.")
]
Force: TypeAlias = Literal["false", "true", "host"]
PathText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
Text: TypeAlias = Annotated[str, Meta(max_length=255)]
Word: TypeAlias = Annotated[str, Meta(max_length=131_072)]
Which: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64, description="A program: its number, name or id.")]


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sent by clients: a member that the server does not know is refused, and never left out in silence."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Sent by the server: a member that an older client does not know is left out."""


class ServerInfo(_Answer, frozen=True, kw_only=True):
    """The server."""

    version: str
    pid: int
    state_folder: str
    vms: list[str]  # those that it owns at the moment


class VM(_Answer, frozen=True, kw_only=True):
    """A VM."""

    name: str
    uuid: str
    state: str
    pid: int | None  # of its QEMU
    keep: bool | None
    memory_mib: int | None
    cpus: int | None
    controllers: int | None
    accelerator: str | None
    created: float  # seconds since the epoch
    findings: list[str] = []  # what the server found half done when this call made it take the VM over


class Disk(_Answer, frozen=True, kw_only=True):
    """A disk that is attached, as `UtilityVM.scsi_slots` has it."""

    slot: SlotText
    attachment: str
    host_path: str
    identity: str
    format: str
    read_only: bool
    size_bytes: int
    state: str
    guest_paths: list[str]
    references: int
    holders: list[str]
    since: float


class Found(_Answer, frozen=True, kw_only=True):
    """A disk that was found by a name. `guest_path`: the name, if that was a guest path of it."""

    disk: Disk
    guest_path: str | None


class Mount(_Answer, frozen=True, kw_only=True):
    """A mount in the guest, as `UtilityVM.scsi_mounts` has it."""

    slot: SlotText
    host_path: str
    guest_path: str
    partition: int
    read_only: bool
    options: list[str]
    filesystem: str | None
    state: str
    references: int
    holders: list[str]
    since: float


class Reservation(_Answer, frozen=True, kw_only=True):
    """A reservation of a disk. It stays until it is given back, whatever becomes of the client."""

    id: str
    slot: SlotText
    host_path: str
    guest_path: str | None
    read_only: bool
    holder: str
    references: int  # on its disk up to this one, if it is just made; otherwise all
    notes: list[str] = []  # what there is to know of its mount


class ScratchKey(_Wire, frozen=True, kw_only=True, tag="scratch", tag_field="kind"):
    """Encrypt with a random key that dies with the mount."""


class CallerKey(_Wire, frozen=True, kw_only=True, tag="caller", tag_field="kind"):
    """Encrypt with this key of 32 or 64 bytes, in Base64. It is neither logged nor stored."""

    key: bytes


class Verity(_Wire, frozen=True, kw_only=True):
    """A dm-verity hash tree on the same partition. Bytes are in Base64."""

    root_hash: bytes
    hash_offset_bytes: int
    data_blocks: int | None = None
    salt: bytes | None = None
    algorithm: str | None = None
    block_size_bytes: int | None = None


class AddDisk(_Wire, frozen=True, kw_only=True):
    """A disk to reserve: `UtilityVM.add_scsi` says what each member means."""

    host_path: PathText
    guest_path: PathText | None = None
    generated: bool = False  # mount it at a path that the server makes up
    holder: Text = "client"
    read_only: bool = False
    options: list[Word] = []
    access: Text = "individual"
    partition: int = 0
    format: Text | None = None
    sector_size_bytes: int | None = None
    filesystem: Text | None = None
    ensure_filesystem: bool = False
    reformat: bool = False
    block_device: bool = False
    encryption: ScratchKey | CallerKey | None = None
    verity: Verity | None = None
    untrusted: bool = False
    physical: bool = False
    timeout_s: Seconds = 60.0

    def __repr__(self) -> str:
        return f"<AddDisk {self.host_path}>"  # it may have a key in it


class Resize(_Wire, frozen=True, kw_only=True):
    """A new size for a disk that is attached."""

    host_path: PathText
    size_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    timeout_s: Seconds | None = None


class Remove(_Wire, frozen=True, kw_only=True):
    """A disk of which one reference is dropped: one whose release failed half-way, or else the newest."""

    host_path: PathText
    holder: Text | None = None  # only of this one
    force: Force = "false"
    timeout_s: Seconds = 60.0


class Released(_Answer, frozen=True, kw_only=True):
    """What a release has left. `overruled`: the guest's reason, if the host took the disk away nevertheless."""

    host_path: str
    references: int  # that are left on the disk; 0: it is detached
    overruled: str | None = None


class Stopped(_Answer, frozen=True, kw_only=True):
    """What an end of a VM has lost, a line each."""

    lost: list[str]


class Limits(_Wire, frozen=True, kw_only=True):
    """What a program and all that it starts may use together."""

    memory_bytes: int | None = None
    pids: int | None = None
    cpus: float | None = None


class RunProgram(_Wire, frozen=True, kw_only=True):
    """A program to run in the guest."""

    command: Annotated[list[Word], Meta(min_length=1, max_length=MOST_WORDS)]
    stdin: bool = False  # input will be sent; else it has none
    env: dict[Word, Word] = {}
    cwd: PathText | None = None
    user: int | Text | None = None
    limits: Limits | None = None
    timeout_s: Seconds | None = None
    keep: bool = False  # it belongs to the guest, goes on without a client, and takes no input
    name: Text | None = None  # of one that is kept

    def __repr__(self) -> str:
        return "<RunProgram>"  # its words may be secrets


class Program(_Answer, frozen=True, kw_only=True):
    """A program that a client started. One that is not kept is killed when its client goes away, or the server."""

    id: str
    state: Literal["running", "ended", "failed"]
    exit_code: int | None = None  # negative for the signal that killed it
    kept: KeptProgram | None = None


class KeptProgram(_Answer, frozen=True, kw_only=True):
    """A program that the guest keeps, as `UtilityVM.programs` has it."""

    number: int
    id: str
    name: str | None
    command: list[str]
    user: str | None
    pid: int | None
    started: float
    ended: float | None
    exit_code: int | None
    out_of_memory: bool
    takes_input: bool
    ring_bytes: int
    stdout_begin: int
    stdout_end: int
    stderr_begin: int
    stderr_end: int
    followers: int


class Signal(_Wire, frozen=True, kw_only=True):
    """A signal for a program that the guest keeps."""

    signal: Annotated[int, Meta(ge=1, le=64)]


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error (RFC 9457). `kind` is its class in `utilityvm.errors`; the other members are that class's fields."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    vm: str | None = None
    slot: str | None = None
    host_path: str | None = None
    remedy: str | None = None
    holders: list[str] | None = None
    owner: str | None = None
    users: list[str] | None = None
    console: list[str] | None = None
    reason: str | None = None  # `GuestRefused.kind`
    message: str | None = None  # `ProtocolError.message`
    kept: str | None = None


def spec_of(body: AddDisk) -> DiskSpec:
    """The disk as the library is asked for it.

    Raises:
        InvalidRequest: a value is wrong by itself.
    """
    from utilityvm.errors import InvalidRequest
    from utilityvm.scsi import ports
    from utilityvm.vm.config import GENERATED, DiskSpec

    if not Path(body.host_path).is_absolute():
        raise InvalidRequest(
            f"host path {body.host_path!r} is not absolute",
            remedy="write it from the root on: the server has another working folder than its client",
        )
    if body.generated and body.guest_path is not None:
        raise InvalidRequest("a guest path, and `generated`, which makes one up", remedy="give one of them")
    encryption: ports.ScratchKey | ports.CallerKey | None = None
    if isinstance(body.encryption, CallerKey):
        encryption = ports.CallerKey(body.encryption.key)
    elif body.encryption is not None:
        encryption = ports.ScratchKey()
    return DiskSpec(
        host_path=body.host_path,
        guest_path=GENERATED if body.generated else body.guest_path,
        read_only=body.read_only,
        options=tuple(body.options),
        access=body.access,
        partition=body.partition,
        format=body.format,
        sector_size_bytes=body.sector_size_bytes,
        filesystem=body.filesystem,
        ensure_filesystem=body.ensure_filesystem,
        reformat=body.reformat,
        block_device=body.block_device,
        encryption=encryption,
        verity=None if body.verity is None else ports.Verity(**msgspec.structs.asdict(body.verity)),
        untrusted=body.untrusted,
        physical=body.physical,
    )


def vm_of(vm: StoredVM, findings: list[str] | None = None) -> VM:
    """A VM as the store has it."""
    config = vm.config
    return VM(
        name=vm.name,
        uuid=vm.uuid,
        state=vm.seen_state,
        pid=vm.pid if vm.is_alive() else None,
        keep=config.get("keep"),
        memory_mib=config.get("memory_mib"),
        cpus=config.get("cpus"),
        controllers=config.get("controllers"),
        accelerator=vm.process.get("accelerator") if vm.process else None,
        created=vm.created,
        findings=findings or [],
    )


def kept_of(info: ProgramInfo) -> KeptProgram:
    return KeptProgram(
        command=list(info.command),
        **{name: getattr(info, name) for name in KeptProgram.__struct_fields__ if name != "command"},
    )


def disk_of(view: SlotView) -> Disk:
    return Disk(
        slot=str(view.slot),
        attachment=view.attachment,
        host_path=view.host_path,
        identity=view.identity,
        format=view.format,
        read_only=view.read_only,
        size_bytes=view.size_bytes,
        state=view.state,
        guest_paths=[str(path) for path in view.guest_paths],
        references=view.references,
        holders=list(view.holders),
        since=view.since,
    )


def mount_of(view: MountView) -> Mount:
    return Mount(
        slot=str(view.slot),
        host_path=view.host_path,
        guest_path=str(view.guest_path),
        partition=view.config.partition,
        read_only=view.config.read_only,
        options=list(view.config.options),
        filesystem=view.config.filesystem,
        state=view.state,
        references=view.references,
        holders=list(view.holders),
        since=view.since,
    )


def reservation_of(mount: SCSIMount) -> Reservation:
    return Reservation(
        id=mount.id,
        slot=str(mount.slot),
        host_path=str(mount.host_path),
        guest_path=None if mount.guest_path is None else str(mount.guest_path),
        read_only=mount.read_only,
        holder=mount.holder,
        references=mount.ref_count,
        notes=list(mount.notes),
    )
