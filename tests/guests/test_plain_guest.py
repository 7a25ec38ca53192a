"""Our host end with a guest that is not ours: hcsshim's gcs, which can be told little and does harm when told wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from pathlib import Path, PurePosixPath

import pytest
import pytest_asyncio

from fake_gcs import FakeGcs
from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    UtilityVMError,
)
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.scsi.ports import (
    AttachmentType,
    CallerKey,
    DiskFormat,
    DiskRecord,
    MountConfig,
    MountRecord,
    Record,
    ScratchKey,
    Verity,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.scsi.transitions import DiskState, MountState

SLOT, OTHER = Slot(0, 1), Slot(1, 2)
PATH = PurePosixPath("/run/mounts/scsi/m0")
PLAIN = MountConfig()


@pytest_asyncio.fixture
async def gcs() -> FakeGcs:
    gcs = FakeGcs()
    gcs.attached = {SLOT, OTHER}
    return gcs


@pytest_asyncio.fixture
async def guest(gcs: FakeGcs, folder: Path) -> AsyncGenerator[BridgeGuest]:
    """It dials us, as the real one does."""
    path = folder / "gcs.sock"
    listening = asyncio.create_task(BridgeGuest.listen(path, timeout_s=20))
    await asyncio.sleep(0)
    reader, writer = await asyncio.open_unix_connection(str(path))
    serving = asyncio.create_task(gcs.serve(reader, writer))
    guest = await listening
    yield guest
    await guest.close()
    await serving
    assert not gcs.harm
    assert not path.exists()


async def mount(guest: BridgeGuest, slot: Slot = SLOT, config: MountConfig = PLAIN, timeout_s: float = 20) -> None:
    await guest.mount(slot, config, guest_path=PATH, timeout_s=timeout_s)


async def unmount(guest: BridgeGuest, slot: Slot = SLOT, config: MountConfig = PLAIN, timeout_s: float = 20) -> None:
    await guest.unmount(slot, config, guest_path=PATH, timeout_s=timeout_s, force=False)


async def eject(guest: BridgeGuest, slot: Slot = SLOT) -> None:
    await guest.eject(slot, timeout_s=20, force=False)


def sent(gcs: FakeGcs) -> list[str]:
    requests = [frame for frame in gcs.received if frame.kind == messages.MODIFY]
    return [frame.payload.decode().partition('"Request":')[2].removesuffix("}\n") for frame in requests]


async def test_a_disk_comes_and_goes(guest: BridgeGuest, gcs: FakeGcs) -> None:
    assert not guest.has_our_agent
    assert guest.boot_id is None
    await mount(guest)
    assert gcs.mounts[str(PATH)] == [SLOT]
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    assert await guest.probe_device(SLOT, timeout_s=1)
    await unmount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    await eject(guest)
    assert not await guest.probe_device(SLOT, timeout_s=1)
    assert SLOT not in gcs.attached


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        # As hcsshim sends them for the same mounts; its newest repeats the settings of a mount in its unmount.
        (MountConfig(), '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1}'),
        (
            MountConfig(read_only=True, options=("rshared",)),
            '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"ReadOnly":true,"Options":["rshared"]}',
        ),
        (
            MountConfig(partition=7, block_device=True),
            '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"Partition":7,"BlockDev":true}',
        ),
        (
            MountConfig(encryption=ScratchKey(), ensure_filesystem=True, reformat=True, filesystem="xfs"),
            '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"Encrypted":true,"EnsureFilesystem":true,'
            '"Filesystem":"xfs"}',
        ),
        (
            MountConfig(ensure_filesystem=True, reformat=True),
            '{"MountPath":"/run/mounts/scsi/m0","Lun":2,"Controller":1,"EnsureFilesystem":true,"Filesystem":"ext4"}',
        ),
    ],
)
async def test_only_what_gcs_knows_is_sent_in_its_order(
    guest: BridgeGuest, gcs: FakeGcs, config: MountConfig, settings: str
) -> None:
    gcs.contents[OTHER].has_data = False
    await mount(guest, OTHER, config)
    await unmount(guest, OTHER, config)
    assert not gcs.ignored
    assert sent(gcs) == [
        f'{{"RequestType":"{what}","ResourceType":"MappedVirtualDisk","Settings":{settings}}}'
        for what in ("Add", "Remove")
    ]


@pytest.mark.parametrize(
    "config",
    [
        MountConfig(encryption=CallerKey(b"k" * 32)),
        MountConfig(verity=Verity(root_hash=b"h", hash_offset_bytes=4096), read_only=True),
        MountConfig(ensure_filesystem=True),
        MountConfig(ensure_filesystem=True, filesystem="xfs"),
        MountConfig(ensure_filesystem=True, reformat=True, filesystem="btrfs"),
        MountConfig(encryption=ScratchKey()),
        MountConfig(encryption=ScratchKey(), ensure_filesystem=True),
        MountConfig(options=("ro",)),
        MountConfig(options=("noexec", "nosuid")),
    ],
)
async def test_what_gcs_cannot_be_told_is_refused_unsent(guest: BridgeGuest, gcs: FakeGcs, config: MountConfig) -> None:
    with pytest.raises(NotSupported):
        guest.check(SLOT, config)
    with pytest.raises(NotSupported):
        await mount(guest, SLOT, config)
    assert not sent(gcs)


async def test_force_and_all_of_ours_are_refused_unsent(guest: BridgeGuest, gcs: FakeGcs) -> None:
    for asking in (
        guest.unmount(SLOT, PLAIN, guest_path=PATH, timeout_s=20, force=True),
        guest.eject(SLOT, timeout_s=20, force=True),
        guest.grow(SLOT, mounts=[], timeout_s=20),
        guest.run(["true"]),
        guest.mounts(),
        guest.info(),
        guest.ping(),
        guest.shutdown(),
    ):
        with pytest.raises(NotSupported):
            await asking
    assert not sent(gcs)


async def test_what_it_never_said_is_unknown(guest: BridgeGuest) -> None:
    with pytest.raises(OutcomeUnknown):
        await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    with pytest.raises(OutcomeUnknown):
        await guest.probe_device(SLOT, timeout_s=1)


async def test_a_second_mount_at_a_path_is_not_sent(guest: BridgeGuest, gcs: FakeGcs) -> None:
    """It would delete every file of the disk, or stack another on it."""
    await mount(guest)
    for slot in (SLOT, OTHER):
        with pytest.raises(GuestPathInUse, match="0:1"):
            await mount(guest, slot)
    assert gcs.mounts[str(PATH)] == [SLOT]


async def test_a_mount_that_was_not_answered_is_not_sent_again(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.silent.set()
    with pytest.raises(DeadlineExceeded):
        await mount(guest, timeout_s=0.02)
    gcs.silent.clear()
    with pytest.raises(OutcomeUnknown, match="may hold"):
        await mount(guest)
    with pytest.raises(OutcomeUnknown):
        await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    with pytest.raises(GuestBusy, match="perhaps mounted"):
        await eject(guest)
    await unmount(guest)
    await mount(guest)
    assert gcs.mounts[str(PATH)] == [SLOT]


async def test_a_mount_that_was_refused_may_be_sent_again(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.refuse_next = "getting device's filesystem: no such file system"
    with pytest.raises(GuestRefused, match=r"0:1 at /run/mounts/scsi/m0: getting device's filesystem"):
        await mount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    await mount(guest)


async def test_a_mount_that_ran_out_of_gcs_own_time_is_unknown(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.refuse_next = "context deadline exceeded"
    with pytest.raises(DeadlineExceeded):
        await mount(guest)
    with pytest.raises(OutcomeUnknown):
        await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)


async def test_a_busy_mount_stays_known(guest: BridgeGuest, gcs: FakeGcs) -> None:
    await mount(guest)
    gcs.busy.add(str(PATH))
    with pytest.raises(GuestBusy, match="device or resource busy"):
        await unmount(guest)
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    gcs.busy.clear()
    await unmount(guest)


async def test_an_unmount_after_the_eject_is_done_without_a_word(guest: BridgeGuest, gcs: FakeGcs) -> None:
    """The real one would wait for ever for the device."""
    await mount(guest)
    await unmount(guest)
    await eject(guest)
    before = len(gcs.received)
    await unmount(guest)
    assert len(gcs.received) == before


async def test_a_slot_used_again_is_told_of_again(guest: BridgeGuest, gcs: FakeGcs) -> None:
    await mount(guest)
    await unmount(guest)
    await eject(guest)
    gcs.attached.add(SLOT)
    await mount(guest)
    await unmount(guest)
    assert len(gcs.received) == 1 + 5


async def test_an_unmount_of_another_disks_path_is_not_sent(guest: BridgeGuest, gcs: FakeGcs) -> None:
    await mount(guest)
    with pytest.raises(InvalidRequest, match="0:1, not the one at 1:2"):
        await unmount(guest, OTHER)
    assert gcs.mounts[str(PATH)] == [SLOT]


async def test_a_mounted_disk_is_not_ejected(guest: BridgeGuest, gcs: FakeGcs) -> None:
    await mount(guest)
    with pytest.raises(GuestBusy, match="mounted at /run/mounts/scsi/m0") as caught:
        await eject(guest)
    assert caught.value.holders == ("mounted at /run/mounts/scsi/m0",)
    assert gcs.attached == {SLOT, OTHER}


@pytest.mark.parametrize("path", ["/etc", "/usr/lib/x", "/home", "/run", "/lib64/a", "/opt/app", "/mnt/x", "/srv/site"])
async def test_where_the_guest_may_have_files_nothing_is_mounted(guest: BridgeGuest, gcs: FakeGcs, path: str) -> None:
    """The real one removes the path, with all that is in it: if the mount fails, and at each unmount."""
    with pytest.raises((InvalidRequest, NotSupported), match=r"guest's (own|system)"):
        guest.checked_path(PurePosixPath(path))
    with pytest.raises(NotSupported, match="the guest's own"):
        await guest.mount(SLOT, PLAIN, guest_path=PurePosixPath(path), timeout_s=20)
    with pytest.raises(NotSupported, match="the guest's own"):
        await guest.unmount(SLOT, PLAIN, guest_path=PurePosixPath(path), timeout_s=20, force=False)
    assert not sent(gcs)


async def test_a_caller_may_vouch_for_a_folder(guest: BridgeGuest, gcs: FakeGcs) -> None:
    guest.allow_mounts_below(PurePosixPath("/mnt"))
    await guest.mount(SLOT, PLAIN, guest_path=guest.checked_path(PurePosixPath("/mnt/mine")), timeout_s=20)
    assert len(sent(gcs)) == 1


@pytest.mark.parametrize("path", [PATH / "below", PATH.parent])
async def test_no_mount_is_made_above_or_below_another(guest: BridgeGuest, gcs: FakeGcs, path: PurePosixPath) -> None:
    """If it failed, the real one would delete what the other disk has there."""
    guest.allow_mounts_below(PurePosixPath("/run/mounts"))
    await mount(guest)
    with pytest.raises(GuestPathInUse, match="overlaps with"):
        await guest.mount(OTHER, PLAIN, guest_path=path, timeout_s=20)
    assert len(sent(gcs)) == 1
    await unmount(guest)
    await guest.mount(OTHER, PLAIN, guest_path=path, timeout_s=20)


async def test_an_eject_without_an_answer_is_told_again_and_nothing_else_is(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.silent.set()
    with pytest.raises(DeadlineExceeded):
        await guest.eject(SLOT, timeout_s=0.02, force=False)
    gcs.silent.clear()
    with pytest.raises(OutcomeUnknown, match="may be ejected"):
        await mount(guest)
    await unmount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    assert len(sent(gcs)) == 1
    assert not await guest.probe_device(SLOT, timeout_s=20)
    gcs.attached.add(SLOT)
    await mount(guest)


async def test_an_eject_that_was_refused_changed_nothing(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.refuse_next = "no"
    with pytest.raises(GuestRefused):
        await eject(guest)
    await mount(guest)
    assert await guest.probe_device(SLOT, timeout_s=1)


def records(disk: DiskState, mounted: MountState) -> list[Record]:
    return [
        DiskRecord(
            attachment="a",
            slot=SLOT,
            host_path="/a",
            identity="a",
            kind=AttachmentType.VIRTUAL_DISK,
            format=DiskFormat.RAW,
            access=VMAccess.NOOP,
            read_only=False,
            size_bytes=1,
            state=disk,
            since=0.0,
        ),
        MountRecord(mount="m", attachment="a", guest_path=PATH, config=PLAIN, state=mounted, since=0.0),
    ]


async def test_an_owner_after_one_that_died_knows_what_that_one_was_told(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.mounts[str(PATH)] = [SLOT]
    guest.adopt(records(DiskState.ATTACHED, MountState.MOUNTED))
    with pytest.raises(GuestPathInUse):
        await mount(guest, OTHER)
    assert await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)
    await unmount(guest)
    await eject(guest)


@pytest.mark.parametrize("state", [MountState.MOUNTING, MountState.UNMOUNTING, MountState.MOUNT_UNKNOWN])
async def test_an_owner_after_one_that_died_does_not_guess(guest: BridgeGuest, gcs: FakeGcs, state: MountState) -> None:
    guest.adopt(records(DiskState.ATTACHED, state))
    for asked in (mount(guest), guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)):
        with pytest.raises(OutcomeUnknown):
            await asked
    assert not sent(gcs)


@pytest.mark.parametrize("state", [DiskState.EJECTING, DiskState.EJECT_UNKNOWN, DiskState.EJECTED, DiskState.DETACHING])
async def test_an_owner_after_one_that_died_ejects_again_what_may_be_there(
    guest: BridgeGuest, gcs: FakeGcs, state: DiskState
) -> None:
    guest.adopt(records(state, MountState.UNMOUNTED))
    await unmount(guest)
    assert not sent(gcs)
    assert not await guest.probe_device(SLOT, timeout_s=20)
    assert len(sent(gcs)) == (state in (DiskState.EJECTING, DiskState.EJECT_UNKNOWN))


async def test_a_gcs_that_dials_again_is_taken_with_all_that_is_known(
    guest: BridgeGuest, gcs: FakeGcs, folder: Path
) -> None:
    await mount(guest)
    assert guest._client
    await guest._client.close()
    reader, writer = await asyncio.open_unix_connection(str(folder / "gcs.sock"))
    serving = asyncio.create_task(gcs.serve(reader, writer))
    with pytest.raises(GuestPathInUse):
        await mount(guest)
    await unmount(guest)  # although this one was negotiated with before, and refuses a second negotiate
    await guest.close()
    await serving
    assert not gcs.mounts[str(PATH)]


async def test_a_connection_that_was_given_is_not_made_again(gcs: FakeGcs) -> None:
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(gcs.serve(*await asyncio.open_connection(sock=theirs)))
    guest = await BridgeGuest.over(*await asyncio.open_connection(sock=ours), timeout_s=20)
    await mount(guest)
    assert guest._client
    await guest._client.close()
    with pytest.raises(UtilityVMError, match="not ours to make again"):
        await unmount(guest)
    await guest.close()
    await serving


# A gcs that was started again, and answers that overtake one another.


async def test_a_gcs_that_was_started_again_is_negotiated_with(guest: BridgeGuest, gcs: FakeGcs) -> None:
    """Its connection stays: QEMU holds the port."""
    await mount(guest)
    for _ in range(3):
        gcs.start_again()
        await unmount(guest)
        gcs.start_again()
        await mount(guest)
    assert gcs.mounts[str(PATH)] == [SLOT]
    assert not guest.has_our_agent


async def test_all_requests_that_meet_a_gcs_that_was_started_again_are_done(guest: BridgeGuest, gcs: FakeGcs) -> None:
    slots = [Slot(0, lun) for lun in range(2, 12)]
    gcs.attached |= set(slots)
    gcs.start_again()
    at = {slot: PurePosixPath(f"/run/mounts/{slot.lun}") for slot in slots}
    await asyncio.gather(*(guest.mount(slot, PLAIN, guest_path=at[slot], timeout_s=20) for slot in slots))
    assert {path: stack for path, stack in gcs.mounts.items() if stack} == {str(at[slot]): [slot] for slot in slots}


async def test_a_guest_that_takes_no_negotiate_refuses(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.takes_no_negotiate = True
    gcs.start_again()
    with pytest.raises(GuestRefused, match="function not supported"):
        await mount(guest)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)


async def test_a_restart_that_is_not_answered_leaves_no_doubt(guest: BridgeGuest, gcs: FakeGcs) -> None:
    """The mount was refused before gcs looked at it, whatever becomes of the negotiate."""
    gcs.start_again()
    gcs.silent_to_negotiates = True
    with pytest.raises(GuestRefused, match="started again"):
        await mount(guest, timeout_s=0.05)
    assert not await guest.probe_mount(SLOT, guest_path=PATH, timeout_s=1)


async def test_answers_may_overtake_one_another(guest: BridgeGuest, gcs: FakeGcs) -> None:
    gcs.hold_next = held = asyncio.Event()
    first = asyncio.create_task(mount(guest))
    while not gcs.mounts:
        await asyncio.sleep(0)
    await guest.mount(OTHER, PLAIN, guest_path=PurePosixPath("/run/mounts/other"), timeout_s=20)
    assert not first.done()
    held.set()
    await first


async def test_the_answer_to_the_first_negotiate_counts_when_that_to_the_second_came_before(gcs: FakeGcs) -> None:
    ours, theirs = socket.socketpair()
    gcs.hold_next = held = asyncio.Event()
    serving = asyncio.create_task(gcs.serve(*await asyncio.open_connection(sock=theirs)))
    client = await BridgeClient.over(await asyncio.open_connection(sock=ours), timeout_s=20)
    assert client.was_negotiated_before
    held.set()
    while client.was_negotiated_before:
        await asyncio.sleep(0)
    assert client.about is None
    await client.close()
    await serving
