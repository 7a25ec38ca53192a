"""`uvm detach` gives back the reservation that is meant, by any name of its disk. The VM is imitated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.cli import disk
from utilityvm.machine.hostpath import identity_of
from utilityvm.scsi.slot import Slot
from utilityvm.vm import naming

from .conftest import Uvm

SLOT = Slot(0, 1)
ONE, TWO = PurePosixPath("/data"), PurePosixPath("/more")


@dataclass
class Held:
    """A reservation."""

    vm: VM
    id: str
    guest_path: PurePosixPath
    holder: str
    host_path: Path
    slot: Slot = SLOT

    async def release(self, *, force: bool, timeout_s: float) -> None:
        self.vm.released.append(self.id)
        self.vm.held.remove(self)


class VM:
    """One disk with two mounts and three reservations."""

    def __init__(self, image: Path) -> None:
        self.image, self.released = image, list[str]()
        held = (("r1", ONE, "me"), ("r2", TWO, "me"), ("r3", ONE, "job"))
        self.held = [Held(self, name, path, holder, image) for name, path, holder in held]

    def scsi_reservations(self) -> list[Held]:
        return list(self.held)

    def scsi_slots(self) -> list[Any]:
        paths = tuple(dict.fromkeys(one.guest_path for one in self.held))
        row = SimpleNamespace(slot=SLOT, host_path=str(self.image), identity="", guest_paths=paths)
        row.references, row.attachment = len(self.held), "a1"
        return [row] if self.held else []

    async def find_scsi(self, name: str, *, timeout_s: float) -> Any:
        return naming.find(self.scsi_slots(), name, identity_of(name), aliases={}, vm="v")[0]

    async def remove_scsi(self, name: str, *, holder: str | None, force: bool, timeout_s: float) -> None:
        _, path = naming.find(self.scsi_slots(), name, identity_of(name), aliases={}, vm="v")
        found = [one for one in self.held if holder in (None, one.holder) and path in (None, one.guest_path)]
        await found[-1].release(force=force, timeout_s=timeout_s)


@pytest.fixture
def vm(folders: Path, monkeypatch: pytest.MonkeyPatch) -> VM:
    (folders / "disk.raw").touch()
    vm = VM(folders / "disk.raw")

    @asynccontextmanager
    async def opened(name: str, **_: object) -> AsyncIterator[VM]:
        yield vm

    monkeypatch.setattr(disk, "opened", opened)
    return vm


@pytest.mark.parametrize(
    ("words", "released"),
    [
        (["/data"], "r3"),
        (["/more"], "r2"),
        (["/data", "--holder", "me"], "r1"),
        (["disk.raw"], "r3"),
        (["disk.raw", "--holder", "me"], "r2"),
        (["r1"], "r1"),
    ],
)
def test_a_guest_path_means_its_newest_reservation_a_disk_the_newest_of_all_and_a_name_itself(
    uvm: Uvm, vm: VM, words: list[str], released: str
) -> None:
    done = uvm("detach", "v", *words)
    assert done.exit_code == 0, done.stderr
    assert vm.released == [released]


def test_the_last_one_is_told_as_the_end(uvm: Uvm, vm: VM) -> None:
    left = [uvm("detach", "v", word, "--json").stdout.partition('"references": ')[2][0] for word in ("/data",) * 2]
    assert left == ["2", "1"]
    assert uvm("detach", "v", "/data").exit_code == 3
    assert '"references": 0' in uvm("detach", "v", "/more", "--json").stdout
