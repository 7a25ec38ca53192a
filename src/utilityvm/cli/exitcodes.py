"""What each error ends `uvm` with. A code is something that a script does differently."""

from __future__ import annotations

from typing import Final

from utilityvm import errors

OK: Final = 0
ERROR: Final = 1  # refused by the hypervisor or the guest, or anything else
USAGE: Final = 2
NOT_FOUND: Final = 3
BUSY: Final = 4
NO_ANSWER: Final = 5
SETUP: Final = 6
NOT_RUNNING: Final = 7
IMAGE: Final = 8
EXEC_FAILED: Final = 125  # `uvm exec` itself failed; the program's own codes are passed on
EXEC_NOT_STARTED: Final = 127
INTERRUPTED: Final = 130

# The first that fits.
TABLE: Final[tuple[tuple[type[errors.UtilityVMError], int], ...]] = (
    (errors.VMNotFound, NOT_FOUND),
    (errors.NotAttached, NOT_FOUND),
    (errors.TemplateNotFound, NOT_FOUND),
    (errors.AlreadyReleased, NOT_FOUND),
    (errors.VMNotRunning, NOT_RUNNING),
    (errors.VMGone, NOT_RUNNING),
    (errors.StartFailed, NOT_RUNNING),
    (errors.VMOwned, BUSY),
    (errors.VMExists, BUSY),
    (errors.TemplateExists, BUSY),
    (errors.TemplateInUse, BUSY),
    (errors.DiskInUse, BUSY),
    (errors.GuestBusy, BUSY),
    (errors.GuestPathInUse, BUSY),
    (errors.ConfigDiffers, BUSY),
    (errors.NoFreeSlot, BUSY),
    (errors.Migrating, BUSY),
    (errors.InvalidRequest, USAGE),
    (errors.OutcomeUnknown, NO_ANSWER),
    (errors.SetupError, SETUP),
    (errors.StoreError, SETUP),
    (errors.ImageError, IMAGE),
    (errors.TemplateDamaged, IMAGE),
    (errors.TemplateDiffers, SETUP),
    (errors.UtilityVMError, ERROR),
)


def code_of(error: errors.UtilityVMError) -> int:
    """What `uvm` ends with for this error."""
    return next(code for kind, code in TABLE if isinstance(error, kind))
