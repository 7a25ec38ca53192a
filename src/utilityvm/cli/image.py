"""The guest image: build, ls, rm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from utilityvm.cli.group import Group
from utilityvm.cli.options import json_option
from utilityvm.cli.output import age, is_watched, print_fields, print_json, print_table, say, size

if TYPE_CHECKING:
    from utilityvm.guestimage.build import GuestImage
    from utilityvm.guestimage.custom import GuestRecipe


@click.group("image", cls=Group)
def image_command() -> None:
    """The guest image that VMs boot."""


@image_command.command("build")
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
    from utilityvm.guestimage.custom import GuestRecipe

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


@image_command.command("rm")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@json_option
def rm_command(keys: tuple[str, ...], as_json: bool) -> None:
    """Remove guest images by their keys, or the beginnings of these. One that a VM or a template uses stays."""
    import shutil

    from utilityvm.errors import DiskInUse
    from utilityvm.guestimage import build
    from utilityvm.store.recover import open_store
    from utilityvm.upkeep.leftovers import users_of_image

    images = [find_image(key) for key in dict.fromkeys(keys)]
    with open_store() as store, build.alone():
        for image in images:
            if users := users_of_image(store, image.folder):
                raise DiskInUse(
                    f"the guest image {image.key} is used by {', '.join(users)}",
                    host_path=image.root,
                    remedy="stop or remove them first",
                )
        for image in images:
            shutil.rmtree(image.folder)
    for image in images:
        say(f"removed {image.key} ({size(image.size_bytes)})")
    if as_json:
        print_json([{"key": image.key, "size_bytes": image.size_bytes} for image in images])


@image_command.command("ls")
@json_option
def ls_command(as_json: bool) -> None:
    """List the guest images in the cache; `*` marks the one that new VMs boot."""
    from utilityvm.guestimage import build

    images, current = build.catalog(), build.find()
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


def find_image(key: str) -> GuestImage:
    """The guest image whose key begins so.

    Raises:
        SetupError: there is none, or there are several; names them.
    """
    from utilityvm.errors import SetupError
    from utilityvm.guestimage import build

    images = build.catalog()
    found = [image for image in images if image.key == key] or [image for image in images if image.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(image.key for image in (found or images))
    said = "several guest images have keys that begin" if found else "no guest image has a key that begins"
    raise SetupError(
        f"{said} with {key!r}",
        remedy=f"there are {known}" if known else "build one: uvm image build",
    )


def ensure_image(recipe: GuestRecipe | None = None, *, refresh: bool = False) -> GuestImage:
    """The guest image of a recipe, built first if there is none, with progress for those who watch.

    Raises:
        SetupError: a program, space or a package is missing.
    """
    from utilityvm.guestimage import build

    if not refresh and (image := build.find(recipe)):
        return image
    with _progress() as report:
        return build.ensure(recipe, refresh=refresh, progress=report)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else nothing."""
    if not is_watched():
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("guest image: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda what, done: progress.update(task, description=what, completed=done)
