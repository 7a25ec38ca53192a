"""What the walls around QEMU cost: starts and clones, with them and without, in turns.

A round is three: without, with, without again; so a machine that gets busier is busier for all. What the two without
differ by is noise. The time of the processors, of this process and of all that it started and saw end, says what the
walls cost on a machine that is too busy for the clock to say anything.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from figures import table
from utilityvm import UtilityVM, VMConfig
from utilityvm.hosts.qemu import QemuConfig, QemuHost

ROUNDS = 20
_WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
TURNS = ("off", "require", "off")


def _cpu_ms() -> float:
    """Of this process, and of those that it started and that have ended."""
    return sum(1000 * (use.ru_utime + use.ru_stime) for use in map(resource.getrusage, _WHOSE))


async def _start(folder: Path, confinement: str) -> tuple[float, float]:
    """From nothing to the monitor's answer; no guest runs."""
    config = QemuConfig(name="walls", memory_mib=64, paused=True, confinement=confinement)
    begun, cpu = time.perf_counter(), _cpu_ms()
    host = await QemuHost.start(config, folder=folder / "walls")
    took = (time.perf_counter() - begun) * 1000
    await host.stop()
    return took, _cpu_ms() - cpu


async def _clone(confinement: str) -> tuple[float, float]:
    """From a template to its guest's answer."""
    os.environ["UTILITYVM_CONFINEMENT"] = confinement
    begun, cpu = time.perf_counter(), _cpu_ms()
    clone = await UtilityVM.clone("walls", "walls-clone")
    took = (time.perf_counter() - begun) * 1000
    await clone.stop()
    return took, _cpu_ms() - cpu


async def _measured(what: str, once: Callable[[str], Awaitable[tuple[float, float]]]) -> list[tuple[str, ...]]:
    for confinement in TURNS:  # what is tried once a boot is remembered
        await once(confinement)
    rounds = [[await once(confinement) for confinement in TURNS] for _ in range(ROUNDS)]
    rows = []
    for kind, measure in (("clock", 0), ("processors, end included", 1)):
        values = [[one[measure] for one in three] for three in rounds]
        without, within, _ = (statistics.median(column) for column in zip(*values, strict=True))
        best = min(walls for _, walls, _ in values) - min(min(first, last) for first, _, last in values)
        price = statistics.median(walls - (first + last) / 2 for first, walls, last in values)
        noise = statistics.median(abs(first - last) / 2 for first, _, last in values)
        rows.append((what, kind, *(f"{number:.1f} ms" for number in (without, within, price, noise, best))))
    return rows


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-walls-") as name:
        folder = Path(name)
        for what in ("STATE", "RUNTIME"):  # nothing of this machine's own VMs is touched
            os.environ[f"UTILITYVM_{what}_DIR"] = str(folder / what.lower())
        rows = await _measured("QEMU's start, to its monitor's answer", lambda how: _start(folder, how))
        vm = await UtilityVM.start(VMConfig(name="parent", memory_mib=128))
        await vm.save_as_template("walls")
        rows += await _measured("a clone, to its guest's answer", _clone)
    print(f"{ROUNDS} rounds; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    table(
        ("what", "measured by", "without", "with", "difference in a round", "noise", "best with - best without"), rows
    )


if __name__ == "__main__":
    asyncio.run(main())
