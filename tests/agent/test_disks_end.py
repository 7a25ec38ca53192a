"""How disks leave and grow, and what the next agent goes on with, on disks that are imitated."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fake_guest import LUN, MIB, World, refused, soon
from utilityvm.agent import content, filesystems, mounting
from utilityvm.agent.faults import Fault

KEY = base64.b64encode(bytes(range(64))).decode()


# Ejecting.


def test_a_disk_is_flushed_before_it_is_forgotten(world: World) -> None:
    world.attach()
    world.table.eject(0, LUN, soon())
    assert world.bus.asked == ["fsync sdb", "flush sdb", f"delete {LUN}"]
    assert not world.bus.folder(LUN).exists()
    world.table.eject(0, LUN, soon())
    assert len(world.bus.asked) == 3


def test_a_mounted_disk_is_not_ejected_and_force_unmounts_all_of_it(world: World) -> None:
    world.attach()
    world.add("one")
    world.add("two")
    fault = refused(lambda: world.table.eject(0, LUN, soon()), f"still mounted at {world.path('one')}", "busy")
    assert fault.holders == [f"mounted at {world.path('one')}"]
    assert len(world.table.mounts()) == 2
    world.table.eject(0, LUN, soon(), force=True)
    assert world.is_clean()
    assert not world.bus.folder(LUN).exists()


def test_the_mount_of_another_disk_keeps_nothing(world: World) -> None:
    world.attach()
    world.attach(2)
    world.add(Lun=2)
    world.table.eject(0, LUN, soon())
    assert len(world.table.mounts()) == 1


def test_a_disk_that_the_guest_uses_is_not_ejected_and_force_unmounts_what_others_mounted(world: World) -> None:
    node = world.attach(partitions=((1, 8),))
    world.kernel.add("/theirs", "ext4", node)
    world.kernel.add("/theirs/inner", "ext4", f"{node}1")
    fault = refused(lambda: world.table.eject(0, LUN, soon()), "the disk is in use: mounted at /theirs, and 1", "busy")
    assert fault.holders == ["mounted at /theirs", "mounted at /theirs/inner"]
    assert world.bus.folder(LUN).exists()
    world.table.eject(0, LUN, soon(), force=True)
    assert [asked for asked in world.kernel.asked if "umount" in asked] == ["umount /theirs/inner", "umount /theirs"]
    assert not world.bus.folder(LUN).exists()


def test_a_disk_that_takes_nothing_more_is_ejected_by_force_alone(world: World) -> None:
    node = world.attach()
    world.bus.dead.add(node)
    refused(lambda: world.table.eject(0, LUN, soon()), f"written to the disk at 0:{LUN} does not reach it: Input/out")
    assert world.bus.folder(LUN).exists()
    world.table.eject(0, LUN, soon(), force=True)
    assert not world.bus.folder(LUN).exists()


@pytest.mark.parametrize(("number", "goes"), [(6, True), (2, True), (19, True), (123, True), (5, False), (13, False)])
def test_a_disk_that_has_not_come_far_enough_to_be_opened_is_forgotten(world: World, number: int, goes: bool) -> None:
    world.bus.absent[world.attach()] = number
    if goes:
        world.table.eject(0, LUN, soon())
    else:
        refused(lambda: world.table.eject(0, LUN, soon()), "does not reach it")
    assert world.bus.folder(LUN).exists() is not goes


@pytest.mark.parametrize(("number", "goes"), [(25, True), (30, True), (13, True), (5, False)])
def test_a_device_that_knows_no_flush_has_nothing_to_flush(world: World, number: int, goes: bool) -> None:
    world.attach()
    world.bus.flush_says = number
    if goes:
        world.table.eject(0, LUN, soon())
    else:
        refused(lambda: world.table.eject(0, LUN, soon()), "does not reach it")


@pytest.mark.parametrize(("controller", "lun"), [(1, 0), (0, 64)])
def test_a_slot_that_is_none_is_invalid(world: World, controller: int, lun: int) -> None:
    refused(lambda: world.table.eject(controller, lun, soon()), "there is no", "invalid")


# Looking.


def test_a_slot_tells_what_is_there(world: World) -> None:
    assert world.table.probe(0, LUN) == {"Present": False, "SizeBytes": 0, "MountPaths": []}
    world.attach()
    world.add("one")
    world.add("two")
    world.kernel.umount2(world.path("two").encode(), 0)
    expected = {"Present": True, "SizeBytes": 32 * MIB, "MountPaths": [world.path("one")]}
    assert world.table.probe(0, LUN) == expected


def test_a_device_on_its_way_in_or_out_is_there(world: World) -> None:
    world.attach()
    block = world.bus.folder(LUN) / "block/sdb"
    (block / "size").unlink()
    assert world.table.probe(0, LUN) == {"Present": True, "SizeBytes": 0, "MountPaths": []}
    (block / "dev").unlink()
    assert world.table.probe(0, LUN) == {"Present": True, "SizeBytes": 0, "MountPaths": []}


# Growing.


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was asked to grow, in place of growing it."""
    grown: list[tuple[str, str, str]] = []

    def grow(node: str, path: str, filesystem: str, deadline: float) -> None:
        if path.endswith("bad"):
            raise Fault("it does not", kind="busy", remedy="wait")
        grown.append((node, path, filesystem))

    monkeypatch.setattr(filesystems, "grow", grow)
    return grown


def test_what_is_writable_and_of_the_whole_disk_grows_with_it(world: World, grown: list[tuple[str, str, str]]) -> None:
    node = world.attach(partitions=((1, 8),))
    world.add("part", Partition=1)
    world.add("whole", Filesystem="ext4")
    world.add("read", Filesystem="ext4", ReadOnly=True)
    world.add("device", BlockDev=True)
    world.bus.grows_to[LUN] = 64 * MIB
    answer = world.table.grow(0, LUN, soon())
    left = [world.path(name) for name in ("part", "read", "device")]
    assert answer == {"SizeBytes": 64 * MIB, "Grown": [world.path("whole")], "Left": left}
    assert grown == [(node, world.path("whole"), "ext4")]
    assert world.bus.asked[-1] == f"rescan {LUN}"


def test_the_mapping_of_the_whole_disk_grows_before_its_file_system(
    world: World, grown: list[tuple[str, str, str]]
) -> None:
    world.attach(partitions=((1, 8),))
    world.add("whole", Filesystem="ext4", Utilityvm={"Key": KEY})
    world.add("part", Partition=1, Utilityvm={"Key": KEY})
    world.bus.grows_to[LUN] = 64 * MIB
    world.table.grow(0, LUN, soon())
    sizes = [mapping.table.sectors for mapping in world.mapper.mappings.values() if mapping.table]
    assert sizes == [64 * MIB // 512, 8 * MIB // 512]


def test_one_that_does_not_grow_keeps_no_other_from_growing(world: World, grown: list[tuple[str, str, str]]) -> None:
    world.attach()
    for name in ("bad", "good", "too bad"):
        world.add(name)
    fault = refused(lambda: world.table.grow(0, LUN, soon()), "it does not; it does not", "busy")
    assert fault.remedy == "wait"
    assert [path for _, path, _ in grown] == [world.path("good")]


def test_a_disk_that_is_not_there_does_not_grow(world: World) -> None:
    refused(lambda: world.table.grow(0, LUN, soon()), f"there is no disk at 0:{LUN}", "not_found")
    world.attach()
    (world.bus.folder(LUN) / "block/sdb/dev").unlink()
    refused(lambda: world.table.grow(0, LUN, soon()), f"there is no disk at 0:{LUN}", "not_found")


def test_what_could_never_grow_is_asked_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str, int]] = []
    monkeypatch.setattr(filesystems, "check_grow", lambda *of: asked.append(of))
    node = world.attach()
    world.add("whole")
    world.add("read", ReadOnly=True)
    world.table.check_grow(0, LUN, 77, soon())
    assert asked == [(node, world.path("whole"), "ext4", 77)]
    assert not world.bus.asked


# The next agent.


def test_the_next_agent_takes_over_what_is_mounted(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    before = world.table.mounts()
    world.table = world.agent()
    assert world.table.mounts() == before
    world.remove()
    assert world.is_clean()


def test_the_next_agent_undoes_what_is_not_mounted_any_more(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    world.kernel.umount2(world.path().encode(), 0)
    world.table = world.agent()
    assert world.is_clean()


@pytest.mark.parametrize("until", ["mapping", "folders", "mount"])
def test_the_next_agent_goes_on_with_a_mount_that_was_cut_short(
    world: World, monkeypatch: pytest.MonkeyPatch, until: str
) -> None:
    """An agent that is killed undoes nothing, and its table was not saved."""
    world.attach()

    class Killed(BaseException):
        pass

    def killed(*_args: object, **_options: object) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ExitStack, "__exit__", lambda stack, *why: None)
        if until == "mapping":
            patch.setattr(content, "of", killed)
        elif until == "folders":
            patch.setattr(mounting, "mount", killed)
        else:
            patch.setattr(world.table, "_save", killed)
        with pytest.raises(Killed):
            world.add(Utilityvm={"Key": KEY})
    assert world.mapper.mappings
    world.table = world.agent()
    assert not list(world.state.parent.glob("*.notes"))
    assert bool(world.table.mounts()) is (until == "mount")
    if until == "mount":
        assert [one["Filesystem"] for one in world.table.mounts()] == ["ext4"]
        world.remove()
    assert world.is_clean()


def test_a_note_that_was_cut_short_is_of_something_that_was_not_made(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    entry = json.loads(world.state.read_text())[0]
    world.state.unlink()
    notes = world.state.with_name("mounts-0-1.notes")
    notes.write_text(json.dumps(entry) + "\n" + json.dumps(entry)[:-9])
    world.table = world.agent()
    assert [one["MountPath"] for one in world.table.mounts()] == [world.path()]
    assert json.loads(world.state.read_text())[0] == entry
    for text in ("", "{", "[]\n", "{}\n"):
        notes.write_text(text)
        world.table = world.agent()
        assert len(world.table.mounts()) == 1
        assert not notes.exists()


@pytest.mark.parametrize("text", ["", "{", "[7]", '[{"path": "/x"}]', '{"path": 1}'])
def test_a_state_that_cannot_be_read_is_none(world: World, text: str) -> None:
    world.state.write_text(text)
    assert world.agent().mounts() == []


def test_folders_that_mounts_share_stay_for_the_last_also_after_a_restart(world: World) -> None:
    world.attach()
    world.attach(2)
    world.add("a/b")
    world.add("a/c", Lun=2)
    world.table = world.agent()
    world.remove("a/b")
    assert Path(world.path("a/c")).is_dir()
    assert not Path(world.path("a/b")).exists()
    world.remove("a/c")
    assert world.is_clean()


def test_a_mapping_that_stays_in_use_keeps_no_agent_from_starting(world: World) -> None:
    world.attach()
    world.add(Utilityvm={"Key": KEY})
    world.kernel.umount2(world.path().encode(), 0)
    world.mapper.used |= world.mapper.mappings.keys()
    assert world.agent().mounts() == []


def test_the_state_is_the_agents_alone(world: World) -> None:
    assert world.state.parent.stat().st_mode & 0o777 == 0o700
    assert list(world.state.parent.iterdir()) == []
