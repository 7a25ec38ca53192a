"""Every hostile image and path of tests/helpers/hostile_images.py, offered to a real QEMU. `./dev corpus hostile`.

Each is asked for read-only and writable, behind the walls and without them. Prints what came of them, and fails if the
file was opened that none may lead to, if an error is none of ours, or if QEMU ends.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

import hostile_images
from figures import table
from utilityvm import UtilityVMError
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.scsi.ports import DiskRequest
from utilityvm.scsi.slot import Slot
from watched import Watched

_T = 60.0


async def offered(host: QemuHost, one: hostile_images.Hostile, name: str, *, read_only: bool) -> str:
    """What became of it."""
    try:
        disk = await host.open(DiskRequest(host_path=one.path, read_only=read_only, format=one.format))
    except UtilityVMError as error:
        return type(error).__name__
    try:
        await host.attach(Slot(0, 1), disk, attachment=name, timeout_s=_T)
    except UtilityVMError as error:
        return f"{type(error).__name__}, by QEMU"
    finally:
        disk.close()
    await host.detach(Slot(0, 1), attachment=name, timeout_s=_T)
    return "attached, as data"


async def main() -> int:
    failures: list[str] = []
    rows: list[tuple[object, ...]] = []
    for confinement in ("auto", "off"):
        with tempfile.TemporaryDirectory(prefix="uvm-hostile-images-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # or QEMU's user could not reach the secret, whatever it does
            (images := folder / "images").mkdir()
            corpus, seen, longest = list(hostile_images.made(images)), Counter[str](), 0.0
            (images / "secret").chmod(0o666)
            config = QemuConfig(name="corpus", memory_mib=64, confinement=confinement)
            host = await QemuHost.start(config, folder=folder / "vm")
            with Watched(images / "secret") as secret:
                for number, one in enumerate(corpus):
                    for read_only in (True, False):
                        begun = time.perf_counter()
                        outcome = await offered(host, one, f"a{number}{read_only}", read_only=read_only)
                        longest = max(longest, time.perf_counter() - begun)
                        seen[outcome] += 1
                        if secret.was_opened() or (outcome.startswith("attached") and one.must == "refused"):
                            failures.append(f"{one.name}, confinement={confinement}: {outcome}")
            assert await host.status() == "running"
            await host.stop()
        told = ", ".join(f"{outcome} {count}" for outcome, count in seen.most_common())
        rows.append((confinement, len(corpus), told, f"{longest:.2f} s"))
    table(("confinement", "images and paths", "outcomes, read-only and writable", "longest"), rows)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
