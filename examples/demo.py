"""The main job, on real disks, step by step with its times: `./dev demo`.

Makes an ext4 VHDX and an ext4 qcow2 with real files, starts a VM, attaches and mounts both (the read-only one
twice: one attachment, two references), reads and writes inside the guest, gives everything back, and checks on
the host that what the guest wrote is in the image.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utilityvm import UtilityVM, VMConfig
from utilityvm.process import find_program, run

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


def make_image(folder: Path, name: str, files: dict[str, str], *, image_format: str, size_mib: int = 64) -> Path:
    """An ext4 file system that holds `files`, as an image of QEMU's own making."""
    tree, raw = folder / f"{name}.tree", folder / f"{name}.raw"
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    mkfs = find_program("mkfs.ext4", package="e2fsprogs")
    run([mkfs, "-q", "-F", "-d", tree, raw, f"{size_mib}M"])
    image = folder / f"{name}.{image_format}"
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "convert", "-f", "raw", "-O", image_format, raw, image])
    return image


def read_back(image: Path, path: str, folder: Path) -> str:
    """What `path` holds in the image's file system, read on the host without mounting it."""
    raw = folder / "read-back.raw"
    qemu_img = find_program("qemu-img", package="qemu-utils")
    run([qemu_img, "convert", "-f", image.suffix[1:], "-O", "raw", image, raw])
    return run([find_program("debugfs", package="e2fsprogs"), "-R", f"cat {path}", raw]).decode()


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


async def demo(folder: Path) -> None:
    print("Disks")
    with step("an ext4 VHDX with the guest's tools"):
        tools = make_image(
            folder, "tools", {"bin/greet": "#!/bin/sh\necho hello from the tools disk\n"}, image_format="vhdx"
        )
    with step("an ext4 qcow2 to work on"):
        data = make_image(folder, "data", {"in/numbers.txt": "\n".join(map(str, range(1, 101)))}, image_format="qcow2")

    print("The VM")
    with step("start, until the agent answers"):
        vm = await UtilityVM.start(VMConfig(name=f"demo-{time.time_ns() % 10**9}"))
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
        with step("stop"):
            await vm.stop()

    print("On the host")
    with step("what the guest wrote is in the image"):
        kept = read_back(data, "/total.txt", folder)
    if kept != total:
        raise SystemExit(f"data.qcow2 holds {kept!r} where the guest wrote {total!r}")
    print(f"    data.qcow2:/total.txt is {kept.strip()}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="utilityvm-demo-") as folder:
        asyncio.run(demo(Path(folder)))
    print(f"Done in {time.perf_counter() - _started:.1f} s.")


if __name__ == "__main__":
    sys.exit(main())
