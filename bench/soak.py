"""One process that goes on and on, with rounds of add + release and of clone + stop. It leaves nothing, or this fails.

`./dev soak [ROUNDS] [--minutes N]`: that many clones, two and a half times as many adds; it ends early when time is up.
Clones get two thirds of the time. How far it is stands on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from figures import ext4_images, table
from memory import kib
from utilityvm import UtilityVM, VMConfig

ROUNDS: Final = 2000
ADDS_PER_CLONE: Final = 2.5
SETTLES_S: Final = 10.0  # what nobody waits for is closed in threads
MAY_GROW_KIB: Final = 16 << 10  # caches and the allocator; a leak of 4 KiB a round is more than that after 5,000


@dataclass(frozen=True, slots=True)
class Left:
    """What this process has of each kind."""

    descriptors: int
    threads: int
    zombies: int
    children: int
    mounts: int
    folders: int  # of VMs, below the runtime folder
    overlays: int  # and other things in the state folder

    @classmethod
    def now(cls, folder: Path) -> Left:
        states = Counter(_states_of_children())
        return cls(
            descriptors=len([*Path("/proc/self/fd").iterdir()]),
            threads=threading.active_count(),
            zombies=states["Z"],
            children=states.total(),
            mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
            folders=len([*folder.glob("run/vms/*")]),
            overlays=len([*folder.glob("state/overlays/*")]),
        )

    def more_than(self, before: Left) -> dict[str, int]:
        had = asdict(before)
        return {kind: count - had[kind] for kind, count in asdict(self).items() if count > had[kind]}


def _states_of_children() -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            text = stat.read_text(errors="replace")
            state, parent = text[text.rindex(")") + 2 :].split()[:2]
            if int(parent) == os.getpid():
                found.append(state)
    return found


async def soak(
    name: str, once: Callable[[int], Awaitable[None]], *, rounds: int, until: float, folder: Path
) -> tuple[list[object], dict[str, int]]:
    """Do it that many times, or until the time is up. Gives a row of the table, and what is left behind."""
    warm = max(1, rounds // 10)
    for number in range(warm):  # pools of threads, modules and caches come to be
        await once(number)
    before, kib_before, begun = Left.now(folder), kib(os.getpid(), "VmRSS"), time.perf_counter()
    done = warm
    while done < rounds and time.monotonic() < until:
        await once(done)
        done += 1
        if done % max(1, rounds // 20) == 0:
            took, more = time.perf_counter() - begun, Left.now(folder).more_than(before)
            grown = kib(os.getpid(), "VmRSS") - kib_before
            print(
                f"{name}: {done} of {rounds} in {took:.0f} s, {grown} KiB, {more or 'nothing'}",
                file=sys.stderr,
                flush=True,
            )
    took = time.perf_counter() - begun
    settled = time.monotonic() + SETTLES_S
    while (more := Left.now(folder).more_than(before)) and time.monotonic() < settled:
        await asyncio.sleep(0.1)
    grown = kib(os.getpid(), "VmRSS") - kib_before
    if grown > MAY_GROW_KIB:
        more["KiB"] = grown
    told = ", ".join(f"{count} {kind}" for kind, count in more.items()) or "nothing"
    return [name, done, f"{took / max(done - warm, 1) * 1000:.0f} ms", f"{grown} KiB", told], more


async def main(rounds: int, minutes: float) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="uvm-") as text:
        folder = Path(text)
        os.environ["UTILITYVM_RUNTIME_DIR"], os.environ["UTILITYVM_STATE_DIR"] = f"{text}/run", f"{text}/state"
        kept, disk = ext4_images(folder, 2)  # a template's disk is not attached again
        config = VMConfig(name="soaked", memory_mib=128)

        async def clone(number: int) -> None:
            async with UtilityVM.clone("soaked", f"clone-{number}"):
                pass

        async with UtilityVM.start(config) as vm:
            await vm.add_scsi(kept, "/kept")
            await vm.save_as_template("soaked")
        cloned, left = await soak("clone + stop", clone, rounds=rounds, until=begun + minutes * 40, folder=folder)

        async with UtilityVM.start(config) as vm:

            async def add(_: int) -> None:
                async with vm.add_scsi(disk, "/soaked"):
                    pass

            adds = int(rounds * ADDS_PER_CLONE)
            added, more = await soak("add + release", add, rounds=adds, until=begun + minutes * 60, folder=folder)
    table(["what", "rounds", "each", "grown by", "left behind"], [cloned, added])
    return 1 if left or more else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=24 * 60.0)
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.rounds, given.minutes)))
