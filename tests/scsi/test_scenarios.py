"""hcsshim's own tests of its managers, each with the test of ours that is about the same; some of those are here.

`SCENARIOS` has its files, each with its scenarios. Where ours does another thing than hcsshim's, the line says so.
"""

from __future__ import annotations

import ast
import asyncio
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from scsi_bench import Bench
from utilityvm.errors import ConfigDiffers, GuestRefused, HostRefused, NoFreeSlot
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.scsi.manager import AddRequest, ScsiManager
from utilityvm.scsi.ports import CallerKey, DiskRequest, Holder, MountConfig, Record, ScratchKey
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.slot import Slot
from utilityvm.testing import MemoryJournal
from utilityvm.testing.contract import GUEST_RULES, HOST_RULES
from utilityvm.testing.hcs import HcsWorld

TESTS = Path(__file__).parents[1]

HERE = "scsi/test_scenarios.py"
RULES = "scsi/test_behaviours.py"
TABLES = "scsi/test_transitions.py"
MOVES = "scsi/test_migration.py"
CONTRACT = "contract/test_manager.py"
HOST = "contract/test_host.py"
GUEST = "contract/test_guest.py"
CONTRACTS = {HOST: HOST_RULES, GUEST: GUEST_RULES}  # each rule is a test there
HCS = "hosts/hcs/test_with_manager.py"
HCS_GUEST = "hosts/hcs/test_guest.py"
REAL = "real/test_stress.py"

# fmt: off
SCENARIOS: dict[str, dict[str, str]] = {
    "internal/uvm/scsi/manager_test.go": {
        "RemoveIndex": f"{CONTRACT}::test_disks_come_and_go_in_batches",  # ours has no list to keep in order
        "AddAddRemoveRemove": f"{HERE}::test_two_adds_share_a_path_that_was_made_up_until_the_second_release",
        "GuestPath": f"{RULES}::test_a_second_path_is_a_second_mount_and_no_path_shares_the_first",  # at both paths
        "ConflictingGuestPath": f"{RULES}::test_a_guest_path_holds_one_disk",
    },
    "internal/controller/device/scsi/controller_test.go": {
        "New": f"{RULES}::test_every_controller_is_used",
        "Reserve_Success": f"{CONTRACT}::test_an_added_disk_is_mounted_and_a_released_one_is_gone",
        "Reserve_SameDiskSamePartition": f"{RULES}::test_everyone_who_waits_for_an_attach_gets_its_real_result",
        "Reserve_SameDiskDifferentPartition": f"{RULES}::test_one_disk_has_several_mounts",
        "Reserve_SamePathDifferentConfig": f"{RULES}::test_other_settings_for_an_attached_disk_are_refused",
        "Reserve_DifferentDisks": f"{CONTRACT}::test_disks_come_and_go_in_batches",
        "Reserve_NoAvailableSlots": f"{RULES}::test_without_controllers_nothing_is_recorded",
        "Reserve_FillsAllSlots": f"{HERE}::test_one_controller_takes_64_disks_and_no_more",
        "MapToGuest_Success": f"{CONTRACT}::test_an_added_disk_is_mounted_and_a_released_one_is_gone",
        "MapToGuest_UnknownReservation": f"{RULES}::test_a_second_release_of_a_reservation_drops_nothing",  # add is one
        "MapToGuest_AttachError": f"{RULES}::test_a_failed_add_frees_its_slot_and_a_later_add_attaches_for_real",
        "MapToGuest_Idempotent": f"{RULES}::test_everyone_who_waits_for_an_attach_gets_its_real_result",
        "UnmapFromGuest_Success": f"{CONTRACT}::test_an_added_disk_is_mounted_and_a_released_one_is_gone",
        "UnmapFromGuest_UnknownReservation": f"{RULES}::test_a_second_release_of_a_reservation_drops_nothing",
        "UnmapFromGuest_CleansUpSlotWhenFullyDetached": f"{CONTRACT}::test_a_disk_is_added_read_only_and_then_writable",
        "UnmapFromGuest_DetachError": f"{RULES}::test_a_failed_detach_is_gone_on_with_and_never_handed_out",
        "UnmapFromGuest_MultipleReservationsSameDisk": f"{CONTRACT}::test_a_disk_is_shared_until_its_last_release",
        "ReserveAfterUnmap_ReusesSlot": f"{HERE}::test_a_slot_that_was_given_back_is_the_next_disks",
        "UnmapFromGuest_AfterFailedMapToGuest": f"{RULES}::test_a_failed_mount_leaves_nothing_stuck",
        "UnmapFromGuest_RetryAfterDetachFailure": f"{RULES}::test_a_release_that_failed_can_be_repeated_and_finishes",
        "ReserveForRootfs_Success": f"{RULES}::test_a_reserved_slot_is_never_handed_out",
        "ReserveForRootfs_InvalidLocation": f"{RULES}::test_numbers_out_of_range_are_refused",
        "ReserveForRootfs_AlreadyReserved": f"{MOVES}::test_only_a_vm_without_disks_takes_it_and_only_where_it_fits",
        "PublicOps_RejectedWhileMigrating": f"{MOVES}::test_every_change_is_refused_from_the_export_until_resume",
        "Resume_LiftsMigrationGuard": f"{MOVES}::test_resume_lifts_it_on_both_sides",
    },
    "internal/controller/device/scsi/controller_lcow_test.go, controller_wcow_test.go": {
        "MapToGuest_MountError": f"{CONTRACT}::test_an_add_whose_mount_fails_is_undone",
        "UnmapFromGuest_UnmountError": f"{RULES}::test_a_failed_unmount_keeps_the_reference_counts_right",
        "UnmapFromGuest_WindowsGuest": f"{HCS}::test_a_windows_guest_gets_its_own_documents_and_no_eject",
    },
    "internal/controller/device/scsi/save_test.go": {
        "Save_RoundTrip": f"{MOVES}::test_a_vm_moves_with_everything_that_it_has",
        "Save_EmptyRoundTrip": f"{MOVES}::test_an_empty_manager_moves_too",
        "Save_RootfsRoundTrip": f"{MOVES}::test_only_a_vm_without_disks_takes_it_and_only_where_it_fits",  # its own
        "Import_Errors": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",
        "HCSAttachments": "hosts/hcs/test_documents.py::test_the_scsi_part_of_a_document_is_byte_for_byte",
        "UpdateDiskHostPath": f"{MOVES}::test_paths_that_cannot_be_are_refused",
    },
    "internal/controller/device/scsi/disk/disk_test.go": {
        "NewReserved": f"{TABLES}::test_every_state_is_reached_from_the_first",
        "ConfigEquals": f"{HERE}::test_what_differs_in_one_setting_is_not_shared",
        "AttachToVM_FromReserved_Success": f"{HOST}::test_an_attached_disk_is_there_and_a_detached_one_is_not",
        "AttachToVM_FromReserved_Error": f"{CONTRACT}::test_an_add_whose_attach_fails_is_undone",
        "AttachToVM_Idempotent_WhenAttached": f"{CONTRACT}::test_everybody_who_waits_for_an_attach_shares_it",
        "AttachToVM_ErrorWhenDetached": f"{TABLES}::test_events_outside_the_table_are_refused",
        "DetachFromVM_FromAttached_NoMounts": f"{CONTRACT}::test_a_cancelled_add_is_undone",
        "DetachFromVM_RemoveError": f"{RULES}::test_a_failed_detach_is_gone_on_with_and_never_handed_out",
        "DetachFromVM_SkipsWhenMountsExist": f"{CONTRACT}::test_a_second_path_is_a_second_mount_and_goes_by_itself",
        "DetachFromVM_Idempotent_WhenReserved": f"{RULES}::test_giving_up_before_the_attach_frees_the_slot",
        "DetachFromVM_Idempotent_WhenDetached": f"{HOST}::test_detaching_twice_is_detaching_once",
        "ReservePartition_Success": f"{RULES}::test_one_disk_has_several_mounts",
        "ReservePartition_SuccessFromReservedDisk":
            f"{HERE}::test_a_partition_is_asked_for_while_its_disk_is_still_coming",
        "ReservePartition_SamePartitionSameConfig": f"{CONTRACT}::test_a_disk_is_shared_until_its_last_release",
        "ReservePartition_SamePartitionDifferentConfig":
            f"{RULES}::test_one_partition_is_not_mounted_in_two_ways_that_contradict",
        "ReservePartition_ErrorWhenDetached": f"{RULES}::test_a_disk_asked_for_while_it_leaves_comes_back",  # no error
        "MountPartitionToGuest_ErrorWhenNotAttached": f"{TABLES}::test_events_outside_the_table_are_refused",
        "MountPartitionToGuest_PartitionNotFound":
            "real/mounts/test_mount_kinds.py::test_partitions_are_mounted_by_their_number",
        "UnmountPartitionFromGuest_SucceedsWhenNotAttached": f"{GUEST}::test_doing_twice_what_is_done_is_done",
        "UnmountPartitionFromGuest_PartitionNotFound_IsNoOp": f"{GUEST}::test_doing_twice_what_is_done_is_done",
    },
    "internal/controller/device/scsi/disk/disk_lcow_test.go": {
        "DetachFromVM_FromAttached_WithGuest": f"{CONTRACT}::test_an_added_disk_is_mounted_and_a_released_one_is_gone",
        "DetachFromVM_EjectError": f"{RULES}::test_a_release_that_failed_can_be_repeated_and_finishes",
        "MountPartitionToGuest_Success": f"{GUEST}::test_a_disk_is_mounted_unmounted_and_ejected",
        "MountPartitionToGuest_MountError": f"{GUEST}::test_a_refused_mount_leaves_nothing_and_may_be_tried_again",
        "UnmountPartitionFromGuest_Success": f"{GUEST}::test_a_disk_is_mounted_unmounted_and_ejected",
        "UnmountPartitionFromGuest_UnmountError":
            f"{CONTRACT}::test_a_release_that_the_guest_refuses_goes_on_when_it_is_repeated",
        "UnmountPartitionFromGuest_RemovesMountWhenFullyUnmounted":
            f"{CONTRACT}::test_a_second_path_is_a_second_mount_and_goes_by_itself",
        "UnmountPartitionFromGuest_RetryAfterDetachFailure":
            f"{RULES}::test_a_release_that_failed_can_be_repeated_and_finishes",
    },
    "internal/controller/device/scsi/disk/disk_wcow_test.go": {
        "MountPartitionToGuest_Success": f"{HCS}::test_a_windows_guest_gets_its_own_documents_and_no_eject",
        "MountPartitionToGuest_MountError": f"{HERE}::test_a_windows_guest_that_refuses_leaves_nothing",
        "MountPartitionToGuest_FormatWithRefs":
            f"{HCS_GUEST}::test_a_windows_scratch_disk_is_formatted_with_refs_when_all_of_it_is_asked_for",
        "UnmountPartitionFromGuest_Success": f"{HCS}::test_a_windows_guest_gets_its_own_documents_and_no_eject",
        "UnmountPartitionFromGuest_UnmountError": f"{HERE}::test_a_windows_guest_that_refuses_leaves_nothing",
        "UnmountPartitionFromGuest_RemovesMountWhenFullyUnmounted":
            f"{HERE}::test_a_windows_guest_that_refuses_leaves_nothing",
    },
    "internal/controller/device/scsi/disk/save_test.go": {
        "Save_ErrorWhenDetached": f"{MOVES}::test_what_is_half_way_is_not_exported",
        "Save_ReservedDisk_RoundTripsConfig": f"{MOVES}::test_export_waits_for_what_is_under_way",  # it waits
        "Save_IncludesReservedMounts": f"{MOVES}::test_export_waits_for_what_is_under_way",
        "Import_NilReturnsNil": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",
        "Import_NilConfig_UsesDefaults": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",  # no guess
        "Import_SkipsNilMountEntry": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",
        "UpdateHostPath": f"{MOVES}::test_host_paths_can_be_others_there",
        "SaveImport_RoundTrip": f"{MOVES}::test_a_vm_moves_with_everything_that_it_has",
    },
    "internal/controller/device/scsi/mount/mount_test.go": {
        "NewReserved": f"{TABLES}::test_every_state_is_reached_from_the_first",
        "Reserve_SameConfig": f"{CONTRACT}::test_a_disk_is_shared_until_its_last_release",
        "Reserve_DifferentConfig": f"{HERE}::test_what_differs_in_one_setting_is_not_shared",
        "Reserve_WhenMounted": f"{CONTRACT}::test_a_disk_is_shared_until_its_last_release",
        "Reserve_WhenUnmounted": f"{RULES}::test_a_disk_asked_for_while_it_leaves_comes_back",  # it is mounted
        "MountToGuest_Idempotent_WhenMounted": f"{CONTRACT}::test_everybody_who_waits_for_an_attach_shares_it",
        "MountToGuest_ErrorWhenUnmounted": f"{TABLES}::test_events_outside_the_table_are_refused",
        "MountToGuest_Error": f"{RULES}::test_a_failed_mount_leaves_nothing_stuck",
        "UnmountFromGuest_FromReserved_DecrementsRefCount":
            f"{RULES}::test_a_cancelled_waiter_gives_its_reference_back",
        "UnmountFromGuest_ErrorWhenUnmounted": f"{RULES}::test_a_second_release_of_a_reservation_drops_nothing",
        "UnmountFromGuest_MultipleRefs_DoesNotUnmountUntilLastRef":
            f"{CONTRACT}::test_a_disk_is_shared_until_its_last_release",
    },
    "internal/controller/device/scsi/mount/mount_lcow_test.go, mount_wcow_test.go": {
        "ConfigEquals (Linux)": f"{HERE}::test_what_differs_in_one_setting_is_not_shared",
        "ConfigEquals (Linux), options": f"{RULES}::test_options_compare_without_order_and_belong_to_the_caller",
        "ConfigEquals (Windows)": f"{HERE}::test_a_windows_disk_that_is_to_be_formatted_is_not_shared",
        "UnmountFromGuest_Error": f"{HERE}::test_a_windows_guest_that_refuses_leaves_nothing",
        "MountToGuest_Success (Windows)": f"{HCS}::test_a_windows_guest_gets_its_own_documents_and_no_eject",
        "MountToGuest_FormatWithRefs (Windows)":
            f"{HCS_GUEST}::test_a_windows_scratch_disk_is_formatted_with_refs_when_all_of_it_is_asked_for",
    },
    "internal/controller/device/scsi/mount/save_lcow_test.go": {
        "Save_ErrorWhenUnmounted": f"{MOVES}::test_what_is_half_way_is_not_exported",
        "Save_Mounted_RoundTripsConfig": f"{MOVES}::test_a_vm_moves_with_everything_that_it_has",
        "Save_Reserved": f"{MOVES}::test_export_waits_for_what_is_under_way",
        "Import_NilReturnsNil": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",
        "Import_NilConfig_UsesDefaults": f"{MOVES}::test_a_document_that_cannot_be_is_refused_whole",
        "SaveImport_RoundTrip": f"{MOVES}::test_a_vm_moves_with_everything_that_it_has",
    },
    "test/functional/uvm_scsi_test.go": {
        "SCSIAddRemoveLCOW": f"{HERE}::test_64_disks_come_and_go_attached_only_and_mounted",
        "SCSIAddRemoveWCOW": f"{HERE}::test_63_disks_come_and_go_in_a_windows_vm",
        "ParallelScsiOps": f"{REAL}::test_tasks_that_share_disks_at_random_get_the_right_ones_and_lose_nothing",
    },
}
# fmt: on

WHO = Holder(name="test")


@cache
def names_in(file: str) -> set[str]:
    if file in CONTRACTS:
        return {f"test_{name}" for name in CONTRACTS[file]}
    tree = ast.parse((TESTS / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions) and node.name.startswith("test_")}


@pytest.mark.parametrize("file", SCENARIOS)
def test_every_scenario_has_its_test(file: str) -> None:
    for scenario, where in SCENARIOS[file].items():
        module, name = where.split("::")
        assert name in names_in(module), f"{scenario}: there is no {where}"


def test_every_test_here_is_of_a_scenario() -> None:
    used = {where.split("::")[1] for file in SCENARIOS.values() for where in file.values()}
    assert names_in(HERE) - used == {"test_every_scenario_has_its_test", "test_every_test_here_is_of_a_scenario"}


async def test_two_adds_share_a_path_that_was_made_up_until_the_second_release(bench: Bench) -> None:
    one, two = await bench.add("a"), await bench.add("a")
    assert one.guest_path == two.guest_path
    assert list(bench.world.mounts) == [one.guest_path]
    assert len(bench.world.bus) == 1
    await bench.manager.release(one)
    assert list(bench.world.mounts) == [one.guest_path]
    await bench.manager.release(two)
    bench.check_empty()


async def test_one_controller_takes_64_disks_and_no_more(bench: Bench) -> None:
    held = [await bench.add(f"d{number}") for number in range(64)]
    assert [one.slot for one in held] == [Slot(0, number) for number in range(64)]
    with pytest.raises(NoFreeSlot, match="64 of 64") as caught:
        await bench.add("one too many")
    assert len(caught.value.holders) == 64
    bench.check_promises()


async def test_a_slot_that_was_given_back_is_the_next_disks(bench: Bench) -> None:
    one, two = await bench.add("a"), await bench.add("b")
    await bench.manager.release(one)
    three = await bench.add("c", "/c")
    assert (two.slot, three.slot) == (Slot(0, 1), one.slot)
    assert bench.world.bus[three.slot].identity == "file:c"
    assert bench.world.mounts[PurePosixPath("/c")][0] == three.slot
    bench.check_promises()


async def test_a_partition_is_asked_for_while_its_disk_is_still_coming(bench: Bench) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def gate(step: str) -> None:
        if step.startswith("attach"):
            reached.set()
            await go_on.wait()

    bench.world.gate = gate
    first = asyncio.create_task(bench.add("a", "/1", partition=1))
    await reached.wait()
    second = asyncio.create_task(bench.add("a", "/2", partition=2))
    await asyncio.sleep(0)
    go_on.set()
    held = await asyncio.gather(first, second)
    assert {str(path): config.partition for path, (_, config) in bench.world.mounts.items()} == {"/1": 1, "/2": 2}
    assert sum(line.startswith("attach") for line in bench.world.log) == 1
    for one in held:
        await bench.manager.release(one)
    bench.check_empty()


@pytest.mark.parametrize(
    "other",
    [
        MountConfig(read_only=True),
        MountConfig(encryption=ScratchKey()),
        MountConfig(encryption=CallerKey(b"k" * 64)),
        MountConfig(ensure_filesystem=True),
        MountConfig(ensure_filesystem=True, reformat=True),
        MountConfig(filesystem="xfs"),
        MountConfig(block_device=True),
        MountConfig(options=("noatime",)),
        MountConfig(partition=1),
    ],
)
async def test_what_differs_in_one_setting_is_not_shared(bench: Bench, other: MountConfig) -> None:
    """It is another mount, or where the two contradict each other an error; the first mount is left as it is."""
    disk = DiskRequest(host_path="a", read_only=False)
    first = await bench.manager.add(disk, mount=MountConfig(), guest_path=PurePosixPath("/x"), holder=WHO)
    held = [first]
    try:
        held.append(await bench.manager.add(disk, mount=other, guest_path=PurePosixPath("/y"), holder=WHO))
    except ConfigDiffers:
        assert list(bench.world.mounts) == [PurePosixPath("/x")]
    else:
        assert bench.world.mounts[PurePosixPath("/y")] == (first.slot, other)
    assert bench.world.mounts[PurePosixPath("/x")] == (first.slot, MountConfig())
    assert bench.manager.references(first) == len(held)
    for one in held:
        await bench.manager.release(one)
    bench.check_empty()


async def test_64_disks_come_and_go_attached_only_and_mounted(bench: Bench) -> None:
    names = [f"d{number}" for number in range(64)]
    for mounted in (False, True):
        first = await asyncio.gather(*(bench.add(name, mounted=mounted) for name in names))
        again = await asyncio.gather(*(bench.add(name, mounted=mounted) for name in names))
        assert [one.slot for one in first] == [one.slot for one in again]
        assert [one.guest_path for one in first] == [one.guest_path for one in again]
        assert len(bench.world.mounts) == (64 if mounted else 0)
        assert sum(line.startswith("attach") for line in bench.world.log) == 64
        assert await bench.manager.remove_many(first) == [None] * 64
        assert len(bench.world.bus) == 64
        assert await bench.manager.remove_many(again) == [None] * 64
        bench.check_empty()
        assert not bench.world.guest_devices
        bench.world.log.clear()


class WindowsVM:
    """A manager on a Windows VM of HCS's, whose scratch disk is at 0:0."""

    def __init__(self) -> None:
        self.world = HcsWorld(os=GuestOS.WINDOWS, controllers=1)
        self.journal = MemoryJournal()
        host = HcsHost(self.world, disks=self.world.disks, group_access=GroupAccess(), controllers=1)
        guest = HcsGuest(self.world, GuestOS.WINDOWS, is_read_only=host.is_read_only)
        reserved = {Slot(0, 0): "scratch"}
        self.manager = ScsiManager(host, guest, self.journal, controllers=1, reserved=reserved)

    def request(self, name: str, mount: MountConfig | None) -> AddRequest:
        path = f"C:\\{name}.vhdx"
        if self.world.file(path) is None:
            self.world.add_file(path)
        return AddRequest(disk=DiskRequest(host_path=path, read_only=False), mount=mount)

    async def add(self, name: str, mount: MountConfig | None) -> Reservation:
        item = self.request(name, mount)
        return await self.manager.add(item.disk, mount=item.mount, holder=WHO)

    @property
    def records(self) -> list[Record]:
        return self.journal.read()

    def check_empty(self) -> None:
        assert (self.world.bus, self.world.mounts, self.world.harm, self.records) == ({}, {}, [], [])
        assert not any(file.rights for file in self.world.files.values())


async def test_63_disks_come_and_go_in_a_windows_vm() -> None:
    vm = WindowsVM()
    for mount in (None, MountConfig()):
        requests = [vm.request(str(number), mount) for number in range(63)]
        results = await vm.manager.add_many(requests, holder=WHO)
        held = [one for one in results if isinstance(one, Reservation)]
        assert sorted(one.slot for one in held) == [Slot(0, number) for number in range(1, 64)]
        assert len(vm.world.mounts) == (63 if mount else 0)
        with pytest.raises(NoFreeSlot):
            await vm.add("one too many", mount)
        assert await vm.manager.remove_many(held) == [None] * 63
        vm.check_empty()


async def test_a_windows_guest_that_refuses_leaves_nothing() -> None:
    vm = WindowsVM()
    vm.world.fail_next("mount")
    with pytest.raises(GuestRefused):
        await vm.add("a", MountConfig())
    vm.check_empty()
    held = await vm.add("a", MountConfig())
    vm.world.fail_next("unmount")
    with pytest.raises(GuestRefused):
        await vm.manager.release(held)
    assert list(vm.world.mounts.values()) == [held.slot]
    vm.world.fail_next("detach")
    with pytest.raises(HostRefused):
        await vm.manager.release(held)
    assert not vm.world.mounts
    await vm.manager.release(held)
    vm.check_empty()


async def test_a_windows_disk_that_is_to_be_formatted_is_not_shared() -> None:
    vm = WindowsVM()
    plain = await vm.add("a", MountConfig())
    for other in (
        MountConfig(filesystem="refs", ensure_filesystem=True, reformat=True),
        MountConfig(read_only=True),
    ):
        with pytest.raises(ConfigDiffers):
            await vm.add("a", other)
    assert vm.manager.references(plain) == 1
    await vm.manager.release(plain)
    vm.check_empty()
