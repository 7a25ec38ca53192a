"""Templates: boot against clone, the parts of a clone, a pool, fifty clones at once, and the seed's way of copying."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import ext4_images, table
from utilityvm import ClonePool, UtilityVM, VMConfig
from utilityvm.hosts.qemu import QemuHost
from utilityvm.machine.programs import find_program, run
from utilityvm.templates import catalog
from utilityvm.vm import booting

BOOTS, CLONES, FROM_POOL, ALIVE = 3, 30, 20, 50
DATA_MIB = 1024

PARTS: list[tuple[str, object, str]] = [
    ("QEMU's process, to its monitor's answer", QemuHost, "start"),
    ("the state, and a look at the disks", QemuHost, "loaded"),
    ("running, made unique, and the agent's answer", booting, "wake"),
]


@contextmanager
def timed_parts() -> Iterator[dict[str, list[float]]]:
    """While this lasts each part of a clone adds its milliseconds to its list."""
    times: dict[str, list[float]] = {label: [] for label, _, _ in PARTS}
    before = [(owner, name, vars(owner)[name]) for _, owner, name in PARTS]

    def timed(label: str, work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapped(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return await work(*arguments, **named)
            finally:
                times[label].append((time.perf_counter() - begun) * 1000)

        return wrapped

    try:
        for label, owner, name in PARTS:
            setattr(owner, name, timed(label, getattr(owner, name)))
        yield times
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


async def ms(work: Awaitable[Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = await work
    return (time.perf_counter() - begun) * 1000, result


def spread(times: list[float]) -> str:
    """The median and the slowest of a hundred, as far as there are so many."""
    ordered = sorted(times)
    return f"{statistics.median(ordered):.0f} ms, p99 {ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]:.0f} ms"


def memory_kib(pid: int) -> tuple[int, int]:
    """Pss and private memory of a process. Source: proc(5), /proc/PID/smaps_rollup."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name] = int(value)
    return fields["Pss:"], fields["Private_Clean:"] + fields["Private_Dirty:"]


async def warm(name: str, disks: list[Path]) -> None:
    vm = await UtilityVM.start(VMConfig(name=name))
    for number, disk in enumerate(disks):
        await vm.add_scsi(disk, f"/disk{number}")
    took, _ = await ms(vm.save_as_template(name))
    print(f"(saved {name} in {took:.0f} ms)\n", flush=True)


async def speed(template: str, rows: list[list[object]]) -> None:
    boots = []
    for _ in range(BOOTS):
        took, vm = await ms(UtilityVM.start(VMConfig(name="bench-boot")))
        boots.append(took)
        await vm.stop(timeout_s=0)
    clones: list[float] = []
    with timed_parts() as parts:
        for number in range(CLONES):
            took, vm = await ms(UtilityVM.clone(template, f"bench-clone{number}"))
            clones.append(took)
            await vm.stop(timeout_s=0)
        medians = {label: statistics.median(times) for label, times in parts.items()}
    pooled = []
    async with ClonePool(template, size=1) as pool:
        for _ in range(FROM_POOL):
            while pool.ready < 1:
                await asyncio.sleep(0.01)
            took, vm = await ms(pool.acquire())
            pooled.append(took)
            await vm.stop(timeout_s=0)
    boot, clone = statistics.median(boots), statistics.median(clones)
    rows.append(["boot to the agent's answer", spread(boots), "1 x"])
    rows.append(["clone with two overlays, unique and answering", spread(clones), f"{boot / clone:.0f} x faster"])
    rows.extend([f"— {label}", f"{median:.0f} ms", ""] for label, median in medians.items())
    rows.append(["clone from a pool", spread(pooled), f"{boot / statistics.median(pooled):.0f} x faster"])


async def many(template: str, rows: list[list[object]]) -> None:
    begun = time.perf_counter()
    clones = [await UtilityVM.clone(template, f"bench-many{number}") for number in range(ALIVE)]
    took = time.perf_counter() - begun
    shares = [memory_kib(vm.process.pid) for vm in clones]
    for vm in clones:
        await vm.stop(timeout_s=0)
    one = await UtilityVM.start(VMConfig(name="bench-one"))
    pss, private = memory_kib(one.process.pid)
    await one.stop(timeout_s=0)
    clone_pss, clone_private = (statistics.median(values) for values in zip(*shares, strict=True))
    rows += [
        [f"{ALIVE} clones, one after the other, all alive", f"{took:.1f} s", ""],
        ["memory of a booted VM", f"{pss / 1024:.0f} MiB Pss, {private / 1024:.0f} MiB private", "1 x"],
        [
            f"memory of each of {ALIVE} clones",
            f"{clone_pss / 1024:.0f} MiB Pss, {clone_private / 1024:.0f} MiB private",
            f"{100 * (1 - clone_pss / pss):.0f} % less",
        ],
    ]


async def large(folder: Path, rows: list[list[object]]) -> None:
    """A disk of 1 GiB of data: the seed copies each writable image whole for each clone."""
    raw, disk = folder / "large.raw", folder / "large.qcow2"
    with raw.open("wb") as file:
        for _ in range(DATA_MIB):
            file.write(os.urandom(1 << 20))
    run([find_program("qemu-img", package="qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", raw, disk])
    raw.unlink()
    vm = await UtilityVM.start(VMConfig(name="bench-large"))
    await vm.add_scsi(disk)
    await vm.save_as_template("bench-large")
    copies, clones = [], []
    for number in range(3):
        begun = time.perf_counter()
        await asyncio.to_thread(shutil.copyfile, disk, folder / "copy.qcow2")
        copies.append((time.perf_counter() - begun) * 1000)
        (folder / "copy.qcow2").unlink()
        took, vm = await ms(UtilityVM.clone("bench-large", f"bench-large{number}"))
        clones.append(took)
        await vm.stop(timeout_s=0)
    copy, clone = statistics.median(copies), statistics.median(clones)
    rows += [
        [f"copying {DATA_MIB} MiB, as the seed does for each clone", f"{copy:.0f} ms, and those {DATA_MIB} MiB", "1 x"],
        ["the whole clone, over the same disk", f"{clone:.0f} ms, 256 KiB of overlay", f"{copy / clone:.1f} x faster"],
    ]


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as name:
        folder = Path(name)
        os.environ["UTILITYVM_STATE_DIR"] = str(folder / "state")
        disks = [*ext4_images(folder, 1), *ext4_images(folder / "second", 1, image_format="vhdx")]
        await warm("bench", disks)
        rows: list[list[object]] = []
        await speed("bench", rows)
        await many("bench", rows)
        await large(folder, rows)
        table(["work", "figure", "ratio"], rows)
        print(f"\nThe template takes {catalog.load('bench').disk_bytes() >> 20} MiB on the disk.")


if __name__ == "__main__":
    asyncio.run(main())
