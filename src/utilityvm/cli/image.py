"""The guest image: build, ls, rm."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from utilityvm.cli import output
from utilityvm.cli.group import Group
from utilityvm.cli.options import json_option
from utilityvm.cli.output import age, is_watched, print_fields, print_json, print_table
from utilityvm.text import size

if TYPE_CHECKING:
    from utilityvm import GuestImage, GuestRecipe

_STEPS = 1000  # of the whole build


@click.group("image", cls=Group)
def image_command() -> None:
    """The guest image that VMs boot."""


@image_command.command("build", short_help="Build the guest image, unless it is there.")
@click.option("--refresh", is_flag=True, help="Build it anew, of the newest packages. The old one stays for its users.")
@click.option("--package", "packages", multiple=True, metavar="P", help="A Debian package more. Repeatable.")
@click.option("--kernel", metavar="P", help="The package of another kernel, with all its modules: linux-image-amd64.")
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="FILE:GUEST_PATH",
    help="A file of this host, at a path in the guest. Repeatable.",
)
@click.option(
    "--hook",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="PROGRAM",
    help="A program of this host that changes the guest's tree, whose folder is its argument.",
)
@json_option
def build_command(
    refresh: bool,
    packages: tuple[str, ...],
    kernel: str | None,
    files: tuple[str, ...],
    hook: Path | None,
    as_json: bool,
) -> None:
    """Build the guest image of this version, unless it is there.

    With packages, a kernel, files or a hook it is an image of your own, which `uvm start --image` boots. No script of a
    package runs.
    """
    from utilityvm import GuestRecipe

    recipe = GuestRecipe(packages=packages, kernel=kernel, files=dict(map(_file, files)), hook=hook)
    image = ensure_image(recipe, refresh=refresh)
    if as_json:
        print_json(_document(image))
    else:
        print_fields({"key": image.key, "folder": image.folder})


def _file(text: str) -> tuple[str, Path]:
    """`FILE:GUEST_PATH`, as the guest's path and the host's file."""
    host_path, found, rest = text.rpartition(":/")
    if not found or not host_path:
        raise click.UsageError(f"--file {text}: write it as FILE:/GUEST/PATH")
    return f"/{rest}", Path(host_path)


@image_command.command("rm", short_help="Remove guest images.")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@json_option
def rm_command(keys: tuple[str, ...], as_json: bool) -> None:
    """Remove guest images by their keys, or the beginnings of these. One that a VM or a template uses stays."""
    from utilityvm import get_image, remove_images

    images = [get_image(key) for key in dict.fromkeys(keys)]
    remove_images(images)
    for image in images:
        output.done(f"removed {image.key} ({size(image.size_bytes)})")
    if as_json:
        print_json([{"key": image.key, "size_bytes": image.size_bytes} for image in images])


@image_command.command("ls", short_help="List the guest images in the cache.")
@json_option
def ls_command(as_json: bool) -> None:
    """List the guest images in the cache; `*` marks the one that new VMs boot."""
    from utilityvm import find_image, list_images

    images, current = list_images(), find_image()
    if as_json:
        print_json([{**_document(image), "current": image == current} for image in images])
        return
    now = time.time()
    print_table(
        ("KEY", "", "ARCH", "SUITE", "PACKAGES", "SIZE", "AGE", "RECIPE"),
        [
            (
                image.key,
                "*" if image == current else "",
                image.arch,
                image.suite,
                image.packages,
                size(image.size_bytes),
                age(now - image.built_at),
                _recipe(image),
            )
            for image in images
        ],
    )


def _document(image: GuestImage) -> dict[str, object]:
    return {
        "key": image.key,
        "arch": image.arch,
        "suite": image.suite,
        "packages": image.packages,
        "size_bytes": image.size_bytes,
        "built_at": image.built_at,
        "folder": str(image.folder),
        "recipe": image.recipe,
    }


def _recipe(image: GuestImage) -> str:
    """A user's own recipe in few words."""
    if image.recipe is None:
        return ""
    words = [*image.recipe["packages"], image.recipe["kernel"], *image.recipe["files"], image.recipe["hook"]]
    return " ".join(word for word in words if word)


def ensure_image(recipe: GuestRecipe | None = None, *, refresh: bool = False) -> GuestImage:
    """The guest image of a recipe, built first if there is none, with progress for those who watch.

    Raises:
        SetupError: a program, space or a package is missing.
    """
    from utilityvm import GuestImage, find_image

    if not refresh and (image := find_image(recipe)):
        return image
    with _progress() as report:
        return GuestImage.build(recipe, refresh=refresh, progress=report)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else nothing."""
    if not is_watched():
        yield lambda what, done: None
        return
    with click.progressbar(length=_STEPS, label="guest image", item_show_func=_text, file=sys.stderr) as bar:
        yield lambda what, done: bar.update(round(done * _STEPS) - bar.pos, what)


def _text(what: object) -> str:
    return "" if what is None else str(what)
