"""The guest image: build, ls."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from utilityvm.cli.options import json_option
from utilityvm.cli.output import age, print_fields, print_json, print_table, size

if TYPE_CHECKING:
    from utilityvm.guestimage.build import GuestImage


@click.group("image")
def image_command() -> None:
    """The guest image that VMs boot."""


@image_command.command("build")
@json_option
def build_command(as_json: bool) -> None:
    """Build the guest image of this version, unless it is there."""
    image = ensure_image()
    if as_json:
        print_json(_document(image))
    else:
        print_fields({"key": image.key, "folder": image.kernel.parent})


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
        ("KEY", "", "ARCH", "SUITE", "PACKAGES", "SIZE", "AGE", "FOLDER"),
        [
            (
                image.key,
                "*" if image == current else "",
                image.arch,
                image.suite,
                image.packages,
                size(image.size_bytes),
                age(now - image.built_at),
                image.kernel.parent,
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
        "folder": str(image.kernel.parent),
    }


def ensure_image() -> GuestImage:
    """The guest image, built first if there is none, with progress for those who watch.

    Raises:
        SetupError: a program, space or a package is missing.
    """
    from utilityvm.guestimage import build

    if image := build.find():
        return image
    with _progress() as report:
        return build.ensure(progress=report)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("guest image: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda what, done: progress.update(task, description=what, completed=done)
