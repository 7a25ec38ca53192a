"""What `uvm attach` tells of a mount. The VM is imitated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm import GENERATED
from utilityvm.cli import disk
from utilityvm.scsi.slot import Slot

from .conftest import Uvm

NOTE = "/data is mounted read-only: its disk cannot be written to"


@pytest.fixture
def added() -> list[tuple[int, object]]:
    """The scratch disks that were made: size and guest path."""
    return []


@pytest.fixture(autouse=True)
def vm(monkeypatch: pytest.MonkeyPatch, added: list[tuple[int, object]]) -> None:
    mount = SimpleNamespace(
        id="r1",
        slot=Slot(0, 1),
        guest_path=PurePosixPath("/data"),
        host_path=Path("/srv/disk.raw"),
        read_only=False,
        ref_count=1,
        notes=(NOTE, "a \x1b[31mred\x1b[0m one"),
    )

    async def add(*_: Any, **__: Any) -> Any:
        return mount

    async def add_scratch(size_bytes: int, guest_path: object, **_: Any) -> Any:
        added.append((size_bytes, guest_path))
        return mount

    @asynccontextmanager
    async def opened(name: str, **_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(add=add, add_scratch=add_scratch)

    monkeypatch.setattr(disk, "opened", opened)


def test_the_notes_of_a_mount_are_told_beside_its_result(uvm: Uvm) -> None:
    done = uvm("attach", "v", "disk.raw:/data")
    assert done.exit_code == 0
    assert done.stdout.split() == ["r1", "0:1", "/data", "1"]
    first, second = done.stderr.splitlines()
    assert first == f"note: {NOTE}"
    assert "\x1b" not in second


def test_with_json_they_are_in_the_document_and_nowhere_else(uvm: Uvm) -> None:
    done = uvm("attach", "v", "disk.raw:/data", "--json")
    assert json.loads(done.stdout)["notes"][0] == NOTE
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words", [["scratch:10G:/work"], ["scratch:10G"], ["scratch:10G:/work", "--filesystem", "xfs"]]
)
def test_a_scratch_disk_is_made_of_the_size_that_is_written(
    uvm: Uvm, added: list[tuple[int, object]], words: list[str]
) -> None:
    done = uvm("attach", "v", *words)
    assert done.exit_code == 0, done.stderr
    ((size_bytes, guest_path),) = added
    assert size_bytes == 10 << 30
    assert guest_path == ("/work" if ":/" in words[0] else GENERATED)


@pytest.mark.parametrize(
    "words",
    [["scratch:lots"], ["scratch:"], ["scratch:10G:/work:ro"]]
    + [
        ["scratch:10G:/work", *option.split()]
        for option in ("--physical", "--format raw", "--reformat", "--partition 1")
    ],
)
def test_what_does_not_go_with_a_scratch_disk_is_refused(
    uvm: Uvm, added: list[tuple[int, object]], words: list[str]
) -> None:
    assert uvm("attach", "v", *words).exit_code == 2
    assert not added


def test_a_file_of_that_name_is_a_disk(uvm: Uvm, added: list[tuple[int, object]], folders: Path) -> None:
    (folders / "scratch:10G").touch()
    assert uvm("attach", "v", "scratch:10G").exit_code == 0
    assert not added
