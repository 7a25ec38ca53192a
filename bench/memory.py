"""Memory: this process with 255 disks attached, QEMU's share of each disk, and the smallest VM that boots."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import ext4_images, table
from utilityvm import DiskSpec, UtilityVM, VMConfig

MEASURED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import memory
asyncio.run(memory.measure(Path(sys.argv[2])))
"""


def kib(pid: int, name: str, file: str = "status") -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


async def measure(folder: Path) -> None:
    """In a process of its own, which has loaded what an owner of VMs needs and no more."""
    disks = sorted(folder.glob("*.qcow2"))
    async with UtilityVM.start(VMConfig(name=f"bench-{os.getpid()}", memory_mib=256)) as vm:
        qemu = vm.process.pid
        before, qemu_before = kib(os.getpid(), "VmRSS"), kib(qemu, "VmRSS")
        await vm.add_scsi_many([DiskSpec(host_path=disk, read_only=True) for disk in disks])
        after, qemu_after = kib(os.getpid(), "VmRSS"), kib(qemu, "VmRSS")
    boots = []
    for memory_mib in (256, 128, 96):
        async with UtilityVM.start(VMConfig(name=f"bench-{os.getpid()}", memory_mib=memory_mib)) as vm:
            free = await vm.run(["sh", "-c", "awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo"])
            boots.append([f"a VM of {memory_mib} MiB", f"boots; {free.stdout.decode().strip()} MiB available in it"])
    table(
        ["what", "figure"],
        [
            ["this process, a VM and no disk", f"{before / 1024:.0f} MiB resident"],
            [f"this process, {len(disks)} disks attached", f"{after / 1024:.0f} MiB resident"],
            ["QEMU, for each disk", f"{(qemu_after - qemu_before) / len(disks):.0f} KiB"],
            *boots,
        ],
    )


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as name:
        folder = Path(name)
        ext4_images(folder, 255, size_mib=4)
        command = [sys.executable, "-c", MEASURED, str(Path(__file__).parent), name]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="")
