"""Any order of adds, releases and failures on HCS: nothing does harm, and in the end nothing is left."""

from __future__ import annotations

import contextlib
from pathlib import PurePosixPath

from hypothesis import given, settings
from hypothesis import strategies as st

from utilityvm.errors import UtilityVMError
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskRequest, Holder, MountConfig, VMAccess
from utilityvm.scsi.reservation import Reservation
from utilityvm.testing.fakes import Break, MemoryJournal
from utilityvm.testing.hcs import HcsWorld

ME = Holder(name="me")

ADDS = st.tuples(
    st.just("add"),
    st.integers(0, 2),  # which disk
    st.booleans(),  # read-only
    st.sampled_from([None, 0, 1]),  # mounted, and which partition
    st.sampled_from([None, "/run/mounts/a", "/run/mounts/b", "/opt/app", "/etc", "/run/mounts/a/below"]),
    st.sampled_from(VMAccess),
)
RELEASES = st.tuples(st.just("release"), st.integers(0, 5))
HOST_FAILURES = st.tuples(st.just("fail"), st.sampled_from(["attach", "detach"]), st.sampled_from(Break))
REFUSALS = st.tuples(
    st.just("fail"), st.sampled_from(["mount", "unmount", "eject", "grant", "revoke"]), st.just(Break.REFUSE)
)
# These guests cannot be asked what became of a request without an answer. So what then stays is not looked at.
GUEST_LOSSES = st.tuples(
    st.just("fail"),
    st.sampled_from(["mount", "unmount", "eject"]),
    st.sampled_from([Break.LOSE_REQUEST, Break.LOSE_ANSWER]),
)
ACTS = (ADDS, ADDS, ADDS, RELEASES, RELEASES)
STEPS = st.lists(st.one_of(*ACTS, HOST_FAILURES, REFUSALS), min_size=8, max_size=30)
LOSSES = st.lists(st.one_of(*ACTS, HOST_FAILURES, GUEST_LOSSES), min_size=8, max_size=30)


class VM:
    """A manager on a VM of HCS's, and what is held."""

    def __init__(self, os: GuestOS) -> None:
        self.world = HcsWorld(os=os)
        self.paths = [f"C:\\{number}.vhdx" for number in range(3)]
        for path in self.paths:
            # All but the first may be opened by a VM that is given no right of its own.
            self.world.add_file(path, rights={"group"} if path != self.paths[0] else set())
        host = HcsHost(self.world, disks=self.world.disks, group_access=GroupAccess(keep=True))
        guest = HcsGuest(self.world, os, is_read_only=host.is_read_only)
        self.manager = ScsiManager(host, guest, MemoryJournal(), controllers=1)
        self.held: list[Reservation] = []

    async def take(self, step: tuple[object, ...]) -> None:
        """Take one step, whatever comes of it."""
        with contextlib.suppress(UtilityVMError):
            match step:
                case ("add", int(number), bool(read_only), partition, guest_path, VMAccess() as access):
                    mount = None if partition is None else MountConfig(partition=int(str(partition)))
                    request = DiskRequest(host_path=self.paths[number], read_only=read_only, access=access)
                    where = PurePosixPath(str(guest_path)) if mount and guest_path else None
                    added = await self.manager.add(request, mount=mount, guest_path=where, holder=ME, timeout_s=5)
                    self.held.append(added)
                case ("release", int(number)) if self.held:
                    reservation = self.held[number % len(self.held)]
                    await self.manager.release(reservation, timeout_s=5)
                    self.held.remove(reservation)
                case ("fail", str(kind), Break() as how):
                    self.world.fail_next(kind, how)
                case _:
                    pass
        assert self.world.harm == []
        on_the_bus = [disk["Path"] for disk in self.world.bus.values()]
        assert len(set(on_the_bus)) == len(on_the_bus), "a disk is attached twice"


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(GuestOS))
async def test_nothing_does_harm_and_nothing_is_left(steps: list[tuple[object, ...]], os: GuestOS) -> None:
    vm = VM(os)
    for step in steps:
        await vm.take(step)
    vm.world.breaks.clear()
    for reservation in vm.held:
        await vm.manager.release(reservation, timeout_s=5)
    await vm.manager.repair()
    assert (vm.world.bus, vm.world.mounts, vm.world.harm) == ({}, {}, [])
    assert vm.manager.slots() == []
    if ("fail", "revoke", Break.REFUSE) not in steps:
        left = {path: file.rights - {"group"} for path, file in vm.world.files.items()}
        assert not any(left.values()), "a right was not taken back"


@settings(max_examples=150, deadline=None)
@given(LOSSES, st.sampled_from(GuestOS))
async def test_a_guest_that_does_not_answer_is_done_no_harm(steps: list[tuple[object, ...]], os: GuestOS) -> None:
    vm = VM(os)
    for step in steps:
        await vm.take(step)
    vm.world.breaks.clear()
    for number in range(len(vm.held)):
        await vm.take(("release", number))
    # Whatever is on the bus is seen.
    assert {view.slot for view in vm.manager.slots()} >= set(vm.world.bus)
