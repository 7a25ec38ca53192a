"""`uvm image rm`, and `uvm start --image`. The images are in the test's own cache; no VM starts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import utilityvm
from utilityvm.errors import SetupError

from .conftest import Uvm

IMAGES = [SimpleNamespace(key=key, size_bytes=3 << 20) for key in ("bookworm-aa1", "bookworm-ab2")]


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the images that were removed."""
    keys: list[str] = []

    def get_image(key: str) -> SimpleNamespace:
        found = [image for image in IMAGES if image.key.startswith(key)]
        if len(found) != 1:
            raise SetupError(f"no guest image has a key that begins with {key!r}", remedy="there are ...")
        return found[0]

    monkeypatch.setattr(utilityvm, "get_image", get_image)
    monkeypatch.setattr(utilityvm, "remove_images", lambda images: keys.extend(image.key for image in images))
    return keys


def test_images_are_removed_by_the_beginnings_of_their_keys_each_once(uvm: Uvm, removed: list[str]) -> None:
    done = uvm("image", "rm", "bookworm-aa", "bookworm-ab2", "bookworm-aa", "--json")
    assert done.exit_code == 0
    assert removed == ["bookworm-aa1", "bookworm-ab2"]
    assert [one["key"] for one in json.loads(done.stdout)] == removed


def test_if_one_key_is_none_no_image_is_removed(uvm: Uvm, removed: list[str]) -> None:
    done = uvm("image", "rm", "bookworm-aa1", "trixie")
    assert done.exit_code == 6
    assert "begins with 'trixie'" in done.stderr
    assert not removed


def test_a_vm_boots_the_image_that_is_named(uvm: Uvm, removed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    booted: list[Any] = []
    process = SimpleNamespace(pid=7, accelerator="tcg", accelerator_reason=None)

    @asynccontextmanager
    async def start(config: Any, *, image: Any, timeout_s: float) -> AsyncIterator[Any]:
        booted.append(image.key)
        yield SimpleNamespace(name=config.name, process=process)

    monkeypatch.setattr(utilityvm.UtilityVM, "start", start)
    done = uvm("start", "v", "--image", "bookworm-ab")
    assert (done.exit_code, done.stdout.split()) == (0, ["v", "7", "tcg"])
    assert booted == ["bookworm-ab2"]


def test_an_image_that_is_not_there_is_told_before_anything_starts(
    uvm: Uvm, removed: list[str], monkeypatch: pytest.MonkeyPatch, folders: Path
) -> None:
    monkeypatch.setattr(utilityvm.UtilityVM, "start", lambda *_, **__: pytest.fail("it started"))
    done = uvm("start", "v", "--image", "trixie")
    assert done.exit_code == 6
    assert "begins with 'trixie'" in done.stderr
