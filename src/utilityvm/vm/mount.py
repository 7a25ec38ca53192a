"""SCSIMount: one reservation of a disk, as its caller has it in hand."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from utilityvm.errors import UtilityVMError, VMGone, VMNotRunning
from utilityvm.log import logger
from utilityvm.scsi.manager import DEFAULT_TIMEOUT_S
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot

if TYPE_CHECKING:
    from utilityvm.vm.utility_vm import UtilityVM

_log = logger(__name__)


class SCSIMount:
    """One reservation of a disk of a VM, mounted in its guest unless it was asked for without a guest path.

    Leaving `async with` gives it back, unless that was done inside.
    """

    def __init__(self, vm: UtilityVM, reservation: Reservation) -> None:
        """Use `UtilityVM.add_scsi`."""
        self._vm = vm
        self._reservation = reservation
        self._released = False

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
    def ref_count(self) -> int:
        """How many reservations there are on the disk now; 0 when this one was given back."""
        return self._vm.scsi.references(self._reservation)

    async def release(self, *, force: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Give it back. The last one of a mount unmounts it; the last one of a disk ejects and detaches it.

        After a failure it is still there; release it again, and that goes on with the step that failed. If the guest
        still uses it nothing was done, and it is held as before; `force` unmounts and ejects it all the same.

        Raises:
            AlreadyReleased: it was given back before.
            GuestBusy, GuestRefused, HostRefused, OutcomeUnknown: a step failed; nothing after it was done.
            DeadlineExceeded: not done within `timeout_s` seconds; it goes on in the background.
            VMGone, VMNotRunning: the VM died, or was stopped; the disk is free by that.
        """
        await self._vm.release(self._reservation, force=force, timeout_s=timeout_s)
        self._released = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._released:
            return
        try:
            await self.release()
        except (VMGone, VMNotRunning):
            return  # the disk is free by that
        except UtilityVMError as failure:
            if error is None:
                raise
            # The block's own error is the one to tell; the disk stays visible in scsi_slots.
            _log.warning("not released: %s", failure, host_path=self.host_path, slot=self.slot)

    def __repr__(self) -> str:
        at = f" at {self.guest_path}" if self.guest_path else ""
        return f"<SCSIMount {self.id}: {self.host_path} in {self.slot}{at}>"
