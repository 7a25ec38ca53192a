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
EXEC_TIMEOUT: Final = 124  # `uvm exec`, which passes on the program's own codes
EXEC_FAILED: Final = 125
EXEC_NOT_EXECUTABLE: Final = 126
EXEC_NOT_FOUND: Final = 127
INTERRUPTED: Final = 130

HELP: Final = """\b
Exit codes:
  0    Done
  1    Refused by the hypervisor or the guest, or another error
  2    Wrong usage: an unknown option, an invalid value, or no command
  3    No such VM, disk, reservation, program or template
  4    Busy: in use by another process, VM or disk
  5    No answer in time; the outcome is unknown
  6    This machine lacks something, or the store cannot be used
  7    The VM is not running
  8    A disk image is damaged or unsafe, or a template is damaged
  130  Interrupted

\b
`uvm exec` passes on the exit code of the program. Its own are:
  124  The program did not end within --timeout, and was killed
  125  uvm failed
  126  The program cannot be executed
  127  The program was not found
  128+N  Signal N killed the program
"""

# The first that fits.
TABLE: Final[tuple[tuple[type[errors.UtilityVMError], int], ...]] = (
    (errors.VMNotFound, NOT_FOUND),
    (errors.NotAttached, NOT_FOUND),
    (errors.TemplateNotFound, NOT_FOUND),
    (errors.AlreadyReleased, NOT_FOUND),
    (errors.ProgramNotFound, NOT_FOUND),
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
