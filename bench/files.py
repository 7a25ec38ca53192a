"""Files: `put` and `get` against tar(1) at the other end of `run_streaming`, in the same run, one after the other.

Both carry the same bytes over the same connection. tar names a file before it is there, and is no guard against what a
guest sends; a copy does both. Each figure is the median of some rounds; the ratio is of throughputs, more is better.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from utilityvm import UtilityVM, VMConfig

ROUNDS = 3
SHAPES = {"one file of 8 MiB": (1, 8 << 20), "200 files of 8 KiB": (200, 8 << 10)}


def make(folder: Path, count: int, size: int) -> None:
    for number in range(count):
        path = folder / f"{number % 10}/{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


async def tar_put(vm: UtilityVM, folder: Path) -> None:
    """As `tar -c | uvm exec VM tar -x`, without a second process on the host."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, ".")
    packed.seek(0)

    async def pieces() -> AsyncIterator[bytes]:
        while data := packed.read(1 << 18):
            yield data

    code = await vm.run_streaming(
        ["sh", "-c", "mkdir -p /tmp/tar && tar -xC /tmp/tar"], stdin=pieces(), stdout=print, stderr=print
    )
    assert code == 0


async def tar_get(vm: UtilityVM, target: Path) -> None:
    packed = io.BytesIO()
    code = await vm.run_streaming(["tar", "-cC", "/tmp/source", "."], stdout=packed.write, stderr=print)
    assert code == 0
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        archive.extractall(target)


async def seconds(work: Awaitable[object]) -> float:
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


async def compare(what: str, mib: float, pairs: tuple[Callable[[], Awaitable[object]], ...]) -> None:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(await seconds(pairs[0]()))
        theirs.append(await seconds(pairs[1]()))
    one, other = statistics.median(ours), statistics.median(theirs)
    print(f"| {what} | {mib / one:.1f} MiB/s | {mib / other:.1f} MiB/s | {other / one:.2f} |", flush=True)


async def main() -> None:
    print("| work | copy | tar through run | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as name:
        here = Path(name)
        async with UtilityVM.start(VMConfig(name=f"bench-{os.getpid()}", memory_mib=512)) as vm:
            for what, (count, size) in SHAPES.items():
                make(here / "source", count, size)
                mib = count * size / (1 << 20)

                await vm.put(here / "source", "/tmp/source")
                await compare(
                    f"put {what}",
                    mib,
                    (lambda: vm.put(here / "source", "/tmp/copied/"), lambda: tar_put(vm, here / "source")),
                )
                await compare(
                    f"get {what}",
                    mib,
                    (lambda: vm.get("/tmp/source", here / "back"), lambda: tar_get(vm, here / "tar")),
                )
                for folder in ("source", "back", "tar"):
                    shutil.rmtree(here / folder)
                await vm.run(["rm", "-rf", "/tmp/source", "/tmp/copied", "/tmp/tar"], check=True)


if __name__ == "__main__":
    asyncio.run(main())
