"""What a test does in a guest, and looks at there."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType

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


async def options_of(vm: UtilityVM, path: str) -> set[str]:
    """The options of what is mounted at `path`, of the mount and of its file system, and its propagation."""
    found = await output(vm, f"findmnt -n -o OPTIONS,PROPAGATION --mountpoint {path}")
    return set(found.replace(" ", ",").strip().split(",")) - {""}


async def device_of(vm: UtilityVM, path: str) -> str:
    """The device that is mounted at `path`."""
    return (await output(vm, f"findmnt -n -o SOURCE --mountpoint {path}")).strip()


async def traces(vm: UtilityVM) -> str:
    """The guest's disks, partitions, mappings, loop devices in use, swap and mounts."""
    return await output(vm, "echo /sys/class/block/[!l]* /sys/block/loop*/loop; cat /proc/swaps /proc/self/mountinfo")


class Running(AbstractAsyncContextManager["Running"]):
    """A shell script that runs in the guest during the block, which begins when the script has said `ready`."""

    def __init__(self, vm: UtilityVM, script: str) -> None:
        self._vm = vm
        self._script = f"echo $$; {script}"
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
