"""What a test does in a guest, and looks at there."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import NamedTuple

from utilityvm import UtilityVM


async def output(vm: UtilityVM, script: str) -> str:
    """What a shell script prints. It has to succeed."""
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, (script, result.stdout.decode(), result.stderr.decode())
    return result.stdout.decode()


async def complaint(vm: UtilityVM, script: str) -> str:
    """What a shell script says on its standard error. It has to fail."""
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code != 0, (script, result.stdout.decode())
    return result.stderr.decode()


async def mount_at(vm: UtilityVM, path: str) -> Mounted:
    """What is mounted at `path`."""
    done = await vm.run(["cat", "/proc/self/mountinfo"])
    for line in reversed(done.stdout.decode().splitlines()):
        before, _, after = line.partition(" - ")
        _, _, _, root, place, options, *tags = before.split()
        if place == path:
            filesystem, source, of_filesystem = after.split()
            words = {*options.split(","), *of_filesystem.split(",")}
            kinds = {tag.partition(":")[0] for tag in tags}
            return Mounted(source, root, filesystem, words, kinds)
    raise AssertionError(f"nothing is mounted at {path}")


class Mounted(NamedTuple):
    """A mount in the guest."""

    device: str
    root: str  # which folder of the file system is shown
    filesystem: str
    options: set[str]  # of the mount and of the file system
    propagation: set[str]  # shared, master, unbindable; none: private


async def traces(vm: UtilityVM) -> str:
    """The guest's disks, partitions, mappings and loop devices with their sizes, its swap and its mounts."""
    return (await vm.run(["cat", "/proc/partitions", "/proc/swaps", "/proc/self/mountinfo"])).stdout.decode()


class Running(AbstractAsyncContextManager["Running"]):
    """A shell script that runs in the guest during the block.

    The block begins when the script has said `ready`, or when a process beside it finds that `when` is true.
    """

    def __init__(self, vm: UtilityVM, script: str, *, when: str = "") -> None:
        self._vm = vm
        self._script = (
            f"echo $$; {f'(until {when}; do [ -d /proc/$$ ] || exit; done; echo ready) & ' if when else ''}{script}"
        )
        self._said = b""
        self._is_ready = asyncio.Event()

    async def __aenter__(self) -> Running:
        self._task = asyncio.create_task(
            self._vm.run_streaming(["sh", "-c", self._script], stdout=self._take, stderr=self._take)
        )
        ready = asyncio.create_task(self._is_ready.wait())
        await asyncio.wait([ready, self._task], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        assert not self._task.done(), (self._script, self._said)
        return self

    def _take(self, data: bytes) -> None:
        self._said += data
        if b"ready" in self._said:
            self._is_ready.set()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await output(self._vm, f"while [ -d /proc/{int(self._said.split()[0])}/fd/.. ]; do :; done")
