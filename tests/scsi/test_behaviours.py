"""What the three managers in hcsshim get wrong, as rules that ours keeps. `ROWS` names the test of each known defect.

S: the seed (2021). M: the newest manager. C: the newest controller. Some concern other rooms, and are tested there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest

from scsi_bench import Bench
from utilityvm.errors import (
    AlreadyReleased,
    ConfigDiffers,
    DeadlineExceeded,
    DiskInUse,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    Migrating,
    NoControllers,
    NoFreeSlot,
    NotAttached,
    NotSupported,
    OutcomeUnknown,
    StoreError,
    VMGone,
    WrongLoop,
)
from utilityvm.scsi.events import ScsiEvents
from utilityvm.scsi.manager import AddRequest, ScsiManager
from utilityvm.scsi.ports import (
    AttachmentType,
    CallerKey,
    DiskFormat,
    DiskRecord,
    DiskRequest,
    Holder,
    MountConfig,
    OpenDisk,
    ScratchKey,
    Verity,
)
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.testing import Break, FakeGuest, FakeHost

WHO = Holder(name="test")

ROWS = {
    "S1": "test_a_failed_add_frees_its_slot_and_a_later_add_attaches_for_real",
    "S2": "test_failures_do_not_use_up_capacity",
    "S3": "test_a_release_that_failed_can_be_repeated_and_finishes",
    "S4": "test_a_disk_half_removed_is_attached_anew_when_it_is_added_again",
    "S5": "test_everyone_who_waits_for_an_attach_gets_its_real_result",
    "S6": "test_other_settings_for_an_attached_disk_are_refused",
    "S7": "test_one_file_by_two_spellings_is_one_disk",
    "S8": "test_a_guest_path_holds_one_disk",
    "S9": "test_a_second_release_of_a_reservation_drops_nothing",
    "S10": "hosts/hcs",
    "S11": "test_when_the_undo_fails_too_the_disk_stays_visible_and_a_retry_finishes_it",
    "S12": "test_a_slow_removal_holds_up_no_other_disk",
    "S13": "test_a_caller_cancelled_beforehand_sends_nothing",
    "S14": "test_without_controllers_nothing_is_recorded",
    "S15": "test_what_callers_look_at_does_not_change_under_them",
    "S16": "test_every_controller_is_used",
    "S17": "hosts/hcs",
    "S18": "hosts/hcs",
    "S19": "hosts/hcs",
    "S20": "hosts/hcs",
    "S21": "hosts/hcs",
    "S22": "test_a_new_owner_finds_everything_in_the_journal",
    "S23": "hosts/hcs",
    "S24": "test_errors_are_typed_and_say_where",
    "M1": "test_a_path_without_a_mount_is_refused",
    "M2": "test_a_cancelled_waiter_gives_its_reference_back",
    "M3": "test_a_cancelled_waiter_on_a_mount_leaves_no_mount_behind",
    "M4": "test_one_callers_deadline_is_not_anothers_error",
    "M5": "test_a_failed_detach_is_gone_on_with_and_never_handed_out",
    "M6": "test_a_failed_unmount_keeps_the_reference_counts_right",
    "M7": "test_a_second_release_of_a_reservation_drops_nothing",
    "M8": "test_cleaning_up_has_its_own_time",
    "M9": "test_a_generated_path_never_meets_a_chosen_one",
    "M10": "test_a_guest_path_of_another_disk_is_refused_whatever_the_order",
    "M11": "test_other_settings_for_an_attached_disk_are_refused",
    "M12": "test_one_partition_is_not_mounted_in_two_ways_that_contradict",
    "M13": "test_options_compare_without_order_and_belong_to_the_caller",
    "M14": "test_a_slow_removal_holds_up_no_other_disk",
    "M15": "test_an_unknown_attach_is_probed_and_its_slot_is_not_used_meanwhile",
    "M16": "hosts/hcs",
    "M17": "test_an_unmount_is_told_all_that_the_mount_was",
    "M18": "test_numbers_out_of_range_are_refused",
    "M19": "hosts/hcs",
    "M20": "hosts/hcs",
    "M21": "test_a_new_owner_finds_everything_in_the_journal",
    "M22": "bench/manager.py",
    "C1": "test_a_failed_mount_leaves_nothing_stuck",
    "C2": "test_a_failed_attach_never_hands_the_slot_to_another_holder",
    "C3": "test_giving_up_before_the_attach_frees_the_slot",
    "C4": "test_a_partition_that_was_given_up_does_not_keep_the_disk",
    "C5": "test_a_retried_release_does_not_touch_a_new_holder",
    "C6": "test_a_disk_half_removed_is_attached_anew_when_it_is_added_again",
    "C7": "test_a_slow_removal_holds_up_no_other_disk",
    "C8": "test_an_unknown_attach_is_probed_and_its_slot_is_not_used_meanwhile",
    "C9": "test_after_a_failed_attach_the_next_caller_gets_a_fresh_attempt",
    "C10": "test_a_new_owner_undoes_what_its_caller_never_got",
    "C11": "test_a_journal_that_contradicts_itself_loses_no_disk",
    "C12": "test_one_file_by_two_spellings_is_one_disk",
    "C13": "test_a_reserved_slot_is_never_handed_out",
    "C14": "hosts/hcs",
    "C15": "hosts/hcs",
    "C16": "test_options_compare_without_order_and_belong_to_the_caller",
    "C17": "test_one_disk_has_several_mounts",
    "C18": "test_reservations_of_dead_holders_are_given_back",
    "C19": "bench/manager.py",
}


def test_every_known_defect_has_its_test() -> None:
    known = {f"S{n}" for n in range(1, 25)} | {f"M{n}" for n in range(1, 23)} | {f"C{n}" for n in range(1, 20)}
    assert set(ROWS) == known
    for name in ROWS.values():
        assert name in globals() or "/" in name, name


async def test_a_failed_add_frees_its_slot_and_a_later_add_attaches_for_real(bench: Bench) -> None:
    bench.world.fail_next("attach")
    with pytest.raises(HostRefused):
        await bench.add("a")
    bench.check_empty()
    await bench.add("a")
    assert bench.world.bus[Slot(0, 0)].identity == "file:a"


async def test_failures_do_not_use_up_capacity(bench: Bench) -> None:
    bench.world.fail_next("attach", times=300)
    for number in range(300):
        with pytest.raises(HostRefused):
            await bench.add(f"bad{number}")
    assert (await bench.add("good")).slot == Slot(0, 0)


@pytest.mark.parametrize("step", ["unmount", "eject", "detach"])
async def test_a_release_that_failed_can_be_repeated_and_finishes(bench: Bench, step: str) -> None:
    held = await bench.add("a")
    bench.world.fail_next(step)
    with pytest.raises((GuestRefused, HostRefused)):
        await bench.manager.release(held)
    assert bench.manager.slots()
    bench.world.log.clear()
    await bench.manager.release(held)
    assert bench.world.log[0].startswith(step), "it goes on from the step that failed"
    bench.check_empty()
    with pytest.raises(AlreadyReleased):
        await bench.manager.release(held)


@pytest.mark.parametrize("step", ["eject", "detach"])
async def test_a_disk_half_removed_is_attached_anew_when_it_is_added_again(bench: Bench, step: str) -> None:
    old = await bench.add("a", "/x")
    bench.world.fail_next(step)
    with pytest.raises((GuestRefused, HostRefused)):
        await bench.manager.release(old)
    new = await bench.add("a", "/x")
    bench.check_promises()
    assert PurePosixPath("/x") in bench.world.mounts
    await bench.manager.release(old)  # its own reference, and no other's
    assert PurePosixPath("/x") in bench.world.mounts
    await bench.manager.release(new)
    bench.check_empty()


@pytest.mark.parametrize("fails", [True, False])
async def test_everyone_who_waits_for_an_attach_gets_its_real_result(bench: Bench, fails: bool) -> None:
    if fails:
        bench.world.fail_next("attach")
    results = await asyncio.gather(*(bench.add("a") for _ in range(5)), return_exceptions=True)
    if fails:
        assert all(isinstance(result, HostRefused) for result in results)
        bench.check_empty()
    else:
        held = [result for result in results if isinstance(result, Reservation)]
        assert len({one.id for one in held}) == 5
        assert bench.manager.references(held[0]) == 5
    assert sum(line.startswith("attach") for line in bench.world.log) == 1


@pytest.mark.parametrize(
    "other",
    [
        DiskRequest(host_path="a", read_only=False),
        DiskRequest(host_path="a", read_only=True, format=DiskFormat.VHDX),
        DiskRequest(host_path="a", read_only=True, sector_size_bytes=4096),
    ],
)
async def test_other_settings_for_an_attached_disk_are_refused(bench: Bench, other: DiskRequest) -> None:
    await bench.add("a")
    with pytest.raises(ConfigDiffers, match=r"=.*, not with ") as caught:
        await bench.manager.add(other, holder=WHO)
    assert caught.value.slot == Slot(0, 0)
    assert len(bench.manager.reservations()) == 1
    bench.check_promises()


async def test_another_type_for_an_attached_disk_is_refused(bench: Bench) -> None:
    """Also on a host that would open it as either."""

    class Lenient(FakeHost):
        async def open(self, request: DiskRequest) -> OpenDisk:
            return await super().open(replace(request, kind=AttachmentType.VIRTUAL_DISK))

    await bench.add("a")
    other = DiskRequest(host_path="a", read_only=True, kind=AttachmentType.PASS_THRU)
    with pytest.raises(InvalidRequest):
        await bench.manager.add(other, holder=WHO)
    bench.host = Lenient(bench.world)
    bench.manager = bench.new_manager()
    await bench.manager.restore(is_alive=lambda holder: True)
    with pytest.raises(ConfigDiffers, match="VirtualDisk, not with type=PassThru"):
        await bench.manager.add(other, holder=WHO)
    bench.check_promises()


async def test_one_file_by_two_spellings_is_one_disk(bench: Bench) -> None:
    bench.world.links["/link"] = "/real"
    one, two = await bench.add("/real"), await bench.add("/link")
    assert one.slot == two.slot
    assert len(bench.world.bus) == 1
    await bench.manager.remove("/link", identity="file:/real")
    await bench.manager.remove("/real")
    bench.check_empty()


async def test_a_guest_path_holds_one_disk(bench: Bench) -> None:
    await bench.add("a", "/mnt")
    with pytest.raises(GuestPathInUse, match="a at 0:0"):
        await bench.add("b", "/mnt")
    assert len(bench.world.bus) == 1
    bench.check_promises()


async def test_a_second_release_of_a_reservation_drops_nothing(bench: Bench) -> None:
    one, two = await bench.add("a"), await bench.add("a")
    await bench.manager.release(one)
    with pytest.raises(AlreadyReleased):
        await bench.manager.release(one)
    assert bench.manager.references(two) == 1
    with pytest.raises(NotAttached):
        await bench.manager.release("nonsense")
    await bench.manager.release(two)
    bench.check_empty()


async def test_when_the_undo_fails_too_the_disk_stays_visible_and_a_retry_finishes_it(bench: Bench) -> None:
    bench.world.fail_next("mount")
    bench.world.fail_next("eject")
    with pytest.raises(GuestRefused, match="mount"):
        await bench.add("a")
    assert [view.state for view in bench.manager.slots()] == ["attached"]
    assert not bench.manager.reservations()
    await bench.manager.repair()
    bench.check_empty()


async def test_a_slow_removal_holds_up_no_other_disk(bench: Bench) -> None:
    slow = await bench.add("a")
    stuck = asyncio.Event()

    async def gate(step: str) -> None:
        if "0:0" in step:
            await stuck.wait()

    bench.world.gate = gate
    removal = asyncio.create_task(bench.manager.release(slow))
    other = await bench.add("b")
    await bench.manager.release(other)
    assert not removal.done()
    stuck.set()
    await removal
    bench.check_empty()


async def test_a_caller_cancelled_beforehand_sends_nothing(bench: Bench) -> None:
    task = asyncio.create_task(bench.add("a"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not bench.world.log
    bench.check_empty()


async def test_without_controllers_nothing_is_recorded() -> None:
    bench = Bench(controllers=0)
    for _ in range(2):
        with pytest.raises(NoControllers):
            await bench.add("a")
    bench.check_empty()


async def test_what_callers_look_at_does_not_change_under_them(bench: Bench) -> None:
    held = await bench.add("a")
    before = bench.manager.slots()
    await bench.manager.release(held)
    assert before[0].references == 1
    assert not bench.manager.slots()


async def test_every_controller_is_used() -> None:
    bench = Bench(controllers=4, reserved={Slot(0, 0): "root"})
    held = [await bench.attach(f"d{number}") for number in range(255)]
    assert [one.slot for one in held] == [Slot(*divmod(number, 64)) for number in range(1, 256)]
    with pytest.raises(NoFreeSlot) as caught:
        await bench.attach("one too many")
    assert caught.value.holders[:2] == ("0:0: root (reserved)", "0:1: d0 (attached, held by test)")
    assert len(caught.value.holders) == 256
    await bench.manager.release(held[100])
    assert (await bench.attach("another")).slot == held[100].slot
    bench.check_promises()


async def test_a_new_owner_finds_everything_in_the_journal(bench: Bench) -> None:
    one = await bench.add("a", "/x", options=("noatime",))
    two = await bench.add("a", "/x", options=("noatime",))
    third = await bench.attach("b", read_only=False)
    bench.manager = bench.new_manager()
    findings = await bench.manager.restore(is_alive=lambda holder: True)
    assert findings == []
    assert {one.id, two.id, third.id} == {held.id for held in bench.manager.reservations()}
    bench.check_promises()
    for held in (one, two, third):
        await bench.manager.release(held.id)
    bench.check_empty()


async def test_errors_are_typed_and_say_where(bench: Bench) -> None:
    bench.world.in_use_elsewhere.add("file:a")
    with pytest.raises(DiskInUse, match="another VM"):
        await bench.add("a")
    bench.world.missing.add("gone")
    with pytest.raises(InvalidRequest) as caught:
        await bench.add("gone")
    assert str(caught.value.host_path) == "gone"
    bench.check_empty()


async def test_a_path_without_a_mount_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="without a mount"):
        await bench.add("a", "/x", mounted=False)
    bench.check_empty()


@pytest.mark.parametrize("at", ["relative", "/a/../b", "/", "/proc/x", "/dev", "/sys", "/run/utilityvm/x", "//"])
async def test_guest_paths_that_cannot_be_are_refused(bench: Bench, at: str) -> None:
    with pytest.raises(InvalidRequest, match="guest path"):
        await bench.add("a", at)
    bench.check_empty()


async def started(bench: Bench, step: str, count: int = 1) -> tuple[asyncio.Event, asyncio.Event]:
    """Make the next step of that kind wait; gives an event for its beginning and one that lets it go on."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def gate(what: str) -> None:
        if what.startswith(step):
            reached.set()
            await go_on.wait()

    bench.world.gate = gate
    return reached, go_on


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_a_cancelled_waiter_gives_its_reference_back(bench: Bench, step: str) -> None:
    reached, go_on = await started(bench, step)
    owner, waiter = asyncio.create_task(bench.add("a")), asyncio.create_task(bench.add("a"))
    await reached.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    go_on.set()
    held = await owner
    assert bench.manager.references(held) == 1
    await bench.manager.release(held)
    bench.check_empty()


async def test_a_cancelled_waiter_on_a_mount_leaves_no_mount_behind(bench: Bench) -> None:
    reached, go_on = await started(bench, "mount")
    owner, waiter = asyncio.create_task(bench.add("a", "/x")), asyncio.create_task(bench.add("a", "/x"))
    await reached.wait()
    waiter.cancel()
    go_on.set()
    await bench.manager.release(await owner)
    await asyncio.gather(waiter, return_exceptions=True)
    bench.check_empty()
    await bench.add("b", "/x")
    assert bench.world.log[-1] == "mount 0:0 /x"


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_the_first_callers_cancellation_does_not_touch_the_second(bench: Bench, step: str) -> None:
    reached, go_on = await started(bench, step)
    owner, waiter = asyncio.create_task(bench.add("a")), asyncio.create_task(bench.add("a"))
    await reached.wait()
    owner.cancel()
    go_on.set()
    held = await waiter
    await asyncio.gather(owner, return_exceptions=True)
    assert bench.manager.references(held) == 1
    await bench.manager.release(held)
    bench.check_empty()


async def test_one_callers_deadline_is_not_anothers_error(bench: Bench) -> None:
    reached, go_on = await started(bench, "attach")
    hasty = asyncio.create_task(bench.add("a", timeout_s=0.001))
    patient = asyncio.create_task(bench.add("a"))
    with pytest.raises(DeadlineExceeded):
        await hasty
    assert reached.is_set()
    go_on.set()
    await bench.manager.release(await patient)
    bench.check_empty()


async def test_a_failed_detach_is_gone_on_with_and_never_handed_out(bench: Bench) -> None:
    held = await bench.add("a")
    bench.world.fail_next("detach", times=3)
    for _ in range(2):
        with pytest.raises(HostRefused):
            await bench.manager.release(held)
    with pytest.raises(HostRefused):
        await bench.add("a")
    assert [view.state for view in bench.manager.slots()] == ["ejected"]
    other = await bench.add("b")
    assert other.slot == Slot(0, 1), "the slot is not free before the host says so"
    await bench.manager.release(held)
    assert [view.host_path for view in bench.manager.slots()] == ["b"]
    bench.check_promises()


async def test_a_failed_unmount_keeps_the_reference_counts_right(bench: Bench) -> None:
    held = await bench.add("a", "/x")
    bench.world.busy[PurePosixPath("/x")] = "pid 7 (sh)"
    with pytest.raises(GuestBusy) as caught:
        await bench.manager.release(held)
    assert caught.value.holders == ("pid 7 (sh)",)
    assert PurePosixPath("/x") in bench.world.mounts
    assert bench.manager.references(held) == 1, "everything is as it was"
    assert bench.manager.reservations() == [held]
    again = await bench.add("a", "/x")
    assert bench.manager.references(again) == 2
    bench.world.busy.clear()
    await bench.manager.release(again)
    bench.check_promises()
    await bench.manager.release(held)
    bench.check_empty()


async def test_a_refused_release_of_a_reservation_is_not_done_behind_its_holder(bench: Bench) -> None:
    held = await bench.add("a", "/x")
    bench.world.busy[PurePosixPath("/x")] = "pid 7 (sh)"
    with pytest.raises(GuestBusy):
        await bench.manager.release(held)
    bench.world.busy.clear()
    bench.kill_owner()
    assert await bench.manager.restore(is_alive=lambda _: True) == []
    assert PurePosixPath("/x") in bench.world.mounts
    assert bench.manager.references(held) == 1
    await bench.manager.release(held)
    bench.check_empty()


async def test_all_that_wait_for_a_refused_release_hold_it_again(bench: Bench) -> None:
    held = [await bench.add("a", "/x") for _ in range(2)]
    other = await bench.add("a", "/y")
    bench.world.busy[PurePosixPath("/x")] = "pid 7 (sh)"
    results = await bench.manager.remove_many([*held, other])
    assert [type(result) for result in results] == [type(None), GuestBusy, type(None)]
    assert bench.manager.reservations() == [held[1]]
    assert set(bench.world.mounts) == {PurePosixPath("/x")}
    bench.world.busy.clear()
    await bench.manager.release(held[1])
    bench.check_empty()


async def test_what_was_given_up_is_not_held_again_because_it_is_in_use(bench: Bench) -> None:
    reached, go_on = await started(bench, "mount")
    adding = asyncio.create_task(bench.add("a", "/x"))
    await reached.wait()
    adding.cancel()
    bench.world.busy[PurePosixPath("/x")] = "pid 7 (sh)"
    go_on.set()
    await asyncio.wait([adding])
    await bench.manager.settle()
    assert bench.manager.reservations() == []
    bench.world.busy.clear()
    await bench.manager.repair()
    bench.check_empty()


async def test_force_releases_what_the_guest_still_uses(bench: Bench) -> None:
    held = await bench.add("a", "/x")
    bench.world.busy[PurePosixPath("/x")] = "pid 7 (sh)"
    await bench.manager.release(held, force=True)
    bench.check_empty()


async def test_cleaning_up_has_its_own_time(bench: Bench) -> None:
    reached, go_on = await started(bench, "mount")
    late = asyncio.create_task(bench.add("a", timeout_s=0.001))
    with pytest.raises(DeadlineExceeded):
        await late
    assert reached.is_set()
    go_on.set()
    await bench.manager.settle()
    bench.check_empty()


async def test_a_generated_path_never_meets_a_chosen_one(bench: Bench) -> None:
    chosen = await bench.add("a", "/run/mounts/scsi/0_1_0")
    made = await bench.add("b")
    assert made.slot == Slot(0, 1)
    assert made.guest_path != chosen.guest_path
    bench.check_promises()


async def test_a_guest_path_of_another_disk_is_refused_whatever_the_order(bench: Bench) -> None:
    for first, second in (("a", "b"), ("b", "a")):
        held = [await bench.add(first, "/x"), await bench.add(second, "/y")]
        with pytest.raises(GuestPathInUse):
            await bench.add(second, "/x")
        for one in held:
            await bench.manager.release(one)
    bench.check_empty()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (MountConfig(), MountConfig(encryption=ScratchKey())),
        (MountConfig(encryption=ScratchKey()), MountConfig(encryption=ScratchKey())),
        (MountConfig(), MountConfig(read_only=True)),
        (MountConfig(filesystem="ext4"), MountConfig(filesystem="xfs")),
        (MountConfig(), MountConfig(ensure_filesystem=True, reformat=True)),
        (
            MountConfig(read_only=True),
            MountConfig(read_only=True, verity=Verity(root_hash=b"x", hash_offset_bytes=4096)),
        ),
    ],
)
async def test_one_partition_is_not_mounted_in_two_ways_that_contradict(
    bench: Bench, one: MountConfig, other: MountConfig
) -> None:
    disk = DiskRequest(host_path="a", read_only=False)
    held = await bench.manager.add(disk, mount=one, guest_path=PurePosixPath("/x"), holder=WHO)
    with pytest.raises(ConfigDiffers):
        await bench.manager.add(disk, mount=other, guest_path=PurePosixPath("/y"), holder=WHO)
    await bench.manager.release(held)
    bench.check_empty()


async def test_options_compare_without_order_and_belong_to_the_caller(bench: Bench) -> None:
    options = ["noatime", "subvol=Data"]
    one = await bench.add("a", options=options)
    options.append("nosuid")
    two = await bench.add("a", options=["subvol=Data", "noatime"])
    assert one.guest_path == two.guest_path
    three = await bench.add("a", options=["subvol=data", "noatime"])
    assert three.guest_path != one.guest_path
    assert one.guest_path is not None
    assert bench.world.mounts[one.guest_path][1].options == ("noatime", "subvol=Data")
    with pytest.raises(InvalidRequest):
        await bench.add("b", options="noatime")


@pytest.mark.parametrize("how", [Break.LOSE_ANSWER, Break.LOSE_REQUEST])
async def test_an_unknown_attach_is_probed_and_its_slot_is_not_used_meanwhile(bench: Bench, how: Break) -> None:
    bench.world.fail_next("attach", how)
    bench.world.fail_next("probe", Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown):
        await bench.add("a")
    assert [view.state for view in bench.manager.slots()] == ["attach unknown"]
    assert (await bench.add("b")).slot == Slot(0, 1)
    await bench.manager.repair()
    assert [view.host_path for view in bench.manager.slots()] == ["b"]
    bench.check_promises()


async def test_an_attach_whose_answer_was_lost_is_found_and_counts(bench: Bench) -> None:
    bench.world.fail_next("attach", Break.LOSE_ANSWER)
    bench.world.fail_next("mount", Break.LOSE_ANSWER)
    held = await bench.add("a")
    bench.check_promises()
    for step in ("unmount", "eject", "detach"):
        bench.world.fail_next(step, Break.LOSE_ANSWER)
    await bench.manager.release(held)
    bench.check_empty()


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_an_add_whose_request_was_lost_fails_and_leaves_nothing(bench: Bench, step: str) -> None:
    bench.world.fail_next(step, Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown, match=step):
        await bench.add("a")
    bench.check_empty()


@pytest.mark.parametrize("step", ["unmount", "eject", "detach"])
async def test_a_release_whose_request_was_lost_fails_and_can_be_repeated(bench: Bench, step: str) -> None:
    held = await bench.add("a")
    bench.world.fail_next(step, Break.LOSE_REQUEST)
    with pytest.raises(OutcomeUnknown, match=step):
        await bench.manager.release(held)
    bench.check_promises()
    await bench.manager.release(held)
    bench.check_empty()


async def test_an_unmount_is_told_all_that_the_mount_was(bench: Bench) -> None:
    told: list[MountConfig] = []

    class Listening(FakeGuest):
        async def unmount(
            self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
        ) -> None:
            told.append(config)
            await super().unmount(slot, config, guest_path=guest_path, timeout_s=timeout_s, force=force)

    bench.guest = Listening(bench.world)
    bench.manager = bench.new_manager()
    config = MountConfig(partition=2, encryption=CallerKey(b"k" * 64), options=("noatime",))
    disk = DiskRequest(host_path="a", read_only=False)
    await bench.manager.release(await bench.manager.add(disk, mount=config, holder=WHO))
    assert told == [config]


@pytest.mark.parametrize("controllers", [-1, 5])
def test_numbers_out_of_range_are_refused(bench: Bench, controllers: int) -> None:
    with pytest.raises(InvalidRequest):
        ScsiManager(bench.host, bench.guest, bench.journal, controllers=controllers)
    with pytest.raises(InvalidRequest):
        ScsiManager(bench.host, bench.guest, bench.journal, controllers=1, reserved={Slot(1, 0): "root"})


async def test_a_failed_mount_leaves_nothing_stuck(bench: Bench) -> None:
    bench.world.fail_next("mount")
    with pytest.raises(GuestRefused):
        await bench.add("a")
    bench.check_empty()
    bench.world.fail_next("mount")
    keeper = await bench.attach("a")
    with pytest.raises(GuestRefused):
        await bench.add("a")
    assert not bench.manager.mounts()
    await bench.add("a")
    await bench.manager.release(keeper)
    bench.check_promises()


async def test_a_failed_attach_never_hands_the_slot_to_another_holder(bench: Bench) -> None:
    bench.world.fail_next("attach")
    results = await asyncio.gather(bench.add("a", "/1"), bench.add("a", "/2"), return_exceptions=True)
    assert all(isinstance(result, HostRefused) for result in results)
    other = await bench.add("b", "/b")
    assert other.slot == Slot(0, 0)
    assert list(bench.world.mounts) == [PurePosixPath("/b")]
    bench.check_promises()


async def test_giving_up_before_the_attach_frees_the_slot(bench: Bench) -> None:
    for number in range(70):
        task = asyncio.create_task(bench.add(f"d{number}"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bench.manager.settle()
    bench.check_empty()


async def test_a_partition_that_was_given_up_does_not_keep_the_disk(bench: Bench) -> None:
    first = await bench.add("a", partition=1)
    bench.world.fail_next("mount")
    with pytest.raises(GuestRefused):
        await bench.add("a", partition=2)
    await bench.manager.release(first)
    bench.check_empty()


async def test_a_retried_release_does_not_touch_a_new_holder(bench: Bench) -> None:
    old = await bench.add("a", "/x")
    bench.world.fail_next("eject")
    with pytest.raises(GuestRefused):
        await bench.manager.release(old)
    new = await bench.add("a", "/x")
    await bench.manager.release(old)
    assert bench.world.mounts[PurePosixPath("/x")][0] == new.slot
    assert bench.manager.references(new) == 1
    bench.check_promises()


@pytest.mark.parametrize("step", ["unmount", "eject", "detach"])
async def test_a_disk_asked_for_while_it_leaves_comes_back(bench: Bench, step: str) -> None:
    old = await bench.add("a", "/x")
    reached, go_on = await started(bench, step)
    leaving = asyncio.create_task(bench.manager.release(old))
    await reached.wait()
    coming = asyncio.create_task(bench.add("a", "/x"))
    await asyncio.sleep(0)
    go_on.set()
    await leaving
    new = await coming
    assert bench.world.mounts[PurePosixPath("/x")][0] == new.slot
    assert bench.manager.references(new) == 1
    await bench.manager.release(new)
    bench.check_empty()


async def test_after_a_failed_attach_the_next_caller_gets_a_fresh_attempt(bench: Bench) -> None:
    bench.world.fail_next("attach")
    with pytest.raises(HostRefused, match="attach"):
        await bench.add("a")
    await bench.add("a")
    assert sum(line.startswith("attach") for line in bench.world.log) == 2


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize(("step", "then"), [("attach", "mount"), ("mount", "unmount")])
async def test_a_new_owner_undoes_what_its_caller_never_got(bench: Bench, step: str, then: str, happened: bool) -> None:
    reached, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def gate(what: str) -> None:
        if what.startswith(step):
            reached.set()
            await go_on.wait()
        if what.startswith(then):
            done.set()
            await asyncio.Event().wait()

    bench.world.gate = gate
    owner = asyncio.create_task(bench.add("a", "/x"))
    await reached.wait()
    killed_at = dict(bench.journal.records)
    if happened:  # the request was under way when the owner was killed, and was done
        go_on.set()
        await asyncio.wait({owner, asyncio.ensure_future(done.wait())}, return_when=asyncio.FIRST_COMPLETED)
    bench.kill_owner()
    owner.cancel()
    await asyncio.gather(owner, return_exceptions=True)
    bench.journal.records = killed_at
    findings = await bench.manager.restore(is_alive=lambda holder: True)
    assert any(f"{step}ing" in line for line in findings)
    bench.check_empty()


async def test_a_journal_that_contradicts_itself_loses_no_disk(bench: Bench) -> None:
    held = await bench.add("a", "/x")
    for key, record in list(bench.journal.records.items()):
        if type(record).__name__ == "ReservationRecord":
            del bench.journal.records[key]
    bench.manager = bench.new_manager()
    await bench.manager.restore(is_alive=lambda holder: True)
    bench.check_empty()
    with pytest.raises(NotAttached):
        await bench.manager.release(held.id)


async def test_a_reserved_slot_is_never_handed_out() -> None:
    bench = Bench(reserved={Slot(0, 0): "root", Slot(0, 2): "swap"})
    held = [await bench.attach(name) for name in "abc"]
    assert [one.slot for one in held] == [Slot(0, 1), Slot(0, 3), Slot(0, 4)]


async def test_one_disk_has_several_mounts(bench: Bench) -> None:
    held = [
        await bench.add("a", "/1", partition=1),
        await bench.add("a", "/2", partition=2),
        await bench.add("a", "/1again", partition=1),
        await bench.attach("a"),
    ]
    assert {one.slot for one in held} == {Slot(0, 0)}
    assert len(bench.world.mounts) == 3
    for one in held:
        await bench.manager.release(one)
        bench.check_promises()
    bench.check_empty()


async def test_reservations_of_dead_holders_are_given_back(bench: Bench) -> None:
    dead = await bench.add("a", holder="dead")
    alive = await bench.add("a", holder="alive")
    await bench.add("b", holder="dead")
    bench.manager = bench.new_manager()
    findings = await bench.manager.restore(is_alive=lambda holder: holder.name == "alive")
    assert len(findings) == 2
    assert [held.id for held in bench.manager.reservations()] == [alive.id]
    assert [view.host_path for view in bench.manager.slots()] == ["a"]
    with pytest.raises(NotAttached):
        await bench.manager.release(dead.id)
    bench.check_promises()


async def test_an_intent_that_cannot_be_written_is_a_step_that_is_not_sent(bench: Bench) -> None:
    bench.journal.fail_next()
    with pytest.raises(StoreError):
        await bench.add("a")
    assert not bench.world.log
    bench.check_promises()
    assert not bench.manager.slots()


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_a_deadline_while_an_intent_waits_sends_nothing(bench: Bench, step: str) -> None:
    await bench.attach("other")
    if step == "mount":
        await bench.attach("a")
    sent = len(bench.world.log)
    is_free = asyncio.Event()

    async def busy(what: str) -> None:
        await is_free.wait()

    bench.journal.gate = busy
    with pytest.raises(DeadlineExceeded):
        await bench.add("a", timeout_s=0.01)
    is_free.set()
    await bench.manager.settle()
    assert bench.world.log[sent:] == []
    bench.check_promises()
    assert {view.host_path for view in bench.manager.slots()} == ({"other", "a"} if step == "mount" else {"other"})


async def test_what_is_wanted_again_while_its_intent_waits_is_not_taken_away(bench: Bench) -> None:
    first = await bench.add("a", "/1")
    sent = len(bench.world.log)
    is_free, waits = asyncio.Event(), asyncio.Event()

    async def busy(what: str) -> None:
        waits.set()
        await is_free.wait()

    bench.journal.gate = busy
    releasing = asyncio.create_task(bench.manager.release(first))
    await waits.wait()
    adding = asyncio.create_task(bench.add("a", "/1"))
    await asyncio.sleep(0)
    is_free.set()
    await asyncio.gather(releasing, adding)
    assert bench.world.log[sent:] == []
    kinds = [type(record).__name__ for record in bench.journal.read()]
    assert kinds == ["DiskRecord", "MountRecord", "ReservationRecord"]
    bench.check_promises()


async def test_a_store_that_hangs_fails_those_who_waited_behind_it_with_one_wait(bench: Bench) -> None:
    tries = 0

    async def hangs(what: str) -> None:
        nonlocal tries
        tries += 1
        for _ in range(20):
            await asyncio.sleep(0)
        raise StoreError("locked")

    bench.journal.gate = hangs
    results = await asyncio.gather(*(bench.attach(name) for name in "abcd"), return_exceptions=True)
    assert [type(result) for result in results] == [StoreError] * 4
    assert tries <= 3  # the four intents, and what is noted of their end
    bench.journal.gate = None
    await bench.manager.settle()
    bench.check_empty()


async def test_an_outcome_that_the_journal_did_not_take_is_written_by_the_next_repair(bench: Bench) -> None:
    held = await bench.add("a")

    async def gate(what: str) -> None:
        if what.startswith("detach"):
            bench.journal.fail_next(times=2)

    bench.world.gate = gate
    await bench.manager.release(held)
    assert bench.journal.records, "it says that the disk is being detached"
    await bench.manager.repair()
    bench.check_empty()


async def test_when_the_vm_dies_everyone_is_told_at_once(bench: Bench) -> None:
    held = await bench.add("a")
    reached, _ = await started(bench, "mount")
    waiting = asyncio.create_task(bench.add("b"))
    await reached.wait()
    bench.manager.mark_gone(VMGone("QEMU was killed"))
    with pytest.raises(VMGone):
        await waiting
    with pytest.raises(VMGone):
        await bench.add("c")
    await bench.manager.release(held)  # its disk is free: nothing is left to fail
    with pytest.raises(AlreadyReleased):
        await bench.manager.release(held)
    await bench.manager.settle()
    assert not bench.manager.slots()
    assert not bench.journal.records


@pytest.mark.parametrize("step", ["attach", "mount"])
async def test_a_step_whose_vm_died_tells_so_and_not_that_its_outcome_is_unknown(bench: Bench, step: str) -> None:
    async def gate(what: str) -> None:
        if step in what:  # and in `probe_mount`
            bench.world.gate = dead
            raise VMGone("QEMU hung up")

    async def dead(what: str) -> None:
        raise VMGone("QEMU hung up")

    bench.world.gate = gate
    with pytest.raises(VMGone):
        await bench.add("a")
    bench.manager.mark_gone(VMGone("QEMU was killed"))
    await bench.manager.settle()
    assert not bench.journal.records


async def test_a_second_path_is_a_second_mount_and_no_path_shares_the_first(bench: Bench) -> None:
    one = await bench.add("a", "/mnt1")
    assert (await bench.add("a")).guest_path == one.guest_path
    assert (await bench.add("a", "/mnt2")).guest_path == PurePosixPath("/mnt2")
    assert len(bench.world.bus) == 1


async def test_a_batch_of_which_one_fails_gives_all_back(bench: Bench) -> None:
    bench.world.missing.add("c")
    batch = [AddRequest(disk=DiskRequest(host_path=name, read_only=True), mount=MountConfig()) for name in "abcd"]
    with pytest.raises(InvalidRequest):
        await bench.manager.add_many(batch, holder=WHO)
    bench.check_empty()
    results = await bench.manager.add_many(batch, which="each", holder=WHO)
    assert [type(result).__name__ for result in results] == [
        "Reservation",
        "Reservation",
        "DiskNotFound",
        "Reservation",
    ]
    left = await bench.manager.remove_many([one for one in results if not isinstance(one, Exception)])
    assert left == [None, None, None]
    bench.check_empty()


async def test_resizing_grows_disk_and_filesystem_and_never_shrinks(bench: Bench) -> None:
    await bench.add("a", read_only=False)
    with pytest.raises(InvalidRequest, match="cannot shrink"):
        await bench.manager.resize("a", 512)
    for size_bytes in ((1 << 21) + 1, 1 << 63):
        with pytest.raises(InvalidRequest, match=f"cannot have {size_bytes} bytes"):
            await bench.manager.resize("a", size_bytes)
    await bench.manager.resize("a", 1 << 21)
    assert bench.world.bus[Slot(0, 0)].size_bytes == 1 << 21
    assert bench.manager.slots()[0].size_bytes == 1 << 21
    assert bench.world.log[-2:] == [f"resize 0:0 {1 << 21}", "grow 0:0"]


async def test_a_resize_that_a_file_system_could_not_follow_changes_nothing(bench: Bench) -> None:
    await bench.add("a", "/mnt/a", read_only=False, filesystem="vfat")
    log = [*bench.world.log]
    with pytest.raises(GuestRefused, match="vfat"):
        await bench.manager.resize("a", 1 << 21)
    assert bench.world.log == log
    assert bench.manager.slots()[0].size_bytes == 1 << 20


async def test_a_resize_that_was_done_and_not_written_down_is_found(bench: Bench) -> None:
    held = await bench.add("a", read_only=False)
    there = bench.world.bus[held.slot]
    there.size_bytes = 1 << 21
    bench.kill_owner()
    findings = await bench.manager.restore(
        is_alive=lambda holder: True, sizes={there.attachment: there.size_bytes, "another": 7}
    )
    assert findings == ["a at 0:0 was being resized: it has 2097152 bytes"]
    assert bench.manager.slots()[0].size_bytes == 1 << 21
    assert [record.size_bytes for record in bench.journal.read() if isinstance(record, DiskRecord)] == [1 << 21]


async def test_events_tell_what_happened_and_how_long_it_took(bench: Bench) -> None:
    seen = []

    async def listen() -> None:
        async for event in bench.manager.events():
            seen.append(event.what)
            if event.what == "detached":
                return

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await bench.manager.release(await bench.add("a"))
    await listening
    assert seen == [
        "attaching", "attached", "mounting", "mounted", "unmounting", "unmounted", "ejecting", "ejected",
        "detaching", "detached",
    ]  # fmt: skip


async def grown(bench: Bench, mib: int) -> int:
    await bench.manager.resize("a", mib << 20)
    return mib


@pytest.mark.parametrize("how", list(Break))
async def test_a_resize_takes_each_answer(bench: Bench, how: Break) -> None:
    held = await bench.add("a", read_only=False)
    bench.world.fail_next("resize", how)
    if how is Break.LOSE_ANSWER:  # it grew: the probe says so, and the file systems follow
        await grown(bench, 4)
        assert bench.world.log[-3:] == [f"resize 0:0 {4 << 20}", "size 0:0", "grow 0:0"]
    else:
        with pytest.raises(HostRefused if how is Break.REFUSE else OutcomeUnknown):
            await grown(bench, 4)
        assert bench.manager.slots()[0].size_bytes == 1 << 20
        await grown(bench, 4)
    assert (bench.manager.slots()[0].state, bench.manager.slots()[0].size_bytes) == ("attached", 4 << 20)
    await bench.manager.release(held)
    bench.check_empty()


async def test_a_resize_is_written_down_before_it_is_sent(bench: Bench) -> None:
    await bench.add("a", read_only=False)
    states: list[str] = []

    async def gate(what: str) -> None:
        if what.startswith("resize"):
            states.extend(record.state for record in bench.journal.read() if isinstance(record, DiskRecord))

    bench.world.gate = gate
    await grown(bench, 4)
    assert states == ["resizing"]


async def test_a_new_owner_finds_how_far_a_resize_came(bench: Bench) -> None:
    await bench.add("a", read_only=False)
    reached, _ = await started(bench, "resize")
    resizing = asyncio.create_task(grown(bench, 4))
    await reached.wait()
    resizing.cancel()
    bench.kill_owner()
    bench.world.bus[Slot(0, 0)].size_bytes = 4 << 20
    assert await bench.manager.restore(is_alive=lambda holder: True) == ["a at 0:0 was resizing"]
    assert (bench.manager.slots()[0].state, bench.manager.slots()[0].size_bytes) == ("attached", 4 << 20)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)])
async def test_two_resizes_at_once_never_shrink_the_disk(bench: Bench, sizes: tuple[int, int]) -> None:
    await bench.add("a", read_only=False)
    results = await asyncio.gather(*(grown(bench, mib) for mib in sizes), return_exceptions=True)
    assert [result for result in results if isinstance(result, int)] == ([8] if sizes == (8, 4) else [4, 8])
    assert all(isinstance(result, int | InvalidRequest) for result in results)
    assert bench.world.bus[Slot(0, 0)].size_bytes == 8 << 20
    assert not bench.world.harm


async def test_a_resize_whose_caller_gave_up_before_its_turn_is_not_sent(bench: Bench) -> None:
    await bench.add("a", read_only=False)
    reached, go_on = await started(bench, "resize")
    first = asyncio.create_task(grown(bench, 4))
    await reached.wait()
    with pytest.raises(DeadlineExceeded):
        await bench.manager.resize("a", 8 << 20, timeout_s=0.01)
    go_on.set()
    await first
    await bench.manager.settle()
    assert bench.world.bus[Slot(0, 0)].size_bytes == 4 << 20


async def test_a_resize_holds_up_no_add_of_what_is_mounted_and_is_done_before_the_disk_leaves(bench: Bench) -> None:
    held = await bench.add("a", "/1", read_only=False)
    reached, go_on = await started(bench, "resize")
    resizing = asyncio.create_task(grown(bench, 4))
    await reached.wait()
    second = await bench.add("a", "/1", read_only=False)
    leaving = asyncio.create_task(bench.manager.remove_many([held, second]))
    await asyncio.sleep(0)
    go_on.set()
    assert await leaving == [None, None]
    with pytest.raises((NotAttached, OutcomeUnknown)):
        await resizing
    bench.check_empty()


async def test_force_belongs_to_the_release_that_asked_for_it(bench: Bench) -> None:
    forced, polite = await bench.add("a", "/1"), await bench.add("a", "/1")
    bench.world.busy[PurePosixPath("/1")] = "sh"
    await bench.manager.release(forced, force=True)  # the other holds on to all of it
    with pytest.raises(GuestBusy):
        await bench.manager.release(polite)
    assert PurePosixPath("/1") in bench.world.mounts
    await bench.manager.release(polite, force=True)
    bench.check_empty()


async def test_of_two_releases_at_once_one_without_force_keeps_the_mount(bench: Bench) -> None:
    forced, polite = await bench.add("a", "/1"), await bench.add("a", "/1")
    bench.world.busy[PurePosixPath("/1")] = "sh"
    results = await asyncio.gather(
        bench.manager.release(forced, force=True), bench.manager.release(polite), return_exceptions=True
    )
    assert results[0] is None  # it is out: the other holds the mount as before
    assert isinstance(results[1], GuestBusy)
    assert [held.id for held in bench.manager.reservations()] == [polite.id]


async def test_force_reaches_every_step_of_a_disk_whose_storage_is_dead(bench: Bench) -> None:
    mounted, attached = await bench.add("a", "/1"), await bench.attach("b")
    bench.world.dead |= {"file:a", "file:b"}
    for held in (mounted, attached):
        with pytest.raises(GuestRefused, match="does not reach"):
            await bench.manager.release(held)
        assert held.id in {one.id for one in bench.manager.reservations()}
        await bench.manager.release(held, force=True)
    bench.check_empty()


async def test_force_that_the_guest_does_not_know_is_refused_before_anything_changes(bench: Bench) -> None:
    held = await bench.add("a", "/1")
    bench.world.knows_force = False
    sent = len(bench.world.log)
    for refused in (bench.manager.release(held, force=True), bench.manager.remove("a", force=True)):
        with pytest.raises(NotSupported):
            await refused
    (error,) = await bench.manager.remove_many([held], force=True)
    assert isinstance(error, NotSupported)
    assert [one.id for one in bench.manager.reservations()] == [held.id]
    assert bench.world.log[sent:] == []
    await bench.manager.release(held)
    bench.check_empty()


@pytest.mark.parametrize(("step", "mounted"), [("unmount", True), ("eject", False)])
@pytest.mark.parametrize("how", ["refuse", "lose request", "store"])
async def test_a_release_that_changed_nothing_leaves_the_reservation_held(
    bench: Bench, step: str, mounted: bool, how: str
) -> None:
    held = await (bench.add("a", "/1") if mounted else bench.attach("a"))
    if how == "store":
        bench.journal.fail_next(times=2)
    else:
        bench.world.fail_next(step, Break(how))
    with pytest.raises((GuestRefused, OutcomeUnknown, StoreError)):
        await bench.manager.release(held)
    assert [one.id for one in bench.manager.reservations()] == [held.id]
    bench.check_promises()
    await bench.manager.release(held)
    bench.check_empty()


async def test_two_removals_at_once_drop_two_references(bench: Bench) -> None:
    for path in ("/1", "/2"):
        await bench.add("a", path)
    await asyncio.gather(bench.manager.remove("a"), bench.manager.remove("a"))
    bench.check_empty()


async def test_a_cancelled_batch_leaves_nothing_also_of_what_had_settled(bench: Bench) -> None:
    ours = await bench.attach("a")
    reached, go_on = await started(bench, "attach")
    requests = [AddRequest(disk=DiskRequest(host_path=name, read_only=True)) for name in "ab"]
    adding = asyncio.create_task(bench.manager.add_many(requests, holder=WHO))
    await reached.wait()
    assert len(bench.manager.reservations()) == 2  # the first of the batch is held by now
    adding.cancel()
    await asyncio.wait({adding})
    go_on.set()
    await bench.manager.settle()
    assert [held.id for held in bench.manager.reservations()] == [ours.id]
    assert [view.host_path for view in bench.manager.slots()] == ["a"]
    await bench.manager.release(ours)
    bench.check_empty()


async def test_a_cancelled_batch_of_releases_releases_all_of_them(bench: Bench) -> None:
    held = [await bench.add(name) for name in "abc"]
    removing = asyncio.create_task(bench.manager.remove_many(held))
    await asyncio.sleep(0)
    removing.cancel()
    await asyncio.wait({removing})
    await bench.manager.settle()
    bench.check_empty()


@pytest.mark.parametrize("writes", range(3))
async def test_a_mistake_of_ours_leaves_no_reservation_of_nobody(bench: Bench, writes: int) -> None:
    write = bench.journal.write

    async def broken(*records: object) -> None:
        nonlocal writes
        if writes == 0:
            bench.journal.write = write  # type: ignore[method-assign]
            raise RuntimeError("a mistake of ours")
        writes -= 1
        await write(*records)  # type: ignore[arg-type]

    bench.journal.write = broken  # type: ignore[method-assign,assignment]
    held = None
    try:
        held = await bench.add("a", "/1")
    except OutcomeUnknown:
        await bench.manager.settle()
        await bench.manager.repair()
    assert len(bench.manager.reservations()) == (held is not None)
    if held:
        await bench.manager.release(held)
    bench.check_empty()


async def test_nothing_is_sent_while_all_is_held_still(bench: Bench) -> None:
    reached, go_on = await started(bench, "attach")
    adding = asyncio.create_task(bench.add("a"))
    await reached.wait()
    with bench.manager.held_still("it is being saved"):
        with pytest.raises(Migrating):
            await bench.manager.resize("a", 4 << 20)
        settling = asyncio.create_task(bench.manager.settle())
        go_on.set()
        while "mount" not in str(bench.world.log):
            await asyncio.sleep(0)
        await settling
        adding.cancel()  # it is held, and its caller does not know yet
        sent = len(bench.world.log)
        await asyncio.wait({adding})
        await bench.manager.settle()
        assert bench.world.log[sent:] == []
    await bench.manager.settle()
    for held in bench.manager.reservations():
        await bench.manager.release(held)
    bench.check_empty()


async def test_events_are_heard_from_the_call_on_and_end_with_the_vm(bench: Bench) -> None:
    events = bench.manager.events()
    await bench.attach("a")
    heard = asyncio.create_task(_all_of(events))
    await asyncio.sleep(0)
    bench.manager.mark_gone(VMGone("QEMU was killed"))
    assert await heard == ["attaching", "attached"]
    assert await _all_of(bench.manager.events()) == []


async def test_a_subscription_that_is_closed_ends(bench: Bench) -> None:
    events = bench.manager.events()
    heard = asyncio.create_task(_all_of(events))
    await asyncio.sleep(0)
    await events.aclose()
    assert await heard == []
    other = bench.manager.events()
    bench.manager.close()
    assert await _all_of(other) == []


async def test_a_listener_that_is_slow_is_told_how_much_it_lost(bench: Bench) -> None:
    events = bench.manager.events()
    for _ in range(200):
        await bench.manager.release(await bench.add("a"))
    bench.manager.close()
    heard = [event async for event in events]
    assert heard[-1].what == "lost"
    assert len(heard) - 1 + heard[-1].count == 200 * 10


async def _all_of(events: ScsiEvents) -> list[str]:
    return [event.what async for event in events]


async def test_every_call_from_another_event_loop_is_refused_at_once(bench: Bench) -> None:
    held = await bench.add("a", "/1")
    manager = bench.manager
    calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "add": lambda: bench.add("b"),
        "add_many": lambda: manager.add_many([], holder=WHO),
        "release": lambda: manager.release(held),
        "remove": lambda: manager.remove("a"),
        "remove_many": lambda: manager.remove_many([held]),
        "resize": lambda: manager.resize("a", 4 << 20),
        "export_state": manager.export_state,
        "resume": manager.resume,
        "repair": manager.repair,
    }

    def elsewhere(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        asyncio.run(call())

    for name, call in calls.items():
        with pytest.raises(WrongLoop, match="another event loop"):
            await asyncio.to_thread(elsewhere, call)
        assert [one.id for one in manager.reservations()] == [held.id], name
    await manager.release(held)
    bench.check_empty()


async def test_a_disk_grows_up_to_the_largest_size_that_qemu_knows(bench: Bench) -> None:
    await bench.attach("a", read_only=False)
    with pytest.raises(InvalidRequest):
        await bench.manager.resize("a", 1 << 63)
    await bench.manager.resize("a", (1 << 63) - 512)
    assert bench.manager.slots()[0].size_bytes == (1 << 63) - 512
