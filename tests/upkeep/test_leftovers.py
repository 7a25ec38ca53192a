"""What is left over, by folders and records alone; with real VMs: tests/real/test_upkeep.py."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage import build, recipe
from utilityvm.guestimage.cache import one_builder
from utilityvm.machine import paths
from utilityvm.machine.processes import own_start
from utilityvm.store import Store, StoredVM, recover
from utilityvm.store.ownership import Ownership
from utilityvm.upkeep import leftovers
from utilityvm.upkeep.leftovers import LeftoverKind
from utilityvm.vm import lifecycle

REST = {
    "uid": 0,
    "controllers": 4,
    "keep": True,
    "accelerator": "tcg",
    "accelerator_reason": "",
    "qemu_version": "7.2.0",
    "machine": "pc",
}  # of a process in the store


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for what in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"UTILITYVM_{what}_DIR", str(tmp_path / what.lower()))
    monkeypatch.setattr(build, "host_suite", lambda: "bookworm")
    return tmp_path


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open() as store:
        yield store


def image(name: str, *, base: str = "", recipe: object = None) -> Path:
    """A whole image of that name in the cache."""
    folder = paths.cache_dir() / "images" / name
    folder.mkdir(parents=True)
    files = {}
    for file in ("vmlinuz", "initramfs", "root.ext4"):
        (folder / file).write_text(file)
        files[file] = {"size": len(file), "sha256": hashlib.sha256(file.encode()).hexdigest()}
    manifest: dict[str, object] = {"arch": "amd64", "suite": "bookworm", "cmdline": "", "files": files, "packages": []}
    manifest |= {"base": base, "recipe": recipe}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def current_image() -> Path:
    try:
        arch = recipe.architecture()
    except SetupError as error:
        pytest.skip(str(error))
    (paths.cache_dir() / "images").mkdir(parents=True, exist_ok=True)
    (paths.cache_dir() / "images/.lock").touch()
    base = f"bookworm-{build.base_key(arch)}"
    (paths.cache_dir() / "bases" / base).mkdir(parents=True)
    return image(f"bookworm-{build.image_key(arch, dict(build.agent_files()))}", base=base)


def running(store: Store, name: str, **config: object) -> StoredVM:
    """A VM whose QEMU is this process."""
    vm = store.add(name, uuid=name, config=config)
    store.set_process(vm, {"pid": os.getpid(), "started": own_start()})
    return vm


def found(store: Store) -> list[tuple[LeftoverKind, str]]:
    return [(one.kind, one.name) for one in leftovers.found_in(store)]


async def test_an_image_that_nobody_uses_goes_and_the_others_stay(store: Store) -> None:
    current, of_a_vm, old = current_image(), image("bookworm-ofavm"), image("bookworm-old")
    running(store, "alive", root=str(of_a_vm / "root.ext4"))
    [one] = leftovers.found_in(store)
    assert (one.kind, one.path) == (LeftoverKind.IMAGE, old)
    assert one.size_bytes > 0
    assert await leftovers.remove(one, store)
    assert sorted(path.name for path in (paths.cache_dir() / "images").iterdir()) == sorted(
        [".lock", current.name, of_a_vm.name]
    )


async def test_the_image_of_a_vm_that_is_just_starting_stays(store: Store) -> None:
    current_image()
    chosen = image("bookworm-chosen")
    ownership = await Ownership.acquire(paths.vm_dir("new"), vm="new")
    vm = store.add("new", uuid="new", config={"root": str(chosen / "root.ext4")})
    assert found(store) == []
    ownership.release()
    assert found(store) == [(LeftoverKind.VM, "new"), (LeftoverKind.IMAGE, chosen.name)], "its starter died"
    store.remove(vm)


def test_an_image_of_a_users_own_recipe_stays_with_its_base(store: Store) -> None:
    current_image()
    image("bookworm-own", base="bookworm-ownbase", recipe={"packages": ["git"]})
    for name in ("bookworm-ownbase", "bookworm-oldbase"):
        (paths.cache_dir() / "bases" / name).mkdir()
    assert found(store) == [(LeftoverKind.BUILD, "bookworm-oldbase")]


def test_who_uses_an_image_is_known(store: Store) -> None:
    chosen = image("bookworm-chosen")
    assert leftovers.users_of_image(store, chosen) == []
    running(store, "alive", root=str(chosen / "root.ext4"))
    assert leftovers.users_of_image(store, chosen) == ["VM alive"]


def test_all_images_stay_while_a_vm_does_not_say_which_it_uses(store: Store) -> None:
    current_image()
    image("bookworm-old")
    vm = running(store, "alive")
    assert found(store) == []
    store.remove(vm)
    assert found(store) == [(LeftoverKind.IMAGE, "bookworm-old")]


def test_all_images_stay_while_the_current_one_is_not_built(store: Store) -> None:
    image("bookworm-old")
    assert found(store) == [], "it may be all that can be started here"


async def test_what_builds_left_goes_unless_somebody_builds(store: Store) -> None:
    current_image()
    bases = paths.cache_dir() / "bases"
    (bases / "bookworm-old").mkdir()
    (bases / ".new-bookworm-1").mkdir()
    (paths.cache_dir() / "images/.new-bookworm-2").mkdir()
    left = leftovers.found_in(store)
    assert [one.name for one in left] == [".new-bookworm-1", ".new-bookworm-2", "bookworm-old"]
    with one_builder(paths.cache_dir() / "images/.lock", waiting=lambda: None):
        assert found(store) == []
        assert [await leftovers.remove(one, store) for one in left] == [False] * 3
        assert (bases / ".new-bookworm-1").exists()
    assert [await leftovers.remove(one, store) for one in left] == [True] * 3
    assert found(store) == []


async def test_a_vm_that_starts_meanwhile_keeps_its_overlays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is there before its overlays are: at whatever point we look, they are not taken for left over."""
    read = store.vms

    def read_then_start() -> list[StoredVM]:
        vms = read()
        store.add("quick", uuid="quick", config={})
        paths.overlays_dir("quick").mkdir(parents=True)
        return vms

    monkeypatch.setattr(store, "vms", read_then_start)
    assert [one for one in leftovers.found_in(store) if one.kind is LeftoverKind.OVERLAYS] == []


def test_overlays_of_a_vm_that_runs_and_is_in_no_store_stay(store: Store) -> None:
    name = str(uuid.uuid4())
    paths.overlays_dir(name).mkdir(parents=True)
    script = "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script, "-uuid", name], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert found(store) == []
        process.kill()
    assert found(store) == [(LeftoverKind.OVERLAYS, name)]


async def test_what_is_taken_up_meanwhile_is_not_removed(store: Store) -> None:
    folder = paths.vm_dir("taken")
    folder.mkdir(parents=True)
    (folder / "console.log").write_text("")
    [one] = leftovers.found_in(store)
    ownership = await Ownership.acquire(folder, vm="taken")
    assert not await leftovers.remove(one, store)
    assert (folder / "console.log").exists()
    ownership.release()


@pytest.mark.parametrize(("of_store", "started", "is_left"), [
    (None, None, False),
    (None, "another@00000000", True),
    ("/another/state.db", "another@00000000", False),
])  # fmt: skip
async def test_the_folder_of_a_vm_that_is_in_no_store(
    store: Store, of_store: str | None, started: str | None, is_left: bool
) -> None:
    """It stays if that VM runs, as after its store was lost, or if it is another store's."""
    folder = paths.vm_dir("lost")
    folder.mkdir(parents=True)
    process = {"pid": os.getpid(), "started": started or own_start()}
    copy = {"name": "lost", "uuid": "u", "created": 0.0, "config": {}, "process": process}
    (folder / paths.RECORD_FILE).write_text(json.dumps({**copy, "store": of_store or str(store.path)}))
    left = leftovers.found_in(store)
    assert [one.name for one in left] == ["lost"] * is_left
    assert [await leftovers.remove(one, store) for one in left] == [True] * is_left
    assert folder.exists() is not is_left


async def test_many_dead_vms_cost_no_more_each_than_few(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, and not timed: what is done for one of them asks for nothing of the others."""
    looks: list[str] = []
    every = store.vms

    def all_vms() -> list[StoredVM]:
        looks.append("all")
        return every()

    monkeypatch.setattr(store, "vms", all_vms)
    monkeypatch.setattr(lifecycle, "process_with", lambda *words: looks.append("scan"))
    dead = {"pid": 1 << 22, "started": "1@00000000", "log_pid": 1 << 22, "log_started": "1@00000000", **REST}
    for number in range(20):
        name = f"dead{number}"
        vm = store.add(name, uuid=name, config={})
        store.set_process(vm, {**dead, "name": name, "uuid": name, "folder": str(paths.vm_dir(name))})
        paths.vm_dir(name).mkdir(parents=True)
        (paths.vm_dir(name) / "console.log").touch()
    left = leftovers.found_in(store)
    looks.clear()
    assert all([await leftovers.remove(one, store) for one in left])
    assert looks == []
    assert every() == []
    assert not list((paths.runtime_dir() / "vms").iterdir())


async def test_a_damaged_record_is_not_taken_for_a_dead_vm(store: Store) -> None:
    vm = store.add("odd", uuid="odd", config={})
    store.db.execute("UPDATE vms SET process = '{' WHERE id = ?", (vm.id,))
    assert found(store) == []


async def test_a_vm_whose_lock_was_removed_while_it_starts_is_not_left_over(store: Store) -> None:
    ownership = await Ownership.acquire(paths.vm_dir("new"), vm="new")
    store.add("new", uuid="new", config={}, owner=ownership.owner.to_json())
    ownership.path.unlink()
    assert found(store) == []
    ownership.release(remove=True)


def dead(store: Store, number: int) -> StoredVM:
    """A VM whose QEMU has ended, with its files."""
    name, vm_uuid = f"dead{number:02}", str(uuid.UUID(int=number))
    vm = store.add(name, uuid=vm_uuid, config={"root": "/none"})
    folder = paths.vm_dir(name)
    about = {"pid": 1 << 30, "log_pid": 1 << 30, "started": "1", "log_started": "1", "folder": str(folder)}
    store.set_process(vm, {"name": name, "uuid": vm_uuid, **about, **REST})
    for path in (folder / "console.log", paths.overlays_dir(vm_uuid) / "a.qcow2"):
        path.parent.mkdir(parents=True, mode=0o700)
        path.touch()
    return vm


async def test_many_dead_vms_go_with_one_look_at_the_store_and_in_one_go_each(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the store reads all of it, and all runtime folders: a look for each would be quadratic."""
    vms = [dead(store, number) for number in range(30)]
    owned = await Ownership.acquire(paths.vm_dir(vms[7].name), vm=vms[7].name)
    opened: list[str] = []
    plain = recover.open_store

    def counted() -> Store:
        opened.append("once more")
        return plain()

    monkeypatch.setattr(recover, "open_store", counted)
    left = leftovers.find_leftovers()
    assert {one.name for one in left} == {vm.name for vm in vms} - {vms[7].name}
    owned.release()
    taken_up = await Ownership.acquire(paths.vm_dir(vms[9].name), vm=vms[9].name)
    assert await leftovers.remove_leftovers(left) == [one.name != vms[9].name for one in left]
    assert len(opened) == 2
    assert [vm.name for vm in store.vms()] == [vms[7].name, vms[9].name]
    taken_up.release()
    assert all(await leftovers.remove_leftovers(leftovers.find_leftovers()))
    assert leftovers.find_leftovers() == []
    assert not [*paths.runtime_dir().glob("vms/*"), *(paths.state_dir() / "overlays").iterdir()]


async def test_what_cannot_be_removed_is_told_and_the_others_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    vms = [dead(store, number) for number in range(5)]
    plain = lifecycle.clear_at_once

    def refuse(record: StoredVM, store: Store) -> bool:
        if record.name == vms[2].name:
            raise SetupError("the test broke it")
        return plain(record, store)

    monkeypatch.setattr(lifecycle, "clear_at_once", refuse)
    results = await leftovers.remove_leftovers(leftovers.find_leftovers())
    assert [str(one) for one in results] == ["True", "True", "the test broke it", "True", "True"]
    assert [vm.name for vm in store.vms()] == [vms[2].name]


async def test_a_removal_that_is_cancelled_leaves_the_rest_for_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        dead(store, number)
    plain, begun = lifecycle.clear_at_once, asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(record: StoredVM, store: Store) -> bool:
        loop.call_soon_threadsafe(begun.set)
        return plain(record, store)

    monkeypatch.setattr(lifecycle, "clear_at_once", tell)
    removing = asyncio.create_task(leftovers.remove_leftovers(leftovers.find_leftovers()))
    await begun.wait()
    removing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await removing
    assert leftovers.find_leftovers()
    while left := leftovers.find_leftovers():  # one may still be in the hands of a thread of the first
        await leftovers.remove_leftovers(left)
    assert store.vms() == []
