"""SCSIMount: one reservation of a disk, as its caller has it in hand."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from utilityvm.errors import AlreadyReleased, GuestBusy, NotAttached, UtilityVMError, VMGone, VMNotRunning
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S
from utilityvm.scsi.reservation import ForceArgument, Reservation
from utilityvm.scsi.slot import Slot

if TYPE_CHECKING:
    from utilityvm.vm.disks import VMDisks

OnBusy: TypeAlias = Literal["raise", "force"]  # what leaving `async with` does if the guest still uses the disk


@typed_errors
class SCSIMount:
    """One reservation of a disk of a VM, mounted in its guest unless it was asked for without a guest path.

    Leaving `async with` gives it back, unless that was done inside, by whatever call. If the guest still uses it then,
    `GuestBusy` is raised, or it is released by force, as `on_busy` of the call that made it says. If the block failed,
    its error is raised, and has a note that says what is still attached.
    """

    def __init__(self, vm: VMDisks, reservation: Reservation, *, on_busy: OnBusy = "raise") -> None:
        """Use `UtilityVM.add_scsi`."""
        self._vm = vm
        self._reservation = reservation
        self._on_busy: OnBusy = on_busy

    @property
    def id(self) -> str:
        """The reservation's name, which `uvm detach` takes as well."""
        return self._reservation.id

    @property
    def host_path(self) -> Path:
        return Path(self._reservation.host_path)

    @property
    def guest_path(self) -> PurePosixPath | None:
        """Where it is mounted in the guest; None: it is attached only."""
        return self._reservation.guest_path

    @property
    def slot(self) -> Slot:
        return self._reservation.slot

    @property
    def controller(self) -> int:
        return self._reservation.slot.controller

    @property
    def lun(self) -> int:
        return self._reservation.slot.lun

    @property
    def read_only(self) -> bool:
        return self._reservation.read_only

    @property
    def holder(self) -> str:
        return self._reservation.holder.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of its mount, a sentence each: that it is read-only, as its file system cannot be
        written to; that a journal was replayed; that the disk's partition table lacks its backup.

        The guest says it when the disk is mounted. It is journalled, so that a later owner of the VM has it too.
        """
        return self._reservation.notes

    @property
    def _where(self) -> dict[str, object]:
        """For the errors of its calls."""
        return {"slot": self.slot, "host_path": self.host_path}

    @property
    def ref_count(self) -> int:
        """How many reservations there are on the disk now; 0 when this one was given back."""
        return self._vm._scsi.references(self._reservation)

    async def release(self, *, force: ForceArgument = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> str | None:
        """Give it back. The last one of a mount unmounts it; the last one of a disk ejects and detaches it.

        If it fails and nothing was done, as when the guest still uses it, it is held as before. If something was done,
        release it again, and that goes on with the step that failed. `force` unmounts and ejects what is in use, and
        what can no longer be written out; a step by which others leave too is forced only if they asked for it as well.
        `force="host"` takes the disk from a guest that refuses even that, or does not answer, unless somebody else
        needs it. Its guest may still have a mount of what is gone, and what it had not written is lost.

        Returns what the guest said if the host took the disk away; None: the guest let go of it.

        Raises:
            AlreadyReleased: it was given back before.
            NotSupported: `force`, which this guest does not know; nothing changed.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown, StoreError: a step failed; nothing after it was done.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
            VMGone, VMNotRunning: the VM died, or was stopped; the disk is free by that.
        """
        return await self._vm.release(self._reservation, force=force, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                await self.release()
            except GuestBusy:
                if self._on_busy == "raise":
                    raise
                await self.release(force=True)
        except (AlreadyReleased, NotAttached):
            return  # by another call: of the VM, or of another owner
        except (VMGone, VMNotRunning):
            return  # the disk is free by that
        except UtilityVMError as failure:
            if error is None:
                raise
            # The block's own error is the one to raise, and this is what it left behind.
            remedy = f" ({failure.remedy})" if failure.remedy else ""
            error.add_note(f"{self.host_path} at {self.slot} was not released: {failure}{remedy}")

    def __repr__(self) -> str:
        at = f" at {self.guest_path}" if self.guest_path else ""
        return f"<SCSIMount {self.id}: {self.host_path} in {self.slot}{at}>"


class MountedDisk(SCSIMount):
    """A reservation that was asked for with a guest path, so that it has one."""

    @property
    def guest_path(self) -> PurePosixPath:
        """Where it is mounted in the guest."""
        path = self._reservation.guest_path
        assert path is not None, "made by `mounted`"
        return path


def mounted(vm: VMDisks, reservation: Reservation, *, on_busy: OnBusy = "raise") -> SCSIMount:
    """The reservation as its caller gets it."""
    kind = SCSIMount if reservation.guest_path is None else MountedDisk
    return kind(vm, reservation, on_busy=on_busy)
