"""A VM taken over from its last owner, by how many disks it has; and what the journal costs of an attach."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from figures import ext4_images, table
from utilityvm import DiskSpec, UtilityVM, VMConfig
from utilityvm.store import SqliteJournal

COUNTS = (1, 64, 255)
ROUNDS = 7


class Journal:
    """Adds up what the journal's writes take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.writes = 0
        plain = SqliteJournal.write

        async def write(journal: SqliteJournal, *arguments: object) -> None:
            begun = time.perf_counter()
            await plain(journal, *arguments)  # type: ignore[arg-type]
            self.seconds += time.perf_counter() - begun
            self.writes += 1

        SqliteJournal.write = write  # type: ignore[assignment, method-assign]


async def share_of_the_journal(vm: UtilityVM, disk: Path) -> list[object]:
    journal, begun = Journal(), time.perf_counter()
    for _ in range(ROUNDS):
        await (await vm.add_scsi(disk, "/data", read_only=True)).release()
    took = time.perf_counter() - begun
    figure = f"{journal.seconds / ROUNDS * 1e6:.0f} us in {journal.writes // ROUNDS} writes"
    return ["the journal's part of an attach, mount and release", figure, f"{100 * journal.seconds / took:.2f} %"]


async def main() -> None:
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as folder:
        disks = ext4_images(Path(folder), max(COUNTS), size_mib=4)
        vm = await UtilityVM.start(VMConfig(name=name, keep=True, memory_mib=512))
        rows: list[list[object]] = [await share_of_the_journal(vm, disks[0])]
        try:
            done = 0
            for count in COUNTS:
                specs = [DiskSpec(host_path=disk, read_only=True) for disk in disks[done:count]]
                await vm.add_scsi_many(specs, holder="bench")
                done = count
                times = []
                for _ in range(ROUNDS):
                    await vm.close()
                    begun = time.perf_counter()
                    vm = await UtilityVM.open(name)
                    times.append((time.perf_counter() - begun) * 1000)
                assert len(vm.scsi_slots()) == count
                rows.append([f"taken over with {count} disks", f"{statistics.median(times):.0f} ms", ""])
            await vm.close()
        finally:
            await UtilityVM.remove(name, force=True)
    table(["work", "median", "of the whole"], rows)


if __name__ == "__main__":
    asyncio.run(main())
