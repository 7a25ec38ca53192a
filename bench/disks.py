"""Disks on a real VM: ours, the script by hand, and libvirt 9 with qemu-guest-agent, on the same kernel and image."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from by_hand import HandVM
from figures import ext4_images, median_ms, table

from utilityvm import UtilityVM, VMConfig
from utilityvm.errors import SetupError
from utilityvm.guestimage import build
from utilityvm.hosts.qemu import accelerator
from utilityvm.process import find_program, run

ROUNDS = 25
MANY = 48
MEMORY_MIB = 256


async def ours(disks: list[Path]) -> dict[str, float]:
    figures: dict[str, float] = {}
    begun = time.perf_counter()
    async with await UtilityVM.start(VMConfig(name=f"bench-{os.getpid()}", memory_mib=MEMORY_MIB)) as vm:
        figures["boot"] = time.perf_counter() - begun
        adds, removes = [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            mount = await vm.add_scsi(disks[0], "/mnt/one", read_only=True)
            middle = time.perf_counter()
            await mount.release()
            adds.append(middle - begun)
            removes.append(time.perf_counter() - middle)
        figures["add"], figures["remove"] = statistics.median(adds), statistics.median(removes)

        async def add_all() -> None:
            mounts[:] = await asyncio.gather(
                *(vm.add_scsi(disk, f"/mnt/{i}", read_only=True) for i, disk in enumerate(disks))
            )

        mounts: list = []
        begun = time.perf_counter()
        await add_all()
        middle = time.perf_counter()
        await asyncio.gather(*(mount.release() for mount in mounts))
        figures["add_many"] = middle - begun
        figures["remove_many"] = time.perf_counter() - middle

        begun = time.perf_counter()
        mounts = await asyncio.gather(*(vm.add_scsi(disk, read_only=True) for disk in disks))
        middle = time.perf_counter()
        await asyncio.gather(*(mount.release() for mount in mounts))
        figures["attach_many"] = middle - begun
        figures["detach_many"] = time.perf_counter() - middle
        figures["ping"] = await median_ms(vm.ping, 200) / 1000
    return figures


def by_hand(disks: list[Path], folder: Path) -> dict[str, float]:
    image = build.find()
    assert image is not None
    chosen = accelerator.choose()
    vm = HandVM(
        folder=folder,
        kernel=image.kernel,
        initramfs=image.initramfs,
        root=image.root,
        cmdline=image.cmdline,
        memory_mib=MEMORY_MIB,
        machine="q35",
        accelerator=chosen.name,
    )
    try:
        figures = {"boot": vm.boot_s}
        adds, removes = [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            device = vm.attach(disks[0], 1, file_format="qcow2", read_only=True)
            vm.mount(1, "/mnt/one", read_only=True)
            middle = time.perf_counter()
            vm.unmount_and_eject(1, "/mnt/one")
            vm.detach([device])
            adds.append(middle - begun)
            removes.append(time.perf_counter() - middle)
        figures["add"], figures["remove"] = statistics.median(adds), statistics.median(removes)

        numbered = list(enumerate(disks, start=1))
        begun = time.perf_counter()
        devices = [vm.attach(disk, lun, file_format="qcow2", read_only=True) for lun, disk in numbered]
        for lun, _ in numbered:
            vm.mount(lun, f"/mnt/{lun}", read_only=True)
        middle = time.perf_counter()
        for lun, _ in numbered:
            vm.unmount_and_eject(lun, f"/mnt/{lun}")
        vm.detach(devices)
        figures["add_many"] = middle - begun
        figures["remove_many"] = time.perf_counter() - middle

        begun = time.perf_counter()
        devices = [vm.attach(disk, lun, file_format="qcow2", read_only=True) for lun, disk in numbered]
        middle = time.perf_counter()
        for lun, _ in numbered:
            vm.bridge.modify("Remove", "SCSIDevice", Lun=lun)
        vm.detach(devices)
        figures["attach_many"] = middle - begun
        figures["detach_many"] = time.perf_counter() - middle
    finally:
        vm.stop()
    return figures
