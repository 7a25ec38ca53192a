"""The manager on HCS: what hcsshim's manager and controller were recorded to send, ours sends too."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from utilityvm.errors import (
    AlreadyReleased,
    ConfigDiffers,
    DeadlineExceeded,
    GuestPathInUse,
    GuestRefused,
    HostRefused,
    InvalidRequest,
    Migrating,
    NotSupported,
    OutcomeUnknown,
)
from utilityvm.hosts.hcs import clone, savedstate
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.gob import SCSIMount
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.scsi.document import ScsiState
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import AttachmentType, DiskRequest, Holder, MountConfig, ScratchKey, VMAccess
from utilityvm.scsi.reservation import Reservation
from utilityvm.scsi.steps import StepTimeouts
from utilityvm.testing.fakes import Break, MemoryJournal
from utilityvm.testing.hcs import HcsWorld

HEAD = json.loads((Path(__file__).parents[2] / "vectors/hcs_head.json").read_text())

ME = Holder(name="me")
A = "C:\\a.vhdx"


class VM:
    """A manager on a VM of HCS's."""

    def __init__(self, os: GuestOS = GuestOS.LINUX, **timeouts: float) -> None:
        self.world = HcsWorld(os=os)
        for path in (A, "C:\\b.vhdx", "\\\\.\\PHYSICALDRIVE2"):
            self.world.add_file(path)
        self.journal = MemoryJournal()
        self._timeouts = StepTimeouts(**timeouts)
        self._begin()

    def _begin(self) -> None:
        host = HcsHost(self.world, disks=self.world.disks, group_access=GroupAccess())
        guest = HcsGuest(self.world, self.world.os, is_read_only=host.is_read_only)
        host.adopt(self.journal.read())
        guest.adopt(self.journal.read())
        self.host, self.guest = host, guest
        self.manager = ScsiManager(host, guest, self.journal, controllers=4, timeouts=self._timeouts, vm=self.world.id)

    async def inherit(self, *, is_alive: bool) -> list[str]:
        """The owner dies, and another one takes over with what the journal has."""
        self.journal = self.journal.copy()
        self._begin()
        return await self.manager.restore(is_alive=lambda _: is_alive)

    async def moved(self, state: ScsiState) -> VM:
        """The VM on the host that it moved to, where HCS runs it with what it has."""
        there = VM(self.world.os)
        there.world = self.world
        there._begin()
        there.guest.adopt(await there.host.adopt_state(state))
        there.manager.import_state(state, holder=ME)
        return there

    async def add(self, path: str = A, guest_path: str | None = None, **options: Any) -> Reservation:
        mount: MountConfig | None = options.pop("mount", MountConfig())
        request = DiskRequest(**{"host_path": path, "read_only": False, "access": VMAccess.INDIVIDUAL, **options})
        where = None if guest_path is None else PurePosixPath(guest_path)
        return await self.manager.add(request, mount=mount, guest_path=where, holder=ME, timeout_s=5)

    @property
    def sent(self) -> list[str]:
        return [sent.json for sent in self.world.sent]

    def is_as_before(self) -> bool:
        return not (self.world.bus or self.world.mounts or self.world.harm or any(self.rights()))

    def rights(self) -> list[set[str]]:
        return [file.rights for file in self.world.files.values()]


def recorded(sequence: str, *steps: int) -> list[str]:
    """What hcsshim's manager sent to HCS in some of the steps of a sequence, with options that have an effect."""
    found = next(each for each in HEAD["sequences"] if each["name"] == sequence)
    sent = [sent["json"] for step in steps for sent in found["steps"][step]["sent"]]
    return [document.replace('["a","b"]', '["rshared","shared"]') for document in sent]


async def test_adding_and_releasing_sends_what_todays_manager_sends() -> None:
    vm = VM()
    first = await vm.add(guest_path="/run/mounts/scsi/m0", mount=MountConfig(options=("rshared", "shared")))
    assert vm.sent == recorded("lcow_add_release_hcs", 0)
    second = await vm.add(mount=MountConfig(options=("shared", "rshared")))
    partition = await vm.add(guest_path="/run/mounts/scsi/m1", mount=MountConfig(partition=2))
    assert vm.sent == recorded("lcow_add_release_hcs", 0, 1, 2)
    await vm.manager.release(first)
    await vm.manager.release(partition)
    assert vm.sent == recorded("lcow_add_release_hcs", 0, 1, 2, 3, 4)
    await vm.manager.release(second)
    # But for the unmount, which says again all that the mount said.
    expected = recorded("lcow_add_release_hcs", 0, 1, 2, 3, 4, 5)
    expected[-3] = expected[-3].replace('"}}}', '","Options":["rshared","shared"]}}}')
    assert vm.sent == expected
    with pytest.raises(AlreadyReleased):
        await vm.manager.release(second)
    assert vm.is_as_before()


async def test_every_type_of_disk_is_sent_as_todays_manager_sends_it() -> None:
    vm = VM()
    vm.world.file("\\\\.\\PHYSICALDRIVE2").content.has_data = False  # type: ignore[union-attr]
    a = await vm.add(read_only=True, mount=None)
    phys = await vm.add(
        "\\\\.\\PHYSICALDRIVE2",
        "/run/mounts/phys",
        kind=AttachmentType.PASS_THRU,
        mount=XFS,
    )
    evd = await vm.add(
        "evd://space/mnt/x",
        "/run/mounts/scsi/m1",
        read_only=True,
        kind=AttachmentType.EXTENSIBLE_VIRTUAL_DISK,
    )
    with pytest.raises(InvalidRequest):
        await vm.add("evd://bad", kind=AttachmentType.EXTENSIBLE_VIRTUAL_DISK)
    for reservation in (a, phys, evd):
        await vm.manager.release(reservation)
    expected = recorded("lcow_attach_only_physical_and_evd", *range(7))
    expected = [doc.replace('"/phys"', '"/run/mounts/phys"') for doc in expected]
    # Recorded with a connection to the guest; without one HCS hands the guest's part on.
    expected = [doc if doc.startswith('{"ResourcePath"') else f'{{"GuestRequest":{doc}}}' for doc in expected]
    unmount_phys = next(
        doc for doc in expected if '"Remove","ResourceType":"MappedVirtualDisk"' in doc and "/phys" in doc
    )
    again = unmount_phys.replace('"Lun":1', '"Lun":1,"Encrypted":true,"EnsureFilesystem":true,"Filesystem":"xfs"')
    assert vm.sent == [again if doc == unmount_phys else doc for doc in expected]
    assert vm.is_as_before()


REFS = MountConfig(filesystem="refs", ensure_filesystem=True, reformat=True)
XFS = MountConfig(encryption=ScratchKey(), ensure_filesystem=True, reformat=True, filesystem="xfs")

# The recorded sequences of hcsshim's controller in which nothing fails: what is added, and how it is released.
SEQUENCES: dict[tuple[str, str], tuple[list[dict[str, Any]], list[int]]] = {
    ("map_unmap_plain", "linux"): ([{}], [0]),
    ("map_unmap_partition_readonly", "linux"): ([{"mount": MountConfig(partition=2, read_only=True)}], [0]),
    ("map_unmap_encrypted_xfs", "linux"): ([{"mount": XFS}], [0]),
    ("map_unmap_block_dev", "linux"): ([{"mount": MountConfig(partition=1, block_device=True)}], [0]),
    ("shared_and_partitions", "linux"): (
        [{"path": "a", "mount": MountConfig(partition=number)} for number in (1, 1, 2)],
        [0, 2, 1],
    ),
    ("types", "linux"): (
        [
            {"path": "\\\\.\\PHYSICALDRIVE2", "read_only": True, "kind": AttachmentType.PASS_THRU},
            {"path": "evd://space/mnt/x", "kind": AttachmentType.EXTENSIBLE_VIRTUAL_DISK},
        ],
        [0, 1],
    ),
    ("map_unmap_plain", "windows"): ([{}], [0]),
    ("map_unmap_format_with_refs", "windows"): ([{"mount": REFS}], [0]),
    ("types", "windows"): (
        [
            {"path": "\\\\.\\PHYSICALDRIVE2", "read_only": True, "kind": AttachmentType.PASS_THRU},
            {"path": "evd://space/mnt/x", "kind": AttachmentType.EXTENSIBLE_VIRTUAL_DISK},
        ],
        [0, 1],
    ),
}


@pytest.mark.parametrize(("name", "os"), SEQUENCES, ids=" ".join)
async def test_the_controllers_sequences_are_byte_for_byte(name: str, os: str) -> None:
    found = next(each for each in HEAD["controller"]["sequences"] if (each["name"], each["os"]) == (name, os))
    expected = [(sent["to"], sent["json"]) for step in found["steps"] for sent in step["sent"]]
    disks, order = SEQUENCES[name, os]
    vm = VM(GuestOS(os))
    vm.world.file(A).content.has_data = False  # type: ignore[union-attr]
    reservations = []
    for disk in disks:
        # The recording has the relative path "a", which ours refuses: HCS would look for it in its own folder.
        options = {**disk, "path": A} if disk.get("path") == "a" else disk
        reservations.append(await vm.add(**options))
    for number in order:
        await vm.manager.release(reservations[number])
    sent = vm.sent
    if disks[0].get("path") == "a":
        sent = [document.replace('"C:\\\\a.vhdx"', '"a"') for document in sent]
    assert sent == [document if to == "hcs" else f'{{"GuestRequest":{document}}}' for to, document in expected]
    assert vm.is_as_before()


async def test_one_file_by_another_spelling_is_one_attachment() -> None:
    vm = VM()
    first = await vm.add()
    second = await vm.add("\\\\?\\c:\\.\\A.VHDX")
    assert len(vm.world.bus) == 1
    await vm.manager.release(first)
    assert len(vm.world.bus) == 1
    await vm.manager.release(second)
    assert vm.is_as_before()


async def test_a_conflicting_request_is_refused_and_nothing_is_sent() -> None:
    vm = VM()
    await vm.add(guest_path="/run/mounts/1")
    sent = len(vm.sent)
    with pytest.raises(ConfigDiffers):
        await vm.add(read_only=True)
    with pytest.raises(GuestPathInUse):
        await vm.add("C:\\b.vhdx", "/run/mounts/1")
    assert len(vm.sent) == sent


@pytest.mark.parametrize(("step", "error"), [("attach", HostRefused), ("mount", GuestRefused)], ids=["attach", "mount"])
async def test_a_failed_add_leaves_nothing(step: str, error: type[Exception]) -> None:
    vm = VM()
    vm.world.fail_next(step)
    with pytest.raises(error):
        await vm.add()
    assert vm.is_as_before()
    await vm.add()
    assert len(vm.world.bus) == 1


@pytest.mark.parametrize("step", ["unmount", "eject", "detach"])
async def test_a_failed_release_goes_on_where_it_stopped(step: str) -> None:
    vm = VM()
    reservation = await vm.add()
    vm.world.fail_next(step)
    with pytest.raises((GuestRefused, HostRefused)):
        await vm.manager.release(reservation)
    await vm.manager.release(reservation)
    assert vm.is_as_before()
    assert [kind for kind in vm.world.log if kind in ("unmount", "eject", "detach")] == ["unmount", "eject", "detach"]


@pytest.mark.parametrize("how", [Break.LOSE_REQUEST, Break.LOSE_ANSWER])
@pytest.mark.parametrize("step", ["attach", "detach"])
async def test_a_lost_answer_of_hcs_is_found_out(step: str, how: Break) -> None:
    vm = VM()
    vm.world.fail_next(step, how)
    try:
        await vm.manager.release(await vm.add())
    except OutcomeUnknown:
        assert vm.is_as_before()
        await vm.manager.release(await vm.add())
    assert vm.is_as_before()


async def test_a_slow_attach_costs_its_slot_only_until_it_is_done() -> None:
    vm = VM(attach=0.01, probe=0.01)
    done = vm.world.hold("attach")
    with pytest.raises((DeadlineExceeded, OutcomeUnknown)):
        await vm.add()
    with pytest.raises((DeadlineExceeded, OutcomeUnknown)):
        await vm.add()
    done.set()
    await vm.manager.release(await vm.add())
    assert vm.is_as_before()


async def test_a_windows_guest_gets_its_own_documents_and_no_eject() -> None:
    vm = VM(GuestOS.WINDOWS)
    reservation = await vm.add(guest_path="/C:/mounts/scsi/0_0_0")
    await vm.manager.release(reservation)
    found = next(
        each for each in HEAD["controller"]["sequences"] if (each["name"], each["os"]) == ("map_unmap_plain", "windows")
    )
    expected = [sent["json"] for step in found["steps"] for sent in step["sent"]]
    assert vm.sent == [doc if doc.startswith('{"ResourcePath"') else f'{{"GuestRequest":{doc}}}' for doc in expected]
    assert vm.is_as_before()


async def test_what_a_windows_guest_cannot_do_is_refused_before_anything_is_sent() -> None:
    vm = VM(GuestOS.WINDOWS)
    for config in (MountConfig(partition=1), MountConfig(options=("ro",)), MountConfig(filesystem="ext4")):
        with pytest.raises(NotSupported):
            await vm.add(mount=config)
    assert (vm.sent, vm.world.log) == ([], [])


async def test_a_windows_guest_gets_no_mount_beyond_its_first_controller() -> None:
    vm = VM(GuestOS.WINDOWS)
    for number in range(64):
        vm.world.add_file(f"C:\\{number}.vhdx")
        await vm.add(f"C:\\{number}.vhdx", mount=None)
    sent = len(vm.sent)
    with pytest.raises(NotSupported, match="controller 1"):
        await vm.add()
    assert len(vm.sent) == sent
    reservation = await vm.add(mount=None)
    assert len(vm.world.bus) == 65
    await vm.manager.release(reservation)


async def test_every_slot_of_four_controllers_is_used() -> None:
    vm = VM()
    reservations = []
    for number in range(256):
        vm.world.add_file(f"C:\\{number}.vhdx")
        reservations.append(await vm.add(f"C:\\{number}.vhdx", read_only=True))
    assert len(vm.world.bus) == 256
    await vm.manager.remove_many(reservations, timeout_s=20)
    assert vm.is_as_before()


async def test_a_new_owner_takes_over_what_is_there() -> None:
    vm = VM()
    await vm.add(guest_path="/run/mounts/data")
    await vm.add("C:\\b.vhdx", mount=None, read_only=True)
    sent = len(vm.sent)
    assert await vm.inherit(is_alive=True) == []
    assert len(vm.sent) == sent
    assert await vm.manager.remove_many(vm.manager.reservations()) == [None, None]
    assert vm.is_as_before()


async def test_a_new_owner_gives_back_what_a_dead_one_held() -> None:
    vm = VM()
    await vm.add()
    await vm.inherit(is_alive=False)
    assert vm.is_as_before()


@pytest.mark.parametrize("step", ["attach", "unmount", "eject", "detach"])
@pytest.mark.parametrize("happened", [True, False])
async def test_a_new_owner_finishes_what_the_old_one_began(step: str, happened: bool) -> None:
    vm = VM()
    held = vm.world.hold(step)
    working = asyncio.ensure_future(_add_and_release(vm))
    while not any(step in vm.world.steps(document) for document in vm.sent):
        await asyncio.sleep(0)
    if happened:
        held.set()
        while step not in vm.world.log:
            await asyncio.sleep(0)
    journal = vm.journal.copy()  # as it is when the owner dies, before it hears of the answer
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    vm.journal = journal
    del vm.world.held[step]
    await vm.inherit(is_alive=False)
    if step == "unmount":
        # Nobody can ask this guest whether it is mounted, so the disk stays as it is, and is seen.
        assert [view.state for view in vm.manager.slots()] == ["attached"]
        assert vm.world.harm == []
    else:
        assert vm.is_as_before()


async def _add_and_release(vm: VM) -> None:
    await vm.manager.release(await vm.add())


@pytest.mark.parametrize("os", GuestOS)
@pytest.mark.parametrize("access", VMAccess)
async def test_a_vm_that_moves_keeps_its_disks(os: GuestOS, access: VMAccess) -> None:
    vm = VM(os)
    vm.world.file(A).rights |= {"group", vm.world.id}  # type: ignore[union-attr]
    vm.world.file("C:\\b.vhdx").rights |= {"group", vm.world.id}  # type: ignore[union-attr]
    reservations = [await vm.add(guest_path="/run/mounts/data", access=access), await vm.add("C:\\b.vhdx", mount=None)]
    state = ScsiState.from_json((await vm.manager.export_state()).to_json())
    sent = len(vm.sent)
    there = await vm.moved(state)
    with pytest.raises(Migrating):
        await there.add("\\\\.\\PHYSICALDRIVE2", kind=AttachmentType.PASS_THRU, mount=None)
    assert await there.manager.resume() == []
    assert len(vm.sent) == sent
    assert there.manager.slots() == [replace(view, phases={}) for view in vm.manager.slots()]
    for reservation in reservations:
        await there.manager.release(reservation.id)
    assert (vm.world.bus, vm.world.mounts, vm.world.harm) == ({}, {}, [])
    if access is VMAccess.INDIVIDUAL:
        assert there.rights() == [{"group"}, {"group"}, set()]


async def test_what_hcsshim_saved_is_gone_on_with() -> None:
    vm = VM()
    vm.world.file(A).rights.add(vm.world.id)  # type: ignore[union-attr]
    await vm.add(guest_path="/run/mounts/scsi/0_0_1", mount=MountConfig(partition=1), access=VMAccess.NOOP)
    payload = next(each for each in HEAD["controller"]["save_payloads"] if each["name"] == "one_mapped")
    saved = savedstate.decode(bytes.fromhex(payload["payload_hex"]))
    state, reserved = savedstate.to_state(saved, disks=vm.world.disks, holder="pods")
    assert reserved == {}
    there = await vm.moved(state)
    assert await there.manager.resume() == []
    await there.manager.release(payload["reservation"])
    assert (vm.world.bus, vm.world.mounts, vm.world.harm) == ({}, {}, [])


async def test_a_vms_disks_become_a_template() -> None:
    vm = VM()
    await vm.add(guest_path="/run/mounts/data")
    await vm.add("C:\\b.vhdx", mount=None, read_only=True)
    config = clone.template_config("vm-1", clone.mounts_of(vm.journal.read()))
    assert clone.load(clone.save(config)).mounts == (
        SCSIMount(host_path=A, uvm_path="/run/mounts/data", controller=0, lun=0),
        SCSIMount(host_path="C:\\b.vhdx", controller=0, lun=1, read_only=True),
    )


@pytest.mark.parametrize(
    "mounts",
    [[MountConfig(partition=1)], [XFS], [MountConfig(), MountConfig(partition=2)]],
)
async def test_what_a_template_cannot_say_is_refused(mounts: list[MountConfig]) -> None:
    vm = VM()
    for mount in mounts:
        await vm.add(mount=mount)
    with pytest.raises(NotSupported):
        clone.mounts_of(vm.journal.read())
