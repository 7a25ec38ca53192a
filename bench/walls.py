"""What the walls around QEMU cost: starts and clones, with them and without, in turns.

A round is three: without, with, without again; so a machine that gets busier is busier for all. What the two without
differ by is noise. On a machine that has other work run it as `chrt --rr 10 ./dev bench walls`, as root: it is the
first then to have a processor.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from figures import table
from utilityvm import UtilityVM, VMConfig
from utilityvm.hosts.qemu import QemuConfig, QemuHost

ROUNDS = 40
TURNS = ("off", "require", "off")


async def _start(folder: Path, confinement: str) -> float:
    """From nothing to the monitor's answer; no guest runs."""
    config = QemuConfig(name="walls", memory_mib=64, paused=True, confinement=confinement)
    begun = time.perf_counter()
    host = await QemuHost.start(config, folder=folder / "walls")
    took = (time.perf_counter() - begun) * 1000
    await host.stop()
    return took


async def _clone(confinement: str) -> float:
    """From a template to its guest's answer."""
    os.environ["UTILITYVM_CONFINEMENT"] = confinement
    begun = time.perf_counter()
    clone = await UtilityVM.clone("walls", "walls-clone")
    took = (time.perf_counter() - begun) * 1000
    await clone.stop()
    return took


async def _measured(what: str, once: Callable[[str], Awaitable[float]]) -> tuple[str, ...]:
    for confinement in TURNS:  # what is tried once a boot is remembered
        await once(confinement)
    rounds = [[await once(confinement) for confinement in TURNS] for _ in range(ROUNDS)]
    without, within, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    price = statistics.median(walls - (first + last) / 2 for first, walls, last in rounds)
    noise = statistics.median(abs(first - last) / 2 for first, _, last in rounds)
    best = min(walls for _, walls, _ in rounds) - min(min(first, last) for first, _, last in rounds)
    return (what, *(f"{number:.1f} ms" for number in (without, within, price, noise, best)))


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-walls-") as name:
        folder = Path(name)
        for what in ("STATE", "RUNTIME"):  # nothing of this machine's own VMs is touched
            os.environ[f"UTILITYVM_{what}_DIR"] = str(folder / what.lower())
        rows = [await _measured("QEMU's start, to its monitor's answer", lambda how: _start(folder, how))]
        vm = await UtilityVM.start(VMConfig(name="parent", memory_mib=128))
        await vm.save_as_template("walls")
        rows.append(await _measured("a clone, to its guest's answer", _clone))
    print(f"{ROUNDS} rounds; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    table(
        ("what", "measured by", "without", "with", "difference in a round", "noise", "best with - best without"), rows
    )


if __name__ == "__main__":
    asyncio.run(main())
