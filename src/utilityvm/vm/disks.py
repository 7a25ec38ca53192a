"""The disks of a VM, as its owner's callers have them: `UtilityVM.add_scsi` and its like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal, Unpack, overload

from utilityvm.errors import UtilityVMError, bound
from utilityvm.machine.hostpath import HostPath, identity_of, identity_within
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.events import ScsiEvents
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S
from utilityvm.scsi.migration import ScsiState
from utilityvm.scsi.mount_config import MountSettings, ScratchKey
from utilityvm.scsi.ports import DiskFormat
from utilityvm.scsi.reservation import ForceArgument, Reservation
from utilityvm.scsi.views import MountView, SlotView
from utilityvm.vm import naming, scratch
from utilityvm.vm.acquiring import Acquiring, acquires
from utilityvm.vm.arguments import checked, each, timed
from utilityvm.vm.config import GENERATED, DiskSettings, DiskSpec, GuestPath, SomeGuestPath, spelled_out
from utilityvm.vm.face import Face
from utilityvm.vm.mount import MountedDisk, OnBusy, SCSIMount, mounted
from utilityvm.vm.owned import holder_of


@typed_errors
class VMDisks(Face):
    """The part of `UtilityVM` that adds and removes disks, and says which there are."""

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

        Without a guest path the disk is only attached, and nothing is asked of the guest. With `GENERATED` utilityvm
        chooses the guest path. A disk that is already attached is shared, and so is a mount with the same settings. If
        this fails, what only this call needed is undone.

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
        with bound(host_path=item.disk.host_path):
            reservation = await self._vm.scsi.add(
                item.disk, mount=item.mount, guest_path=item.guest_path, holder=holder_of(holder), timeout_s=timeout_s
            )
        return mounted(self, reservation, on_busy=on_busy)

    @acquires
    @timed
    async def add_scratch(
        self,
        size_bytes: int,
        guest_path: SomeGuestPath = GENERATED,
        *,
        filesystem: str | None = None,
        options: Sequence[str] = (),
        encryption: ScratchKey | None = None,
        untrusted: bool = False,
        holder: str | None = None,
        on_busy: OnBusy = "raise",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> MountedDisk:
        """Make an empty disk of this size, with a file system, mounted at `guest_path`.

        The image is the VM's own, in the state folder. It takes space as it is written to, and is removed when the disk
        is released for the last time, or with the VM. A template that is saved of the VM has the disk as it is then.

        `filesystem` is `ext4`, the default, or `xfs`. The rest is as in `add_scsi`. If this fails no image is left.

        Raises:
            InvalidRequest: the size is no multiple of 512, or too small or large; or another value is wrong.
            SetupError: no space, or no right, in the state folder.
            GuestRefused: the guest cannot make such a file system in that size; the message has the reason.
            others: as `add_scsi`.
        """
        self._vm.check()
        scratch.check_size(size_bytes)
        async with scratch.Making(self._vm, size_bytes) as image:
            spec = DiskSpec(
                host_path=image,
                guest_path=guest_path,
                format=DiskFormat.RAW,
                ensure_filesystem=True,
                filesystem=filesystem,
                options=options,
                encryption=encryption,
                untrusted=untrusted,
            )
            made = await self.add(spec, holder=holder, on_busy=on_busy, timeout_s=timeout_s)
        assert isinstance(made, MountedDisk)
        return made

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

        `host_path` is any name of the disk, as in `find_scsi`. A guest path stands for the reservations of its mount.

        `force`, and what is returned, are those of `SCSIMount.release`. A disk that nobody has a reservation of any
        more, because an undo failed, is taken out.

        Raises:
            NotAttached: it is not attached, or `holder` has no reservation on it.
            others: as `SCSIMount.release`.
        """
        self._vm.check()
        disk, guest_path = self._named(host_path, await identity_within(host_path, timeout_s))
        try:
            with bound(slot=disk.slot, host_path=disk.host_path):
                return await self._vm.scsi.remove(
                    disk.host_path,
                    identity=disk.identity,
                    guest_path=guest_path,
                    holder=holder,
                    force=force,
                    timeout_s=timeout_s,
                )
        finally:
            await scratch.tidy(self._vm)

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
        try:
            return await self._vm.scsi.remove_many(ids, force=force, timeout_s=timeout_s)
        finally:
            await scratch.tidy(self._vm)

    @timed
    async def release(
        self, reservation: Reservation | str, *, force: ForceArgument = False, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> str | None:
        """Give back a reservation, also one that this object did not make. See `SCSIMount.release`."""
        self._vm.check()
        try:
            return await self._vm.scsi.release(reservation, force=force, timeout_s=timeout_s)
        finally:
            await scratch.tidy(self._vm)

    @timed
    async def resize_scsi(self, host_path: HostPath, size_bytes: int, *, timeout_s: float | None = None) -> None:
        """Grow the disk, its image, and the file systems that are mounted from all of it.

        `host_path` is any name of the disk, as in `find_scsi`.

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
        disk, _ = self._named(host_path, await identity_within(host_path, timeout_s))
        with bound(slot=disk.slot, host_path=disk.host_path):
            await self._vm.scsi.resize(disk.host_path, size_bytes, identity=disk.identity, timeout_s=timeout_s)

    @timed
    async def find_scsi(self, host_path: HostPath, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> SlotView:
        """The disk of that name, as `scsi_slots` has it.

        A disk's names are every path of its image; the path by which it was attached, if no file is there any more; its
        guest paths; and in a clone the path that it has in the template.

        Raises:
            NotAttached: no disk has that name.
            InvalidRequest: it is a path of one disk's image, and the guest path of another.
        """
        self._vm.check()
        return self._named(host_path, await identity_within(host_path, timeout_s))[0]

    def _named(self, name: HostPath, identity: str | None) -> tuple[SlotView, PurePosixPath | None]:
        return naming.find(self._vm.scsi.slots(), name, identity, aliases=self._vm.aliases, vm=self.name)

    @checked
    def scsi_guest_path(self, host_path: HostPath) -> PurePosixPath | None:
        """Where the disk of that name is mounted in the guest; None if it is attached only. See `find_scsi`.

        Raises:
            NotAttached, InvalidRequest: as `find_scsi`.
        """
        self._vm.check()
        disk, guest_path = self._named(host_path, identity_of(host_path))
        return guest_path or self._vm.scsi.guest_path(disk.host_path, identity=disk.identity)

    def scsi_slots(self) -> list[SlotView]:
        """Every slot that a disk has, in order; the VM's own root disk is not among them."""
        self._vm.check_here()
        return self._vm.scsi.slots()

    def scsi_mounts(self) -> list[MountView]:
        """Every mount in the guest, in the order of slots."""
        self._vm.check_here()
        return self._vm.scsi.mounts()

    def scsi_reservations(self) -> list[SCSIMount]:
        """Every reservation that is held, whichever process made it; the oldest first."""
        self._vm.check_here()
        return [mounted(self, reservation) for reservation in self._vm.scsi.reservations()]

    def scsi_events(self) -> ScsiEvents:
        """What happens to disks and mounts from this call on. The iteration ends when the VM ends, or is closed."""
        self._vm.check_here()
        return self._vm.scsi.events()

    @timed
    async def export_scsi_state(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ScsiState:
        """Export disks, mounts and reservations as a document, for the owner of the VM, or one like it, after a move.

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
