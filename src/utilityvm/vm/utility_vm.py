"""UtilityVM: the face of one VM, from its start to its end. What it does is in the modules beside it.

Here is its life. The calls for its disks are in `disks`, and those for programs in its guest in `programs`.

A VM has one owner at a time: the process that started it, or opened it after that one let go or died. The owner's
object is this. With `keep` the VM outlives it; without, the VM ends with it, however the owner ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Self

from utilityvm.errors import InvalidRequest, UtilityVMError, bound
from utilityvm.guestimage.build import GuestImage
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost, QemuProcess
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.slot import Slot
from utilityvm.store import Store
from utilityvm.tasks import Deadline
from utilityvm.templates.catalog import Template
from utilityvm.vm import clone as cloning
from utilityvm.vm import end
from utilityvm.vm import open as opening
from utilityvm.vm import save as saving
from utilityvm.vm import start as starting
from utilityvm.vm.acquiring import acquires
from utilityvm.vm.arguments import checked
from utilityvm.vm.config import DiskSpec, VMConfig
from utilityvm.vm.disks import VMDisks
from utilityvm.vm.files import VMFiles
from utilityvm.vm.lifecycle import BOOT_S, SHUTDOWN_S
from utilityvm.vm.owned import OwnedVM
from utilityvm.vm.programs import VMPrograms

CLONE_S: Final = 60.0
SAVE_S: Final = 120.0
OPEN_S: Final = 60.0


@typed_errors
class UtilityVM(VMDisks, VMPrograms, VMFiles):
    """A running utility VM that this process owns. Made by `start` and `open`; for the event loop that made it."""

    def __init__(self, vm: OwnedVM) -> None:
        """Use `start`, `clone` or `open`."""
        super().__init__(vm)
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
        with bound(vm=config.name):
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
        with bound(vm=name):
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
        with bound(vm=name):
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
        with bound(vm=name):
            if not isinstance(force, bool):
                raise InvalidRequest(f"force {force!r} is for disks", remedy="give True to kill the VM")
            return await end.remove(name, wait_s=wait_s, force=force, timeout_s=timeout_s)

    # What it is.

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
    def _host(self) -> QemuHost:
        return self._vm.host

    @property
    def _guest(self) -> BridgeGuest:
        return self._vm.guest

    @property
    def _store(self) -> Store:
        return self._vm.store

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
        async with Deadline(timeout_s).limit(f"VM {self.name} did not end"):
            reason = await asyncio.shield(self._host.gone)
        await self._host.logged()
        return reason

    @checked
    async def stop(self, *, timeout_s: float = SHUTDOWN_S) -> list[str]:
        """End the VM: the guest writes out everything and powers off, or is killed after `timeout_s` seconds.

        True on return: no process, socket, lock or record of it is left; its disks are free. Stopped before: no error.
        The result says what the guest left unwritten, and whether it was killed, a line each; it is empty otherwise.

        Raises:
            OutcomeUnknown: the kernel does not let QEMU go; call again.
            StoreError: it has ended, and the store keeps its record; call again.
        """
        self._vm.check_here()
        return await end.stop(self._vm, timeout_s=timeout_s)

    @checked
    async def close(self, *, timeout_s: float = SHUTDOWN_S) -> None:
        """Let go of the VM. With `keep` it runs on, and another process can open it; without, it is stopped.

        Work in the background is waited for, for some seconds; the next owner continues the rest of it.
        Calling it again is no error.
        """
        self._vm.check_here()
        await end.close(self._vm, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<UtilityVM {self.name}: {'running' if self.is_running else 'ended'}>"
