"""UtilityVM: one VM with its host side, its guest side, its disks and its journal; from its start to its end.

A VM has one owner at a time: the process that started it, or opened it after that one let go or died. The owner's
object is this. With `keep` the VM outlives it; without, the VM ends with it, however the owner ends.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Final, Literal, Self

from utilityvm.errors import (
    InvalidRequest,
    SetupError,
    UtilityVMError,
    VMGone,
    VMNotFound,
    VMNotRunning,
)
from utilityvm.guestimage.build import GuestImage
from utilityvm.guestimage.build import find as find_image
from utilityvm.guests.bridge_guest import BridgeGuest, CommandResult, OutputSink
from utilityvm.hosts.qemu import QemuHost, QemuProcess
from utilityvm.log import logger
from utilityvm.machine import paths
from utilityvm.machine.hostpath import HostPath, absolute, identity_of
from utilityvm.machine.processes import is_running, own_start
from utilityvm.scsi.events import ScsiEvent
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S, ScsiManager
from utilityvm.scsi.migration import ScsiState
from utilityvm.scsi.ports import CallerKey, DiskFormat, Holder, MountConfig, ScratchKey, Verity, VMAccess
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.views import MountView, SlotView
from utilityvm.store import SqliteJournal, Store, StoredVM, VMState
from utilityvm.store.ownership import Ownership
from utilityvm.store.recover import open_store
from utilityvm.templates import catalog
from utilityvm.templates import clone as cloning
from utilityvm.templates import save as saving
from utilityvm.templates.catalog import Template
from utilityvm.vm import lifecycle
from utilityvm.vm.config import GENERATED, DiskSpec, GuestPath, VMConfig
from utilityvm.vm.lifecycle import BOOT_S, CONNECT_S, SHUTDOWN_S
from utilityvm.vm.mount import SCSIMount

SETTLE_S: Final = 3.0
CLONE_S: Final = 60.0
SAVE_S: Final = 120.0
ROOT_SLOT: Final = Slot(0, 0)

_log = logger(__name__)


class UtilityVM:
    """A running utility VM that this process owns. Made by `start` and `open`; for the event loop that made it."""

    def __init__(
        self,
        config: VMConfig,
        *,
        record: StoredVM,
        store: Store,
        ownership: Ownership,
        host: QemuHost,
        guest: BridgeGuest,
        strays: Mapping[Slot, str] | None = None,
    ) -> None:
        """Use `start` or `open`."""
        self.config = config
        self.findings: tuple[str, ...] = ()  # what `open` found half done, and did about it: a line each
        self._record = record
        self._store = store
        self._ownership = ownership
        self._host = host
        self._guest = guest
        self._ended: UtilityVMError | None = None
        self._resting: UtilityVMError | None = None
        self._is_stopping = False
        self._ending = asyncio.Lock()
        self._is_closed = False
        self._log = _log.bind(vm=config.name)
        self.scsi = ScsiManager(
            host,
            guest,
            SqliteJournal(store, record),
            controllers=config.controllers,
            reserved={ROOT_SLOT: "the VM's root disk", **(strays or {})},
            vm=config.name,
        )
        host.gone.add_done_callback(lambda gone: self._on_gone(gone.result()))

    @classmethod
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
        vm_uuid = str(uuid.uuid4())
        config.check()
        image = image or find_image()
        if image is None:
            raise SetupError("there is no guest image", vm=config.name, remedy="build it: uvm image build")
        async with AsyncExitStack() as undo:
            store = undo.enter_context(open_store())
            saved = {**config.to_json(), "root": str(image.root)}
            record, ownership, folder = await lifecycle.claim_name(undo, store, config.name, vm_uuid, saved)
            host = await QemuHost.start(
                config.for_qemu(image, uuid=vm_uuid),
                folder=folder,
                who_uses=_who_uses(store, record),
                frozen_by=catalog.frozen_by,
            )
            undo.push_async_callback(host.stop)
            document = host.process.to_json()
            store.set_process(record, document)
            lifecycle.write_copy(folder, record, document)
            guest = await lifecycle.boot(host, config.name, timeout_s=timeout_s)
            undo.push_async_callback(guest.close)
            store.set_state(record, VMState.RUNNING)
            vm = cls(config, record=record, store=store, ownership=ownership, host=host, guest=guest)
            undo.pop_all()
        vm._log.info("started on %s", host.process.accelerator)
        return vm

    @classmethod
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
        requests = {slot: spec.request().disk for slot, spec in (replace or {}).items()}
        vm_uuid = str(uuid.uuid4())
        async with AsyncExitStack() as undo:
            with catalog.in_use(template) as source:
                config = VMConfig(
                    name=name,
                    memory_mib=source.manifest.memory_mib,
                    cpus=source.manifest.cpus,
                    controllers=source.manifest.controllers,
                    keep=keep,
                )
                config.check()
                await cloning.check_machine(source)
                store = undo.enter_context(open_store())
                origin = {"template": template, "template_uuid": source.uuid}
                document = {**config.to_json(), "root": str(source.root), "clone": origin}
                record, ownership, folder = await lifecycle.claim_name(undo, store, name, vm_uuid, document)
                overlays = paths.overlays_dir(vm_uuid)
                holder = Holder(name=f"template {template}")
                with cloning.prepare(source, overlays, holder=holder, replace=requests) as prepared:
                    undo.callback(lifecycle.remove_overlays, record)
                    host = await QemuHost.start(
                        config.for_clone(source.root, uuid=vm_uuid),
                        folder=folder,
                        saved=prepared.incoming,
                        who_uses=_who_uses(store, record),
                        frozen_by=catalog.frozen_by,
                    )
            undo.push_async_callback(host.stop)
            process = host.process.to_json()
            store.set_process(record, process)
            lifecycle.write_copy(folder, record, process)
            await SqliteJournal(store, record).write(prepared.records)
            await host.loaded(prepared.incoming.disks, timeout_s=timeout_s)
            guest = await lifecycle.wake(host, name, timeout_s=timeout_s)
            undo.push_async_callback(guest.close)
            store.set_state(record, VMState.RUNNING)
            vm = cls(config, record=record, store=store, ownership=ownership, host=host, guest=guest)
            await vm.scsi.restore(is_alive=is_alive)
            undo.pop_all()
        vm._log.info("cloned from template %s", template)
        return vm

    @classmethod
    async def open(cls, name: str, *, wait_s: float = 0.0) -> UtilityVM:
        """Own a running VM whose owner let go of it, or died. What an owner left half done is finished or undone.

        Reservations of processes that are dead are given back; those of named holders stay. `findings` says what was
        found. If this fails nothing changed.

        Raises:
            VMNotFound: there is no VM of that name.
            VMNotRunning: its QEMU has ended.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds.
            DeadlineExceeded: QEMU or the agent does not answer.
        """
        async with AsyncExitStack() as undo:
            store = undo.enter_context(open_store())
            record, ownership = await lifecycle.own(store, name, wait_s=wait_s, must_run=True)
            undo.callback(ownership.release)
            lifecycle.refuse_unfinished(record)
            process = lifecycle.process_of(record)
            try:
                host = await QemuHost.connect(
                    process, who_uses=_who_uses(store, record), frozen_by=catalog.frozen_by, timeout_s=CONNECT_S
                )
            except VMGone as error:
                raise lifecycle.not_running(record) from error
            undo.push_async_callback(host.close)
            found = []
            if record.state is VMState.SAVING:
                found.append("saving it as a template was cut short: it goes on")
                await host.resume(timeout_s=CONNECT_S)
            guest = await BridgeGuest.connect(process.agent_socket, timeout_s=CONNECT_S, vm=name)
            undo.push_async_callback(guest.close)
            if record.state is VMState.SAVING:
                await guest.thaw(timeout_s=CONNECT_S)
                store.set_state(record, VMState.RUNNING)
            strays = await lifecycle.strays(host, SqliteJournal(store, record))
            config = VMConfig.from_json(record.config)
            vm = cls(config, record=record, store=store, ownership=ownership, host=host, guest=guest, strays=strays)
            found += [f"slot {slot} has a disk that is in no journal: it stays taken" for slot in strays]
            vm.findings = (*found, *await vm.scsi.restore(is_alive=is_alive, sizes=await host.sizes()))
            if record.state is not VMState.RUNNING:
                store.set_state(record, VMState.RUNNING)  # its owner died when it started, or was about to stop
            undo.pop_all()
        for finding in vm.findings:
            vm._log.warning("%s", finding)
        return vm

    @classmethod
    async def remove(cls, name: str, *, wait_s: float = 0.0, force: bool = False) -> None:
        """End a VM, whatever state it is in, and remove all that is left of it. `force` does not ask its guest.

        Raises:
            VMNotFound: there is no VM of that name.
            VMOwned: another process owns it, also after waiting in the queue for `wait_s` seconds.
            OutcomeUnknown: the kernel does not let QEMU go; call again.
        """
        async with AsyncExitStack() as undo:
            store = undo.enter_context(open_store())
            try:
                record, ownership = await lifecycle.own(store, name, wait_s=wait_s)
            except VMNotFound:
                await lifecycle.sweep(store, name)
                raise
            undo.callback(ownership.release)
            if record.is_alive() and not force:
                await lifecycle.shut_down(record)
            await lifecycle.clear(record, store)
            ownership.release(remove=True)

    # What it is.

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def uuid(self) -> str:
        return self._record.uuid

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
        return self._ended is None

    def console(self) -> str:
        """The end of its console and of QEMU's own messages."""
        return self._host.console().decode(errors="replace")

    # Disks.

    async def add_scsi(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        read_only: bool = False,
        options: Sequence[str] = (),
        access: VMAccess = VMAccess.INDIVIDUAL,
        partition: int = 0,
        format: DiskFormat | str | None = None,
        filesystem: str | None = None,
        ensure_filesystem: bool = False,
        reformat: bool = False,
        block_device: bool = False,
        encryption: ScratchKey | CallerKey | None = None,
        verity: Verity | None = None,
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> SCSIMount:
        """Reserve a disk image: it is attached, and mounted at `guest_path`.

        Without a guest path it is attached only, and nothing is asked of the guest; with `GENERATED` it is mounted at
        a path that we make up. A disk that is attached already is shared, and so is a mount that is the same. If this
        fails, what only it needed is undone.

        `holder` names the reservation's holder, and makes it outlive this process; otherwise it is this process, and a
        later owner of the VM gives the reservation back when this process is dead. `partition` counts from 1; 0 is the
        whole disk. `format` None: what the image's header says. `options` are those of mount(8).

        Raises:
            RequestError: it cannot be met; nothing was sent. InvalidRequest, NoFreeSlot, ConfigDiffers, GuestPathInUse,
                DiskInUse, AccessDenied and others.
            ImageError: the image is damaged, or would make QEMU open something else.
            HostRefused, GuestRefused: a step was refused.
            OutcomeUnknown: a step got no answer, and the truth could not be found out.
            DeadlineExceeded: it was not done within `timeout_s` seconds; it is undone in the background.
            VMGone: the VM died. VMNotRunning: it had ended before.
        """
        spec = DiskSpec(
            host_path=host_path,
            guest_path=guest_path,
            read_only=read_only,
            options=options,
            access=access,
            partition=partition,
            format=format,
            filesystem=filesystem,
            ensure_filesystem=ensure_filesystem,
            reformat=reformat,
            block_device=block_device,
            encryption=encryption,
            verity=verity,
        )
        return await self.add(spec, holder=holder, timeout_s=timeout_s)

    async def add_scsi_physical_disk(
        self,
        host_path: HostPath,
        guest_path: GuestPath = None,
        *,
        read_only: bool = False,
        options: Sequence[str] = (),
        partition: int = 0,
        filesystem: str | None = None,
        ensure_filesystem: bool = False,
        reformat: bool = False,
        block_device: bool = False,
        encryption: ScratchKey | CallerKey | None = None,
        verity: Verity | None = None,
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> SCSIMount:
        """Reserve a physical disk, a block device of the host, for this VM alone. Otherwise as `add_scsi`.

        Raises:
            DiskInUse: the host has it mounted, or uses it otherwise.
            others: as `add_scsi`.
        """
        spec = DiskSpec(
            host_path=host_path,
            guest_path=guest_path,
            read_only=read_only,
            options=options,
            partition=partition,
            filesystem=filesystem,
            ensure_filesystem=ensure_filesystem,
            reformat=reformat,
            block_device=block_device,
            encryption=encryption,
            verity=verity,
            physical=True,
        )
        return await self.add(spec, holder=holder, timeout_s=timeout_s)

    async def add(
        self, disk: DiskSpec, *, holder: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> SCSIMount:
        """`add_scsi` and `add_scsi_physical_disk` in one, for a disk that is described by a value."""
        self._check_running()
        item = disk.request()
        reservation = await self.scsi.add(
            item.disk, mount=item.mount, guest_path=item.guest_path, holder=_holder(holder), timeout_s=timeout_s
        )
        return SCSIMount(self, reservation)

    async def add_scsi_many(
        self,
        disks: Iterable[DiskSpec],
        *,
        which: Literal["all", "each"] = "all",
        holder: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[SCSIMount | UtilityVMError]:
        """Reserve several disks at the same time, in order.

        `all`: if one fails, those that came are given back and its error is raised. `each`: every result stands for
        itself, errors among them.
        """
        self._check_running()
        requests = [spec.request() for spec in disks]
        results = await self.scsi.add_many(requests, which=which, holder=_holder(holder), timeout_s=timeout_s)
        return [result if isinstance(result, UtilityVMError) else SCSIMount(self, result) for result in results]

    async def remove_scsi(
        self,
        host_path: HostPath,
        *,
        holder: str | None = None,
        force: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Drop one reference to the disk: the newest, or the newest of `holder`. The last one detaches it.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `SCSIMount.release`.
        """
        self._check_running()
        path, identity = absolute(host_path), identity_of(host_path)
        await self.scsi.remove(path, identity=identity, holder=holder, force=force, timeout_s=timeout_s)

    async def remove_scsi_many(
        self, mounts: Iterable[SCSIMount], *, force: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[UtilityVMError | None]:
        """Give back several reservations at the same time; what became of each, in order. None: it is done."""
        self._check_running()
        return await self.scsi.remove_many([mount.id for mount in mounts], force=force, timeout_s=timeout_s)

    async def release(
        self, reservation: Reservation | str, *, force: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Give back a reservation, also one that this object did not make. See `SCSIMount.release`."""
        self._check_running()
        await self.scsi.release(reservation, force=force, timeout_s=timeout_s)

    async def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        Raises:
            NotAttached: it is not attached.
            InvalidRequest: it would not be larger, or the size is not a multiple of 512.
            NotSupported, HostRefused: the image cannot grow; nothing changed.
            GuestRefused: the disk is larger now, a file system is not; ask again with the same size.
            DeadlineExceeded, OutcomeUnknown: no answer within `timeout_s` seconds (None: as long as a step may take
                by itself); ask again with the same size.
        """
        self._check_running()
        identity = identity_of(host_path)
        await self.scsi.resize(absolute(host_path), size_bytes, identity=identity, timeout_s=timeout_s)

    async def remove_strays(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[str]:
        """Take out of the VM what no journal knows, as after the store was lost; says what, a line each.

        Raises:
            GuestBusy: something in the guest uses it; it stays, and so does what was to come after it.
            GuestRefused, HostRefused, OutcomeUnknown: a step failed; call again.
        """
        self._check_running()
        done: list[str] = []
        known = {mount.guest_path for mount in self.scsi.mounts()}
        for mount in await self._guest.mounts(timeout_s=timeout_s):
            path, slot = PurePosixPath(str(mount["MountPath"])), Slot(mount["Controller"], mount["Lun"])
            if path not in known:
                config = MountConfig(partition=mount["Partition"])
                await self._guest.unmount(slot, config, guest_path=path, timeout_s=timeout_s, force=False)
                done.append(f"{path} was mounted from slot {slot}, and no journal knew it: unmounted")
        taken = {view.attachment for view in self.scsi.slots()}
        for one in await self._host.attachments(timeout_s=timeout_s):
            if one.attachment not in taken:
                await self._guest.eject(one.slot, timeout_s=timeout_s, force=False)
                await self._host.detach(one.slot, attachment=one.attachment, timeout_s=timeout_s)
                self.scsi.unreserve(one.slot)
                done.append(f"slot {one.slot} had a disk that no journal knew: detached")
        return done

    def scsi_guest_path(self, host_path: HostPath) -> PurePosixPath | None:
        """Where the disk is mounted in the guest; None if it is attached only.

        Raises:
            NotAttached: it is not attached.
        """
        self._check_running()
        return self.scsi.guest_path(absolute(host_path), identity=identity_of(host_path))

    def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order; the VM's own root disk is not among them."""
        return self.scsi.slots()

    def scsi_mounts(self) -> list[MountView]:
        """Every mount in the guest, in the order of slots."""
        return self.scsi.mounts()

    def scsi_reservations(self) -> list[SCSIMount]:
        """Every reservation that is held, whoever made it; the oldest first."""
        return [SCSIMount(self, reservation) for reservation in self.scsi.reservations()]

    def scsi_events(self) -> AsyncIterator[ScsiEvent]:
        """What happens to disks and mounts from now on."""
        return self.scsi.events()

    async def export_scsi_state(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ScsiState:
        """The disks, mounts and reservations as a document, for whoever owns the VM, or one like it, after a move.

        From then on every change of them is refused with `Migrating`, until `resume_scsi` or the VM's end. If this
        fails they are as before.

        Raises:
            WrongState: a disk or a mount is half-way, or is being resized; names it.
            DeadlineExceeded: what was under way did not end within `timeout_s` seconds.
        """
        self._check_running()
        return await self.scsi.export_state(timeout_s=timeout_s)

    def import_scsi_state(self, state: ScsiState) -> None:
        """Take up what another VM's owner exported; this VM has no disks yet. Nothing is sent until `resume_scsi`.

        Until then every change is refused with `Migrating`. Reservations keep their names; those of processes are this
        process's from then on.

        Raises:
            AlreadyAttached: there are disks, or a slot is taken.
            InvalidRequest: the VM has fewer controllers.
            NotSupported: the guest cannot express a mount.
        """
        self._check_running()
        self.scsi.import_state(state, holder=_holder(None))

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
        self._check_running()
        return await self.scsi.resume(timeout_s=timeout_s)

    # The guest.

    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        timeout_s: float | None = None,
    ) -> CommandResult:
        """Run a program in the guest to its end. Cancelled or out of time, it is killed with all that it started.

        Raises:
            GuestRefused: it could not be started.
            DeadlineExceeded: it did not end within `timeout_s` seconds.
            VMGone: the VM died.
        """
        self._check_running()
        return await self._guest.run(_command(command), stdin=stdin, env=env, cwd=cwd, timeout_s=timeout_s)

    async def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdout: OutputSink,
        stderr: OutputSink,
        stdin: AsyncIterator[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code."""
        self._check_running()
        return await self._guest.run_streaming(
            _command(command), stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, timeout_s=timeout_s
        )

    async def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the guest's agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        self._check_running()
        await self._guest.ping(timeout_s=timeout_s)

    # What it can become.

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
            GuestBusy: a program that `run` started still runs: it could not answer to anybody.
            GuestRefused: the guest did not quiesce, or a hook of its refused.
            SetupError: no space, or no right to read the VM's memory.
            HostRefused, OutcomeUnknown, VMGone: QEMU did not save its state.
        """
        self._check_running()
        catalog.refuse_taken(name)
        async with self._ending:
            self._check_running()
            template = await self._save(name, timeout_s=timeout_s)
            self._is_stopping = True
            self._end(
                VMNotRunning(
                    f"VM {self.name} was saved as template {name}",
                    vm=self.name,
                    remedy=f"clone it: uvm clone {name} NAME",
                )
            )
            await self._clear_away()
        self._log.info("saved as template %s", name)
        return template

    async def _save(self, name: str, *, timeout_s: float) -> Template:
        with self.scsi.held_still(f"VM {self.name} is being saved as template {name}"):
            await self.scsi.settle()
            records = SqliteJournal(self._store, self._record).read()
            saving.check_settled(records, vm=self.name)
            parent = catalog.parent_of(self._record.config)
            kernel = str((await self._guest.info())["Kernel"])
            self._store.set_state(self._record, VMState.SAVING)
            try:
                await self._guest.quiesce(timeout_s=timeout_s)
                await self._guest.hang_up()
                return await saving.write(
                    name,
                    host=self._host,
                    config=self.config,
                    root=Path(str(self._record.config["root"])) if parent is None else parent.root,
                    kernel=kernel,
                    records=records,
                    parent=parent,
                    timeout_s=timeout_s,
                )
            except BaseException:
                await self._go_on()
                raise

    async def _go_on(self) -> None:
        """After a save that failed: the VM runs as before."""
        with suppress(VMGone):
            await self._host.resume()
            await self._guest.thaw(timeout_s=CONNECT_S)
            self._store.set_state(self._record, VMState.RUNNING)

    async def rest(self, *, timeout_s: float = 10.0) -> None:
        """Stop its processors until `wake`; meanwhile every other call is refused. For `ClonePool`."""
        self._check_running()
        await self._guest.ping(timeout_s=timeout_s)  # what it still had to do is done when it answers
        self._store.set_state(self._record, VMState.WAITING)
        await self._host.pause(timeout_s=timeout_s)
        self._resting = VMNotRunning(f"VM {self.name} waits in a pool", vm=self.name)

    async def wake(self, *, timeout_s: float = 10.0) -> None:
        """Let it run again, and make it unique again: its clock stood still."""
        if self._ended is not None:
            raise self._ended
        await self._host.resume(timeout_s=timeout_s)
        await self._guest.make_unique(**lifecycle.new_identity(self.name), timeout_s=timeout_s)
        self._store.set_state(self._record, VMState.RUNNING)
        self._resting = None

    # Its end.

    async def wait(self) -> UtilityVMError:
        """Return when the VM has ended, with the reason; `console` has its last words then."""
        reason = await asyncio.shield(self._host.gone)
        await self._host.logged()
        return reason

    async def stop(self, *, timeout_s: float = SHUTDOWN_S) -> None:
        """End the VM: the guest writes out everything and powers off, or is killed after `timeout_s` seconds.

        True on return: no process, socket, lock or record of it is left; its disks are free. Stopped before is done.

        Raises:
            OutcomeUnknown: the kernel does not let QEMU go; call again.
            StoreError: it has ended, and the store keeps its record; call again.
        """
        async with self._ending:
            if self._is_closed:
                return
            if self._ended is None:
                self._is_stopping = True
                try:
                    self._store.set_state(self._record, VMState.STOPPING)
                except UtilityVMError as error:  # a full disk must not keep a VM running
                    self._log.warning("not written down: %s", error)
                with suppress(UtilityVMError):
                    await self._guest.shutdown(timeout_s=timeout_s)
                    await asyncio.wait([self._host.gone], timeout=timeout_s)
                self._end(VMNotRunning(f"VM {self.name} was stopped", vm=self.name))
            await self._clear_away()
        self._log.info("stopped")

    async def _clear_away(self) -> None:
        await self._guest.close()
        await self._host.stop()
        lifecycle.remove_overlays(self._record)
        lifecycle.remove_copy(self._host.process.folder)
        self._store.remove(self._record)
        self._ownership.release(remove=True)
        self._store.close()
        self._is_closed = True

    async def close(self) -> None:
        """Let go of the VM: with `keep` it runs on, and can be opened by whoever comes next; without, it is stopped.

        Work that goes on in the background is waited for, for some seconds; the next owner goes on with the rest of it.
        Closed before is done.
        """
        if not self.config.keep or self._ended is not None:
            await self.stop()
            return
        async with self._ending:
            if self._is_closed:
                return
            self._is_closed = True
            self._ended = VMNotRunning(f"VM {self.name} was closed here", vm=self.name, remedy="open it again")
            async with AsyncExitStack() as closing:  # the last first, also when this is cancelled
                closing.callback(self._store.close)
                closing.callback(self._ownership.release)
                # At once: what was under way has lost its connection, and the journal says so.
                closing.push_async_callback(self.scsi.settle)
                closing.push_async_callback(self._host.close)
                closing.push_async_callback(self._guest.close)
                with suppress(TimeoutError):
                    async with asyncio.timeout(SETTLE_S):
                        await self.scsi.settle()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<UtilityVM {self.name}: {'running' if self.is_running else 'ended'}>"

    def _check_running(self) -> None:
        if self._ended is not None:
            raise self._ended
        if self._resting is not None:
            raise self._resting

    def _on_gone(self, reason: UtilityVMError) -> None:
        if self._ended is not None:
            return
        if self._is_stopping:
            return  # as it should
        self._end(reason)
        self._log.error("the VM died: %s", reason)
        try:
            self._store.set_dead(self._record)
        except UtilityVMError as error:
            self._log.warning("not written down: %s", error)

    def _end(self, reason: UtilityVMError) -> None:
        """Whoever waits for something of the VM is told now."""
        self._ended = reason
        self.scsi.mark_gone(reason)


def _who_uses(store: Store, record: StoredVM) -> Callable[[str], str | None]:
    def who(identity: str) -> str | None:
        user = store.user_of(identity, other_than=record)
        return f"VM {user}" if user else None

    return who


def _holder(name: str | None) -> Holder:
    if name is None:
        return Holder(name=f"process {os.getpid()}", pid=os.getpid(), started=own_start())
    if not name or not name.isprintable():
        raise InvalidRequest(f"{name!r} cannot be a holder's name", remedy="use printable characters")
    return Holder(name=name)


def is_alive(holder: Holder) -> bool:
    """May the holder still come and release what it holds? A named one always may."""
    return holder.pid is None or holder.started is None or is_running(holder.pid, holder.started)


def _command(command: Sequence[str]) -> Sequence[str]:
    if isinstance(command, str) or not command:
        raise InvalidRequest("a command is a list of words", remedy='such as ["sh", "-c", "ls /data"]')
    return command


__all__ = ["GENERATED", "DiskSpec", "SCSIMount", "UtilityVM", "VMConfig"]
