"""Strays: disks and mounts in a VM that no journal knows, as after the store was lost."""

from __future__ import annotations

from pathlib import PurePosixPath

from utilityvm.scsi.mount_config import MountConfig
from utilityvm.scsi.slot import Slot
from utilityvm.vm.owned import OwnedVM


async def remove_strays(vm: OwnedVM, *, timeout_s: float) -> list[str]:
    """Take out of the VM what no journal knows; says what, a line each. `timeout_s` is for each step.

    Raises:
        GuestBusy: something in the guest uses it; it stays, and so does what was to come after it.
        GuestRefused, HostRefused, OutcomeUnknown: a step failed; call again.
    """
    vm.check()
    done: list[str] = []
    known = {mount.guest_path for mount in vm.scsi.mounts()}
    for mount in await vm.guest.mounts(timeout_s=timeout_s):
        path, slot = PurePosixPath(str(mount["MountPath"])), Slot(mount["Controller"], mount["Lun"])
        if path not in known:
            config = MountConfig(partition=mount["Partition"])
            await vm.guest.unmount(slot, config, guest_path=path, timeout_s=timeout_s, force=False)
            done.append(f"{path} was mounted from slot {slot}, and no journal knew it: unmounted")
    taken = {view.attachment for view in vm.scsi.slots()}
    for one in await vm.host.attachments(timeout_s=timeout_s):
        if one.attachment not in taken:
            await vm.guest.eject(one.slot, timeout_s=timeout_s, force=False)
            await vm.host.detach(one.slot, attachment=one.attachment, timeout_s=timeout_s)
            vm.scsi.unreserve(one.slot)
            done.append(f"slot {one.slot} had a disk that no journal knew: detached")
    return done
