"""Mounts and what is made for them, on SCSI disks, mounts and mappings that are imitated."""

from __future__ import annotations

import base64
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_guest import LUN, MIB, World, refused, seen, soon
from utilityvm.agent import content, disks, filesystems, holders, mounting
from utilityvm.agent.faults import Fault

RDONLY, NOATIME, SHARED = 1, 1024, 1 << 20  # linux/mount.h
KEY = base64.b64encode(bytes(range(64))).decode()


# Mounting.


def test_a_disk_is_mounted_and_unmounted_and_leaves_nothing(world: World) -> None:
    node = world.attach()
    world.add()
    there = seen(world, world.path())
    assert (there.filesystem, there.source, there.flags) == ("ext4", node, 0)
    assert world.table.mounts() == [
        {"MountPath": world.path(), "Controller": 0, "Lun": LUN, "Partition": 0, "Filesystem": "ext4"}
    ]
    assert not list(world.state.parent.glob("*.notes"))
    world.remove()
    assert world.is_clean()
    assert f"sync {world.path()}" in world.kernel.asked
    world.remove()


def test_a_partition_is_mounted_by_its_number(world: World) -> None:
    node = world.attach(partitions=((1, 8), (9, 8)))
    world.add(Partition=2)
    assert seen(world, world.path()).source == f"{node}2"
    assert world.table.mounts()[0]["Partition"] == 2


def test_a_mount_is_made_with_its_options(world: World) -> None:
    world.attach()
    world.add(ReadOnly=True, Options=["noatime", "shared,commit=7"])
    there = seen(world, world.path())
    assert there.flags == RDONLY | NOATIME
    assert there.options.startswith("commit=7,")
    assert there.propagation == [SHARED]


def test_a_file_system_that_is_said_is_not_looked_for(world: World) -> None:
    world.attach(holds="")
    world.add(Filesystem="xfs")
    assert seen(world, world.path()).filesystem == "xfs"


@pytest.mark.parametrize(
    ("settings", "said", "kind"),
    [
        ({}, rf"is on the disk at 0:{LUN}: it looks blank", "no_filesystem"),
        ({"Utilityvm": {"Key": KEY}}, rf"shows on the disk at 0:{LUN} with this key", "refused"),
    ],
)
def test_a_disk_without_a_file_system_is_refused_and_nothing_is_left(
    world: World, settings: dict[str, Any], said: str, kind: str
) -> None:
    world.attach(holds="")
    refused(lambda: world.add(**settings), said, kind)
    assert world.is_clean()


def test_the_partition_that_has_no_file_system_is_named(world: World) -> None:
    world.attach(partitions=((1, 8),), holds="")
    refused(lambda: world.add(Partition=1), f"on the disk at 0:{LUN} partition 1: ", "no_filesystem")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"Controller": 1}, "no SCSI controller 1: the VM has 1"),
        ({"Controller": -1}, "no SCSI controller -1"),
        ({"Lun": 64}, "no LUN 64: they go from 0 to 63"),
        ({"Lun": -1}, "no LUN -1"),
        ({"Partition": -1}, "partition -1"),
        ({"Partition": 1.0}, r"partition 1\.0"),
        ({"MountPath": ""}, "a MountPath is needed"),
        ({"MountPath": 7}, "a MountPath is needed"),
        ({"MountPath": "/usr/x"}, "the guest path '/usr/x' belongs to the guest's system"),
        ({"Options": ["bind"]}, "the mount option bind"),
        ({"Utilityvm": {"Verity": {}}}, "dm-verity needs a read-only mount"),
        ({"Utilityvm": {"Key": "%"}}, "Key is not base64"),
        ({"Utilityvm": {"Key": None}}, "Key is not base64"),
        ({"Utilityvm": {"Key": "AAAA"}}, "a key of 3 bytes: 32 or 64 are needed"),
        ({"EnsureFilesystem": True, "ReadOnly": True}, "made on a read-only disk"),
    ],
)
def test_what_is_invalid_is_refused_and_leaves_nothing(world: World, settings: dict[str, Any], said: str) -> None:
    world.attach()
    refused(lambda: world.add(**settings), said, "invalid")
    assert world.is_clean()
    assert not world.mapper.mappings


def test_the_last_lun_is_one(world: World) -> None:
    refused(lambda: world.table.add({"MountPath": world.path(), "Lun": 63}, 0.0), "no disk came at", "timeout")


def test_a_bind_mount_of_the_systems_is_not_mounted_over(world: World) -> None:
    world.kernel.add(world.path("shown"), "overlay", "overlay", root="/etc")
    refused(lambda: world.add("shown/x"), "belongs to the guest's system: a bind mount shows /etc there", "invalid")


# A path holds one mount.


def test_a_path_of_ours_is_not_mounted_over(world: World) -> None:
    world.attach()
    world.attach(2)
    world.add()
    fault = refused(lambda: world.add(Lun=2), "is in use", "busy")
    assert fault.holders == [f"a mount at {world.path()}"]
    assert seen(world, world.path()).source.endswith("sdb")


def test_what_somebody_else_mounted_is_neither_mounted_over_nor_unmounted(world: World) -> None:
    world.attach()
    world.kernel.add(world.path(), "tmpfs", "x")
    fault = refused(world.add, "holds a mount already", "busy")
    assert fault.holders == [f"a mount at {world.path()}"]
    refused(world.remove, "holds a mount that is not ours")
    assert world.kernel.at(world.path())
    refused(world.add, "holds a mount already", "busy")


@pytest.mark.parametrize("where", [{"Lun": 2}, {"Controller": 1, "Lun": LUN}, {"Controller": 0}])
def test_the_mount_of_another_disk_is_not_unmounted(world: World, where: dict[str, int]) -> None:
    world.attach()
    world.add()
    settings = {"MountPath": world.path(), **where}
    refused(lambda: world.table.remove(settings, soon()), f"holds the disk at 0:{LUN}, which is another", "invalid")
    assert world.table.mounts()
    world.table.remove({"MountPath": world.path(), "Lun": LUN}, soon())
    assert world.is_clean()


def test_a_request_waits_for_another_on_the_same_disk_and_no_longer_than_its_time(world: World) -> None:
    world.attach()
    world.attach(2)
    with world.table._slot(0, LUN, soon()):
        settings = {"MountPath": world.path(), "Lun": LUN}
        refused(lambda: world.table.add(settings, 0.0), f"another request on the disk at 0:{LUN} does", "timeout")
        world.add("other", Lun=2)
        waiting = threading.Thread(target=world.add)
        waiting.start()
    waiting.join(20)
    assert len(world.table.mounts()) == 2


def test_of_two_requests_for_one_path_one_is_refused_while_the_other_is_at_it(world: World) -> None:
    world.attach()
    with world.table._claim(Path(world.path())):  # type: ignore[arg-type]
        refused(world.add, "is in use", "busy")
    world.add()


# What fails is undone.


def test_a_mount_that_the_kernel_refuses_leaves_nothing(world: World) -> None:
    world.attach()
    for settings in ({}, {"BlockDev": True}, {"Filesystem": "ext4", "Utilityvm": {"Key": KEY}}):
        world.kernel.refuses = [errno.EINVAL]
        refused(lambda settings=settings: world.add(**settings), "Invalid argument")  # type: ignore[misc]
        assert world.is_clean()
    world.add()


def test_a_mount_that_cannot_be_noted_is_taken_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.attach()

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.table, "_save", fail)
        with pytest.raises(OSError, match="No space"):
            world.add()
    assert world.kernel.at(world.path()) is None
    assert not list(world.guest.iterdir())
    assert not list(world.state.parent.glob("*.notes"))


# Keys, trees and devices.


@pytest.mark.parametrize("read_only", [False, True])
def test_an_encrypted_disk_is_mounted_through_its_mapping(world: World, read_only: bool) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY}, ReadOnly=read_only)
    (mapping,) = world.mapper.mappings.values()
    assert mapping.table
    assert (mapping.table.kind, mapping.table.sectors, mapping.table.read_only) == ("crypt", 65536, read_only)
    assert bytes(range(64)).hex() in mapping.table.text
    assert seen(world, world.path()).source == f"{world.bus.dev}/dm-0"
    world.remove()
    assert world.is_clean()


@pytest.mark.parametrize("settings", [{"Encrypted": True}, {"Utilityvm": {"Scratch": True}}])
def test_a_scratch_disk_has_a_key_of_its_own_each_time(world: World, settings: dict[str, Any]) -> None:
    keys = set()
    for lun in (1, 2):
        world.attach(lun)
        world.add(f"m{lun}", Lun=lun, **settings)
    for mapping in world.mapper.mappings.values():
        assert mapping.table
        keys.add(mapping.table.text.split()[1])
    assert {len(key) for key in keys} == {128}
    assert len(keys) == 2


def test_a_verified_disk_is_mapped_below_its_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.attach()
    verity = {"RootHash": "ab" * 32, "HashOffset": 16 * MIB, "DataBlocks": 4096, "BlockSize": 4096}
    world.mapper.device(f"{world.bus.dev}/dm-0", "253:0")
    verity |= {"Salt": "", "Algorithm": "sha256"}
    world.add(ReadOnly=True, Utilityvm={"Verity": verity, "Key": KEY})
    kinds = [mapping.table.kind for mapping in world.mapper.mappings.values() if mapping.table]
    assert kinds == ["verity", "crypt"]
    assert seen(world, world.path()).source == f"{world.bus.dev}/dm-1"
    world.remove()
    assert world.is_clean()


def test_a_device_is_published_as_a_file(world: World) -> None:
    node = world.attach(holds="")
    world.add(BlockDev=True)
    assert seen(world, world.path()).root == f"/{Path(node).name}"
    assert Path(world.path()).is_file()
    assert world.table.mounts()[0]["Filesystem"] == ""
    world.remove()
    assert world.is_clean()
    assert f"sync {world.path()}" not in world.kernel.asked


# File systems are made.


def test_a_blank_disk_gets_ext4_unless_another_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def ensure(node: str, filesystem: str, *, below: Any, reformat: bool, deadline: float) -> None:
        asked.append((node, filesystem, reformat))

    monkeypatch.setattr(filesystems, "ensure", ensure)
    node = world.attach(holds="")
    world.add("a", EnsureFilesystem=True)
    world.add("b", EnsureFilesystem=True, Filesystem="xfs", Utilityvm={"Reformat": True})
    world.add("c", EnsureFilesystem=True, BlockDev=True)
    assert asked == [(node, "ext4", False), (node, "xfs", True), (node, "ext4", False)]
    assert [one["Filesystem"] for one in world.table.mounts()] == ["ext4", "xfs", ""]


@pytest.mark.parametrize("wrong", ["a file is there", "below a file", "an option"])
def test_what_cannot_be_mounted_is_refused_before_anything_is_formatted(
    world: World, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def refuse(filesystem: str, how: object) -> None:
        raise Fault(f"{filesystem} does not take it")

    node = world.attach()
    before = Path(node).read_bytes()
    Path(world.path("file")).touch()
    if wrong == "an option":
        monkeypatch.setattr(mounting, "check_options", refuse)
    name = {"a file is there": "file", "below a file": "file/below", "an option": "a"}[wrong]
    with pytest.raises((Fault, OSError)):
        world.add(name, EnsureFilesystem=True, Utilityvm={"Reformat": True})
    assert Path(node).read_bytes() == before
    assert not Path(world.path("a")).exists()


def test_a_new_file_system_is_really_there(world: World) -> None:
    node = world.attach(holds="")
    world.add(EnsureFilesystem=True, Utilityvm={"Key": KEY})
    assert content.of(node, soon()).filesystem == "ext4"
    assert seen(world, world.path()).filesystem == "ext4"


@pytest.mark.parametrize(
    ("partition", "with_it", "users"),
    [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 2, 0), (2, 1, 0)],
)
def test_a_device_that_was_published_is_in_use(
    world: World, monkeypatch: pytest.MonkeyPatch, partition: int, with_it: int, users: int
) -> None:
    """The whole disk is in use by its parts, and a part by the whole disk."""
    found: list[list[str]] = []
    monkeypatch.setattr(
        filesystems, "ensure", lambda node, filesystem, *, below, reformat, deadline: found.append(below.users())
    )
    monkeypatch.setattr(holders, "of_device", lambda node, sysfs, numbers: [])
    world.attach(partitions=((1, 8), (9, 8)))
    world.add("published", Partition=with_it, BlockDev=True)
    world.add("made", Partition=partition, EnsureFilesystem=True)
    assert found == [[f"published at {world.path('published')}"] * users]


@pytest.mark.parametrize(("partition", "numbers"), [(0, {(8, 16), (8, 17), (8, 18)}), (1, {(8, 17)}), (2, {(8, 18)})])
def test_who_uses_a_disk_is_asked_with_its_partitions(
    world: World, monkeypatch: pytest.MonkeyPatch, partition: int, numbers: set[tuple[int, int]]
) -> None:
    asked: list[tuple[str, set[tuple[int, int]]]] = []

    def of_device(node: str, sysfs: str, numbers: set[tuple[int, int]]) -> list[str]:
        assert sysfs.endswith(f"/{Path(node).name}")
        asked.append((node, numbers))
        return ["somebody"]

    monkeypatch.setattr(holders, "of_device", of_device)
    node = world.attach(partitions=((1, 8), (9, 8)), holds="")
    fault = refused(lambda: world.add(EnsureFilesystem=True, Partition=partition), "in use: somebody; it was not")
    assert fault.remedy
    assert asked == [(f"{node}{partition or ''}", numbers)]


def test_below_a_key_who_uses_the_disk_is_asked_before_it_is_mapped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        holders, "of_device", lambda node, sysfs, numbers: ["our own mapping"] * len(world.mapper.mappings)
    )
    world.attach(holds="")
    world.add(EnsureFilesystem=True, Utilityvm={"Key": KEY})


@pytest.mark.parametrize(
    ("told", "partition", "written", "ranges"),
    [
        ([[2 * MIB, MIB]], 0, False, [(2 * MIB, MIB)]),
        ([[2 * MIB, MIB]], 1, False, [(MIB, MIB)]),
        ([[0, 2 * MIB]], 1, False, [(0, MIB)]),
        ([[0, MIB], [9 * MIB, MIB]], 1, False, []),
        ([[8 * MIB, 8 * MIB]], 1, False, [(7 * MIB, MIB)]),
        ([], 0, False, []),
        ([[2 * MIB, MIB]], 0, True, None),
        (None, 0, False, None),
        ("", 0, False, None),
        ([[-1, 2]], 0, False, None),
        ([[1, -2]], 0, False, None),
        ([[1, 2, 3]], 0, False, None),
        ([[0, 0]], 0, False, []),
    ],
)
def test_what_the_host_knows_of_a_disk_is_believed_of_the_part_until_it_was_written(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    told: Any,
    partition: int,
    written: bool,
    ranges: list[tuple[int, int]] | None,
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(
        filesystems, "ensure", lambda node, filesystem, *, below, reformat, deadline: found.append(below.may_hold)
    )
    world.attach(partitions=((1, 8),), holds="")
    if written:
        (world.bus.folder(LUN) / "block/sdb/stat").write_text("0 0 0 0 1 0 8 0 0 0 0 0 0 0 0\n")
    world.add(EnsureFilesystem=True, Partition=partition, Utilityvm={"MayHold": told})
    assert found == [ranges]


# Unmounting what is used.


def test_a_busy_mount_stays_and_its_users_are_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.attach()
    world.add()
    world.kernel.busy[world.path()] = -1
    monkeypatch.setattr(holders, "of_mount", lambda path: [f"one at {path}", "two"])
    fault = refused(world.remove, "is in use: one at .*, and 1 more$", "busy")
    assert fault.holders == [f"one at {world.path()}", "two"]
    assert world.kernel.at(world.path())
    assert len(world.table.mounts()) == 1


def test_a_mount_that_is_let_go_in_a_moment_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_PASSING_S", 20)
    world.attach()
    world.add()
    world.kernel.busy[world.path()] = 2
    world.remove()
    assert world.is_clean()


def test_a_mount_that_nobody_can_be_named_for_is_not_waited_for_without_end(world: World) -> None:
    world.attach()
    world.add()
    world.kernel.busy[world.path()] = -1
    fault = refused(world.remove, "is in use: something in the kernel has it$", "busy")
    assert fault.holders == ["something in the kernel has it"]
    world.remove(force=True)
    assert world.is_clean()


def test_force_takes_away_all_that_is_at_the_path_and_what_it_was_made_of(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    (name,) = world.mapper.mappings
    world.mapper.used.add(name)
    world.kernel.add(world.path(), "tmpfs", "over it")
    world.kernel.busy[world.path()] = -1
    world.remove(force=True)
    assert world.kernel.at(world.path()) is None
    world.mapper.unused(name)
    assert world.is_clean()


def test_a_mapping_that_is_used_keeps_the_mount_in_the_table(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    world.mapper.used |= world.mapper.mappings.keys()
    refused(world.remove, "is in use", "busy")
    assert len(world.table.mounts()) == 1
    world.mapper.used.clear()
    world.remove()
    assert world.is_clean()


def test_what_was_written_and_does_not_reach_the_disk_is_told_and_the_mount_stays(world: World) -> None:
    world.attach()
    world.add()
    world.kernel.not_written_out.add(world.path())
    refused(world.remove, "does not reach the disk: Input/output error")
    assert world.kernel.at(world.path())
    world.remove(force=True)
    assert world.is_clean()


def test_another_error_of_an_unmount_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.attach()
    world.add()

    def fail(path: str, *, lazily: bool = False) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(mounting, "unmount", fail)
    with pytest.raises(PermissionError):
        world.remove()
    assert len(world.table.mounts()) == 1


def test_what_would_go_on_using_the_device_keeps_the_mount(world: World) -> None:
    node = world.attach()
    world.add()
    world.kernel.add("/bound", "ext4", node)
    fault = refused(world.remove, "is in use: mounted at /bound$", "busy")
    assert fault.holders == ["mounted at /bound"]
    assert world.kernel.at(world.path())
    world.remove(force=True)
    assert world.is_clean()


def test_one_of_two_mounts_of_ours_goes_though_the_device_stays_used(world: World) -> None:
    node = world.attach()
    world.add("one")
    world.add("two")
    world.kernel.pinned[node] = ""
    world.remove("one")
    assert [one["MountPath"] for one in world.table.mounts()] == [world.path("two")]
    refused(lambda: world.remove("two"), "is in use", "busy")


def test_a_file_system_that_lives_on_is_mounted_again_as_it_was(world: World) -> None:
    node = world.attach()
    world.add(Options=["noatime", "commit=7", "private"])
    before = seen(world, world.path())
    world.kernel.pinned[node] = ""
    refused(world.remove, "is in use: something that has no mount", "busy")
    again = seen(world, world.path())
    assert again is not before
    assert (again.flags, again.options, again.propagation) == (before.flags, before.options, before.propagation)
    assert (again.source, again.filesystem) == (before.source, before.filesystem)
    assert len(world.table.mounts()) == 1


def test_a_device_that_is_let_go_in_a_moment_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_PASSING_S", 20)
    users = [["somebody"], ["somebody"], []]
    monkeypatch.setattr(holders, "after_unmount", lambda node: users.pop(0))
    world.attach()
    world.add()
    world.remove()
    assert world.is_clean()


def test_a_mount_that_somebody_took_away_is_given_up(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    world.kernel.umount2(world.path().encode(), 0)
    world.remove()
    assert world.is_clean()
