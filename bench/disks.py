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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from by_hand import HandVM
from figures import ext4_images, median_ms, table
from utilityvm import Slot, UtilityVM, VMConfig
from utilityvm.bridge import frame, messages
from utilityvm.guestimage import build
from utilityvm.hosts.qemu import accelerator as accelerators
from utilityvm.hosts.qemu import emulator
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskRequest

ROUNDS = 25
MANY, MANY_ROUNDS = 48, 3
MEMORY_MIB = 256


class Times:
    """What each work took, in seconds, on one side."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    @contextmanager
    def taking(self, work: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.add(work, time.perf_counter() - begun)

    def add(self, work: str, seconds: float) -> None:
        self._taken.setdefault(work, []).append(seconds)

    def medians(self) -> dict[str, float]:
        return {work: statistics.median(taken) for work, taken in self._taken.items()}


async def ours_and_by_hand(disks: list[Path], folder: Path, accelerator: str) -> dict[str, dict[str, float]]:
    """Both VMs at once, and their rounds in turn: what else the machine does is then the same for both."""
    image = build.find()
    assert image is not None
    hand_times, times = Times(), Times()
    hand = HandVM(
        folder=folder,
        kernel=image.kernel,
        initramfs=image.initramfs,
        root=image.root,
        cmdline=image.cmdline,
        memory_mib=MEMORY_MIB,
        machine="q35",
        accelerator=accelerator,
    )
    hand_times.add("boot", hand.boot_s)
    try:
        with times.taking("boot"):
            vm = await UtilityVM.start(VMConfig(name=f"bench-{os.getpid()}", memory_mib=MEMORY_MIB))
        async with vm:
            for _ in range(ROUNDS):
                one_by_hand(hand, disks[0], hand_times)
                await one(vm, disks[0], times)
            for _ in range(MANY_ROUNDS):
                many_by_hand(hand, disks, hand_times)
                await many(vm, disks, times)
            times.add("ping", await median_ms(vm.ping, 200) / 1000)
    finally:
        hand.stop()
    return {"by hand": hand_times.medians(), "ours": times.medians()}


async def one(vm: UtilityVM, disk: Path, times: Times) -> None:
    with times.taking("add"):
        mount = await vm.add_scsi(disk, "/mnt/one", read_only=True)
    with times.taking("remove"):
        await mount.release()


async def many(vm: UtilityVM, disks: list[Path], times: Times) -> None:
    for at, add, remove in (("/mnt/{}", "add_many", "remove_many"), (None, "attach_many", "detach_many")):
        with times.taking(add):
            mounts = await asyncio.gather(
                *(vm.add_scsi(disk, at and at.format(number), read_only=True) for number, disk in enumerate(disks))
            )
        with times.taking(remove):
            await asyncio.gather(*(mount.release() for mount in mounts))
    times.add("unplug_many", await unplug_many(vm, disks))


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


def one_by_hand(vm: HandVM, disk: Path, times: Times) -> None:
    with times.taking("add"):
        device = vm.attach(disk, 1, file_format="qcow2", read_only=True)
        vm.mount(1, "/mnt/one", read_only=True)
    with times.taking("remove"):
        vm.unmount_and_eject(1, "/mnt/one")
        vm.detach([device])


def many_by_hand(vm: HandVM, disks: list[Path], times: Times) -> None:
    numbered = list(enumerate(disks, start=1))

    def attach_all() -> list[str]:
        return [vm.attach(disk, lun, file_format="qcow2", read_only=True) for lun, disk in numbered]

    with times.taking("add_many"):
        devices = attach_all()
        for lun, _ in numbered:
            vm.mount(lun, f"/mnt/{lun}", read_only=True)
    with times.taking("remove_many"):
        for lun, _ in numbered:
            vm.unmount_and_eject(lun, f"/mnt/{lun}")
        vm.detach(devices)
    with times.taking("attach_many"):
        devices = attach_all()
    with times.taking("detach_many"):
        for lun, _ in numbered:
            vm.bridge.modify("Remove", "SCSIDevice", Lun=lun)
        vm.detach(devices)
    devices = attach_all()
    with times.taking("unplug_many"):
        vm.detach(devices)


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
        sides = await ours_and_by_hand(disks, folder, chosen)
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
