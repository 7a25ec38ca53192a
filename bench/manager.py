"""What the manager costs by itself: null backends, with no journal and with SQLite's, and steps that take time."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import PurePosixPath

from figures import table
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import (
    DiskFormat,
    DiskRequest,
    Holder,
    Journal,
    MountConfig,
    OpenDisk,
    Record,
)
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store

WHO = Holder(name="bench")
ROUNDS = 400
REPEATS = 5


class NullDisk:
    """A disk that is nothing."""

    format = DiskFormat.RAW
    size_bytes = 1 << 20

    def __init__(self, path: str) -> None:
        self.identity = path

    def close(self) -> None:
        pass


class NullHost:
    """A host whose every step is done after `seconds`, and at once when they are 0."""

    def __init__(self, seconds: float = 0) -> None:
        self._seconds = seconds

    async def _step(self) -> None:
        if self._seconds:
            await asyncio.sleep(self._seconds)

    async def open(self, request: DiskRequest) -> OpenDisk:
        return NullDisk(request.host_path)

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        await self._step()

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        await self._step()

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        return False

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        await self._step()
        return size_bytes

    async def size(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        return 0


class NullGuest:
    """A guest whose every step is done after `seconds`."""

    def __init__(self, seconds: float = 0) -> None:
        self._seconds = seconds

    async def _step(self) -> None:
        if self._seconds:
            await asyncio.sleep(self._seconds)

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        pass

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        return guest_path

    def check_force(self, slot: Slot) -> None:
        pass

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        await self._step()
        return ()

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        await self._step()

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        await self._step()

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        return False

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        return False

    async def check_grow(self, slot: Slot, *, size_bytes: int, timeout_s: float) -> None:
        await self._step()

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        await self._step()


class NullJournal:
    """A journal that keeps nothing."""

    async def write(self, put: Sequence[Record], drop: Sequence[Record] = ()) -> None:
        pass

    def read(self) -> list[Record]:
        return []


def manager(journal: Journal, *, seconds: float = 0) -> ScsiManager:
    return ScsiManager(
        NullHost(seconds), NullGuest(seconds), journal, controllers=4, reserved={Slot(0, 0): "root"}, vm="bench"
    )


async def cycle(one: ScsiManager, name: str) -> None:
    disk = DiskRequest(host_path=name, read_only=True)
    await one.release(await one.add(disk, mount=MountConfig(read_only=True), holder=WHO))


async def cycle_us(one: ScsiManager, name: str) -> float:
    """The median time of an add and its release, in microseconds."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for _ in range(ROUNDS):
            await cycle(one, name)
        times.append((time.perf_counter() - begun) / ROUNDS)
    return statistics.median(times) * 1e6


async def rows(journal: Journal, what: str) -> list[list[object]]:
    one = manager(journal)
    empty = await cycle_us(one, "/disk")
    for number in range(254):
        await one.add(DiskRequest(host_path=f"/full{number}", read_only=True), holder=WHO)
    full = await cycle_us(one, "/disk")
    shared = await cycle_us(one, "/full0")
    return [
        [f"add + release, {what}, VM empty", f"{empty:.0f} us"],
        [f"add + release, {what}, 254 slots used", f"{full:.0f} us ({full / empty:.2f} x)"],
        [f"a second mount of a disk that is attached, {what}", f"{shared:.0f} us"],
    ]


async def parallel() -> list[list[object]]:
    """64 disks whose host and guest steps take 5 ms each; what is above 10 and 15 ms is the manager's own."""
    adds, removes = [], []
    for _ in range(REPEATS):
        one = manager(NullJournal(), seconds=0.005)
        mount = MountConfig(read_only=True)
        begun = time.perf_counter()
        held = await asyncio.gather(
            *(one.add(DiskRequest(host_path=f"/{n}", read_only=True), mount=mount, holder=WHO) for n in range(64))
        )
        middle = time.perf_counter()
        await asyncio.gather(*(one.release(reservation) for reservation in held))
        adds.append(middle - begun)
        removes.append(time.perf_counter() - middle)
    return [
        ["64 adds of 5 + 5 ms at once", f"{statistics.median(adds) * 1000:.1f} ms"],
        ["64 removals of 5 + 5 + 5 ms at once", f"{statistics.median(removes) * 1000:.1f} ms"],
    ]


async def main() -> None:
    lines = await rows(NullJournal(), "no journal")
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as folder:
        os.environ["UTILITYVM_STATE_DIR"] = folder
        try:
            with Store.open() as store:
                vm = store.add("bench", uuid="00000000-0000-0000-0000-000000000000", config={})
                lines += await rows(SqliteJournal(store, vm), "SQLite journal")
        finally:
            del os.environ["UTILITYVM_STATE_DIR"]
    lines += await parallel()
    table(["work", "median"], lines)
