"""What is in the base, made of real packages."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from utilityvm.guestimage import initramfs, recipe
from utilityvm.machine.programs import find_program, run

AGENT_MODULES = ("dm_mod", "dm_crypt", "dm_verity", "xts", "loop", "xfs", "btrfs", "erofs", "squashfs", "isofs", "vfat",
                 "nls_ascii", "overlay", "fuse", "vsock", "virtio_rng", "qemu_fw_cfg")  # fmt: skip


@pytest.fixture(scope="module")
def tree(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    # Not by tarfile: how it is asked to extract differs between the releases of Python.
    run([find_program("tar", package="tar"), "-xf", base / "root.tar", "-C", root, "--wildcards", "*lib/modules/*"])
    (found,) = root.glob("**/lib/modules/*")
    return found


@pytest.fixture(scope="module")
def members(base: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(base / "root.tar") as archive:
        return archive.getmembers()


def test_every_module_has_what_it_depends_on(tree: Path) -> None:
    files, builtin = initramfs.module_files(tree), initramfs.builtin_modules(tree)
    assert len(files) > 100
    initramfs.in_load_order(files, files, builtin)


@pytest.mark.parametrize("name", [*recipe.BOOT_MODULES, *AGENT_MODULES])
def test_the_modules_that_vms_need_are_there(tree: Path, name: str) -> None:
    name = name.replace("-", "_")
    assert name in initramfs.module_files(tree) or name in initramfs.builtin_modules(tree)


def test_modprobe_can_find_them(tree: Path) -> None:
    listed = (tree / "modules.dep").read_text()
    assert "kernel/drivers/md/dm-crypt.ko" in listed


def test_everything_is_roots_and_nothing_gains_rights(members: list[tarfile.TarInfo]) -> None:
    assert {(member.uid, member.gid) for member in members} == {(0, 0)}
    assert [member.name for member in members if member.mode & 0o6000] == []


def test_times_are_the_recipes(members: list[tarfile.TarInfo]) -> None:
    assert {member.mtime for member in members} == {recipe.TIME}


def test_python_is_compiled_and_does_not_look_at_sources_times(base: Path) -> None:
    with tarfile.open(base / "root.tar") as archive:
        compiled = [member for member in archive if member.name.endswith(".pyc")]
        # The word behind the magic: bit 0, checked by hash; bit 1, look at the source. PEP 552.
        assert {int.from_bytes(archive.extractfile(one).read(8)[4:], "little") for one in compiled} == {1}  # type: ignore[union-attr]
    names = {member.name for member in compiled}
    assert any("/__pycache__/subprocess.cpython-3" in name for name in names)


@pytest.mark.parametrize(
    "name", ["usr/share/doc/", "usr/share/man/", "usr/share/locale/", "boot/System.map", "usr/bin/perl"]
)
def test_what_no_vm_needs_is_left_out(members: list[tarfile.TarInfo], name: str) -> None:
    assert [member.name for member in members if member.isreg() and member.name.startswith(name)] == []


def test_the_packages_are_known_with_their_versions(base: Path) -> None:
    packages = json.loads((base / "packages.json").read_text())
    assert set(recipe.PACKAGES) <= set(packages)
    assert ":" in "".join(packages.values())  # an epoch, which a file name cannot have as it is
