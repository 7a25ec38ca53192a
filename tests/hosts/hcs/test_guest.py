from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    WrongState,
)
from utilityvm.hosts.hcs.documents import GuestOS
from utilityvm.hosts.hcs.guest import HcsGuest
from utilityvm.scsi.ports import (
    AttachmentType,
    CallerKey,
    DiskFormat,
    DiskRecord,
    MountConfig,
    MountRecord,
    ScratchKey,
    Verity,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.testing.fakes import Break
from utilityvm.testing.hcs import HcsWorld

HEAD = json.loads((Path(__file__).parents[2] / "vectors/hcs_head.json").read_text())

SLOT = Slot(0, 2)
PATH = PurePosixPath("/run/mounts/data")
PLAIN = MountConfig()
SOON = {"timeout_s": 5.0}
NOW = {"timeout_s": 0.0}


@pytest.fixture
def world() -> HcsWorld:
    return world_with(GuestOS.LINUX)


@pytest.fixture
def guest(world: HcsWorld) -> HcsGuest:
    return HcsGuest(world, GuestOS.LINUX)


def world_with(os: GuestOS, *slots: Slot) -> HcsWorld:
    world = HcsWorld(os=os)
    for slot in slots or (SLOT, Slot(1, 2), Slot(0, 3)):
        world.bus[slot] = {"Type": "VirtualDisk", "Path": "C:\\d.vhdx"}
        world.devices.add(slot)
    return world


async def mount(guest: HcsGuest, slot: Slot = SLOT, path: PurePosixPath = PATH, **options: Any) -> None:
    await guest.mount(slot, options.pop("config", PLAIN), guest_path=path, **{**SOON, **options})


async def unmount(guest: HcsGuest, slot: Slot = SLOT, path: PurePosixPath = PATH, **options: Any) -> None:
    await guest.unmount(slot, options.pop("config", PLAIN), guest_path=path, **{**SOON, "force": False, **options})


async def test_a_disk_is_mounted_unmounted_and_ejected(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    assert world.mounts == {str(PATH): SLOT}
    assert await guest.probe_mount(SLOT, guest_path=PATH, **SOON)
    await unmount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, **SOON)
    assert await guest.probe_device(SLOT, **SOON)
    await guest.eject(SLOT, **SOON, force=False)
    assert not await guest.probe_device(SLOT, **SOON)
    assert SLOT not in world.devices
    assert world.harm == []


def config_of(vector: dict[str, Any]) -> MountConfig:
    given = vector["config"]
    return MountConfig(
        partition=given["partition"],
        read_only=given["read_only"],
        options=tuple(given["options"] or ()),
        filesystem=given["filesystem"] or None,
        ensure_filesystem=given["ensure_filesystem"],
        block_device=given["block_dev"],
        encryption=ScratchKey() if given["encrypted"] else None,
        reformat=given["ensure_filesystem"],
    )


# Ours refuses words that have no effect, and paths where the guest may have files; and it names the file system.
OTHERWISE = {
    "linux_mount_options",
    "linux_mount_options_readonly",
    "linux_mount_html",
    "linux_mount_ensure_filesystem_without_name",
}


MOUNTS = [
    vector
    for vector in HEAD["guest"]
    if vector["op"] == "mount"
    and vector["os"] in ("linux", "windows")
    and not vector["config"]["format_with_refs"]
    and vector["controller"] < 4
    and vector["name"] != "windows_mount_block_dev"  # ours refuses what is not sent
    and vector["name"] not in OTHERWISE
]


@pytest.mark.parametrize("vector", MOUNTS, ids=[vector["name"] for vector in MOUNTS])
async def test_it_sends_todays_requests_through_hcs(vector: dict[str, Any]) -> None:
    slot = Slot(vector["controller"], vector["lun"])
    world = world_with(GuestOS(vector["os"]), slot)
    guest = HcsGuest(world, GuestOS(vector["os"]))
    path = PurePosixPath(vector["path"])
    if vector.get("rejected"):
        with pytest.raises(NotSupported):
            await mount(guest, slot, path, config=config_of(vector))
        assert world.sent == []
    else:
        await mount(guest, slot, path, config=config_of(vector))
        assert [sent.json for sent in world.sent] == [vector["hcs_json"]]


async def test_a_windows_guest_is_not_told_to_eject() -> None:
    world = world_with(GuestOS.WINDOWS)
    guest = HcsGuest(world, GuestOS.WINDOWS)
    await guest.eject(SLOT, **SOON, force=False)
    assert world.sent == []
    assert not await guest.probe_device(SLOT, **SOON)


@pytest.mark.parametrize(
    ("path", "known_as"),
    [
        ("C:\\mounts\\scsi\\m0", "C:\\mounts\\scsi\\m0"),
        ("c:/mounts/scsi/m0", "C:\\mounts\\scsi\\m0"),
        ("\\\\?\\C:\\data", "C:\\data"),
        ("\\data", "C:\\data"),
        ("/run/mounts/scsi/0_2_0", "C:\\mounts\\scsi\\0_2_0"),
        ("/data", "C:\\data"),
        ("/D:/data", "D:\\data"),
    ],
)
async def test_a_windows_guest_knows_paths_on_drives(path: str, known_as: str) -> None:
    world = world_with(GuestOS.WINDOWS)
    guest = HcsGuest(world, GuestOS.WINDOWS)
    await mount(guest, path=guest.checked_path(PurePosixPath(path)))
    assert list(world.mounts) == [known_as]


async def test_a_path_in_a_windows_guest_has_many_spellings() -> None:
    world = world_with(GuestOS.WINDOWS)
    guest = HcsGuest(world, GuestOS.WINDOWS)
    await mount(guest, path=PurePosixPath("/Data"))
    for other in ("/data", "/c:/DATA"):
        with pytest.raises(GuestPathInUse, match="/Data"):
            await mount(guest, Slot(0, 3), path=PurePosixPath(other))
    assert len(world.sent) == 1


async def test_a_windows_scratch_disk_is_formatted_with_refs_when_all_of_it_is_asked_for() -> None:
    world = world_with(GuestOS.WINDOWS)
    guest = HcsGuest(world, GuestOS.WINDOWS)
    refs = MountConfig(filesystem="refs", ensure_filesystem=True, reformat=True)
    await mount(guest, config=refs)
    assert "MappedVirtualDiskForContainerScratch" in world.sent[0].json
    await unmount(guest, config=refs)
    with pytest.raises(NotSupported):
        guest.check(None, MountConfig(filesystem="refs", ensure_filesystem=True))


async def test_a_read_only_mount_of_a_writable_disk_cannot_be_had_from_windows() -> None:
    world = world_with(GuestOS.WINDOWS)
    config = MountConfig(read_only=True)
    with pytest.raises(NotSupported, match="cannot be told to mount a writable disk"):
        await mount(HcsGuest(world, GuestOS.WINDOWS, is_read_only=lambda _: False), config=config)
    assert world.sent == []
    await mount(HcsGuest(world, GuestOS.WINDOWS, is_read_only=lambda _: True), config=config)


@pytest.mark.parametrize(
    "config",
    [
        MountConfig(encryption=CallerKey(b"k" * 32)),
        MountConfig(verity=Verity(root_hash=b"h" * 32, hash_offset_bytes=0)),
        MountConfig(ensure_filesystem=True, reformat=True, filesystem="btrfs"),
    ],
)
@pytest.mark.parametrize("os", GuestOS)
def test_what_hcsshim_has_no_words_for_is_refused(config: MountConfig, os: GuestOS) -> None:
    with pytest.raises(NotSupported) as caught:
        HcsGuest(HcsWorld(), os).check(None, config)
    assert caught.value.remedy


def test_what_a_windows_guest_cannot_be_told_is_refused_for_its_slot_too() -> None:
    guest = HcsGuest(HcsWorld(os=GuestOS.WINDOWS), GuestOS.WINDOWS)
    guest.check(None, PLAIN)
    guest.check(Slot(0, 5), PLAIN)
    guest.check(Slot(1, 0), None)  # attached only
    with pytest.raises(NotSupported, match="controller 1"):
        guest.check(Slot(1, 0), PLAIN)


async def test_force_is_refused_before_anything_is_sent(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    sent = len(world.sent)
    with pytest.raises(NotSupported):
        await unmount(guest, force=True)
    with pytest.raises(NotSupported):
        await guest.eject(SLOT, **SOON, force=True)
    with pytest.raises(NotSupported):
        await guest.grow(SLOT, mounts=[], **SOON)
    assert len(world.sent) == sent


# What would do harm is not sent.


async def test_a_path_in_use_is_not_mounted_over(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    with pytest.raises(GuestPathInUse):
        await mount(guest, Slot(0, 3))
    with pytest.raises(GuestPathInUse):
        await mount(guest)
    assert len(world.sent) == 1
    assert world.harm == []


# Where gcs would remove the guest's own files, or another disk's: when a mount fails, and at each unmount.
NOT_FOR_MOUNTS = [
    "/",
    "/etc",
    "/usr/local",
    "/home",
    "/home/u",
    "/opt/app",
    "/var/log/app",
    "/root",
    "/srv/site",
    "/mnt/data",
    "/tmp/x",
    "/run",
    "/run/mounts",
    "/run/mounts/scsi",
    "/run/mounts/../../etc",
    "/run/mountsx/a",
    "/run/gcs/c",
    "/run/gcs/c/c1",
    "/run/gcs/c/c1/rootfs",
    "/run/gcs/c/c1/mounts",
    "/run/layers",
]
FOR_MOUNTS = [
    "/run/mounts/data",
    "/run/mounts/m0",
    "/run/mounts/scsi/m0",
    "/run/mounts/scsi/0_1_0",
    "/run/layers/S1",
    "/run/drivers/d1",
    "/run/gcs/c/0/scsi1",
    "/run/gcs/c/c1/mounts/m0",
    "/data",
]


@pytest.mark.parametrize("path", NOT_FOR_MOUNTS)
async def test_nothing_is_mounted_or_unmounted_where_the_guest_may_have_files(
    guest: HcsGuest, world: HcsWorld, path: str
) -> None:
    with pytest.raises((NotSupported, InvalidRequest)):
        guest.checked_path(PurePosixPath(path))
    with pytest.raises(NotSupported, match="may hold files of the guest's own"):
        await mount(guest, path=PurePosixPath(path))
    with pytest.raises(NotSupported, match="may hold files of the guest's own"):
        await unmount(guest, path=PurePosixPath(path))
    assert world.sent == []


@pytest.mark.parametrize("path", FOR_MOUNTS)
async def test_where_hcsshim_mounts_ours_may(guest: HcsGuest, world: HcsWorld, path: str) -> None:
    assert guest.checked_path(PurePosixPath(path)) == PurePosixPath(path)
    for text in (None, "mounting: no such device"):
        world.gcs.refuse_next = text
        with contextlib.suppress(GuestRefused):
            await mount(guest, path=PurePosixPath(path))
            await unmount(guest, path=PurePosixPath(path))
    assert world.harm == []


async def test_a_caller_may_vouch_for_a_folder(guest: HcsGuest, world: HcsWorld) -> None:
    guest.allow_mounts_below(PurePosixPath("/mnt"))
    path = PurePosixPath("/mnt/mine")
    assert guest.checked_path(path) == path
    await mount(guest, path=path)
    await unmount(guest, path=path)
    with pytest.raises(NotSupported):
        guest.checked_path(PurePosixPath("/mnt"))
    with pytest.raises(InvalidRequest):
        guest.allow_mounts_below(PurePosixPath("/proc"))


@pytest.mark.parametrize("path", [PATH / "below", PATH.parent / "a", PATH])
async def test_no_mount_or_unmount_takes_another_disks_files_along(
    guest: HcsGuest, world: HcsWorld, path: PurePosixPath
) -> None:
    await mount(guest, path=PATH if path != PATH.parent / "a" else path / "below")
    with pytest.raises(GuestPathInUse):
        await mount(guest, Slot(0, 3), path)
    with pytest.raises((GuestPathInUse, InvalidRequest)):
        await unmount(guest, Slot(0, 3), path)
    assert len(world.sent) == 1
    assert world.harm == []


# What its words do there is not what ours say.


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MountConfig(ensure_filesystem=True), "formats a disk that holds anything but ext4"),
        (MountConfig(ensure_filesystem=True, filesystem="ext4"), "formats a disk that holds anything but ext4"),
        (MountConfig(ensure_filesystem=True, filesystem="xfs"), "formats a disk that holds anything, xfs too"),
        (MountConfig(ensure_filesystem=True, encryption=ScratchKey()), "formats each disk that it encrypts"),
        (MountConfig(encryption=ScratchKey()), "formats each disk that it encrypts"),
        (MountConfig(ensure_filesystem=True, reformat=True, filesystem="vfat"), "makes no vfat"),
        (MountConfig(block_device=True, encryption=ScratchKey()), "encrypts no published device"),
        (MountConfig(block_device=True, options=("shared",)), "no options to a published device"),
        (MountConfig(options=("ro",)), "ignores the mount option 'ro'"),
        (MountConfig(options=("rshared", "noexec")), "ignores the mount option 'noexec'"),
        (MountConfig(options=("shared,noexec",)), "ignores the mount option 'shared,noexec'"),
        (MountConfig(options=("made up",)), "ignores the mount option 'made up'"),
    ],
)
async def test_words_that_gcs_takes_otherwise_are_refused(
    guest: HcsGuest, world: HcsWorld, config: MountConfig, why: str
) -> None:
    with pytest.raises(NotSupported, match=why) as caught:
        guest.check(None, config)
    assert caught.value.remedy
    with pytest.raises(NotSupported):
        await mount(guest, config=config)
    assert world.sent == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MountConfig(ensure_filesystem=True, reformat=True), '"EnsureFilesystem":true,"Filesystem":"ext4"'),
        (
            MountConfig(ensure_filesystem=True, reformat=True, filesystem="xfs"),
            '"EnsureFilesystem":true,"Filesystem":"xfs"',
        ),
        (
            MountConfig(ensure_filesystem=True, reformat=True, encryption=ScratchKey()),
            '"Encrypted":true,"EnsureFilesystem":true,"Filesystem":"ext4"',
        ),
        (MountConfig(options=("rshared", "slave")), '"Options":["rshared","slave"]'),
    ],
)
async def test_words_that_gcs_takes_as_they_are_meant_are_sent(
    guest: HcsGuest, world: HcsWorld, config: MountConfig, said: str
) -> None:
    world.gcs.content_at(SLOT).has_data = False
    await mount(guest, config=config)
    await unmount(guest, config=config)
    assert world.harm == []
    assert [said in sent.json for sent in world.sent] == [True, True]
    assert world.gcs.ignored == []


async def test_a_windows_guest_may_mount_below_another() -> None:
    guest = HcsGuest(world_with(GuestOS.WINDOWS), GuestOS.WINDOWS)
    await mount(guest, path=PurePosixPath("/C:/data"))
    await mount(guest, Slot(0, 3), PurePosixPath("/C:/data/below"))


async def test_a_mount_of_unknown_state_is_not_sent_again(guest: HcsGuest, world: HcsWorld) -> None:
    world.fail_next("mount", Break.LOSE_ANSWER)
    with pytest.raises(OutcomeUnknown):
        await mount(guest)
    with pytest.raises(WrongState):
        await mount(guest)
    with pytest.raises(OutcomeUnknown, match="nobody knows"):
        await guest.probe_mount(SLOT, guest_path=PATH, **SOON)
    assert len(world.sent) == 1


async def test_nothing_is_unmounted_after_an_eject(guest: HcsGuest, world: HcsWorld) -> None:
    await guest.eject(SLOT, **SOON, force=False)
    await unmount(guest)
    assert [world.steps(sent.json) for sent in world.sent] == [["eject"]]
    assert world.harm == []


async def test_a_mounted_disk_is_not_ejected(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    with pytest.raises(GuestBusy) as caught:
        await guest.eject(SLOT, **SOON, force=False)
    assert caught.value.holders == (str(PATH),)
    assert len(world.sent) == 1


async def test_nothing_is_mounted_from_a_device_that_may_be_ejected(guest: HcsGuest, world: HcsWorld) -> None:
    world.fail_next("eject", Break.LOSE_ANSWER)
    with pytest.raises(OutcomeUnknown):
        await guest.eject(SLOT, **SOON, force=False)
    with pytest.raises(OutcomeUnknown):
        await mount(guest)
    with pytest.raises(OutcomeUnknown):
        await guest.probe_device(SLOT, **SOON)
    assert world.harm == []


async def test_the_next_disk_of_a_slot_is_mounted_and_ejected_as_the_first(guest: HcsGuest, world: HcsWorld) -> None:
    for _ in range(2):
        world.devices.add(SLOT)
        await mount(guest)
        await unmount(guest)
        await guest.eject(SLOT, **SOON, force=False)
        assert SLOT not in world.devices
    world.devices.add(SLOT)
    await guest.eject(SLOT, **SOON, force=False)  # attached only
    assert SLOT not in world.devices


async def test_anothers_mount_at_the_path_is_left_alone(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    with pytest.raises(InvalidRequest, match="0:2, not the one at 0:3"):
        await unmount(guest, Slot(0, 3))
    assert len(world.sent) == 1
    assert world.mounts == {str(PATH): SLOT}


# Refusals and late answers.


async def test_a_refused_mount_leaves_nothing_and_may_be_tried_again(guest: HcsGuest, world: HcsWorld) -> None:
    world.fail_next("mount")
    with pytest.raises(GuestRefused, match=f"mount {PATH}"):
        await mount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, **SOON)
    await mount(guest)


async def test_a_refused_unmount_leaves_the_mount(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    world.fail_next("unmount")
    with pytest.raises(GuestRefused):
        await unmount(guest)
    assert await guest.probe_mount(SLOT, guest_path=PATH, **SOON)
    await unmount(guest)


async def test_a_refused_eject_leaves_the_device(guest: HcsGuest, world: HcsWorld) -> None:
    world.fail_next("eject")
    with pytest.raises(GuestRefused):
        await guest.eject(SLOT, **SOON, force=False)
    assert await guest.probe_device(SLOT, **SOON)


@pytest.mark.parametrize("how", [None, Break.REFUSE])
async def test_a_late_answer_to_a_mount_is_taken(guest: HcsGuest, world: HcsWorld, how: Break | None) -> None:
    done = world.hold("mount")
    if how:
        world.fail_next("mount", how)
    with pytest.raises(DeadlineExceeded):
        await mount(guest, timeout_s=0.0)
    with pytest.raises(DeadlineExceeded):
        await guest.probe_mount(SLOT, guest_path=PATH, **NOW)
    done.set()
    assert await guest.probe_mount(SLOT, guest_path=PATH, **SOON) is (how is None)


@pytest.mark.parametrize("how", [None, Break.REFUSE])
async def test_a_late_answer_to_an_unmount_is_taken(guest: HcsGuest, world: HcsWorld, how: Break | None) -> None:
    await mount(guest)
    done = world.hold("unmount")
    if how:
        world.fail_next("unmount", how)
    with pytest.raises(DeadlineExceeded):
        await unmount(guest, timeout_s=0.0)
    done.set()
    assert await guest.probe_mount(SLOT, guest_path=PATH, **SOON) is (how is Break.REFUSE)


async def test_a_late_unmount_is_not_sent_twice(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    done = world.hold("unmount")
    with pytest.raises(DeadlineExceeded):
        await unmount(guest, timeout_s=0.0)
    done.set()
    await unmount(guest)
    assert world.log == ["mount", "unmount"]


@pytest.mark.parametrize("how", [None, Break.REFUSE])
async def test_a_late_answer_to_an_eject_is_taken(guest: HcsGuest, world: HcsWorld, how: Break | None) -> None:
    done = world.hold("eject")
    if how:
        world.fail_next("eject", how)
    with pytest.raises(DeadlineExceeded):
        await guest.eject(SLOT, **NOW, force=False)
    done.set()
    assert await guest.probe_device(SLOT, **SOON) is (how is Break.REFUSE)


# Taking over.


def records(mount_state: str) -> tuple[DiskRecord, MountRecord]:
    disk = DiskRecord(
        attachment="a1",
        slot=SLOT,
        host_path="C:\\d.vhdx",
        identity="i",
        kind=AttachmentType.VIRTUAL_DISK,
        format=DiskFormat.VHDX,
        access=VMAccess.NOOP,
        read_only=False,
        size_bytes=1,
        state="attached",
        since=time.time(),
    )
    mounted = MountRecord(
        mount="m1", attachment="a1", guest_path=PATH, config=PLAIN, state=mount_state, since=time.time()
    )
    return disk, mounted


async def test_an_adopted_mount_is_there(guest: HcsGuest, world: HcsWorld) -> None:
    await mount(guest)
    heir = HcsGuest(world, GuestOS.LINUX)
    heir.adopt(records("mounted"))
    assert await heir.probe_mount(SLOT, guest_path=PATH, **SOON)
    with pytest.raises(GuestPathInUse):
        await mount(heir, Slot(0, 3))
    await unmount(heir)
    assert world.mounts == {}


async def test_an_adopted_doubt_stays_one(world: HcsWorld) -> None:
    heir = HcsGuest(world, GuestOS.LINUX)
    heir.adopt(records("mount unknown"))
    with pytest.raises(OutcomeUnknown):
        await heir.probe_mount(SLOT, guest_path=PATH, **SOON)


async def test_what_was_never_sent_is_not_adopted(world: HcsWorld) -> None:
    heir = HcsGuest(world, GuestOS.LINUX)
    heir.adopt(records("reserved"))
    await mount(heir)
