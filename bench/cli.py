"""The command from start to finish, beside an empty Python and `virsh list`, if that is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import ext4_images, table
from utilityvm import UtilityVM, VMConfig

ROUNDS = 15


def run_ms(command: list[str]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


async def main() -> None:
    uvm = str(Path(sys.executable).with_name("uvm"))
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as folder:
        [disk] = ext4_images(Path(folder), 1)
        vm = await UtilityVM.start(VMConfig(name=name, keep=True))
        try:
            await vm.add_scsi(disk, "/data", read_only=True, holder="bench")
            inside = []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                mount = await vm.add_scsi(disk, "/data", read_only=True)
                inside.append(time.perf_counter() - begun)
                await mount.release()
            await vm.close()
            commands = {
                "an empty Python": [sys.executable, "-c", ""],
                "uvm ls NAME": [uvm, "ls", name],
                "uvm ps": [uvm, "ps"],
                "uvm path NAME DISK": [uvm, "path", name, str(disk)],
                "uvm attach of an attached disk": [uvm, "attach", name, f"{disk}:/data", "--read-only"],
            }
            if shutil.which("virsh"):
                commands["virsh --version (without a daemon)"] = ["virsh", "--version"]
            lines: list[list[object]] = [[what, f"{run_ms(command):.0f} ms"] for what, command in commands.items()]
            lines.append(
                ["the same attach in a process that owns the VM", f"{statistics.median(inside) * 1000:.1f} ms"]
            )
            table(["command", "median"], lines)
        finally:
            await UtilityVM.remove(name, force=True)


if __name__ == "__main__":
    asyncio.run(main())
