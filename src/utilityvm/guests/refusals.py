"""A guest's no, as the error that its caller acts on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestRefused,
    InvalidRequest,
    OutcomeUnknown,
    UtilityVMError,
)
from utilityvm.guests.answers import Response
from utilityvm.scsi.slot import Slot

_BUSY: Final = "device or resource busy"  # Go's text of EBUSY, which is all that gcs says


@dataclass(frozen=True, slots=True)
class Where:
    """What a request is about, for its error."""

    slot: Slot
    guest_path: PurePosixPath | None = None

    def __str__(self) -> str:
        return f"{self.slot} at {self.guest_path}" if self.guest_path else str(self.slot)


def refusal(response: Response, where: Where | None, *, vm: str | None) -> UtilityVMError:
    """The error for a response whose result is not 0.

    InvalidRequest, GuestBusy and GuestRefused: nothing was changed. DeadlineExceeded and OutcomeUnknown: the guest
    itself does not know how it ended.
    """
    said = response.error_message or f"HRESULT {response.result & 0xFFFFFFFF:#010x}"
    text = f"{where}: {said}" if where else said
    slot = where.slot if where else None
    advice = response.remedy
    match response.kind:
        case "busy":
            remedy = "end what uses it, or force it"
            return GuestBusy(text, holders=response.holders, vm=vm, slot=slot, remedy=remedy)
        case "invalid":
            return InvalidRequest(text, vm=vm, slot=slot, remedy=advice)
        case "no_filesystem":
            remedy = "have one made: ensure_filesystem (--ensure-filesystem), which writes to a blank disk only"
            return GuestRefused(text, vm=vm, slot=slot, remedy=advice or remedy)
        case "timeout":
            return DeadlineExceeded(text, vm=vm, slot=slot)
        case "unknown":
            return OutcomeUnknown(text, vm=vm, slot=slot)
        case None if said.endswith(_BUSY):
            return GuestBusy(text, vm=vm, slot=slot, remedy="end what uses it")
        case None if "context deadline exceeded" in said:
            # Go's text: gcs gave up in the middle, and does not say where.
            return DeadlineExceeded(text, vm=vm, slot=slot)
    error = GuestRefused(text, vm=vm, slot=slot, remedy=advice)
    error.kind = response.kind
    return error
