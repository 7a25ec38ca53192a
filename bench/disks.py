"""Disks on a real VM: ours, the script by hand, and libvirt 9 with qemu-guest-agent, on the same kernel and image."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from by_hand import HandVM
from figures import ext4_images, median_ms, table
from utilityvm import SCSIMount, Slot, UtilityVM, VMConfig
from utilityvm.bridge import frame, messages
from utilityvm.guestimage import build
from utilityvm.hosts.qemu import accelerator as accelerators
from utilityvm.hosts.qemu import emulator
from utilityvm.process import find_program, run
from utilityvm.scsi.ports import DiskRequest

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

        mounts: list[SCSIMount] = []

        async def add_all() -> None:
            mounts[:] = await asyncio.gather(
                *(vm.add_scsi(disk, f"/mnt/{i}", read_only=True) for i, disk in enumerate(disks))
            )

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
        figures["unplug_many"] = await unplug_many(vm, disks)
        figures["ping"] = await median_ms(vm.ping, 200) / 1000
    return figures


async def unplug_many(vm: UtilityVM, disks: list[Path]) -> float:
    """The host's part alone, without a word to the guest: what libvirt's detach does."""
    host = vm._host
    opened = [await host.open(DiskRequest(host_path=str(disk), read_only=True)) for disk in disks]
    slots = {f"unplugged{number}": Slot(0, number) for number in range(1, len(disks) + 1)}
    for disk, (name, slot) in zip(opened, slots.items(), strict=True):
        await host.attach(slot, disk, attachment=name, timeout_s=20)
        disk.close()
    begun = time.perf_counter()
    await asyncio.gather(*(host.detach(slot, attachment=name, timeout_s=20) for name, slot in slots.items()))
    return time.perf_counter() - begun


def by_hand(disks: list[Path], folder: Path, accelerator: str) -> dict[str, float]:
    image = build.find()
    assert image is not None
    vm = HandVM(
        folder=folder,
        kernel=image.kernel,
        initramfs=image.initramfs,
        root=image.root,
        cmdline=image.cmdline,
        memory_mib=MEMORY_MIB,
        machine="q35",
        accelerator=accelerator,
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

        devices = [vm.attach(disk, lun, file_format="qcow2", read_only=True) for lun, disk in numbered]
        middle = time.perf_counter()
        vm.detach(devices)
        figures["unplug_many"] = time.perf_counter() - middle
    finally:
        vm.stop()
    return figures


QGA_PACKAGES = ("qemu-guest-agent", "libglib2.0-0", "libnuma1", "libudev1", "liburing2", "libpcre2-8-0")
QGA_START = """
port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name); port=${port%/name}
export LD_LIBRARY_PATH=/qga/lib/x86_64-linux-gnu:/qga/usr/lib/x86_64-linux-gnu
setsid /qga/usr/sbin/qemu-ga -m virtio-serial -p /dev/${port##*/} -t /run > /run/qga.log 2>&1 &
sleep 1
"""
LIBVIRT = """
mount --bind {folder}/qemu.conf /etc/libvirt/qemu.conf
libvirtd 2> {folder}/libvirtd.log &
until virsh -c qemu:///system version > {folder}/virsh.log 2>&1; do sleep 0.1; done
/usr/bin/python3 {here}/libvirt_side.py
"""


def qga_disk(folder: Path) -> Path:
    """An ext4 disk with qemu-guest-agent and its libraries, unpacked from Debian's packages."""
    tree = folder / "qga"
    downloads = folder / "packages"
    downloads.mkdir()
    subprocess.run(["apt-get", "download", *QGA_PACKAGES], cwd=downloads, check=True, capture_output=True)
    for package in downloads.glob("*.deb"):
        run(["dpkg-deb", "-x", package, tree])
    disk = folder / "qga.raw"
    run([find_program("mkfs.ext4", package="e2fsprogs"), "-q", "-F", "-d", tree, disk, "64M"])
    return disk


def libvirt(disks: list[Path], folder: Path, accelerator: str) -> dict[str, float]:
    """The work through libvirtd, in a mount and process namespace of its own that ends with it."""
    image = build.find()
    assert image is not None
    (folder / "qemu.conf").write_text(
        'security_driver = "none"\ncgroup_controllers = [ ]\nuser = "root"\ngroup = "root"\nnamespaces = [ ]\n'
        'stdio_handler = "file"\n'
    )
    start = messages.request(Process=1, Argv=["sh", "-c", QGA_START], Env={}, Cwd="", Stdin=False)
    job = {
        "folder": str(folder),
        "kernel": str(image.kernel),
        "initramfs": str(image.initramfs),
        "root": str(image.root),
        "cmdline": image.cmdline,
        "memory_mib": MEMORY_MIB,
        "accelerator": accelerator,
        "qga_disk": str(qga_disk(folder)),
        "qga_start": frame.encode(messages.RUN, 7, frame.host_json(start)).hex(),
        "one": [{"path": str(disks[0]), "format": "qcow2"}] * ROUNDS,
        "many": [{"path": str(disk), "format": "qcow2"} for disk in disks],
    }
    script = LIBVIRT.format(folder=folder, here=Path(__file__).parent)
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-e", "-c", script]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"libvirt's side failed:\n{done.stderr}")
    raw: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {
        "add": raw["attach"] + raw["mount"],
        "remove": raw["unmount_eject"] + raw["detach"],
        "add_many": raw["attach_many"] + raw["mount_many"],
        "remove_many": raw["unmount_many"] + raw["detach_many"],
        "attach_many": raw["attach_many"],
        "unplug_many": raw["detach_many"],
    }


ROWS = {
    "boot": "start to the agent's answer",
    "ping": "agent round trip",
    "add": "one disk: attach + mount",
    "remove": "one disk: unmount + eject + detach",
    "add_many": f"{MANY} disks: attach + mount",
    "remove_many": f"{MANY} disks: unmount + eject + detach",
    "attach_many": f"{MANY} disks: attach",
    "unplug_many": f"{MANY} disks: detach, the host's part",
    "detach_many": f"{MANY} disks: eject + detach",
}


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        disks = ext4_images(folder, MANY)
        chosen = (await accelerators.choose(await emulator.find())).name
        sides = {"by hand": by_hand(disks, folder, chosen), "ours": await ours(disks)}
        if os.geteuid() == 0 and shutil.which("libvirtd"):
            sides["libvirt 9 + QGA"] = libvirt(disks, folder, chosen)
        else:
            print("libvirt's side is left out: it needs root, libvirt-daemon-system and python3-libvirt\n")
    rows = []
    for key, what in ROWS.items():
        cells: list[object] = [what]
        for side in ("by hand", "libvirt 9 + QGA", "ours"):
            figure = sides.get(side, {}).get(key)
            cells.append("-" if figure is None else f"{figure * 1000:.1f} ms")
        mine = sides["ours"][key]
        for side in ("by hand", "libvirt 9 + QGA"):
            figure = sides.get(side, {}).get(key)
            cells.append("-" if figure is None else f"{mine / figure:.2f} x")
        rows.append(cells)
    table(["work", "by hand", "libvirt 9 + QGA", "ours", "ours / by hand", "ours / libvirt"], rows)
