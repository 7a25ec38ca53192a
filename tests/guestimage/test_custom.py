"""A user's own recipe: another key for all that goes in, files and a hook in the tree; newer packages beside old."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from utilityvm import GuestImage, GuestRecipe
from utilityvm.errors import InvalidRequest, SetupError
from utilityvm.guestimage import base as bases
from utilityvm.guestimage import build, recipe
from utilityvm.machine.programs import find_program, run

ARCH = recipe.ARCHITECTURES["x86_64"]


def in_image(image: GuestImage, command: str) -> str:
    return run([find_program("debugfs", package="e2fsprogs"), "-R", command, image.root]).decode()


@pytest.fixture
def host_file(tmp_path: Path) -> Path:
    path = tmp_path / "tool"
    path.write_text("#!/bin/sh\necho mine\n")
    path.chmod(0o700)
    return path


@pytest.fixture
def no_network(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages are those of the base that is there."""

    def make(folder: Path, **_: object) -> None:
        for name in ("root.tar", "packages.json"):
            shutil.copy(base / name, folder / name)

    monkeypatch.setattr("utilityvm.guestimage.base.make", make)


@pytest.mark.parametrize("name", ["", "Git", "a", "git,vim", "git vim", "-oDebug::x", "git=1", "../x"])
def test_what_no_package_can_be_called_is_refused(name: str) -> None:
    for arguments in ({"packages": (name,)}, {"kernel": name}) if name else ({"packages": (name,)},):
        with pytest.raises(InvalidRequest, match="is not the name of a Debian package"):
            GuestRecipe(**arguments)


@pytest.mark.parametrize("path", ["etc/motd", "/", "/a/../b", "/a//b", "/a/"])
def test_a_path_in_the_guest_is_absolute(path: str, host_file: Path) -> None:
    with pytest.raises(InvalidRequest, match="is not the absolute path of a file"):
        GuestRecipe(files={path: host_file})


def test_each_part_of_a_recipe_is_in_the_key(host_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    hook = tmp_path / "hook"
    hook.write_text("hook")
    hook.chmod(0o755)

    def keys() -> list[str]:
        recipes = [
            GuestRecipe(),
            GuestRecipe(packages=("git",)),
            GuestRecipe(packages=("git", "vim")),
            GuestRecipe(kernel="git"),
            GuestRecipe(files={"/a": host_file}),
            GuestRecipe(files={"/b": host_file}),
            GuestRecipe(files={"/a": other}),
            GuestRecipe(hook=hook),
        ]
        return [build.image_key(ARCH, {}, each) for each in recipes]

    before = keys()
    assert len(set(before)) == len(before)
    assert build.image_key(ARCH, {}) == before[0]
    host_file.chmod(0o600)
    assert [number for number, (one, two) in enumerate(zip(before, keys(), strict=True)) if one != two] == [4, 5]
    host_file.write_text("changed")
    hook.write_text("changed")
    assert {4, 5, 7} == {number for number, (one, two) in enumerate(zip(before, keys(), strict=True)) if one != two}


def test_a_hook_that_cannot_be_executed_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text("hook")
    with pytest.raises(InvalidRequest, match="is not executable"):
        build.image_key(ARCH, {}, GuestRecipe(hook=hook))


def test_the_order_of_packages_does_not_matter() -> None:
    one, two = GuestRecipe(packages=("git", "vim")), GuestRecipe(packages=("vim", "git", "vim"))
    assert build.base_key(ARCH, one) == build.base_key(ARCH, two) != build.base_key(ARCH)


def test_files_and_hook_are_in_the_image(cache: Path, host_file: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text('#!/bin/sh\nset -e\ntest "$1" = "$PWD"\necho hello > etc/motd\n')
    hook.chmod(0o755)
    own = GuestRecipe(files={"/opt/my/tool": host_file, "/srv/note": hook}, hook=hook)
    image = GuestImage.build(own)
    assert in_image(image, "cat /opt/my/tool") == host_file.read_text()
    assert "Mode:  0755" in in_image(image, "stat /opt/my/tool")
    assert "Mode:  0700" in in_image(image, "stat /root"), "a folder that was there keeps its mode"
    assert in_image(image, "cat /etc/motd") == "hello\n"
    assert image.recipe == {"packages": [], "kernel": None, "files": ["/opt/my/tool", "/srv/note"], "hook": "hook"}
    assert build.find(own) == image
    assert build.find() is None
    assert GuestImage.build(own) == image


def test_a_hook_that_fails_leaves_no_image_and_says_why(cache: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\necho no such luck >&2; exit 3\n")
    hook.chmod(0o755)
    with pytest.raises(SetupError, match="no such luck"):
        GuestImage.build(GuestRecipe(hook=hook))
    assert build.catalog() == []


@pytest.mark.parametrize("path", ["/var/run/x", "/var/run/a/b"])
def test_a_file_behind_a_link_is_not_written_to_this_host(cache: Path, host_file: Path, path: str) -> None:
    with pytest.raises(InvalidRequest, match="is behind a link"):
        GuestImage.build(GuestRecipe(files={path: host_file}))
    assert not Path("/run/x").exists()


def test_a_file_that_is_not_there_is_refused_before_anything_is_built(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        GuestImage.build(GuestRecipe(files={"/a": tmp_path / "none"}))


def test_a_refreshed_image_stands_beside_the_old_one_and_is_found(image: GuestImage, no_network: None) -> None:
    newer = GuestImage.build(refresh=True)
    assert newer.key == f"{image.key}.2"
    assert build.find() == newer
    assert {one.key for one in build.catalog()} == {image.key, newer.key}
    build.verify(image)
    third = GuestImage.build(refresh=True)
    assert build.find() == third
    assert third.base != newer.base
    shutil.rmtree(third.folder)
    shutil.rmtree(newer.folder)
    assert build.find() == image


def test_a_recipe_is_fetched_with_its_packages_and_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def make(folder: Path, **arguments: object) -> None:
        seen.append(arguments)
        raise SetupError("enough")

    monkeypatch.setattr(bases, "make", make)
    with pytest.raises(SetupError, match="enough"):
        GuestImage.build(GuestRecipe(packages=("git",), kernel="linux-image-amd64"))
    assert (seen[0]["packages"], seen[0]["kernel"]) == (("git",), "linux-image-amd64")


def test_what_is_asked_of_mmdebstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def stop(command: list[str | Path], **_: object) -> bytes:
        asked.extend(map(str, command))
        raise SetupError("enough")

    monkeypatch.setattr(bases, "run", stop)
    monkeypatch.setattr("utilityvm.guestimage.sources.debian_sources", lambda suite: "")
    monkeypatch.setattr("utilityvm.guestimage.sources.apt_settings", lambda: "")
    with pytest.raises(SetupError, match="enough"):
        bases.make(tmp_path, arch=ARCH, suite="bookworm", report=lambda *_: None, packages=("git",), kernel="mine")
    (included,) = (word.removeprefix("--include=").split(",") for word in asked if word.startswith("--include="))
    assert {"git", "mine", *recipe.PACKAGES} == set(included)
