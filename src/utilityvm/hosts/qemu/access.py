"""What a VM needs of the host before it gets a disk: the right to it, and our lock on it.

Everything here asks the disk's storage and blocks for as long as that does, so it is done in threads.
"""

from __future__ import annotations

import grp
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from utilityvm.errors import AccessDenied, DiskInUse, SetupError
from utilityvm.hosts.qemu import acl
from utilityvm.hosts.qemu.disk import Locked, QemuDisk, WhoUses, open_disk, unlock
from utilityvm.hosts.qemu.format import FormatMemory
from utilityvm.machine.programs import CommandFailed, find_program, run
from utilityvm.scsi.ports import DiskRequest, VMAccess

FrozenBy: TypeAlias = Callable[[int], str | None]  # a disk's descriptor -> the template that is made of it, if one is


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A disk that is open and locked for one attachment: the owner of `fd` closes it, or gives it all back."""

    fd: int
    locks: bool  # False: its file system has none, and QEMU is not to ask for one either
    before: acl.Before | None  # the file's rights before it was opened to the VMs' group

    def give_back(self) -> None:
        """Nothing of it is left: not the right, and not the lock either if QEMU keeps the file open."""
        try:
            unlock(self.fd)
            if self.before:
                acl.restore(self.fd, self.before)
        finally:
            os.close(self.fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Opens disks for one VM."""

    vm: str
    uid: int  # whom its QEMU runs as
    vm_group: str
    who_uses: WhoUses | None
    frozen_by: FrozenBy | None
    memory: FormatMemory | None = None

    def open(self, request: DiskRequest) -> QemuDisk:
        """Open and check a disk. Besides what `open_disk` refuses:

        Raises:
            AccessDenied: VMAccess.NOOP, and the VM's QEMU has no right of its own to the file.
            SetupError: VMAccess.GROUP, and the group does not exist.
        """
        if request.access is VMAccess.GROUP:
            self._group()
        disk = open_disk(request, memory=self.memory)
        if request.access is VMAccess.NOOP and self.uid != os.geteuid():
            try:
                _check_own_right(request, self.uid)
            except BaseException:
                disk.close()
                raise
        return disk

    def take(self, fd: int, disk: QemuDisk) -> Taken:
        """Lock the disk behind `fd`, and give the right that was asked for. Nothing changed if this fails.

        Raises:
            DiskInUse: another VM holds it in a way that forbids this, or a template is made of it.
            AccessDenied: the right cannot be given, or that of this process was taken away.
            NotSupported: its file system cannot lock, and it is to be written.
        """
        try:
            fd, locked = disk.open_locked(fd, who_uses=self.who_uses)
        except DiskInUse:
            self._check_not_frozen(disk)  # then the template says it better than a lock of its clones does
            raise
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            # With our lock held: a save holds that lock until its template is visible.
            self._check_not_frozen(disk)
            before = self._grant(fd, disk.request) if disk.request.access is VMAccess.GROUP else None
            undo.pop_all()
        return Taken(fd=fd, locks=locked is not Locked.NOWHERE, before=before)

    def _check_not_frozen(self, disk: QemuDisk) -> None:
        if disk.request.read_only or self.frozen_by is None:
            return
        if (template := self.frozen_by(disk.fd)) is not None:
            raise DiskInUse(
                f"{disk.request.host_path}: template {template} is made of it, and its clones would see it change",
                vm=self.vm,
                host_path=disk.request.host_path,
                remedy=f"attach it read-only, or remove the template: uvm template rm {template}",
            )

    def _group(self) -> int:
        try:
            return grp.getgrnam(self.vm_group).gr_gid
        except KeyError as error:
            raise SetupError(
                f"there is no group {self.vm_group}, to which the disk could be opened",
                vm=self.vm,
                remedy=f"groupadd --system {self.vm_group}; or attach with VMAccess.INDIVIDUAL, which needs none",
            ) from error

    def _grant(self, fd: int, request: DiskRequest) -> acl.Before | None:
        try:
            return acl.grant(fd, self._group(), acl.READ if request.read_only else acl.READ | acl.WRITE)
        except OSError as error:
            raise AccessDenied(
                f"{request.host_path}: group {self.vm_group} cannot be given access: {error.strerror}",
                vm=self.vm,
                host_path=request.host_path,
                remedy="attach with VMAccess.INDIVIDUAL, which changes no file",
            ) from error


def _check_own_right(request: DiskRequest, uid: int) -> None:
    """May `uid` open the path by itself? The kernel is asked, in a process of that user."""
    setpriv = find_program("setpriv", package="util-linux")
    as_user: list[str | Path] = [
        setpriv,
        f"--reuid={uid}",
        f"--regid={uid}",
        "--clear-groups",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ]
    tests = ["-r", request.host_path] + ([] if request.read_only else ["-a", "-w", request.host_path])
    try:
        run([*as_user, "test", *tests])
    except CommandFailed as error:
        raise AccessDenied(
            f"{request.host_path}: this VM (user {uid}) may not open it by itself",
            host_path=request.host_path,
            remedy="attach with VMAccess.INDIVIDUAL, which needs no right of the VM's own",
        ) from error
