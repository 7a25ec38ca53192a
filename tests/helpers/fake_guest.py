"""A guest of disks, mounts and mappings that are imitated, and the agent's table of them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_bus import ADDRESS, FakeBus
from fake_mapper import FakeMapper
from fake_mounts import FakeMounts
from utilityvm.agent.disks import DiskTable
from utilityvm.agent.faults import Fault

MIB = 1 << 20
LUN = 1


class World:
    """A guest with one controller, and the agent's table."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = FakeMounts(folder).install(monkeypatch)
        self.bus = FakeBus(folder, self.kernel)
        self.mapper = FakeMapper(self.bus.dev).install(monkeypatch)
        self.bus.install(monkeypatch)
        for number in range(4):
            self.kernel.device(f"{self.bus.dev}/dm-{number}", (253, number))
        self.guest = folder / "guest"
        self.guest.mkdir()
        self.state = folder / "run/mounts.json"
        self.table = self.agent()

    def agent(self) -> DiskTable:
        """One that has just started."""
        return DiskTable([ADDRESS], state=self.state)

    def attach(
        self, lun: int = LUN, *, mib: int = 32, partitions: tuple[tuple[int, int], ...] = (), holds: str = "ext4"
    ) -> str:
        node = self.bus.attach(lun, mib=mib, partitions=partitions)
        for number in range(len(partitions) + 1):
            name = f"{node}{number or ''}"
            self.mapper.device(name, f"8:{16 * lun + number}")
            if holds and (number or not partitions):
                subprocess.run([f"mkfs.{holds}", "-q", "-F", name], check=True)
        return node

    def path(self, name: str = "a/b") -> str:
        return str(self.guest / name)

    def add(self, name: str = "a/b", **settings: Any) -> None:
        self.table.add({"MountPath": self.path(name), "Lun": LUN, **settings}, soon())

    def remove(self, name: str = "a/b", *, force: bool = False) -> None:
        self.table.remove({"MountPath": self.path(name)}, soon(), force=force)

    def is_clean(self) -> bool:
        """Is nothing left of any mount?"""
        is_mounted = any(one.path.startswith(str(self.guest)) for one in self.kernel.mounts)
        notes = list(self.state.parent.glob("*.notes"))
        saved = json.loads(self.state.read_text()) if self.state.exists() else []
        left = [*self.guest.iterdir(), *self.table.mounts(), *self.mapper.mappings, *notes, *saved]
        return not is_mounted and not left


def soon() -> float:
    return time.monotonic() + 20


def seen(world: World, path: str) -> Any:
    there = world.kernel.at(path)
    assert there, path
    return there


def refused(act: Callable[[], object], said: str, kind: str = "refused") -> Fault:
    with pytest.raises(Fault, match=said) as caught:
        act()
    assert caught.value.kind == kind
    return caught.value
