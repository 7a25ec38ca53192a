"""A template is there whole, or not at all, and for as long as somebody depends on it."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manifests_made import layer, manifest
from utilityvm.errors import (
    InvalidRequest,
    SetupError,
    TemplateDamaged,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
)
from utilityvm.machine import paths
from utilityvm.store import Store
from utilityvm.templates import catalog
from utilityvm.templates.draft import Draft, no_space
from utilityvm.templates.manifest import Fingerprint, LayerEntry, Manifest, Parent, encode

CUT_SHORT = """
import asyncio, os, signal
from utilityvm.templates.draft import Draft
async def main():
    async with Draft("cut").begun() as folder:
        (folder / "memory").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def save(document: Manifest) -> catalog.Template:
    return asyncio.run(saved(document))


async def saved(document: Manifest) -> catalog.Template:
    async with Draft(document.name).begun() as folder:
        (folder / catalog.MANIFEST).write_bytes(encode(document))
        (folder / catalog.MEMORY).write_bytes(b"memory")
        (folder / catalog.STATE).write_bytes(b"state")
    return catalog.load(document.name)


@pytest.fixture
def store(folders: Path) -> Iterator[Store]:
    with Store.open() as store:
        yield store


def test_there_is_none_at_first(folders: Path) -> None:
    assert catalog.names() == []
    assert catalog.every() == []
    assert catalog.leftovers() == []
    with open(__file__, "rb") as file:  # noqa: PTH123
        assert catalog.frozen_by(file.fileno()) is None
    with pytest.raises(TemplateNotFound, match="'warm'") as error:
        catalog.load("warm")
    assert "uvm template save" in str(error.value.remedy)


async def test_it_appears_with_its_name(folders: Path) -> None:
    draft = Draft("warm")
    async with draft.begun() as folder:
        (folder / catalog.MANIFEST).write_bytes(encode(manifest()))
        assert catalog.names() == []
        assert catalog.leftovers() == [], "somebody works there"
        assert not draft.is_there
    assert draft.is_there
    assert catalog.load("warm").manifest == manifest()
    assert [template.name for template in catalog.every()] == ["warm"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 64, ".new-x", "a b"])
async def test_a_name_that_cannot_be(folders: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        async with Draft(name).begun():
            raise AssertionError
    with pytest.raises(InvalidRequest):
        catalog.load(name)


async def test_a_block_that_fails_leaves_nothing(folders: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "disks").mkdir()
        (folder / "disks/one").write_bytes(b"1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with Draft("warm").begun() as folder:
            fail(folder)
    assert list(paths.templates_dir().iterdir()) == []


async def test_a_block_that_is_cancelled_again_while_it_is_taken_back_leaves_nothing(folders: Path) -> None:
    async def begin() -> None:
        async with Draft("warm").begun() as folder:
            (folder / "memory").write_bytes(b"half")
            working.set()
            await asyncio.Event().wait()

    working = asyncio.Event()
    task = asyncio.create_task(begin())
    await working.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert list(paths.templates_dir().iterdir()) == []


def test_what_the_storage_refuses_says_what_to_do(folders: Path) -> None:
    with pytest.raises(SetupError, match="No space") as error, no_space(folders):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "make room" in str(error.value.remedy)


async def test_a_name_is_given_once(folders: Path) -> None:
    first = await saved(manifest())
    with pytest.raises(TemplateExists):
        async with Draft("warm").begun():
            raise AssertionError
    with pytest.raises(TemplateExists):
        async with Draft("race").begun():
            await saved(manifest("race"))
    assert catalog.load("race").manifest == manifest("race")
    assert catalog.load("warm") == first


def test_what_a_killed_process_left_is_found(folders: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CUT_SHORT], check=False)
    assert done.returncode == -9
    assert catalog.names() == []
    [left] = catalog.leftovers()
    catalog.remove_leftover(left)
    assert catalog.leftovers() == []


def image(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(bytes(512))
    return path


def frozen_by(path: Path) -> str | None:
    with path.open("rb") as file:
        return catalog.frozen_by(file.fileno())


def made_of(disk: Path, root: Path) -> Manifest:
    """The manifest of a template of these."""
    before = manifest()
    layers = (layer_of(disk),)
    return msgspec.structs.replace(
        before, root=layer_of(root), disks=(msgspec.structs.replace(before.disks[0], layers=layers),)
    )


def layer_of(path: Path) -> LayerEntry:
    return msgspec.structs.replace(layer(path), fingerprint=Fingerprint.at(path))


def test_its_disks_are_frozen_while_it_exists(store: Store, tmp_path: Path) -> None:
    disk, root, other = (image(tmp_path, name) for name in ("disk", "root", "other"))
    save(made_of(disk, root))
    assert frozen_by(disk) == "warm"
    assert frozen_by(root) == "warm", "its root disk"
    assert frozen_by(other) is None
    disk.write_bytes(b"written to all the same")
    assert frozen_by(disk.rename(tmp_path / "elsewhere")) == "warm"
    catalog.remove("warm", store)
    assert frozen_by(tmp_path / "elsewhere") is None
    assert list(paths.templates_dir().iterdir()) == []


def test_its_disks_are_frozen_and_the_same_when_their_device_has_another_number(folders: Path, tmp_path: Path) -> None:
    disk, root = image(tmp_path, "disk"), image(tmp_path, "root")
    if Fingerprint.at(disk).lasting is None:
        pytest.skip("this file system keeps nothing that names a file for longer")
    document = made_of(disk, root)
    fingerprint = document.disks[0].layers[0].fingerprint
    then = msgspec.structs.replace(fingerprint, device=fingerprint.device + 1)
    layers = (msgspec.structs.replace(document.disks[0].layers[0], fingerprint=then),)
    save(msgspec.structs.replace(document, disks=(msgspec.structs.replace(document.disks[0], layers=layers),)))
    assert frozen_by(disk) == "warm"
    assert catalog.difference_of(layers[0]) is None


def test_a_template_that_cannot_say_what_it_is_made_of_freezes_everything(folders: Path, tmp_path: Path) -> None:
    template = save(manifest())
    (template.folder / catalog.MANIFEST).write_bytes(b"{}")
    with pytest.raises(TemplateDamaged):
        frozen_by(image(tmp_path, "other"))
    assert catalog.every() == []


def test_it_stays_while_somebody_depends_on_it(store: Store) -> None:
    template = save(manifest())
    clone = store.add("clone", uuid="c", config={"clone": {"template": "warm", "template_uuid": template.uuid}})
    save(manifest("child", uuid="3", parent=Parent(name="warm", uuid=template.uuid)))
    with pytest.raises(TemplateInUse, match="VM clone, template child") as error:
        catalog.remove("warm", store)
    assert error.value.users == ("VM clone", "template child")
    store.remove(clone)
    catalog.remove("child", store)
    with catalog.in_use("warm"), pytest.raises(TemplateInUse, match="just being started"):
        catalog.remove("warm", store)
    catalog.remove("warm", store)
    with pytest.raises(TemplateNotFound), catalog.in_use("warm"):
        raise AssertionError


def test_the_parent_of_a_clone(store: Store) -> None:
    template = save(manifest())
    assert catalog.parent_of({"name": "vm"}) is None
    assert catalog.parent_of({"clone": {"template": "warm", "template_uuid": template.uuid}}) == template
    assert catalog.made_of(template.manifest.vm_uuid) == "warm"
    assert catalog.made_of("another") is None


def test_what_differs_is_told(folders: Path) -> None:
    template = save(manifest())
    found = catalog.verify(template)
    assert [line.rpartition("/")[2] for line in found] == [
        "memory is not what was saved",
        "state is not what was saved",
        "root.img: No such file or directory",
        "a.raw: No such file or directory",
    ]
    assert template.disk_bytes() > 0
