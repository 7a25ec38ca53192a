"""What the walls around QEMU cost at its start: pairs of starts, one with them and one without, in turns."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from figures import table
from utilityvm.hosts.qemu import QemuConfig, QemuHost

PAIRS = 30


async def _started_ms(folder: Path, confinement: str) -> float:
    """From nothing to the monitor's answer; no guest runs."""
    config = QemuConfig(name="walls", memory_mib=64, paused=True, confinement=confinement)
    begun = time.perf_counter()
    host = await QemuHost.start(config, folder=folder / "walls")
    took = (time.perf_counter() - begun) * 1000
    await host.stop()
    return took


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-walls-") as name:
        folder = Path(name)
        for confinement in ("off", "require"):  # what is tried once a boot is remembered
            await _started_ms(folder, confinement)
        pairs = [(await _started_ms(folder, "off"), await _started_ms(folder, "require")) for _ in range(PAIRS)]
    without, within = (statistics.median(column) for column in zip(*pairs, strict=True))
    price = statistics.median(one - other for other, one in pairs)
    table(
        ("QEMU's start, to its monitor's answer", "median"),
        [
            ("without walls", f"{without:.1f} ms"),
            ("behind them", f"{within:.1f} ms"),
            ("the difference in a pair", f"{price:.1f} ms"),
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
