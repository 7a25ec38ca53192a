"""UtilityVM: the face of one VM, from its start to its end. What it does is in the modules beside it.

A VM has one owner at a time: the process that started it, or opened it after that one let go or died. The owner's
object is this. With `keep` the VM outlives it; without, the VM ends with it, however the owner ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final, Literal, Self, Unpack, overload

from utilityvm.errors import InvalidRequest, UtilityVMError
from utilityvm.guestimage.build import GuestImage
from utilityvm.guests.bridge_guest import MAX_OUTPUT_BYTES, BridgeGuest
from utilityvm.guests.follow import ProgramPieces
from utilityvm.guests.kept import RING_BYTES, Program
from utilityvm.guests.program import CommandResult, Limits, OutputSink
from utilityvm.guests.programinfo import ProgramInfo
from utilityvm.hosts.qemu import QemuHost, QemuProcess
from utilityvm.machine.hostpath import HostPath, absolute, identity_of, identity_within
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors
from utilityvm.scsi.events import ScsiEvents
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S, ScsiManager
from utilityvm.scsi.migration import ScsiState
from utilityvm.scsi.mount_config import MountConfig, MountSettings
from utilityvm.scsi.reservation import ForceArgument, Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.views import MountView, SlotView
from utilityvm.store import Store
from utilityvm.tasks import Deadline
from utilityvm.templates.catalog import Template
from utilityvm.vm import clone as cloning
from utilityvm.vm import end
from utilityvm.vm import open as opening
from utilityvm.vm import save as saving
from utilityvm.vm import start as starting
from utilityvm.vm.acquiring import Acquiring, acquires
from utilityvm.vm.arguments import checked, each, timed
from utilityvm.vm.config import (
    GENERATED,
    DiskSettings,
    DiskSpec,
    GuestPath,
    SomeGuestPath,
    VMConfig,
    spelled_out,
)
from utilityvm.vm.lifecycle import BOOT_S, SHUTDOWN_S
from utilityvm.vm.mount import MountedDisk, OnBusy, SCSIMount, mounted
from utilityvm.vm.owned import OwnedVM, holder_of
from utilityvm.vm.programs import finished

CLONE_S: Final = 60.0
SAVE_S: Final = 120.0
OPEN_S: Final = 60.0


@typed_errors
class UtilityVM:
    """A running utility VM that this process owns. Made by `start` and `open`; for the event loop that made it."""

    def __init__(self, vm: OwnedVM) -> None:
        """Use `start`, `clone` or `open`."""
        self._vm = vm
        self.config = vm.config
        self.findings = vm.findings  # what `open` found half done, and did about it: a line each

    @classmethod
    @acquires
    @checked
    async def start(
        cls, config: VMConfig | str, *, image: GuestImage | None = None, timeout_s: float = BOOT_S
    ) -> UtilityVM:
        """Start a VM; its guest's agent answers. A name stands for a `VMConfig` of that name.

        Call it on the thread that is to own the VM: without `keep` the VM ends with that thread. If this fails no
        process, record, folder or lock is left. A dead VM of that name is replaced.

        Raises:
            InvalidRequest: a value of `config` cannot be.
            VMExists: the name is taken by a VM that runs.
            VMOwned: another process is just starting or ending a VM of that name.
            SetupError: QEMU, the guest image (`uvm image build`), a right or memory is missing.
            StartFailed: it did not come up within `timeout_s` seconds, or died; the message has its last words.
        """
        config = VMConfig(name=config) if isinstance(config, str) else config
        return cls(await starting.start(config, image=image, timeout_s=timeout_s))

    @classmethod
    @acquires
    @checked
    async def clone(
        cls,
        template: str,
        name: str,
        *,
        keep: bool = False,
        replace: Mapping[Slot, DiskSpec] | None = None,
        timeout_s: float = CLONE_S,
    ) -> UtilityVM:
        """Start a VM that goes on where the template's was saved, as a VM of its own.

        Its disks are at the same slots and guest paths, each mount with one reference of a holder named after the
        template. What is read-only is shared; what is writable is an overlay of the clone's, which goes when the clone
        is stopped. Its random numbers, clock, host name, machine id and boot id are its own before this returns, and
        the template's hooks have run. `replace` puts another disk of the same size at a slot that has no mount.

        As `start` for threads, names and what is left after a failure: no process, record, folder, lock or overlay.

        Raises:
            TemplateNotFound, TemplateInUse: there is no such template, or it is just being removed.
            TemplateDiffers: QEMU or the processor is another one than the template was saved with.
            TemplateDamaged: one of its files, or a disk under it, is not what was saved.
            others: as `start`.
        """
        return cls(await cloning.clone(template, name, keep=keep, replace=replace, timeout_s=timeout_s))

    @classmethod
    @acquires
    @checked
    async def open(
        cls, name: str, *, wait_s: float = 0.0, timeout_s: float = OPEN_S, needs_guest: bool = True
    ) -> UtilityVM:
        """Own a running VM whose owner let go of it, or died. What an owner left half done is finished or undone.

        Reservations of processes that are dead are given back; those of named holders stay. `findings` says what was
        found. If this fails nothing changed.

        Without `needs_guest` the VM is opened also if its agent does not answer: `findings` says so, and each call that
        needs the guest asks it anew.

        Raises:
            VMNotFound: there is no VM of that name.
            VMNotRunning: its QEMU has ended.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds.
            DeadlineExceeded: QEMU or the agent does not answer within `timeout_s` seconds.
        """
        return cls(await opening.open_running(name, wait_s=wait_s, timeout_s=timeout_s, needs_guest=needs_guest))

    @classmethod
    @checked
    async def remove(
        cls, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = SHUTDOWN_S
    ) -> list[str]:
        """End a VM, whatever state it is in, and remove all that is left of it.

        Its guest is asked to write out everything and to power off, within `timeout_s` seconds. If it cannot be asked,
        or does not, it is killed. The result says that, and what the guest left unwritten, a line each; it is empty
        otherwise.

        `force` asks nobody: the VM is killed at once, whoever owns it. Its owner gets VMGone; one that stands still
        gets it when it goes on.

        Raises:
            VMNotFound: there is no VM of that name.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds. Not with `force`.
            OutcomeUnknown: the kernel does not let QEMU go; call again.
        """
        if not isinstance(force, bool):
            raise InvalidRequest(f"force {force!r} is for disks", vm=name, remedy="give True to kill the VM")
        return await end.remove(name, wait_s=wait_s, force=force, timeout_s=timeout_s)

    # What it is.

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def uuid(self) -> str:
        return self._vm.record.uuid

    @property
    def process(self) -> QemuProcess:
        """The QEMU that runs it."""
        return self._host.process

    @property
    def accelerator(self) -> str:
        """What runs its processors, and why."""
        return f"{self._host.process.accelerator} ({self._host.process.accelerator_reason})"

    @property
    def is_running(self) -> bool:
        return self._vm.is_running

    def console(self) -> str:
        """The end of its console and of QEMU's own messages."""
        return self._host.console().decode(errors="replace")

    @property
    def scsi(self) -> ScsiManager:
        """Deprecated, and gone in 0.2: the manager behind `add_scsi` and its like, for what these cannot say."""
        return self._vm.scsi

    @property
    def _scsi(self) -> ScsiManager:
        """For tests and for `upkeep`: the manager's calls ask nothing of the VM's state."""
        return self._vm.scsi

    @property
    def _host(self) -> QemuHost:
        return self._vm.host

    @property
    def _guest(self) -> BridgeGuest:
        return self._vm.guest

    @property
    def _store(self) -> Store:
        return self._vm.store

    # Disks.

    @overload
    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: SomeGuestPath,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[DiskSettings],
    ) -> Acquiring[MountedDisk]: ...

    @overload
    def add_scsi(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[DiskSettings],
    ) -> Acquiring[SCSIMount]: ...

    @acquires
    @checked
    @spelled_out(DiskSettings)
    async def add_scsi(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[DiskSettings],
    ) -> SCSIMount:
        """Reserve a disk image: it is attached, and mounted at `guest_path`.

        Without a guest path it is attached only, and nothing is asked of the guest; with `GENERATED` it is mounted at
        a path that we make up. A disk that is attached already is shared, and so is a mount that is the same. If this
        fails, what only it needed is undone.

        `holder` names the reservation's holder, and makes it outlive this process; otherwise it is this process, and a
        later owner of the VM gives the reservation back when this process is dead. `partition` counts from 1; 0 is the
        whole disk. `options` are those of mount(8). `on_busy`: what leaving `async with` does if the guest still uses
        the disk: raise `GuestBusy`, or release it by force.

        `format` None: what was decided when the image was first opened, by its header; a format that is given is
        remembered in its place. `sector_size_bytes` is 512, or 4096 for a copy of a disk with such sectors.

        Raises:
            RequestError: it cannot be met; nothing was sent. InvalidRequest, NoFreeSlot, ConfigDiffers, GuestPathInUse,
                DiskInUse, AccessDenied and others.
            ImageError: the image is damaged, or would make QEMU open something else.
            HostRefused, GuestRefused: a step was refused.
            OutcomeUnknown: a step got no answer, and the truth could not be found out.
            DeadlineExceeded: it was not done within `timeout_s` seconds; it is undone in the background.
            VMGone: the VM died. VMNotRunning: it had ended before.
        """
        spec = DiskSpec(host_path=host_path, guest_path=guest_path, **settings)
        return await self.add(spec, holder=holder, on_busy=on_busy, timeout_s=timeout_s)

    @overload
    def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: SomeGuestPath,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[MountSettings],
    ) -> Acquiring[MountedDisk]: ...

    @overload
    def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[MountSettings],
    ) -> Acquiring[SCSIMount]: ...

    @acquires
    @checked
    @spelled_out(MountSettings)
    async def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **settings: Unpack[MountSettings],
    ) -> SCSIMount:
        """Reserve a physical disk, a block device of the host, for this VM alone. Otherwise as `add_scsi`.

        Raises:
            DiskInUse: the host has it mounted, or uses it otherwise.
            others: as `add_scsi`.
        """
        spec = DiskSpec(host_path=host_path, guest_path=guest_path, physical=True, **settings)
        return await self.add(spec, holder=holder, on_busy=on_busy, timeout_s=timeout_s)

    @acquires
    @timed
    async def add(
        self,
        disk: DiskSpec,
        *,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> SCSIMount:
        """`add_scsi` and `add_scsi_physical_disk` in one, for a disk that is described by a value."""
        self._vm.check()
        item = disk.request()
        reservation = await self._vm.scsi.add(
            item.disk, mount=item.mount, guest_path=item.guest_path, holder=holder_of(holder), timeout_s=timeout_s
        )
        return mounted(self, reservation, on_busy=on_busy)

    @overload
    async def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all"] = "all",
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[SCSIMount]: ...

    @overload
    async def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all", "each"],
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[SCSIMount | UtilityVMError]: ...

    @timed
    async def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all", "each"] = "all",
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[SCSIMount] | list[SCSIMount | UtilityVMError]:
        """Reserve several disks at the same time, in order.

        `all`: if one fails, those that came are given back and its error is raised. `each`: every result stands for
        itself, errors among them.
        """
        self._vm.check()
        requests = [spec.request() for spec in each("disk", disks)]
        results = await self._vm.scsi.add_many(requests, which=which, holder=holder_of(holder), timeout_s=timeout_s)
        return [result if isinstance(result, UtilityVMError) else mounted(self, result) for result in results]

    @timed
    async def remove_scsi(
        self,
        host_path: HostPath,
        *,
        holder: str | None = None,
        force: ForceArgument = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> str | None:
        """Drop one reference to the disk: the newest, or the newest of `holder`. The last one detaches it.

        `force`, and what is returned, are those of `SCSIMount.release`. A disk that nobody has a reservation of any
        more, because an undo failed, is taken out.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `SCSIMount.release`.
        """
        self._vm.check()
        path, identity = absolute(host_path), await identity_within(host_path, timeout_s)
        return await self._vm.scsi.remove(path, identity=identity, holder=holder, force=force, timeout_s=timeout_s)

    @timed
    async def remove_scsi_many(
        self,
        mounts: Iterable[SCSIMount | Reservation | str],
        *,
        force: ForceArgument = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[UtilityVMError | None]:
        """Give back several reservations, or those of these ids, at the same time; what became of each, in order.

        None: it is done.
        """
        self._vm.check()
        ids = [one if isinstance(one, str) else one.id for one in each("reservation", mounts)]
        return await self._vm.scsi.remove_many(ids, force=force, timeout_s=timeout_s)

    @timed
    async def release(
        self, reservation: Reservation | str, *, force: ForceArgument = False, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> str | None:
        """Give back a reservation, also one that this object did not make. See `SCSIMount.release`."""
        self._vm.check()
        return await self._vm.scsi.release(reservation, force=force, timeout_s=timeout_s)

    @timed
    async def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        Raises:
            NotAttached: it is not attached.
            InvalidRequest: it would not be larger, or the size is not a multiple of 512.
            NotSupported, HostRefused: the image cannot grow; nothing changed.
            GuestRefused: a file system cannot grow, and nothing changed; or it did not, though the disk is larger now:
                ask again with the same size.
            DeadlineExceeded, OutcomeUnknown: no answer within `timeout_s` seconds (None: as long as a step may take
                by itself); ask again with the same size.
        """
        self._vm.check()
        identity = await identity_within(host_path, timeout_s)
        await self._vm.scsi.resize(absolute(host_path), size_bytes, identity=identity, timeout_s=timeout_s)

    @timed
    async def remove_strays(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[str]:
        """Take out of the VM what no journal knows, as after the store was lost; says what, a line each.

        Raises:
            GuestBusy: something in the guest uses it; it stays, and so does what was to come after it.
            GuestRefused, HostRefused, OutcomeUnknown: a step failed; call again.
        """
        self._vm.check()
        done: list[str] = []
        known = {mount.guest_path for mount in self._vm.scsi.mounts()}
        for mount in await self._guest.mounts(timeout_s=timeout_s):
            path, slot = PurePosixPath(str(mount["MountPath"])), Slot(mount["Controller"], mount["Lun"])
            if path not in known:
                config = MountConfig(partition=mount["Partition"])
                await self._guest.unmount(slot, config, guest_path=path, timeout_s=timeout_s, force=False)
                done.append(f"{path} was mounted from slot {slot}, and no journal knew it: unmounted")
        taken = {view.attachment for view in self._vm.scsi.slots()}
        for one in await self._host.attachments(timeout_s=timeout_s):
            if one.attachment not in taken:
                await self._guest.eject(one.slot, timeout_s=timeout_s, force=False)
                await self._host.detach(one.slot, attachment=one.attachment, timeout_s=timeout_s)
                self._vm.scsi.unreserve(one.slot)
                done.append(f"slot {one.slot} had a disk that no journal knew: detached")
        return done

    @checked
    def scsi_guest_path(self, host_path: HostPath) -> PurePosixPath | None:
        """Where the disk is mounted in the guest; None if it is attached only.

        Raises:
            NotAttached: it is not attached.
        """
        self._vm.check()
        return self._vm.scsi.guest_path(absolute(host_path), identity=identity_of(host_path))

    def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order; the VM's own root disk is not among them."""
        self._vm.check_here()
        return self._vm.scsi.slots()

    def scsi_mounts(self) -> list[MountView]:
        """Every mount in the guest, in the order of slots."""
        self._vm.check_here()
        return self._vm.scsi.mounts()

    def scsi_reservations(self) -> list[SCSIMount]:
        """Every reservation that is held, whoever made it; the oldest first."""
        self._vm.check_here()
        return [mounted(self, reservation) for reservation in self._vm.scsi.reservations()]

    def scsi_events(self) -> ScsiEvents:
        """What happens to disks and mounts from this call on. The iteration ends when the VM ends, or is closed."""
        self._vm.check_here()
        return self._vm.scsi.events()

    @timed
    async def export_scsi_state(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ScsiState:
        """The disks, mounts and reservations as a document, for whoever owns the VM, or one like it, after a move.

        From then on every change of them is refused with `Migrating`, until `resume_scsi` or the VM's end. If this
        fails they are as before.

        Raises:
            WrongState: a disk or a mount is half-way, or is being resized; names it.
            DeadlineExceeded: what was under way did not end within `timeout_s` seconds.
        """
        self._vm.check()
        return await self._vm.scsi.export_state(timeout_s=timeout_s)

    @checked
    def import_scsi_state(self, state: ScsiState) -> None:
        """Take up what another VM's owner exported; this VM has no disks yet. Nothing is sent until `resume_scsi`.

        Until then every change is refused with `Migrating`. Reservations keep their names; those of processes are this
        process's from then on.

        Raises:
            AlreadyAttached: there are disks, or a slot is taken.
            InvalidRequest: the VM has fewer controllers.
            NotSupported: the guest cannot express a mount.
        """
        self._vm.check()
        self._vm.scsi.import_state(state, holder=holder_of(None))

    @timed
    async def resume_scsi(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[str]:
        """Go on after `export_scsi_state` or `import_scsi_state`. Says what was left half-way, a line each.

        What was imported is looked for in the VM: what is there is taken over, the rest is attached and mounted in its
        slot and at its path. If this fails with an error nothing changed, and it can be called again.

        Raises:
            WrongState: nothing was exported or imported; or an encrypted mount is not there, and its key is nowhere.
            ConfigDiffers: a file is not the one that it was: another format or size, or two are one.
            DeadlineExceeded: not everything was looked at within `timeout_s` seconds.
            others: as `add_scsi`, for a disk that cannot be opened here.
        """
        self._vm.check()
        return await self._vm.scsi.resume(timeout_s=timeout_s)

    # The guest.

    @overload
    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: Literal[False] = False,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes]: ...

    @overload
    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: Literal[True],
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        timeout_s: float | None = None,
    ) -> CommandResult[str]: ...

    @timed
    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        check: bool = False,
        text: bool = False,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        timeout_s: float | None = None,
    ) -> CommandResult[bytes] | CommandResult[str]:
        """Run a program in the guest to its end. Cancelled or out of time, it is killed with all that it started.

        It has ended when its own process has. What its children write to its output within half a second of that is
        kept, and later output is dropped. The children go on running: a server can be started so.

        `user` is a name or a number of the guest's; None: root. With `text` its output is decoded as UTF-8, with
        U+FFFD for what is none. It ends with this process; `start_program` starts one that does not.

        Raises:
            ProgramFailed: with `check`, it ended with another code than 0.
            GuestRefused: it could not be started, or wrote more than `max_output_bytes` and was killed; the message
                has the reason.
            InvalidRequest: the guest has no such user, or a limit cannot be.
            NotSupported: the guest image is too old for `user` and `limits`: build it anew.
            DeadlineExceeded: it did not end within `timeout_s` seconds; has what it wrote in `stdout` and `stderr`.
            VMGone: the VM died.
        """
        self._vm.check()
        async with self._vm.ends_told():
            result = await self._guest.run(
                command,
                stdin=stdin,
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                timeout_s=timeout_s,
                max_output_bytes=max_output_bytes,
            )
        return finished(result, command, check=check, text=text, vm=self.name)

    @timed
    @raises_callers_errors
    async def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdout: OutputSink,
        stderr: OutputSink,
        stdin: AsyncIterator[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code."""
        self._vm.check()
        async with self._vm.ends_told():
            return await self._guest.run_streaming(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                timeout_s=timeout_s,
            )

    @timed
    async def start_program(
        self,
        command: Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        name: str | None = None,
        id: str | None = None,
        follow: bool = True,
        ring_bytes: int = RING_BYTES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Program:
        """Start a program that belongs to the guest: it goes on when this process, or the VM's owner, ends.

        The guest keeps the last `ring_bytes` of its output, and its exit code until it is forgotten. The next owner
        of the VM finds it with `programs`, and goes on with `program`. With `follow` this object reads its output
        from the first byte, and output that is not read holds the program back; without, its oldest output is dropped
        when there is too much. With `stdin` it waits for the input that it is given, else it has none.

        `name` is a name for people, which no other program of the guest has. A second start with the same
        `id`, letters and digits, gives the program that there is: so it can be asked for again after a lost answer.

        Clones of a template go on with such a program. Saving is refused while its output is followed.

        Raises:
            GuestRefused: it could not be started, or there is no room for one more; the message has the reason.
            InvalidRequest: a value is wrong, the name is taken, or the guest has no such user.
            NotSupported: the guest image is too old: build it anew.
            OutcomeUnknown, DeadlineExceeded: no answer came; look for it with `programs`.
            VMGone: the VM died.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._guest.kept.start(
                command,
                stdin=stdin,
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                name=name,
                id=id,
                follow=follow,
                ring_bytes=ring_bytes,
                timeout_s=timeout_s,
            )

    @timed
    async def program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        follow: bool = True,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Program:
        """A program that the guest keeps, by its number, name or id.

        Its output is read from these offsets on; what the guest has dropped of it is counted in `stdout.lost`. With
        the offsets up to which another process had come, no byte is lost or repeated. See `start_program` for `follow`.

        Raises:
            ProgramNotFound: there is no such program.
            InvalidRequest: it has not written so much.
            others: as `start_program`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._guest.kept.get(
                number, stdout=stdout_offset, stderr=stderr_offset, follow=follow, timeout_s=timeout_s
            )

    @timed
    async def programs(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ProgramInfo]:
        """The programs that the guest keeps, in the order in which they were started; those that ended are among them.

        Raises:
            NotSupported: the guest image is too old: build it anew.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._guest.kept.list(timeout_s=timeout_s)

    @timed
    async def follow_program(
        self,
        number: int | str,
        *,
        stdout_offset: int = 0,
        stderr_offset: int = 0,
        hold: bool = False,
        live: bool = True,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> ProgramPieces:
        """The output of a program that the guest keeps, both streams in their order, from these offsets on.

        With `hold` the program waits for its reader, else the guest drops what is not read in time: the next piece's
        offset tells. Without `live` it ends with what there is now.

        Raises:
            as `program`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._guest.kept.follow(
                number, stdout=stdout_offset, stderr=stderr_offset, hold=hold, live=live, timeout_s=timeout_s
            )

    @timed
    async def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the guest's agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        self._vm.check()
        async with self._vm.ends_told():
            await self._guest.ping(timeout_s=timeout_s)

    # What it can become.

    @checked
    async def save_as_template(self, name: str, *, timeout_s: float = SAVE_S) -> Template:
        """Make the VM a template, from which clones start in a fraction of a second: see `clone`.

        True on return: the template is there; the VM has ended and cannot run again; its disks stay as they are for as
        long as the template exists, and nobody can attach one of them for writing. The programs in it go on in each
        clone. Everything in its memory is in the template's files, keys of scratch disks among them.

        If this fails there is no such template, and the VM goes on.

        Raises:
            InvalidRequest, TemplateExists: the name cannot be, or is taken.
            WrongState: a disk or a mount is half-way.
            NotSupported: a mount has a key of a caller's.
            GuestBusy: a program that `run` started still runs, or somebody follows one that `start_program` did: it
                could not answer to anybody.
            GuestRefused: the guest did not quiesce, or a hook of its refused.
            SetupError: no space, or no right to read the VM's memory.
            HostRefused, OutcomeUnknown, VMGone: QEMU did not save its state.
        """
        self._vm.check_here()
        return await saving.save(self._vm, name, timeout_s=timeout_s)

    # Its end.

    @checked
    async def wait(self, *, timeout_s: float | None = None) -> UtilityVMError:
        """Return when the VM has ended, with the reason; `console` has its last words then.

        Raises:
            DeadlineExceeded: it did not end within `timeout_s` seconds (None: wait for ever).
        """
        self._vm.check_here()
        async with Deadline(timeout_s).limit(f"VM {self.name} did not end", vm=self.name):
            reason = await asyncio.shield(self._host.gone)
        await self._host.logged()
        return reason

    @checked
    async def stop(self, *, timeout_s: float = SHUTDOWN_S) -> list[str]:
        """End the VM: the guest writes out everything and powers off, or is killed after `timeout_s` seconds.

        True on return: no process, socket, lock or record of it is left; its disks are free. Stopped before is done.
        The result says what the guest left unwritten, and whether it was killed, a line each; it is empty otherwise.

        Raises:
            OutcomeUnknown: the kernel does not let QEMU go; call again.
            StoreError: it has ended, and the store keeps its record; call again.
        """
        self._vm.check_here()
        return await end.stop(self._vm, timeout_s=timeout_s)

    @checked
    async def close(self, *, timeout_s: float = SHUTDOWN_S) -> None:
        """Let go of the VM: with `keep` it runs on, and can be opened by whoever comes next; without, it is stopped.

        Work that goes on in the background is waited for, for some seconds; the next owner goes on with the rest of it.
        Closed before is done.
        """
        self._vm.check_here()
        await end.close(self._vm, timeout_s=timeout_s)

    async def _ready(self, deadline: Deadline) -> None:
        await self._vm.ready(deadline)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<UtilityVM {self.name}: {'running' if self.is_running else 'ended'}>"


__all__ = ["GENERATED", "DiskSpec", "MountedDisk", "SCSIMount", "UtilityVM", "VMConfig"]
