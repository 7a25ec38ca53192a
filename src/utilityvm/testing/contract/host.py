"""What every host backend does: a disk comes on the bus, and goes, and every refusal has its type."""

from __future__ import annotations

from utilityvm.errors import (
    AlreadyAttached,
    DeadlineExceeded,
    DiskInUse,
    HostRefused,
    InvalidRequest,
    NotAttached,
    NotSupported,
)
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest
from utilityvm.scsi.slot import Slot
from utilityvm.testing.contract.check import NotTried, refused
from utilityvm.testing.contract.vm import SOON, ContractVM, T, attach, together

SLOT, NEXT, LAST = Slot(0, 1), Slot(0, 2), Slot(3, 63)


async def an_attached_disk_is_there_and_a_detached_one_is_not(vm: ContractVM) -> None:
    for slot in (SLOT, LAST):
        name = await vm.attach(vm.image(), slot)
        assert await vm.probe(slot, name)
        await vm.take_away(slot, name)
        assert not await vm.probe(slot, name)


async def what_was_never_attached_is_not_there_and_is_detached_already(vm: ContractVM) -> None:
    assert not await vm.probe(SLOT, "never")
    await vm.detach(SLOT, "never")
    assert not await vm.probe(SLOT, "never")


async def detaching_twice_is_detaching_once(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.eject(SLOT)
    await vm.detach(SLOT, name)
    await vm.detach(SLOT, name)
    assert not await vm.probe(SLOT, name)


async def detaching_twice_at_once_takes_nothing_else_away(vm: ContractVM) -> None:
    name, other = await vm.attach(vm.image("a"), SLOT), await vm.attach(vm.image("b"), NEXT)
    await vm.eject(SLOT)
    await together(vm.detach(SLOT, name) for _ in range(2))
    assert not await vm.probe(SLOT, name)
    assert await vm.probe(NEXT, other)
    await vm.take_away(NEXT, other)


async def an_attachment_is_known_by_its_name_and_not_by_its_slot(vm: ContractVM) -> None:
    first = await vm.attach(vm.image("a"), SLOT)
    await vm.take_away(SLOT, first)
    second = await vm.attach(vm.image("b"), SLOT)
    assert not await vm.probe(SLOT, first)
    await vm.detach(SLOT, first)  # a late retry
    assert await vm.probe(SLOT, second)
    await vm.take_away(SLOT, second)


async def a_slot_holds_one_disk(vm: ContractVM) -> None:
    first = await vm.attach(vm.image("a"), SLOT)
    with refused(AlreadyAttached):
        await vm.attach(vm.image("b"), SLOT, "second")
    assert await vm.probe(SLOT, first)
    assert not await vm.probe(SLOT, "second")
    await vm.take_away(SLOT, first)


async def a_name_has_one_disk(vm: ContractVM) -> None:
    name = await vm.attach(vm.image("a"), SLOT)
    with refused(AlreadyAttached):
        await vm.attach(vm.image("b"), NEXT, name)
    assert await vm.probe(SLOT, name)
    await vm.take_away(SLOT, name)
    again = await vm.attach(vm.image("c"), NEXT)
    await vm.take_away(NEXT, again)


async def a_slot_that_does_not_exist_is_refused(vm: ContractVM) -> None:
    for slot in [Slot(4, 0), Slot(0, 64), Slot(-1, 0), Slot(0, -1)]:
        with refused(InvalidRequest):
            await vm.attach(vm.image(), slot, "a")
        assert not await vm.probe(slot, "a")


async def many_disks_come_and_go_side_by_side(vm: ContractVM) -> None:
    slots = [Slot(number % 4, 10 + number) for number in range(12)]
    names = await together(vm.attach(vm.image(str(slot)), slot) for slot in slots)
    assert await together(map(vm.probe, slots, names)) == [True] * 12
    await together(map(vm.take_away, slots, names))
    assert await together(map(vm.probe, slots, names)) == [False] * 12


async def a_disk_that_is_not_there_is_refused_by_name(vm: ContractVM) -> None:
    path = vm.missing()
    with refused(InvalidRequest) as caught:
        await vm.host.open(DiskRequest(host_path=path, read_only=True))
    assert str(caught.value.host_path) == path


async def what_is_no_path_is_refused(vm: ContractVM) -> None:
    for path in ["", "/a\0b"]:
        with refused(InvalidRequest):
            await vm.host.open(DiskRequest(host_path=path, read_only=True))


async def a_file_is_no_physical_disk(vm: ContractVM) -> None:
    request = DiskRequest(host_path=vm.image(), read_only=True, kind=AttachmentType.PASS_THRU)
    with refused(InvalidRequest):
        await vm.host.open(request)


async def opening_looks_and_attaches_nothing(vm: ContractVM) -> None:
    path = vm.image()
    one = await vm.host.open(DiskRequest(host_path=path, read_only=False))
    two = await vm.host.open(DiskRequest(host_path=path, read_only=True))
    assert one.identity == two.identity
    assert one.size_bytes == two.size_bytes > 0
    assert isinstance(one.format, DiskFormat)
    for disk in (one, two, one):
        disk.close()


async def what_was_opened_may_be_closed_when_it_is_attached(vm: ContractVM) -> None:
    disk = await vm.host.open(DiskRequest(host_path=vm.image(), read_only=False))
    await vm.host.attach(SLOT, disk, attachment="closed", timeout_s=T)
    disk.close()
    assert await vm.probe(SLOT, "closed")
    await vm.take_away(SLOT, "closed")


async def a_disk_of_another_kind_of_host_is_refused(vm: ContractVM) -> None:
    class Foreign:
        identity, format, size_bytes = "x", DiskFormat.RAW, 1

        def close(self) -> None: ...

    with refused(InvalidRequest):
        await vm.host.attach(SLOT, Foreign(), attachment="a", timeout_s=T)
    assert not await vm.probe(SLOT, "a")


async def a_second_writer_in_the_same_vm_is_refused(vm: ContractVM) -> None:
    path = vm.image()
    first = await vm.attach(path, SLOT)
    for read_only in (False, True):
        with refused(DiskInUse):
            await vm.attach(path, NEXT, "second", read_only=read_only)
        assert not await vm.probe(NEXT, "second")
    await vm.take_away(SLOT, first)


async def two_vms_share_a_disk_only_to_read(vm: ContractVM) -> None:
    for here, there, both in [(True, True, True), (True, False, False), (False, True, False), (False, False, False)]:
        path = vm.image()
        name = await vm.attach(path, SLOT, read_only=here)
        async with vm.other_vm() as other:
            if both:
                await attach(other, path, SLOT, "other", read_only=there)
                await other.detach(SLOT, attachment="other", timeout_s=T)
            else:
                with refused(DiskInUse):
                    await attach(other, path, SLOT, "other", read_only=there)
                assert not await other.probe(SLOT, attachment="other", timeout_s=T)
            await vm.take_away(SLOT, name)
            await attach(other, path, SLOT, "later", read_only=there)
            assert await other.probe(SLOT, attachment="later", timeout_s=T)
            await other.detach(SLOT, attachment="later", timeout_s=T)


async def after_an_attach_without_an_answer_the_probe_tells_the_truth(vm: ContractVM) -> None:
    disk = await vm.host.open(DiskRequest(host_path=vm.image(), read_only=False))
    with vm.silence(), refused(DeadlineExceeded):
        await vm.host.attach(SLOT, disk, attachment="late", timeout_s=SOON)
    assert await vm.probe(SLOT, "late"), "it was sent, so it was done once there was somebody to do it"
    disk.close()
    await vm.take_away(SLOT, "late")


async def a_detach_without_an_answer_may_be_sent_again(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.eject(SLOT)
    with vm.silence(), refused(DeadlineExceeded):
        await vm.detach(SLOT, name, timeout_s=SOON)
    await vm.detach(SLOT, name)
    assert not await vm.probe(SLOT, name)


async def after_a_detach_without_an_answer_the_probe_tells_the_truth(vm: ContractVM) -> None:
    name = await vm.attach(vm.image(), SLOT)
    await vm.eject(SLOT)
    with vm.silence(), refused(DeadlineExceeded):
        await vm.detach(SLOT, name, timeout_s=SOON)
    assert not await vm.probe(SLOT, name)


async def a_disk_grows_or_the_host_says_that_it_cannot(vm: ContractVM) -> None:
    path = vm.image()
    name = await vm.attach(path, SLOT)
    before = await _size(vm, path)
    if vm.grows:
        await vm.host.resize(SLOT, attachment=name, size_bytes=before * 2, timeout_s=T)
        assert await _size(vm, path) == before * 2
        for error, slot, attachment, size_bytes in (
            (InvalidRequest, SLOT, name, before * 2 + 1),
            (NotAttached, NEXT, "never", before * 4),
        ):
            with refused(error):
                await vm.host.resize(slot, attachment=attachment, size_bytes=size_bytes, timeout_s=T)
    else:
        with refused(NotSupported):
            await vm.host.resize(SLOT, attachment=name, size_bytes=before * 2, timeout_s=T)
        assert await _size(vm, path) == before
    await vm.take_away(SLOT, name)


async def a_read_only_disk_does_not_grow(vm: ContractVM) -> None:
    path = vm.image()
    name = await vm.attach(path, SLOT, read_only=True)
    before = await _size(vm, path)
    with refused(NotSupported):
        await vm.host.resize(SLOT, attachment=name, size_bytes=before * 2, timeout_s=T)
    assert await _size(vm, path) == before
    await vm.take_away(SLOT, name)


async def a_disk_that_somebody_else_made_larger_is_not_cut(vm: ContractVM) -> None:
    if not vm.grows:
        raise NotTried("this host sets no disk to a size")
    path = vm.image()
    name = await vm.attach(path, SLOT)
    before = await _size(vm, path)
    vm.grow_outside(path, before * 4)
    with refused(HostRefused):
        await vm.host.resize(SLOT, attachment=name, size_bytes=before * 2, timeout_s=T)
    assert await _size(vm, path) == before * 4
    assert await vm.host.resize(SLOT, attachment=name, size_bytes=before * 4, timeout_s=T) == before * 4
    assert await _size(vm, path) == before * 4
    await vm.take_away(SLOT, name)


async def a_disk_never_gets_smaller(vm: ContractVM) -> None:
    if not vm.grows:
        raise NotTried("this host grows no disk, and so shrinks none")
    path = vm.image()
    name = await vm.attach(path, SLOT)
    before = await _size(vm, path)
    assert await vm.host.resize(SLOT, attachment=name, size_bytes=before * 2, timeout_s=T) == before * 2
    for smaller in (before * 2, before, 512):
        assert await vm.host.resize(SLOT, attachment=name, size_bytes=smaller, timeout_s=T) == before * 2
        assert await vm.host.size(SLOT, attachment=name, timeout_s=T) == before * 2
    assert await _size(vm, path) == before * 2
    vm.forgive()  # a manager asks for no smaller size
    await vm.take_away(SLOT, name)


async def the_size_is_told_by_the_name_of_the_attachment_or_cannot_be_asked_for(vm: ContractVM) -> None:
    path = vm.image()
    name = await vm.attach(path, SLOT)
    if vm.grows:
        assert await vm.host.size(SLOT, attachment=name, timeout_s=T) == await _size(vm, path)
        with refused(NotAttached):
            await vm.host.size(SLOT, attachment="never", timeout_s=T)
    else:
        with refused(NotSupported):
            await vm.host.size(SLOT, attachment=name, timeout_s=T)
    await vm.take_away(SLOT, name)


async def _size(vm: ContractVM, path: str) -> int:
    disk = await vm.host.open(DiskRequest(host_path=path, read_only=True))
    disk.close()
    return disk.size_bytes
