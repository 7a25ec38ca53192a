"""The manager on every pair of backends: what it promises is true on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest

from utilityvm.errors import (
    AlreadyReleased,
    ConfigDiffers,
    DeadlineExceeded,
    DiskInUse,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
)
from utilityvm.scsi.manager import AddRequest, ScsiManager
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.testing import MemoryJournal
from utilityvm.testing.contract import ContractVM
from utilityvm.testing.contract.vm import T

ME = Holder(name="me")
PATH, OTHER = PurePosixPath("/run/mounts/one"), PurePosixPath("/run/mounts/two")
SOON = 0.5  # for an add of which the guest does its part, and no more


class Managed:
    """A manager on one of the VMs."""

    def __init__(self, vm: ContractVM) -> None:
        self.vm = vm
        self.journal = MemoryJournal()
        self.manager = vm.manager(self.journal)

    async def add(
        self,
        disk: str,
        at: PurePosixPath | None = PATH,
        *,
        read_only: bool = False,
        mount: MountConfig | None = None,
        timeout_s: float = T,
    ) -> Reservation:
        """Mounted `at`; attached only, if that is None."""
        mount = mount or MountConfig(read_only=read_only)
        return await self.manager.add(
            DiskRequest(host_path=disk, read_only=read_only),
            mount=mount if at else None,
            guest_path=at,
            holder=ME,
            timeout_s=timeout_s,
        )

    async def release(self, *held: Reservation) -> None:
        for one in held:
            await self.manager.release(one, timeout_s=T)

    async def is_empty(self) -> bool:
        return not (await self.vm.left() or self.manager.slots() or self.journal.records)

    def new_owner(self) -> ScsiManager:
        self.journal = self.journal.copy()
        self.manager = self.vm.manager(self.journal)
        return self.manager

    @property
    def references(self) -> list[int]:
        return [view.references for view in self.manager.slots()]


@pytest.fixture
def managed(vm: ContractVM) -> Managed:
    return Managed(vm)


async def test_an_added_disk_is_mounted_and_a_released_one_is_gone(managed: Managed) -> None:
    held = await managed.add(managed.vm.image())
    assert (held.slot, held.guest_path) == (Slot(0, 1), PATH)
    assert await managed.vm.probe_mount(held.slot, PATH)
    await managed.release(held)
    assert await managed.is_empty()
    with pytest.raises(AlreadyReleased):
        await managed.release(held)


async def test_a_disk_is_shared_until_its_last_release(managed: Managed) -> None:
    disk = managed.vm.image()
    one, two, three = await managed.add(disk), await managed.add(disk), await managed.add(disk, None)
    assert one.slot == two.slot == three.slot
    assert managed.references == [3]
    await managed.release(one, three)
    assert await managed.vm.probe_mount(two.slot, PATH)
    await managed.release(two)
    assert await managed.is_empty()


async def test_a_second_path_is_a_second_mount_and_goes_by_itself(managed: Managed) -> None:
    disk = managed.vm.image()
    one, two = await managed.add(disk, PATH), await managed.add(disk, OTHER)
    assert one.slot == two.slot
    assert await managed.vm.probe_mount(one.slot, OTHER)
    await managed.release(one)
    assert not await managed.vm.probe_mount(two.slot, PATH)
    assert await managed.vm.probe_mount(two.slot, OTHER)
    await managed.release(two)
    assert await managed.is_empty()


async def test_everybody_who_waits_for_an_attach_shares_it(managed: Managed) -> None:
    disk = managed.vm.image()
    held = await asyncio.gather(*(managed.add(disk) for _ in range(5)))
    assert {one.slot for one in held} == {Slot(0, 1)}
    assert managed.references == [5]
    results = await managed.manager.remove_many(held, timeout_s=T)
    assert results == [None] * 5
    assert await managed.is_empty()


async def test_an_add_whose_mount_fails_is_undone(managed: Managed) -> None:
    disk = managed.vm.image(blank=True)
    with pytest.raises(GuestRefused):
        await managed.add(disk)
    await managed.manager.settle()
    assert await managed.is_empty()
    looks = managed.vm.looks_before_it_formats
    made = MountConfig(ensure_filesystem=True, filesystem="ext4", reformat=not looks)
    await managed.release(await managed.add(disk, mount=made))
    await managed.release(await managed.add(disk))
    assert await managed.is_empty()


async def test_a_mount_that_fails_takes_nothing_from_those_who_have_the_disk(managed: Managed) -> None:
    disk = managed.vm.image(blank=True)
    attached = await managed.add(disk, None)
    with pytest.raises(GuestRefused):
        await managed.add(disk)
    assert managed.references == [1]
    assert not managed.manager.mounts()
    await managed.release(attached)
    assert await managed.is_empty()


async def test_an_add_whose_attach_fails_is_undone(managed: Managed) -> None:
    disk = managed.vm.image()
    async with managed.vm.other_vm() as other:
        opened = await other.open(DiskRequest(host_path=disk, read_only=False))
        await other.attach(Slot(0, 9), opened, attachment="theirs", timeout_s=T)
        opened.close()
        with pytest.raises(DiskInUse):
            await managed.add(disk)
        await other.detach(Slot(0, 9), attachment="theirs", timeout_s=T)
        assert await managed.is_empty()
    await managed.release(await managed.add(disk))
    assert await managed.is_empty()


async def test_requests_that_cannot_be_met_change_nothing(managed: Managed) -> None:
    disk, second = managed.vm.image("a"), managed.vm.image("b")
    held = await managed.add(disk)
    before = managed.manager.slots()
    for error, path, at, read_only in (
        (ConfigDiffers, disk, PATH, True),
        (GuestPathInUse, second, PATH, False),
        (InvalidRequest, managed.vm.missing(), OTHER, False),
        (InvalidRequest, second, PurePosixPath("relative"), False),
        (InvalidRequest, second, PurePosixPath("/proc/x"), False),
    ):
        with pytest.raises(error):
            await managed.add(path, at, read_only=read_only)
    assert managed.manager.slots() == before
    await managed.release(held)
    assert await managed.is_empty()


async def test_a_disk_is_added_read_only_and_then_writable(managed: Managed) -> None:
    disk = managed.vm.image()
    for read_only in (True, False):
        held = await managed.add(disk, read_only=read_only)
        assert await managed.vm.probe_mount(held.slot, PATH)
        await managed.release(held)
    assert await managed.is_empty()


async def test_a_release_that_the_guest_refuses_goes_on_when_it_is_repeated(managed: Managed) -> None:
    held = await managed.add(managed.vm.image())
    async with managed.vm.in_use(PATH):
        with pytest.raises(GuestBusy):
            await managed.release(held)
        assert await managed.vm.probe_mount(held.slot, PATH)
    await managed.release(held)
    assert await managed.is_empty()


async def test_disks_come_and_go_in_batches(managed: Managed) -> None:
    requests = [
        AddRequest(
            disk=DiskRequest(host_path=managed.vm.image(str(number)), read_only=number % 2 == 0),
            mount=MountConfig(),
            guest_path=PurePosixPath(f"/run/mounts/{number}"),
        )
        for number in range(8)
    ]
    results = await managed.manager.add_many(requests, holder=ME, timeout_s=T)
    held = [one for one in results if isinstance(one, Reservation)]
    assert sorted(one.slot for one in held) == [Slot(0, number) for number in range(1, 9)]
    assert await managed.manager.remove_many(held, timeout_s=T) == [None] * 8
    assert await managed.is_empty()


async def test_an_add_that_is_not_answered_in_time_is_undone_behind_it(managed: Managed) -> None:
    disk = managed.vm.image()
    with managed.vm.silence(), pytest.raises(DeadlineExceeded):
        await managed.add(disk, timeout_s=SOON)
    await managed.manager.settle()
    assert await managed.is_empty()
    await managed.release(await managed.add(disk))
    assert await managed.is_empty()


async def test_a_cancelled_add_is_undone(managed: Managed) -> None:
    for turns in (0, 1, 3, 10, 100):
        adding = asyncio.create_task(managed.add(managed.vm.image()))
        for _ in range(turns):
            await asyncio.sleep(0)
        adding.cancel()
        for held in await _results([adding]):
            await managed.release(held)
        await managed.manager.settle()
        assert await managed.is_empty()


async def test_a_new_owner_has_what_the_last_one_had(managed: Managed) -> None:
    disk = managed.vm.image()
    one, two = await managed.add(disk, PATH), await managed.add(disk, OTHER)
    assert await managed.new_owner().restore(is_alive=lambda holder: True) == []
    assert {held.id for held in managed.manager.reservations()} == {one.id, two.id}
    await managed.release(one)
    assert await managed.vm.probe_mount(two.slot, OTHER)
    await managed.release(two)
    assert await managed.is_empty()


async def test_a_new_owner_takes_away_what_a_dead_one_held(managed: Managed) -> None:
    await managed.add(managed.vm.image())
    findings = await managed.new_owner().restore(is_alive=lambda holder: False)
    assert len(findings) == 1
    assert await managed.is_empty()


async def _results(tasks: Iterable[asyncio.Task[Reservation]]) -> list[Reservation]:
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [one for one in done if isinstance(one, Reservation)]
