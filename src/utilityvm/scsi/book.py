"""Who has what: the slots, disks, mounts, guest paths and claims of one VM. Pure bookkeeping; nothing here waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath

from utilityvm.errors import AlreadyAttached, GuestPathInUse, NoFreeSlot, NotAttached
from utilityvm.scsi.disk import Disk
from utilityvm.scsi.ledger import Ledger
from utilityvm.scsi.mount import GENERATED_BELOW, Mount, check_beside, difference, same_mount, without_reformat
from utilityvm.scsi.ports import (
    CallerKey,
    DiskRecord,
    DiskRequest,
    Holder,
    MountConfig,
    MountRecord,
    OpenDisk,
    Record,
    ReservationRecord,
)
from utilityvm.scsi.reservation import NOBODY, Claim, Force
from utilityvm.scsi.slot import FreeSlots, Slot
from utilityvm.scsi.transitions import WAITING, DiskState, Event, MountState, ReservationState


class Book:
    """The manager's book. What it changes it notes in the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        controllers: int,
        reserved: Mapping[Slot, str],
        check: Callable[[Slot, MountConfig | None], None],
        checked_path: Callable[[PurePosixPath], PurePosixPath],
        new_id: Callable[[], str],
        clock: Callable[[], float],
        vm: str | None,
    ) -> None:
        """`check` refuses what the guest cannot express at a slot, and `checked_path` spells a path as the guest does.

        `reserved` are slots that are never handed out.
        """
        self._ledger = ledger
        self._reserved = dict(reserved)
        self._check = check
        self._checked_path = checked_path
        self._new_id = new_id
        self._clock = clock
        self.vm = vm
        self.free = FreeSlots(controllers, reserved=self._reserved)
        self.disks: dict[str, Disk] = {}  # by identity
        self.paths: dict[PurePosixPath, Mount] = {}
        self.claims: dict[str, Claim] = {}

    def unreserve(self, slot: Slot) -> None:
        if self._reserved.pop(slot, None) is not None:
            self.free.give_back(slot)

    def in_order(self) -> list[Disk]:
        """The disks in the order of their slots."""
        return sorted(self.disks.values(), key=lambda disk: disk.slot)

    def has(self, disk: Disk) -> bool:
        """Not if it was forgotten, also if the same disk is here again."""
        return self.disks.get(disk.identity) is disk

    def find(self, host_path: str, identity: str | None) -> Disk:
        # What the path leads to now comes first: another file may have taken the name of one that is attached.
        if identity is not None and (found := self.disks.get(identity)):
            return found
        for disk in self.disks.values():
            if disk.request.host_path == host_path:
                return disk
        raise NotAttached(f"{host_path} is not attached", vm=self.vm, host_path=host_path)

    def claim(
        self,
        request: DiskRequest,
        opened: OpenDisk,
        config: MountConfig | None,
        path: PurePosixPath | None,
        holder: Holder,
        *,
        id: str | None = None,
    ) -> Claim:
        """Enter a claim, all of it or nothing. From here to the first step nothing waits, so nothing comes between.

        Raises:
            AlreadyAttached: there is a reservation of that id.
        """
        now, id = self._clock(), id or self._new_id()
        if id in self.claims:
            raise AlreadyAttached(f"there is a reservation {id} already", vm=self.vm, host_path=request.host_path)
        disk = self.disks.get(opened.identity)
        if disk is not None:
            disk.check_same(request, opened)
            mount = self._share_or_make_mount(disk, config, path, now)
        else:
            disk = self._new_disk(request, opened, now)
            try:
                self._check(disk.slot, config)
                mount = self._share_or_make_mount(disk, config, path, now)
            except BaseException:
                self.free.give_back(disk.slot)
                raise
            self.disks[disk.identity] = disk
        if mount is not None and mount.id not in disk.mounts:
            disk.mounts[mount.id] = mount
            self.paths[mount.guest_path] = mount
        if disk.opened is None and disk.state is not DiskState.ATTACHED:
            disk.opened = opened
        elif disk.opened is not opened:
            opened.close()
        claim = Claim(id, disk, mount, holder, now, reformat=config is not None and config.reformat)
        self.claims[claim.id] = claim
        disk.claims[claim.id] = claim
        if mount is not None:
            mount.claims[claim.id] = claim
        return claim

    def _new_disk(self, request: DiskRequest, opened: OpenDisk, now: float) -> Disk:
        try:
            slot = self.free.take_lowest()
        except NoFreeSlot:
            raise self._full(request) from None
        return Disk(
            self._new_id(), slot, request, opened.identity, opened.format, opened.size_bytes, now, opened=opened
        )

    def _full(self, request: DiskRequest) -> NoFreeSlot:
        lines = [f"{slot}: {what} (reserved)" for slot, what in sorted(self._reserved.items())]
        for disk in self.in_order():
            holders = ", ".join(claim.holder.name for claim in disk.claims.values()) or "nobody"
            lines.append(f"{disk.slot}: {disk.request.host_path} ({disk.state}, held by {holders})")
        capacity = self.free.capacity
        return NoFreeSlot(
            f"attach {request.host_path}: no free slot ({capacity} of {capacity} used)",
            holders=lines,
            vm=self.vm,
            host_path=request.host_path,
            remedy="release a disk that is not needed any more; the error's holders say who has what",
        )

    def _share_or_make_mount(
        self, disk: Disk, config: MountConfig | None, path: PurePosixPath | None, now: float
    ) -> Mount | None:
        if config is None:
            return None
        for mount in disk.mounts.values():
            if same_mount(mount.config, config) and path in (None, mount.guest_path):
                return mount
        if path is not None and (taken := self.paths.get(path)):
            differing = (
                f", mounted otherwise than with {difference(taken.config, config)}" if taken.disk is disk else ""
            )
            raise GuestPathInUse(
                f"guest path {path} is in use by {taken.disk.request.host_path} at {taken.disk.slot}{differing}",
                vm=self.vm,
                slot=taken.disk.slot,
                remedy="choose another, or release that one first",
            )
        for mount in disk.mounts.values():
            where = f"{disk.request.host_path} at {mount.guest_path}"
            check_beside(mount.config, config, where=where)
        path = path or self._generated_path(disk.slot, config.partition)
        return Mount(self._new_id(), disk, path, without_reformat(config), now)

    def _generated_path(self, slot: Slot, partition: int) -> PurePosixPath:
        base = self._checked_path(GENERATED_BELOW / f"{slot.controller}_{slot.lun}_{partition}")
        path, number = base, 1
        while path in self.paths:
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        return path

    def drop_claim(self, claim: Claim) -> None:
        """The claim could not be met: it is as if it had never been."""
        claim.disk.claims.pop(claim.id, None)
        if claim.mount is not None:
            claim.mount.claims.pop(claim.id, None)
        self.claims.pop(claim.id, None)

    def take_back(self, claim: Claim) -> None:
        """Its release was refused before anything was done: it is held as before."""
        disk, mount = claim.disk, claim.mount
        del disk.leaving[claim.id]
        if claim.holder is NOBODY:
            self.claims.pop(claim.id, None)
            self._ledger.note([], [claim.record()])
            return
        claim.state, claim.force = ReservationState.HELD, Force.NO
        disk.claims[claim.id] = claim
        if mount is not None:
            mount.claims[claim.id] = claim
        self._ledger.note([claim.record()])

    def give_back(self, claim: Claim, *, force: Force) -> None:
        """From here on the claim wants nothing. `force`: so its release says."""
        disk, mount = claim.disk, claim.mount
        claim.force = force
        if claim.state is ReservationState.RELEASING:
            self._ledger.note([claim.record()])
            return
        disk.claims.pop(claim.id, None)
        if mount is not None:
            mount.claims.pop(claim.id, None)
        claim.was_held = claim.state is ReservationState.HELD
        claim.state = ReservationState.RELEASING
        disk.leaving[claim.id] = claim
        self._ledger.note([claim.record()])

    def claim_of_nobody(self, disk: Disk) -> Claim:
        """A claim for who takes out a disk that was left behind: an undo failed, and no reservation of it is left."""
        claim = Claim(self._new_id(), disk, None, NOBODY, self._clock(), ReservationState.RELEASING, was_held=True)
        self.claims[claim.id] = disk.leaving[claim.id] = claim
        return claim

    def renew(self, disk: Disk) -> None:
        """It is wanted again: as a new attachment, in the slot that it has."""
        old: list[Record] = [disk.record(), *(mount.record() for mount in disk.mounts.values())]
        disk.id, disk.overruled = self._new_id(), None
        disk.state = disk.after(Event.WANTED)
        claims = [claim.record() for claim in (*disk.claims.values(), *disk.leaving.values())]
        self._ledger.note([disk.record(), *(mount.record() for mount in disk.mounts.values()), *claims], old[:1])

    def forget_disk(self, disk: Disk) -> None:
        """Nothing of it is left: the slot is free."""
        disk.close_opened()
        for mount in list(disk.mounts.values()):  # asked for, and never mounted: the disk did not come so far
            mount.state = mount.after(Event.UNUSED)
            self.forget_mount(mount)
        del self.disks[disk.identity]
        self.free.give_back(disk.slot)
        self._ledger.note([], [disk.record()])

    def forget_mount(self, mount: Mount) -> None:
        """Nothing of it is left: the guest path is free."""
        del mount.disk.mounts[mount.id]
        del self.paths[mount.guest_path]
        self._ledger.note([], [mount.record()])

    def restore(self, records: Iterable[Record], is_alive: Callable[[Holder], bool]) -> list[str]:
        findings: list[str] = []
        disks: dict[str, Disk] = {}
        mounts: dict[str, Mount] = {}
        for record in records:
            if isinstance(record, DiskRecord):
                disks[record.attachment] = self._restored_disk(record, findings)
            elif isinstance(record, MountRecord):
                if (disk := disks.get(record.attachment)) is None:
                    self._ledger.note([], [record])
                    continue
                mounts[record.mount] = self._restored_mount(record, disk, findings)
            else:
                self._restore_claim(record, disks, mounts, is_alive, findings)
        return findings

    def _restored_disk(self, record: DiskRecord, findings: list[str]) -> Disk:
        request = DiskRequest(
            host_path=record.host_path,
            read_only=record.read_only,
            kind=record.kind,
            format=record.format,
            access=record.access,
            sector_size_bytes=record.sector_size_bytes,
        )
        disk = Disk(
            record.attachment, record.slot, request, record.identity, record.format, record.size_bytes, record.since
        )
        disk.state = DiskState(record.state)
        if disk.state in WAITING:
            findings.append(f"{record.host_path} at {record.slot} was {disk.state}")
            disk.state = disk.after(Event.NO_ANSWER)
        self.free.take(disk.slot)
        self.disks[disk.identity] = disk
        return disk

    def _restored_mount(self, record: MountRecord, disk: Disk, findings: list[str]) -> Mount:
        # A record, or a template, that an earlier version wrote may still say `reformat`; its caller is gone.
        config = without_reformat(record.config)
        mount = Mount(record.mount, disk, record.guest_path, config, record.since)
        mount.notes = record.notes
        mount.state = MountState(record.state)
        if mount.state in (MountState.MOUNTING, MountState.UNMOUNTING):
            findings.append(f"{disk.request.host_path} at {mount.guest_path} was {mount.state}")
            mount.state = mount.after(Event.NO_ANSWER)
        disk.mounts[mount.id] = mount
        self.paths[mount.guest_path] = mount
        return mount

    def _restore_overruling(
        self, record: ReservationRecord, disk: Disk, mount: Mount | None, findings: list[str]
    ) -> None:
        """The owner before was taking the disk away from a guest that would not let go. That is gone on with.

        The guest may use a mount that the journal does not know any more, so nobody else can have the disk.
        """
        state = ReservationState.RELEASING
        claim = Claim(record.reservation, disk, mount, record.holder, record.since, state, was_held=True)
        claim.force = Force.HOST
        self.claims[claim.id] = disk.leaving[claim.id] = claim
        findings.append(f"{disk.request.host_path} at {disk.slot} was being taken away whatever the guest says")

    def _restore_claim(
        self,
        record: ReservationRecord,
        disks: Mapping[str, Disk],
        mounts: Mapping[str, Mount],
        is_alive: Callable[[Holder], bool],
        findings: list[str],
    ) -> None:
        disk = disks.get(record.attachment)
        mount = mounts.get(record.mount) if record.mount else None
        if disk is not None and record.state == ReservationState.OVERRULING:
            self._restore_overruling(record, disk, mount, findings)
            return
        whole = disk is not None and (record.mount is None or mount is not None)
        if not whole or record.state != ReservationState.HELD or not is_alive(record.holder):
            if record.state == ReservationState.HELD:
                findings.append(f"reservation {record.reservation} of {record.holder.name} was given back: it is dead")
            self._ledger.note([], [record])
            return
        assert disk is not None
        claim = Claim(record.reservation, disk, mount, record.holder, record.since, ReservationState.HELD)
        self.claims[claim.id] = claim
        disk.claims[claim.id] = claim
        if mount is not None:
            mount.claims[claim.id] = claim
            lost_key = isinstance(mount.config.encryption, CallerKey) and mount.state is not MountState.MOUNTED
            if lost_key:
                self.drop_claim(claim)
                self._ledger.note([], [record])
                findings.append(f"{mount.guest_path} cannot be mounted again: its key was not kept")
