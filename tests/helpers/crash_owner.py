"""A process that owns a VM, does one operation through the public API, and is killed at one point of it.

Started as a program it makes such processes by fork, so that each costs no start of an interpreter: it reads a JSON
`Task` a line, and writes an `Outcome` a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias

from crash_points import Points, install, install_start_and_stop, install_templates
from utilityvm import ClonePool, DiskSpec, SCSIMount, UtilityVM, VMConfig

KEEPER: Final = "keeper"  # holds what the operation must leave alone
JOB: Final = "job"  # holds what the operation adds or gives back, and outlives the process
MIB: Final = 1 << 20
TEMPLATE: Final = "crash-base"  # what clones are made from
SAVED: Final = "crash-saved"  # what a VM is saved as
STOP: Final = "stop"  # begins the name of each point of it


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to do, and at which point it is killed."""

    operation: str
    vm: str
    folder: str  # where the images are
    kill_at: int
    holder: str | None  # of what the operation adds or gives back; None: the process

    @property
    def text(self) -> str:
        """What it writes to a disk."""
        return f"{self.operation} of {self.holder}, to die at {self.kill_at}\n"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it. `point` is None when it came to its end before; `points` is then how many there were."""

    point: str | None
    points: int
    error: str | None


@dataclass(kw_only=True)
class Work:
    """The VM and the disks of an operation."""

    vm: UtilityVM
    folder: Path
    holder: str | None
    text: str

    def path(self, name: str) -> Path:
        return self.folder / name

    async def add(self, name: str, guest_path: str | None = None, *, holder: str | None = None) -> SCSIMount:
        return await self.vm.add_scsi(self.path(name), guest_path, holder=holder or self.holder)

    async def write(self, path: str) -> None:
        """Have the guest write a text, which must be on the disk whatever happens from now on."""
        done = await self.vm.run(["tee", f"{path}/written"], stdin=self.text.encode())
        assert done.exit_code == 0, done.stderr


Act: TypeAlias = Callable[[], Awaitable[object]]
Prepare: TypeAlias = Callable[[Work], Awaitable[Act]]


async def attach(work: Work) -> Act:
    return lambda: work.add("one.raw")


async def attach_and_mount(work: Work) -> Act:
    return lambda: work.add("two.qcow2", "/data")


async def mount(work: Work) -> Act:
    await work.add("one.raw", holder=KEEPER)
    return lambda: work.add("one.raw", "/data")


async def mount_with_a_new_file_system(work: Work) -> Act:
    spec = DiskSpec(host_path=work.path("blank.raw"), guest_path="/data", ensure_filesystem=True)
    return lambda: work.vm.add(spec, holder=work.holder)


async def share(work: Work) -> Act:
    await work.add("one.raw", "/keep", holder=KEEPER)
    return lambda: work.add("one.raw", "/keep")


async def give_back_a_share(work: Work) -> Act:
    await work.add("one.raw", "/keep", holder=KEEPER)
    shared = await work.add("one.raw", "/keep")
    return shared.release


async def unmount(work: Work) -> Act:
    await work.add("two.qcow2", holder=KEEPER)
    mounted = await work.add("two.qcow2", "/data")
    await work.write("/data")
    return mounted.release


async def unmount_eject_detach(work: Work) -> Act:
    await work.add("one.raw", "/data")
    await work.write("/data")
    return lambda: work.vm.remove_scsi(work.path("one.raw"))


async def add_many(work: Work) -> Act:
    return lambda: work.vm.add_scsi_many(_many(work.folder), holder=work.holder)


async def remove_many(work: Work) -> Act:
    mounts = await work.vm.add_scsi_many(_many(work.folder), holder=work.holder)
    await work.write("/data")

    async def act() -> None:
        results = await work.vm.remove_scsi_many(one for one in mounts if isinstance(one, SCSIMount))
        assert results == [None] * len(mounts), results

    return act


async def resize(work: Work) -> Act:
    await work.add("one.raw", "/keep", holder=KEEPER)
    path = work.path("one.raw")
    return lambda: work.vm.resize_scsi(path, path.stat().st_size + MIB)


def _many(folder: Path) -> list[DiskSpec]:
    return [
        DiskSpec(host_path=folder / "one.raw", guest_path="/data"),
        DiskSpec(host_path=folder / "two.qcow2", guest_path="/more"),
        DiskSpec(host_path=folder / "shared.raw", guest_path="/shared", read_only=True),
        DiskSpec(host_path=folder / "blank.raw"),
    ]


# What the keeper has before each operation, and has to have after it: the image, and where it is mounted.
KEPT: Final[dict[str, tuple[str, str | None]]] = {
    "mount": ("one.raw", None),
    "share": ("one.raw", "/keep"),
    "give_back_a_share": ("one.raw", "/keep"),
    "unmount": ("two.qcow2", None),
    "resize": ("one.raw", "/keep"),
}

# The image that a text was written to before the operation.
WRITTEN: Final[dict[str, str]] = {
    "unmount": "two.qcow2",
    "unmount_eject_detach": "one.raw",
    "remove_many": "one.raw",
}

OPERATIONS: Final[dict[str, Prepare]] = {
    prepare.__name__: prepare
    for prepare in (
        attach,
        attach_and_mount,
        mount,
        mount_with_a_new_file_system,
        share,
        give_back_a_share,
        unmount,
        unmount_eject_detach,
        add_many,
        remove_many,
        resize,
    )
}


async def _disk_operation(task: Task, points: Points) -> None:
    vm = await UtilityVM.open(task.vm)
    work = Work(vm=vm, folder=Path(task.folder), holder=task.holder, text=task.text)
    act = await OPERATIONS[task.operation](work)
    points.arm(task.operation)
    await act()
    points.disarm()
    await vm.close()


async def _take_over(task: Task, points: Points) -> None:
    points.arm(task.operation)
    vm = await UtilityVM.open(task.vm)
    await vm.close()
    points.disarm()


async def _start_and_stop(task: Task, points: Points) -> None:
    install_start_and_stop(points)
    config = VMConfig(name=task.vm, keep=task.holder is not None, memory_mib=128)
    points.arm("start")
    vm = await UtilityVM.start(config)
    points.disarm()
    work = Work(vm=vm, folder=Path(task.folder), holder=task.holder, text=task.text)
    await work.add("one.raw", "/data")
    await work.write("/data")
    await vm.run(["sync"])  # whoever finds the VM may end it without a word to the guest
    points.arm(STOP)
    await vm.stop()
    points.disarm()


async def _save(task: Task, points: Points) -> None:
    install_templates(points)
    vm = await UtilityVM.open(task.vm)
    points.arm("save")
    await vm.save_as_template(SAVED)
    points.disarm()


async def _clone(task: Task, points: Points) -> None:
    install_start_and_stop(points)
    install_templates(points)
    points.arm("clone")
    vm = await UtilityVM.clone(TEMPLATE, task.vm, keep=task.holder is not None)
    points.disarm()
    points.arm(STOP)
    await vm.stop(timeout_s=0)
    points.disarm()


async def _pool(task: Task, points: Points) -> None:
    install_start_and_stop(points)
    install_templates(points)
    points.arm("pool")
    async with ClonePool(TEMPLATE, size=1, prefix=task.vm) as pool:
        vm = await pool.acquire()
        await vm.stop(timeout_s=0)
    points.disarm()


OTHERS: Final = {
    "take_over": _take_over,
    "start_and_stop": _start_and_stop,
    "save": _save,
    "clone": _clone,
    "pool": _pool,
}


def _run(task: Task, tell: Callable[[Outcome], None]) -> None:
    points = Points(task.kill_at, lambda name: tell(Outcome(point=name, points=task.kill_at, error=None)))
    install(points)
    run = OTHERS.get(task.operation, _disk_operation)
    try:
        asyncio.run(run(task, points))
    except BaseException:
        tell(Outcome(point=None, points=points.count, error=traceback.format_exc()))
    else:
        tell(Outcome(point=None, points=points.count, error=None))


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        task = Task(**json.loads(line))

        def tell(outcome: Outcome) -> None:
            os.write(out, json.dumps(asdict(outcome)).encode() + b"\n")

        if (child := os.fork()) == 0:
            _run(task, tell)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        # The next line is not read before this process is gone, and by that its locks.
        os.write(out, json.dumps({"killed": status == signal.SIGKILL}).encode() + b"\n")


if __name__ == "__main__":
    main()
