"""What the benchmarks share: times, tables, and disks to measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from utilityvm.machine.programs import find_program, run


async def median_ms(work: Callable[[], Awaitable[object]], rounds: int) -> float:
    """The median time of `work`, in milliseconds."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        await work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("---" for _ in head) + "|")
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |")


def ext4_images(folder: Path, count: int, *, image_format: str = "qcow2", size_mib: int = 16) -> list[Path]:
    """`count` images of one small ext4 file system that holds the file `hello`."""
    tree = folder / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    (tree / "hello").write_text("hello\n")
    raw = folder / "base.raw"
    run(
        [
            find_program("mkfs.ext4", package="e2fsprogs"),
            "-q",
            "-F",
            "-O",
            "^has_journal",
            "-d",
            tree,
            raw,
            f"{size_mib}M",
        ]
    )
    images = []
    for number in range(count):
        image = folder / f"disk{number}.{image_format}"
        run([find_program("qemu-img", package="qemu-utils"), "convert", "-f", "raw", "-O", image_format, raw, image])
        images.append(image)
    return images
