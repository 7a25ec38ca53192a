"""Images are built of real packages here; the base is fetched once for all tests, an image takes some three seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage import build, recipe
from utilityvm.guestimage.build import GuestImage

Builder = Callable[..., "subprocess.Popen[str]"]


def lines(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    with process.stdout:
        said = process.stdout.read().splitlines()
    assert process.wait() == 0, said
    return said


def test_an_image_is_built_once_and_found_again(cache: Path) -> None:
    assert build.find() is None
    said: list[tuple[str, float]] = []
    image = build.ensure(progress=lambda what, done: said.append((what, done)))
    assert [done for _, done in said] == sorted(done for _, done in said)
    assert said[-1] == ("done", 1.0)
    again: list[str] = []
    assert build.ensure(progress=lambda what, done: again.append(what)) == image
    assert again == []
    assert build.find() == image
    assert build.catalog() == [image]
    assert sorted(path.name for path in image.kernel.parent.iterdir()) == [
        "initramfs", "manifest.json", "root.ext4", "vmlinuz",
    ]  # fmt: skip
    build.verify(image)


def test_the_manifest_says_what_is_in_it(built: GuestImage) -> None:
    manifest = json.loads((built.kernel.parent / "manifest.json").read_text())
    assert set(recipe.PACKAGES) <= set(manifest["packages"])
    assert all(manifest["packages"].values())
    assert built.packages == len(manifest["packages"])
    assert built.size_bytes == sum(path.stat().st_size for path in (built.kernel, built.initramfs, built.root))


def test_the_same_input_makes_the_same_image(built: GuestImage, cache: Path) -> None:
    again = build.ensure()
    assert again.root != built.root
    assert again.root.read_bytes() == built.root.read_bytes()
    assert again.initramfs.read_bytes() == built.initramfs.read_bytes()


def test_a_changed_agent_is_another_image_of_the_same_base(image: GuestImage, source: Path, builder: Builder) -> None:
    with (source / "utilityvm/agent/faults.py").open("a") as file:
        file.write("\n# changed\n")
    *steps, key = lines(builder())
    assert key != image.key
    assert "unpacking" in steps
    assert "fetching Debian packages" not in steps
    assert {one.key for one in build.catalog()} == {image.key, key}
    assert build.find() == image


@pytest.mark.parametrize("damage", ["cut short", "gone", "changed"])
def test_a_damaged_image_is_not_found(image: GuestImage, damage: str) -> None:
    if damage == "cut short":
        os.truncate(image.root, image.root.stat().st_size - 1)
        os.utime(image.root, (recipe.TIME, recipe.TIME))
    elif damage == "gone":
        image.initramfs.unlink()
    else:
        with image.root.open("r+b") as file:
            file.write(b"x")
    assert build.find() is None
    with pytest.raises(SetupError) as caught:
        build.verify(image)
    assert "uvm image build" in (caught.value.remedy or "")


def test_a_damaged_image_is_built_again(image: GuestImage) -> None:
    os.truncate(image.root, 4096)
    build.verify(build.ensure())


def test_damage_that_keeps_size_and_time_is_found_by_verify(image: GuestImage) -> None:
    with image.root.open("r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    os.utime(image.root, (recipe.TIME, recipe.TIME))
    with pytest.raises(SetupError, match=r"root\.ext4 is not what was built"):
        build.verify(image)


def test_a_copy_that_lost_its_times_is_found(image: GuestImage) -> None:
    for path in (image.root, image.kernel, image.initramfs):
        path.touch()
    assert build.find() == image


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"vmlinuz": {"size": "x"}}}'])
def test_a_manifest_that_is_none_is_no_image(cache: Path, text: str) -> None:
    folder = cache / "images" / "a"
    folder.mkdir(parents=True)
    for name in ("vmlinuz", "initramfs", "root.ext4"):
        (folder / name).write_text("")
    (folder / "manifest.json").write_text(text)
    assert build.catalog() == []


@pytest.mark.parametrize("step", ["unpacking", "writing the root disk"])
def test_a_build_that_is_killed_leaves_nothing_to_believe(cache: Path, builder: Builder, step: str) -> None:
    process = builder()
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            if line.strip() == step:
                process.kill()
    assert process.wait() == -signal.SIGKILL
    assert build.catalog() == []
    assert list((cache / "images").glob(".new-*"))
    key = lines(builder())[-1]
    assert [image.key for image in build.catalog()] == [key]


def test_two_builds_at_once_build_once(cache: Path, builder: Builder) -> None:
    said = [lines(process) for process in [builder(), builder()]]
    assert said[0][-1] == said[1][-1]
    assert sum(one.count("unpacking") for one in said) == 1


def test_a_base_that_was_cut_short_is_not_used(cache: Path, base: Path) -> None:
    """Its folder has its name only when it is whole; one without its list was put there by hand."""
    (cache / "bases" / base.name).unlink()
    (cache / "bases" / base.name).mkdir()
    (cache / "bases" / base.name / "root.tar").write_bytes(b"")
    report: list[str] = []

    def stop(what: str, done: float) -> None:
        report.append(what)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.ensure(progress=stop)
    assert report == ["fetching Debian packages"]
    assert not list((cache / "bases").glob(".new-*"))
