"""What every guest backend does: mount, unmount and eject in every order, and every refusal has its type."""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath
from typing import Any

from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    RequestError,
)
from utilityvm.scsi.ports import MountConfig
from utilityvm.scsi.slot import Slot
from utilityvm.testing.contract.check import NotTried, refused
from utilityvm.testing.contract.vm import SOON, ContractVM, T, together

SLOT, NEXT = Slot(0, 1), Slot(2, 5)
PATH, OTHER = PurePosixPath("/run/mounts/one"), PurePosixPath("/run/mounts/two")


async def a_disk_is_mounted_unmounted_and_ejected(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    assert not await vm.probe_mount(SLOT, PATH)
    await vm.mount(SLOT, PATH)
    assert await vm.probe_mount(SLOT, PATH)
    assert await vm.probe_device(SLOT)
    await vm.unmount(SLOT, PATH)
    assert not await vm.probe_mount(SLOT, PATH)
    assert await vm.probe_device(SLOT)
    await vm.eject(SLOT)
    assert not await vm.probe_device(SLOT)
    assert await vm.probe(SLOT, name), "the host's part is the host's"
    await vm.detach(SLOT, name)


async def doing_twice_what_is_done_is_done(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.unmount(SLOT, PATH)  # was never mounted
    await vm.mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.eject(SLOT)
    await vm.eject(SLOT)
    await vm.unmount(SLOT, PATH)
    await vm.detach(SLOT, name)
    await vm.eject(SLOT)
    assert not await vm.probe_device(SLOT)


async def a_path_holds_one_mount(vm: ContractVM) -> None:
    one, two = await vm.attach(vm.image("a"), SLOT), await vm.attach(vm.image("b"), NEXT)
    await vm.mount(SLOT, PATH)
    for slot in (NEXT, SLOT):
        with refused(GuestPathInUse):
            await vm.mount(slot, PATH)
    assert await vm.probe_mount(SLOT, PATH)
    assert not await vm.probe_mount(NEXT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.mount(NEXT, PATH)
    assert await vm.probe_mount(NEXT, PATH)
    await vm.unmount(NEXT, PATH)
    await vm.take_away(SLOT, one)
    await vm.take_away(NEXT, two)


async def two_mounts_at_one_path_at_once_are_one_mount_and_one_refusal(vm: ContractVM) -> None:
    one, two = await vm.attach(vm.image("a"), SLOT), await vm.attach(vm.image("b"), NEXT)
    results = await asyncio.gather(vm.mount(SLOT, PATH), vm.mount(NEXT, PATH), return_exceptions=True)
    refused = [isinstance(result, GuestPathInUse) for result in results]
    assert sorted(refused) == [False, True], results
    assert not any(isinstance(result, BaseException) for result in results if not isinstance(result, GuestPathInUse))
    winner, loser = (NEXT, SLOT) if refused[0] else (SLOT, NEXT)
    assert await vm.probe_mount(winner, PATH)
    assert not await vm.probe_mount(loser, PATH)
    await vm.unmount(winner, PATH)
    await vm.take_away(SLOT, one)
    await vm.take_away(NEXT, two)


async def a_mount_is_not_unmounted_for_another_disk(vm: ContractVM) -> None:
    one, two = await vm.attach(vm.image("a"), SLOT), await vm.attach(vm.image("b"), NEXT)
    await vm.mount(SLOT, PATH)
    with refused(InvalidRequest):
        await vm.unmount(NEXT, PATH)
    assert await vm.probe_mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.take_away(SLOT, one)
    await vm.take_away(NEXT, two)


async def a_mounted_disk_is_not_ejected(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    await vm.mount(SLOT, OTHER)
    with refused(GuestBusy) as caught:
        await vm.eject(SLOT)
    assert any(str(PATH) in holder for holder in caught.value.holders)
    await vm.unmount(SLOT, PATH)
    with refused(GuestBusy) as caught:
        await vm.eject(SLOT)
    assert any(str(OTHER) in holder for holder in caught.value.holders)
    assert await vm.probe_mount(SLOT, OTHER)
    await vm.unmount(SLOT, OTHER)
    await vm.take_away(SLOT, name)


async def force_ejects_what_is_mounted_or_is_refused(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    if vm.knows_force:
        await vm.eject(SLOT, force=True)
        assert not await vm.probe_mount(SLOT, PATH)
        assert not await vm.probe_device(SLOT)
        await vm.detach(SLOT, name)
    else:
        with refused(NotSupported):
            await vm.eject(SLOT, force=True)
        assert await vm.probe_mount(SLOT, PATH)
        await vm.unmount(SLOT, PATH)
        await vm.take_away(SLOT, name)


async def a_mount_in_use_stays_until_it_is_free_or_forced(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    async with vm.in_use(PATH):
        with refused(GuestBusy) as caught:
            await vm.unmount(SLOT, PATH)
        if vm.is_asked:
            assert any("sleep" in holder for holder in caught.value.holders)
        assert await vm.probe_mount(SLOT, PATH)
        if vm.knows_force:
            await vm.unmount(SLOT, PATH, force=True)
            assert not await vm.probe_mount(SLOT, PATH)
        else:
            with refused(NotSupported):
                await vm.unmount(SLOT, PATH, force=True)
            assert await vm.probe_mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.take_away(SLOT, name)


async def force_is_taken_or_refused_before_anything_is_done(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    if vm.knows_force:
        vm.guest.check_force(SLOT)
    else:
        with refused(NotSupported) as caught:
            vm.guest.check_force(SLOT)
        assert caught.value.remedy, "it says what to do instead"
    assert await vm.probe_mount(SLOT, PATH), "asking does nothing"
    await vm.unmount(SLOT, PATH)
    await vm.take_away(SLOT, name)


async def a_disk_whose_storage_is_dead_goes_by_force_alone(vm: ContractVM) -> None:
    path = vm.image()
    name = await vm.attach(path, SLOT)
    try:
        vm.let_storage_die(path)
    except NotImplementedError:
        await vm.take_away(SLOT, name)
        raise NotTried("the storage of this VM cannot be made to die") from None
    await vm.mount(SLOT, PATH)
    with refused(GuestRefused):
        await vm.unmount(SLOT, PATH)
    assert await vm.probe_mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH, force=True)
    with refused(GuestRefused):
        await vm.eject(SLOT)
    assert await vm.probe_device(SLOT)
    await vm.eject(SLOT, force=True)
    assert not await vm.probe_device(SLOT)
    await vm.detach(SLOT, name)


async def a_read_only_disk_is_mounted_read_only_or_not_at_all(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT, read_only=True)
    if vm.falls_back:
        await vm.mount(SLOT, PATH)
        assert not await vm.can_write(PATH)
        await vm.unmount(SLOT, PATH)
    else:
        with refused(GuestRefused):
            await vm.mount(SLOT, PATH)
    assert not await vm.probe_mount(SLOT, PATH)
    await vm.mount(SLOT, PATH, read_only=True)
    assert await vm.probe_mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH, read_only=True)
    await vm.take_away(SLOT, name)


async def a_writable_disk_is_mounted_either_way(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    for read_only in (True, False):
        await vm.mount(SLOT, PATH, read_only=read_only)
        await vm.unmount(SLOT, PATH, read_only=read_only)
    await vm.take_away(SLOT, name)


async def a_refused_mount_leaves_nothing_and_may_be_tried_again(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(blank=True), SLOT)
    with refused(GuestRefused):
        await vm.mount(SLOT, PATH)
    assert not await vm.probe_mount(SLOT, PATH)
    made: dict[str, Any] = {"ensure_filesystem": True, "filesystem": "ext4", "reformat": not vm.looks_before_it_formats}
    await vm.mount(SLOT, PATH, **made)
    assert await vm.probe_mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH, **made)
    await vm.mount(SLOT, PATH)  # now it has one
    await vm.unmount(SLOT, PATH)
    await vm.take_away(SLOT, name)


async def no_disk_is_not_mounted(vm: ContractVM) -> None:
    if vm.waits_for_ever:
        raise NotTried("hcsshim's guest waits for ever for such a disk, so no client may ask for it")
    with refused(DeadlineExceeded):
        await vm.mount(SLOT, PATH, timeout_s=SOON)
    assert not await vm.probe_mount(SLOT, PATH)
    assert not await vm.probe_device(SLOT)


async def a_slot_that_does_not_exist_is_refused(vm: ContractVM) -> None:
    for slot in [Slot(4, 0), Slot(0, 64)]:
        with refused(InvalidRequest):
            vm.guest.check(slot, MountConfig())
        with refused(InvalidRequest):
            await vm.mount(slot, PATH)
        assert not await vm.probe_mount(SLOT, PATH)


async def a_disk_pulled_from_under_a_mount_leaves_a_mount_to_be_cleared(vm: ContractVM) -> None:
    """No manager does this. The path is not free by it, and the guest's steps still come to their end."""
    name = await vm.attach(vm.image(), SLOT, read_only=True)
    await vm.mount(SLOT, PATH, read_only=True)
    await vm.detach(SLOT, name)
    assert not await vm.probe(SLOT, name)
    vm.forgive()
    assert await vm.probe_mount(SLOT, PATH)
    if not vm.waits_for_ever:
        await vm.unmount(SLOT, PATH, read_only=True)
        assert not await vm.probe_mount(SLOT, PATH)
        await vm.eject(SLOT)
        assert not await vm.probe_device(SLOT)


async def a_disk_detached_before_it_was_ejected_is_ejected_by_that(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.detach(SLOT, name)
    vm.forgive()
    await vm.eject(SLOT)
    assert not await vm.probe_device(SLOT)


async def disks_that_were_hardly_there_are_not_in_the_way_of_the_next(vm: ContractVM) -> None:
    """Ejected before the guest noticed them, all at once, and others in their slots as soon as they are free."""
    slots = [Slot(1, lun) for lun in range(16)]
    paths = [vm.image(str(slot)) for slot in slots]

    async def come_and_go(path: str, slot: Slot) -> None:
        await vm.take_away(slot, await vm.attach(path, slot))

    async def stay(path: str, slot: Slot) -> None:
        at = PurePosixPath(f"/run/mounts/{slot.lun}")
        name = await vm.attach(path, slot)
        await vm.mount(slot, at)
        assert await vm.probe_mount(slot, at)
        await vm.unmount(slot, at)
        await vm.take_away(slot, name)

    await together(map(come_and_go, paths, slots))
    await together(map(stay, reversed(paths), slots))


async def a_path_where_nothing_can_be_mounted_is_refused(vm: ContractVM) -> None:
    for path in ["relative", "", "/run/mounts/../../etc", "/run/mounts/a\nb", "/", "/etc", "/usr/bin"]:
        with refused(RequestError):
            vm.guest.checked_path(PurePosixPath(path))


async def a_path_has_one_spelling(vm: ContractVM) -> None:
    for spelled in ("/run/mounts/one", "/run/mounts/one/", "/run//mounts/./one", "//run/mounts/one"):
        assert vm.guest.checked_path(PurePosixPath(spelled)) == PATH
    assert vm.guest.checked_path(vm.guest.checked_path(PATH)) == PATH


async def what_cannot_grow_is_told_before_the_disk_has_grown(vm: ContractVM) -> None:
    grown = 32 << 20
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    if vm.grows:
        await vm.guest.check_grow(SLOT, size_bytes=grown, timeout_s=T)
        other = await vm.attach(vm.vfat_image(), NEXT)
        await vm.mount(NEXT, OTHER, filesystem="vfat")
        with refused(GuestRefused):
            await vm.guest.check_grow(NEXT, size_bytes=grown, timeout_s=T)
        assert await vm.probe_mount(NEXT, OTHER), "asking changes nothing"
        await vm.unmount(NEXT, OTHER, filesystem="vfat")
        await vm.guest.check_grow(NEXT, size_bytes=grown, timeout_s=T)  # nothing of it is mounted
        await vm.take_away(NEXT, other)
    else:
        with refused(NotSupported):
            await vm.guest.check_grow(SLOT, size_bytes=grown, timeout_s=T)
    await vm.unmount(SLOT, PATH)
    await vm.take_away(SLOT, name)


async def the_next_disk_at_a_slot_is_another_disk(vm: ContractVM) -> None:
    for image in "ab":
        name = await vm.attach(vm.image(image), SLOT)
        assert not await vm.probe_mount(SLOT, PATH)
        await vm.mount(SLOT, PATH)
        await vm.unmount(SLOT, PATH)
        await vm.take_away(SLOT, name)


async def after_a_mount_without_an_answer_the_probe_tells_the_truth(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, OTHER)  # so the device is there
    with vm.silence():
        with refused(DeadlineExceeded):
            await vm.mount(SLOT, PATH, timeout_s=SOON)
        probing = asyncio.create_task(vm.probe_mount(SLOT, PATH))
        await asyncio.sleep(0)  # so it is sent, and comes to the guest right behind the mount
    found = await probing
    assert [await vm.probe_mount(SLOT, PATH) for _ in range(20)] == [found] * 20
    await vm.unmount(SLOT, PATH)
    assert not await vm.probe_mount(SLOT, PATH)
    await vm.mount(SLOT, PATH)
    await vm.unmount(SLOT, PATH)
    await vm.unmount(SLOT, OTHER)
    await vm.take_away(SLOT, name)


async def an_unmount_and_an_eject_without_an_answer_may_be_sent_again(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.mount(SLOT, PATH)
    with vm.silence(), refused(DeadlineExceeded):
        await vm.unmount(SLOT, PATH, timeout_s=SOON)
    await vm.unmount(SLOT, PATH)
    assert not await vm.probe_mount(SLOT, PATH)
    with vm.silence(), refused(DeadlineExceeded):
        await vm.eject(SLOT, timeout_s=SOON)
    await vm.eject(SLOT)
    assert not await vm.probe_device(SLOT)
    await vm.detach(SLOT, name)
