"""Every error that utilityvm raises.

::

    UtilityVMError               .vm .slot .host_path  where · .remedy  what to do next · __cause__  why
    ├── RequestError             cannot be met as asked; nothing was sent, nothing changed
    │   ├── InvalidRequest       a value is wrong by itself: a relative guest path, an unknown option
    │   │   └── DiskNotFound     no file is at the host path
    │   ├── NoFreeSlot           every slot is taken; .holders says by what
    │   ├── NoControllers        the VM has no SCSI controller
    │   ├── TooManyAttachments   more than a fixed limit: controllers, LUNs, mounts of one disk
    │   ├── NotAttached          no disk of that path or reservation is attached
    │   ├── AlreadyAttached      the slot or the disk is taken, where an empty one was needed
    │   ├── AlreadyReleased      this reservation was given back before
    │   ├── ConfigDiffers        the disk is attached with other settings
    │   ├── GuestPathInUse       another mount holds the guest path
    │   ├── DiskInUse            another VM, or the host itself, uses the disk
    │   ├── AccessDenied         we, or the VM, have no right to the disk's file
    │   ├── NotSupported         this host, guest or disk cannot express the request
    │   ├── VMNotFound           no VM of that name
    │   ├── VMExists             the name is taken
    │   ├── VMNotRunning         the VM is stopped, or its hypervisor is gone
    │   ├── VMOwned              another process owns the VM; .owner says which
    │   ├── ProgramNotFound      the guest keeps no program of that number
    │   ├── TemplateNotFound     no template of that name
    │   ├── TemplateExists       the name is taken
    │   ├── TemplateInUse        clones or templates depend on it; .users says which
    │   ├── TemplateDiffers      it was saved with another QEMU or processor
    │   ├── Migrating            the disks must stay as they are: an export, or saving a template, is under way
    │   ├── WrongLoop            the VM belongs to another event loop, or thread
    │   └── WrongState           the event does not fit the state of the thing
    ├── SetupError               something this machine needs is missing: a program, an image, space
    ├── HostRefused              the hypervisor said no; the bus is as it was
    ├── GuestRefused             the guest said no; the disk is still attached
    │   └── GuestBusy            the guest still uses the disk; .holders says who
    ├── ProgramFailed            a program that had to succeed did not; .exit_code .stdout .stderr say how
    ├── OutcomeUnknown           sent, and no answer came; the next step probes first
    │   └── DeadlineExceeded     the caller's time was up first
    ├── VMGone                   the VM died; its disks are free
    ├── StartFailed              the VM did not come up, and was removed; .console has its last lines
    ├── ProtocolError            a peer broke its own rules (QMP, bridge, QGA); .message holds what it said
    ├── UnsafePath               what the guest sent would lead out of the destination; nothing outside was touched
    ├── ImageError               a disk image cannot be used
    │   ├── ImageDamaged         it is not what its header says, or is cut short
    │   └── ImageUnsafe          it would make the hypervisor open something that was not asked for
    ├── TemplateDamaged          a file of a template, or a disk under it, is not what was saved
    └── StoreError               the journal would not take a line; an intent unwritten is a step unsent
        ├── StoreTooNew          a later version of utilityvm wrote the store
        └── StoreDamaged         the store was not whole and was moved aside; .kept says where

A kind is something that a caller does differently; all else is a field. A traceback shows the remedy as well.

Where it happened (`.vm`, `.slot`, `.host_path`) is told once, by whoever knows it: what the raising line did not say is
filled in on the way out, by `bound`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utilityvm.scsi.slot import Slot


class UtilityVMError(Exception):
    """The root of every error that utilityvm raises on purpose."""

    def __init__(
        self,
        message: str,
        *,
        vm: str | None = None,
        slot: Slot | None = None,
        host_path: Path | str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.vm = vm
        self.slot = slot
        self.host_path = None if host_path is None else Path(host_path)
        self.remedy = remedy
        if remedy:
            self.add_note(f"hint: {remedy}")  # for whoever reads the traceback

    def fill(
        self, *, vm: str | None = None, slot: Slot | None = None, host_path: Path | str | None = None
    ) -> UtilityVMError:
        """Say where it happened, as far as that is not said yet. Gives the error."""
        self.vm = self.vm or vm
        if not isinstance(self, (VMGone, VMNotRunning)):  # they are of no disk, and one may be told to many callers
            self.slot = self.slot if self.slot is not None else slot
            self.host_path = self.host_path or (None if host_path is None else Path(host_path))
        return self


@contextmanager
def bound(*, vm: str | None = None, slot: Slot | None = None, host_path: Path | str | None = None) -> Iterator[None]:
    """Errors that leave the block say where they happened. See `UtilityVMError.fill`."""
    try:
        yield
    except UtilityVMError as error:
        error.fill(vm=vm, slot=slot, host_path=host_path)
        raise


class RequestError(UtilityVMError):
    """The request cannot be met as asked. Nothing was sent and nothing changed."""


class InvalidRequest(RequestError):
    """A value of the request is wrong whatever the VM's state is."""


class DiskNotFound(InvalidRequest):
    """No file is at the host path."""


class NoFreeSlot(RequestError):
    """Every slot is taken (hcsshim: `ErrNoAvailableLocation`); `holders` has a line for each."""

    def __init__(
        self,
        message: str,
        *,
        holders: Sequence[str] = (),
        vm: str | None = None,
        host_path: Path | str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, vm=vm, host_path=host_path, remedy=remedy)
        self.holders = tuple(holders)


class NoControllers(RequestError):
    """The VM has no SCSI controller (hcsshim: `ErrNoSCSIControllers`)."""


class TooManyAttachments(RequestError):
    """A fixed limit is exceeded (hcsshim: `ErrTooManyAttachments`)."""


class NotAttached(RequestError):
    """No such disk or reservation is attached (hcsshim: `ErrNotAttached`)."""


class AlreadyAttached(RequestError):
    """Something is attached where nothing may be (hcsshim: `ErrAlreadyAttached`)."""


class AlreadyReleased(RequestError):
    """The reservation was given back before; the count was not touched again."""


class ConfigDiffers(RequestError):
    """The disk is attached with settings that the request contradicts; the message names both."""


class GuestPathInUse(RequestError):
    """Another mount holds the guest path."""


class DiskInUse(RequestError):
    """Another VM, or the host itself, uses the disk."""


class AccessDenied(RequestError):
    """We, or the VM, have no right to the disk's file."""


class NotSupported(RequestError):
    """This hypervisor, guest or disk cannot express the request."""


class VMNotFound(RequestError):
    """No VM of that name is known."""


class VMExists(RequestError):
    """A VM of that name is known already."""


class VMNotRunning(RequestError):
    """The VM is stopped, or its hypervisor process is gone."""


class VMOwned(RequestError):
    """Another process owns the VM; `owner` names it."""

    def __init__(self, message: str, *, owner: str = "", vm: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message, vm=vm, remedy=remedy)
        self.owner = owner


class ProgramNotFound(RequestError):
    """The guest keeps no program of that number: it was forgotten, made room for newer ones, or never was."""


class TemplateNotFound(RequestError):
    """No template of that name."""


class TemplateExists(RequestError):
    """The name is taken by another template."""


class TemplateInUse(RequestError):
    """Clones or templates depend on the template; `users` names them."""

    def __init__(
        self, message: str, *, users: Sequence[str] = (), vm: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message, vm=vm, remedy=remedy)
        self.users = tuple(users)


class TemplateDiffers(RequestError):
    """The template was made with another QEMU, processor or guest image than there is now. It stays as it is."""


class TemplateDamaged(UtilityVMError):
    """A file of the template, or a disk under it, is not what was saved. Nothing was started from it."""


class Migrating(RequestError):
    """The VM's disks must stay as they are: its manager's state was exported, or it is being saved as a template."""


class WrongLoop(RequestError):
    """The VM belongs to the event loop that started or opened it; the call came from another one, or another thread."""


class WrongState(RequestError):
    """The event does not fit the state that the disk or the mount is in."""


class SetupError(UtilityVMError):
    """This machine lacks something: a program, a right, an image, space. `remedy` says what to do."""


class HostRefused(UtilityVMError):
    """The hypervisor said no. The bus is as it was."""


class GuestRefused(UtilityVMError):
    """The guest said no. The disk is still attached and nothing in the guest changed.

    `kind` is the agent's word for why, if it has one: "not_found", "refused", ….
    """

    kind: str | None = None


class GuestBusy(GuestRefused):
    """The guest still uses the disk; `holders` names the processes, mounts and devices that do."""

    def __init__(
        self,
        message: str,
        *,
        holders: Sequence[str] = (),
        vm: str | None = None,
        slot: Slot | None = None,
        host_path: Path | str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, vm=vm, slot=slot, host_path=host_path, remedy=remedy)
        self.holders = tuple(holders)


class ProgramFailed(UtilityVMError):
    """A program ran with `check=True` and ended with another code than 0; negative for the signal that killed it."""

    def __init__(
        self,
        message: str,
        *,
        exit_code: int,
        stdout: bytes | str = b"",
        stderr: bytes | str = b"",
        vm: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, vm=vm, remedy=remedy)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class OutcomeUnknown(UtilityVMError):
    """The request was sent and no answer came. The truth is probed before the next step."""


class DeadlineExceeded(OutcomeUnknown):
    """The caller's deadline passed first. What was begun is finished or undone in the background.

    Of a program that was run and killed, `stdout` and `stderr` have what it had written by then.
    """

    stdout: bytes = b""
    stderr: bytes = b""


class VMGone(UtilityVMError):
    """The VM died: its hypervisor process ended or its connection broke for good."""


class StartFailed(UtilityVMError):
    """The VM did not come up. Nothing of it is left; `console` has the last lines that it wrote."""

    def __init__(
        self, message: str, *, console: Sequence[str] = (), vm: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message, vm=vm, remedy=remedy)
        self.console = tuple(console)


class ProtocolError(UtilityVMError):
    """A peer broke the rules of its protocol; `message` holds what it sent, cut to a sane length."""

    def __init__(self, text: str, *, message: object = None, vm: str | None = None, remedy: str | None = None) -> None:
        super().__init__(text, vm=vm, remedy=remedy)
        self.message = message


class UnsafePath(UtilityVMError):
    """A name or a link that the guest sent leads out of the destination. It was not made."""


class ImageError(UtilityVMError):
    """A disk image cannot be used as asked."""


class ImageDamaged(ImageError):
    """The image is not what its header says, is cut short, or is of a kind that we do not read."""


class ImageUnsafe(ImageError):
    """The image would make the hypervisor open something that nobody asked for."""


class StoreError(UtilityVMError):
    """The journal would not take a line. An intent that is not written is a step that is not sent."""


class StoreTooNew(StoreError):
    """A later version of utilityvm wrote the store; it was not touched."""


class StoreDamaged(StoreError):
    """The store was not whole. It was moved aside, unchanged, to `kept`; the next call goes on with a new one."""

    def __init__(self, message: str, *, kept: Path, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.kept = kept
