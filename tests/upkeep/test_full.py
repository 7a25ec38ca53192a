"""Space or files on a file system have run out, or descriptors: it is told, and what needs none of it goes on.

With real VMs: tests/real/test_hostile.py and test_recovery.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from descriptors import descriptors_left
from small import fill, fill_files, small_filesystem
from utilityvm.errors import SetupError, StoreError, UtilityVMError
from utilityvm.machine import paths
from utilityvm.store import Store
from utilityvm.store.ownership import Ownership
from utilityvm.templates import catalog
from utilityvm.templates.draft import Draft, no_space
from utilityvm.upkeep import leftovers

SIZE_BYTES = 512 << 10
PROCESS = {"pid": 1 << 30, "started": "1", "log_pid": 1 << 30, "log_started": "1", "uid": 0, "controllers": 4}
TOLD = {"keep": True, "accelerator": "tcg", "accelerator_reason": "", "qemu_version": "7.2.0", "machine": "pc"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for what in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"UTILITYVM_{what}_DIR", str(tmp_path / what.lower()))
    return tmp_path


@pytest.fixture
def mounts() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def dead(store: Store, name: str) -> None:
    """A VM that has ended, with its files."""
    vm = store.add(name, uuid=f"uuid-of-{name}", config={"root": "/none"})
    folder = paths.vm_dir(name)
    store.set_process(vm, {**PROCESS, **TOLD, "name": name, "uuid": vm.uuid, "folder": str(folder)})
    for path in (folder / "console.log", paths.overlays_dir(vm.uuid) / "a.qcow2"):
        path.parent.mkdir(parents=True, mode=0o700)
        path.touch()


@pytest.mark.parametrize("runs_out", ["space", "files"])
async def test_a_full_runtime_folder_keeps_no_dead_vm(folders: Path, mounts: ExitStack, runs_out: str) -> None:
    runtime = mounts.enter_context(small_filesystem(folders / "runtime", SIZE_BYTES, files=64))
    with Store.open() as store:
        for name in ("one", "two"):
            dead(store, name)
            (await Ownership.acquire(paths.vm_dir(name), vm=name)).release()
    (fill if runs_out == "space" else fill_files)(runtime)
    left = leftovers.find_leftovers()
    assert await leftovers.remove_leftovers(left) == [True, True]
    assert leftovers.find_leftovers() == []


async def test_a_runtime_folder_without_a_file_left_is_told_and_an_owner_goes_on(
    folders: Path, mounts: ExitStack
) -> None:
    runtime = mounts.enter_context(small_filesystem(folders / "runtime", SIZE_BYTES, files=64))
    owned = await Ownership.acquire(paths.vm_dir("one"), vm="one")
    fill_files(runtime)
    with pytest.raises(SetupError, match="No space left") as caught:
        await Ownership.acquire(paths.vm_dir("two"), vm="two")
    assert "make room" in str(caught.value.remedy)
    owned.release(remove=True)
    assert not paths.vm_dir("one").exists()


@pytest.mark.parametrize("runs_out", ["space", "files"])
def test_a_full_state_folder_can_be_read_and_what_it_refuses_is_as_it_was(
    folders: Path, mounts: ExitStack, runs_out: str
) -> None:
    state = mounts.enter_context(small_filesystem(folders / "state", SIZE_BYTES, files=64))
    with Store.open() as store:
        one = store.add("one", uuid="1", config={})
        (fill if runs_out == "space" else fill_files)(state)
        if runs_out == "space":
            with pytest.raises(StoreError) as caught:
                store.set_owner(one, {"words": "a" * 100_000})
            assert str(state) in str(caught.value.remedy)
            assert [vm.name for vm in store.vms()] == ["one"]
            with pytest.raises(StoreError):
                store.add("two", uuid="2", config={"words": "a" * 100_000})
    with Store.open() as other:
        assert [vm.name for vm in other.vms()] == ["one"]
    for filler in state.glob("filler*"):
        filler.unlink()
    with Store.open() as store:
        store.remove(store.get("one"))
        store.add("two", uuid="2", config={})


@pytest.mark.parametrize("runs_out", ["space", "files"])
async def test_a_template_without_space_leaves_nothing(folders: Path, mounts: ExitStack, runs_out: str) -> None:
    state = mounts.enter_context(small_filesystem(folders / "state", SIZE_BYTES, files=64))
    Store.open().close()
    paths.templates_dir().mkdir()
    before = {*state.rglob("*")}

    async def save() -> None:
        async with Draft("warm").begun() as folder:
            with no_space(folder):
                (fill if runs_out == "space" else fill_files)(folder)
                (folder / "memory").write_bytes(bytes(1 << 20))

    with pytest.raises(SetupError, match="No space left"):
        await save()
    assert {*state.rglob("*")} == before
    assert catalog.leftovers() == []


async def test_without_a_free_descriptor_the_error_is_typed_and_all_goes_on_later(folders: Path) -> None:
    with Store.open() as store:
        dead(store, "one")
        for free in range(12):
            with descriptors_left(free):
                if not store.vms():  # a store that is open needs no more of them
                    break
                try:
                    results = await leftovers.remove_leftovers(leftovers.find_leftovers())
                except UtilityVMError:  # and no other error
                    continue
                assert all(isinstance(one, bool | UtilityVMError) for one in results)
        while left := leftovers.find_leftovers():
            await leftovers.remove_leftovers(left)
        assert store.vms() == []
