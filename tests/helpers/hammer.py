"""A process that uses VMs which others use at the same time: it attaches, shares, writes and releases at random.

Prints a line of JSON for each text that it has written to the disk that only one VM at a time may write to.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path

from utilityvm import DiskInUse, UtilityVM

WAIT_S = 120.0
WRITTEN = "written.raw"


async def once(chance: random.Random, name: str, folder: Path, number: int, me: int) -> None:
    shared = folder / f"shared{chance.randrange(3)}.raw"
    async with (
        await UtilityVM.open(name, wait_s=WAIT_S) as vm,
        await vm.add_scsi(shared, f"/{shared.stem}", read_only=True) as mount,
    ):
        done = await vm.run(["cat", f"/{shared.stem}/name"])
        assert done.stdout.decode() == shared.stem, (done, mount)
        if chance.random() < 0.5:
            return
        try:
            written = await vm.add_scsi(folder / WRITTEN, "/written")
        except DiskInUse:
            return
        text = f"{me} {number}"
        done = await vm.run(["sh", "-c", f"echo {text} >> /written/log && sync"])
        assert done.exit_code == 0, done
        if chance.random() < 0.5:
            await written.release()
        # Else it stays until this process has ended: what a dead holder had goes then.
        sys.stdout.write(f"{json.dumps(text)}\n")
        sys.stdout.flush()


async def main() -> None:
    me, seconds, folder, *names = sys.argv[1:]
    chance = random.Random(int(me))
    until = time.monotonic() + float(seconds)
    number = 0
    while number == 0 or time.monotonic() < until:
        number += 1
        await once(chance, chance.choice(names), Path(folder), number, int(me))


if __name__ == "__main__":
    asyncio.run(main())
