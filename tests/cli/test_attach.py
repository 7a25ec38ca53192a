"""What `uvm attach` tells of a mount. The VM is imitated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.cli import disk
from utilityvm.scsi.slot import Slot

from .conftest import Uvm

NOTE = "/data is mounted read-only: its disk cannot be written to"


@pytest.fixture(autouse=True)
def vm(monkeypatch: pytest.MonkeyPatch) -> None:
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

    @asynccontextmanager
    async def opened(name: str, **_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(add=add)

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
