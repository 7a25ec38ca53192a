"""The main job, on real disks, step by step with its times: `./dev demo`.

Makes an ext4 VHDX and an ext4 qcow2 with real files, starts a VM, attaches and mounts both (the read-only one
twice: one attachment, two references), reads and writes inside the guest, gives everything back, and checks on
the host that what the guest wrote is in the image. Then the less usual kinds of disks, a batch, an owner that is
killed in the middle of an attach, and a warm VM that is forked.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utilityvm import (
    DiskSpec,
    ScratchKey,
    UtilityVM,
    Verity,
    VMConfig,
    VMNotFound,
    get_template,
    get_vm,
    list_templates,
)

MIB = 1 << 20
CLONES = 4
BAR = 60  # characters of the timeline

_started = time.perf_counter()


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print `what` and how long the block took; on an error, that it failed."""
    print(f"  {what} ", end="", flush=True)
    begun = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"({(time.perf_counter() - begun) * 1000:.0f} ms)", flush=True)


def run(*command: str | Path) -> str:
    """Run a program of this host, and give what it printed. Debian keeps some in /sbin."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr}")
    return done.stdout


def make_image(folder: Path, name: str, files: dict[str, str], *, image_format: str, size_mib: int = 64) -> Path:
    """An ext4 file system that holds `files`, as an image of QEMU's own making."""
    tree, raw = folder / f"{name}.tree", folder / f"{name}.raw"
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    run("mkfs.ext4", "-q", "-F", "-d", tree, raw, f"{size_mib}M")
    if image_format == "raw":
        return raw
    image = folder / f"{name}.{image_format}"
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, image)
    return image


def make_partitioned(folder: Path) -> Path:
    """A disk with an MBR and two partitions; the second is an ext4."""
    second = make_image(folder, "second", {"where": "the second partition\n"}, image_format="raw", size_mib=16)
    disk = folder / "partitioned.raw"
    entries = [(MIB // 512, MIB // 512), (2 * MIB // 512, second.stat().st_size // 512)]
    table = b"".join(struct.pack("<B3xB3xII", 0, 0x83, start, length) for start, length in entries)
    with disk.open("wb") as file:
        file.write(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
        file.seek(2 * MIB)
        file.write(second.read_bytes())
    return disk


def make_verity(folder: Path) -> tuple[Path, Verity]:
    """A file system with its hash tree behind it, and what proves that it is this one."""
    image = make_image(folder, "layer", {"release": "42\n"}, image_format="raw", size_mib=16)
    offset = image.stat().st_size
    sizes = ["--data-block-size=1024", "--hash-block-size=1024"]  # those of so small an ext4
    said = run("veritysetup", "format", *sizes, f"--hash-offset={offset}", image, image)
    found = re.search(r"Root hash:\s+([0-9a-f]+)", said)
    if not found:
        raise SystemExit(f"veritysetup said no root hash: {said}")
    return image, Verity(root_hash=bytes.fromhex(found[1]), hash_offset_bytes=offset)


def read_back(image: Path, path: str, folder: Path) -> str:
    """What `path` holds in the image's file system, read on the host without mounting it."""
    raw = folder / "read-back.raw"
    run("qemu-img", "convert", "-f", image.suffix[1:], "-O", "raw", image, raw)
    return run("debugfs", "-R", f"cat {path}", raw)


async def inside(vm: UtilityVM, script: str) -> str:
    """Run a shell script in the guest and give what it printed."""
    result = await vm.run(["sh", "-c", script])
    if result.exit_code:
        raise SystemExit(f"in the guest: {script}: {result.stderr.decode()}")
    return result.stdout.decode()


def show_slots(vm: UtilityVM) -> None:
    print("\n    slot  mode  refs  disk                 guest paths")
    for slot in vm.scsi_slots():
        mode = "ro" if slot.read_only else "rw"
        paths = ", ".join(str(path) for path in slot.guest_paths)
        print(f"    {slot.slot!s:<5} {mode:<5} {slot.references:<5} {Path(slot.host_path).name:<20} {paths}")
    print()


async def main_job(folder: Path, name: str) -> None:
    print("Disks")
    with step("an ext4 VHDX with the guest's tools"):
        tools = make_image(
            folder, "tools", {"bin/greet": "#!/bin/sh\necho hello from the tools disk\n"}, image_format="vhdx"
        )
    with step("an ext4 qcow2 to work on"):
        data = make_image(folder, "data", {"in/numbers.txt": "\n".join(map(str, range(1, 101)))}, image_format="qcow2")

    print("The VM")
    with step("start, until the agent answers"):
        vm = await UtilityVM.start(VMConfig(name=name))
    async with vm:
        print(f"    {vm.name}: {vm.accelerator}")
        print("Attach and mount")
        with step("tools.vhdx read-only at /tools"):
            first = await vm.add_scsi(tools, "/tools", read_only=True)
        with step("tools.vhdx once more: the same attachment, another reference"):
            second = await vm.add_scsi(tools, "/tools", read_only=True)
        with step("data.qcow2 at /data"):
            work = await vm.add_scsi(data, "/data")
        assert first.slot == second.slot
        assert first.ref_count == 2
        show_slots(vm)

        print("Work inside the guest")
        with step("run a tool of one disk"):
            said = await inside(vm, "sh /tools/bin/greet")
        print(f"    {said.strip()}")
        with step("read and write the other"):
            total = await inside(vm, "awk '{s += $1} END {print s}' /data/in/numbers.txt | tee /data/total.txt")
        print(f"    the sum of the numbers is {total.strip()}")

        print("Give it all back")
        with step("the first reference to tools.vhdx: it stays"):
            await first.release()
        assert second.ref_count == 1
        with step("the second: unmount, eject, detach"):
            await second.release()
        with step("data.qcow2: unmount, eject, detach"):
            await work.release()
        assert not vm.scsi_mounts()
        await kinds(vm, folder)
        with step("stop"):
            await vm.stop()

    print("On the host")
    with step("what the guest wrote is in the image"):
        kept = read_back(data, "/total.txt", folder)
    if kept != total:
        raise SystemExit(f"data.qcow2 holds {kept!r} where the guest wrote {total!r}")
    print(f"    data.qcow2:/total.txt is {kept.strip()}")


async def kinds(vm: UtilityVM, folder: Path) -> None:
    print("Other kinds of disks")
    with step("a partition of a disk, at /second"):
        second = await vm.add_scsi(make_partitioned(folder), "/second", partition=2, read_only=True)
    print(f"    {(await inside(vm, 'cat /second/where')).strip()}")
    blank = folder / "blank.raw"
    with blank.open("wb") as file:
        file.truncate(64 * MIB)
    with step("a blank disk, encrypted with a key that nobody knows and formatted, at /scratch"):
        scratch = await vm.add_scsi(blank, "/scratch", ensure_filesystem=True, encryption=ScratchKey())
    await inside(vm, "echo a secret of the guest > /scratch/secret; sync")
    layer, verity = make_verity(folder)
    with step("a layer whose every block is proven by its root hash, at /layer"):
        proven = await vm.add_scsi(layer, "/layer", read_only=True, verity=verity)
    print(f"    release {(await inside(vm, 'cat /layer/release')).strip()}")
    with step("give the three back together"):
        results = await vm.remove_scsi_many([second, scratch, proven])
    assert results == [None, None, None], results
    if b"a secret of the guest" in blank.read_bytes():
        raise SystemExit("the scratch disk holds what the guest wrote in plain")
    print("    blank.raw does not hold what was written to it, and nobody has the key")

    disks = [make_image(folder, f"batch{number}", {"n": f"{number}"}, image_format="qcow2") for number in range(8)]
    specs = [DiskSpec(host_path=disk, guest_path=f"/batch/{number}") for number, disk in enumerate(disks)]
    with step("a batch of eight disks, attached and mounted"):
        mounts = await vm.add_scsi_many(specs)
    assert await inside(vm, "cat /batch/*/n") == "01234567"
    with step("and released"):
        await vm.remove_scsi_many(mounts)


async def killed_owner(folder: Path, name: str) -> None:
    print("An owner that dies")
    disk = make_image(folder, "survivor", {"in": "still here\n"}, image_format="qcow2")
    with step("start a VM that outlives its owner"):
        vm = await UtilityVM.start(VMConfig(name=name, keep=True))
    await vm.close()
    try:
        with step("another process owns it, attaches a disk, and is killed in the middle"):
            child = await asyncio.create_subprocess_exec(sys.executable, __file__, "--die", name, str(disk))
            status = await child.wait()
        if status != -signal.SIGKILL:
            raise SystemExit(f"the owner was to be killed, and ended with {status}")
        with step("own it again: what was half done is finished or undone"):
            vm = await UtilityVM.open(name)
        for finding in vm.findings:
            print(f"    found: {finding}")
        with step("attach the same disk, and go on"):
            await vm.add_scsi(disk, "/data")
        print(f"    {(await inside(vm, 'cat /data/in')).strip()}")
        await vm.stop()
    finally:
        if vm.is_running:
            await vm.stop()
        elif is_known(name):
            await UtilityVM.remove(name, force=True)


def is_known(name: str) -> bool:
    try:
        get_vm(name)
    except VMNotFound:
        return False
    return True


async def die(name: str, disk: str) -> None:
    """The owner that dies: at the instant in which its attach is sent."""
    vm = await UtilityVM.open(name)

    async def kill_at_the_attach() -> None:
        async for event in vm.scsi_events():
            if event.what == "attaching":
                os.kill(os.getpid(), signal.SIGKILL)

    watching = asyncio.create_task(kill_at_the_attach())
    await asyncio.sleep(0)
    await vm.add_scsi(disk, "/data")
    await watching


async def fork(folder: Path, name: str) -> None:
    print("A warm VM is forked")
    base = make_image(folder, "work", {"base": "warm\n"}, image_format="vhdx")
    begun = time.perf_counter()
    vm = await UtilityVM.start(VMConfig(name=name))
    await vm.add_scsi(base, "/data")
    await inside(vm, "echo ready > /data/state")
    booted = time.perf_counter() - begun
    clones: list[UtilityVM] = []
    try:
        begun = time.perf_counter()
        await vm.save_as_template(name)
        rows = [("boot and warm up", 0.0, booted), ("save as a template", booted, time.perf_counter() - begun)]
        at = booted + rows[-1][2]
        for number in range(CLONES):
            begun = time.perf_counter()
            clones.append(await UtilityVM.clone(name, f"{name}-{number}"))
            took = time.perf_counter() - begun
            rows.append((f"clone {number}", at, took))
            at += took
        for what, start, took in rows:
            bar = " " * round(start / at * BAR) + "#" * max(1, round(took / at * BAR))
            print(f"    {what:<20} {took * 1000:>6.0f} ms  {bar}")
        for clone in clones:
            await inside(clone, "hostname > /data/state")
        states = [(await inside(clone, "cat /data/base /data/state")).split() for clone in clones]
        assert states == [["warm", clone.name] for clone in clones], states
        print("    each has the template's files and its own writes, and its own name, ids and random numbers")
    finally:
        await vm.stop()
        for clone in clones:
            await clone.stop(timeout_s=0)
        if name in {template.name for template in list_templates()}:
            get_template(name).remove()


async def demo(folder: Path) -> None:
    name = f"demo-{time.time_ns() % 10**9}"
    await main_job(folder, name)
    await killed_owner(folder, f"{name}-kept")
    await fork(folder, f"{name}-warm")


def main() -> None:
    if sys.argv[1:2] == ["--die"]:
        asyncio.run(die(*sys.argv[2:]))
        return
    with tempfile.TemporaryDirectory(prefix="utilityvm-demo-") as folder:
        asyncio.run(demo(Path(folder)))
    print(f"Done in {time.perf_counter() - _started:.1f} s.")


if __name__ == "__main__":
    sys.exit(main())
