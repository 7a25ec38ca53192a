"""Many commands and clients on one VM through the server: what they cost each other, and what it needs for them."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import ext4_images, table
from utilityvm import Client, UtilityVM, VMConfig, connect
from utilityvm.client.command import server_pid

COMMANDS = 20
IDLE, BUSY, CALLS = 1000, 200, 5


def command_ms(*words: str) -> float:
    begun = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("uvm")), *words], check=True, capture_output=True)
    return (time.perf_counter() - begun) * 1000


async def at_once_ms(count: int, *words: str) -> list[float]:
    """Processes of their own; the time of each."""
    return sorted(await asyncio.gather(*(asyncio.to_thread(command_ms, *words) for _ in range(count))))


def memory_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


async def calls_ms(client: Client, name: str) -> list[float]:
    times = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        await client.at(name).scsi_slots()
        times.append((time.perf_counter() - begun) * 1000)
    return times


def row(what: str, times: list[float], pid: int) -> list[object]:
    times = sorted(times)
    worst = times[min(len(times) - 1, len(times) * 99 // 100)]
    return [what, f"{statistics.median(times):.1f} ms", f"{worst:.1f} ms", f"{memory_mib(pid):.0f} MiB"]


async def main() -> None:
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as folder:
        [disk] = ext4_images(Path(folder), 1)
        vm = await UtilityVM.start(VMConfig(name=name, keep=True))
        await vm.close()
        clients = [connect() for _ in range(IDLE)]
        try:
            command_ms("attach", name, f"{disk}:/data")  # it starts the server
            pid = server_pid()
            assert pid is not None
            rows = [row("one `uvm exec`", await at_once_ms(1, "exec", name, "-n", "true"), pid)]
            together = await asyncio.gather(
                at_once_ms(COMMANDS, "exec", name, "-n", "true"), at_once_ms(5, "attach", name, f"{disk}:/data")
            )
            rows += [
                row(f"{COMMANDS} `uvm exec` at once", together[0], pid),
                row("5 `attach` beside", together[1], pid),
            ]
            rows.append(row("a call of one client", await calls_ms(clients[0], name), pid))
            for client in clients:
                await client.vms()
            rows.append(row(f"a call beside {IDLE} idle clients", await calls_ms(clients[0], name), pid))
            busy = await asyncio.gather(*(calls_ms(client, name) for client in clients[:BUSY]))
            rows.append(row(f"a call of {BUSY} busy clients", [one for times in busy for one in times], pid))
            table(["what", "median", "99 of 100", "memory of the server"], rows)
        finally:
            for client in clients:
                await client.close()
            await UtilityVM.remove(name, force=True)


if __name__ == "__main__":
    asyncio.run(main())
