"""Programs that belong to a real guest: they outlive their owner, keep within their limits, and end whole."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from real_vms import Start
from utilityvm import Limits, UtilityVM

pytestmark = pytest.mark.real

# Owns the VM and writes down what it has read of the program's output, until it is killed.
OWNER = """
import asyncio, sys
from utilityvm import UtilityVM

async def main(name, path):
    vm = await UtilityVM.open(name)
    program = await vm.start_program(["seq", "-f", "%07.0f", "0", "119999"], name="counting")
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(await program.stdout.read(10_000))

asyncio.run(main(*sys.argv[1:]))
"""
SCRIPT = "setsid sleep 1000 < /dev/null > /dev/null 2>&1 & sleep 1001 & echo ready; wait"


async def test_programs_of_a_guest(start: Start, tmp_path: Path) -> None:
    vm = await start("programs", keep=True)
    await vm.close()
    vm = await _killed_owner(tmp_path / "read")
    try:
        await _limits(vm)
        await _killed_whole(vm)
        await _clone(vm)
    finally:
        await vm.stop()


async def _killed_owner(read: Path) -> UtilityVM:
    """The owner is killed in the middle of output; the next one resumes without a byte lost or repeated."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, "programs", str(read))
    while not read.exists() or read.stat().st_size < 300_000:
        assert owner.returncode is None
        await asyncio.sleep(0.01)
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    vm = await UtilityVM.open("programs", wait_s=20)
    first = read.read_bytes()
    program = await vm.program("counting", stdout_offset=len(first))
    rest = await program.stdout.read()
    assert first + rest == b"".join(b"%07d\n" % number for number in range(120_000))
    assert program.stdout.lost == 0  # what was not read when the owner died is less than the ring
    assert await program.wait() == 0
    return vm


async def _limits(vm: UtilityVM) -> None:
    limits = Limits(memory_bytes=24 << 20, pids=12, cpus=0.5)
    eats = await vm.start_program(["python3", "-c", "x = bytearray(100 << 20)"], limits=limits)
    assert await eats.wait(timeout_s=60) == -signal.SIGKILL
    assert eats.out_of_memory
    forks = "i=0; while [ $i -lt 30 ]; do sleep 100 & i=$((i+1)); done"
    forked = await vm.run(["sh", "-c", forks], limits=limits, timeout_s=60)
    assert forked.exit_code
    assert b"fork" in forked.stderr
    look = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cpu.max; id -un; echo $HOME"
    looked = await vm.run(["sh", "-c", look], limits=limits, user="nobody", text=True, check=True)
    assert looked.stdout == "50000 100000\nnobody\n/nonexistent\n"


async def _killed_whole(vm: UtilityVM) -> None:
    program = await vm.start_program(["sh", "-c", SCRIPT])
    assert await program.stdout.readline() == b"ready\n"
    await program.kill()
    assert await program.wait() == -signal.SIGKILL
    left = await vm.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"], text=True)
    assert "sleep 1000" not in left.stdout
    assert "sleep 1001" not in left.stdout
    await program.forget()


async def _clone(vm: UtilityVM) -> None:
    """A clone goes on with a program, its number and its output."""
    script = "echo before; until [ -e /tmp/go ]; do sleep 0.05; done; echo after"
    program = await vm.start_program(["sh", "-c", script], name="goes on", follow=False)
    await vm.save_as_template("with-programs")
    clone = await UtilityVM.clone("with-programs", "programs-clone")
    try:
        found = await clone.program("goes on")
        assert found.number == program.number
        assert await found.stdout.readline() == b"before\n"
        await clone.run(["touch", "/tmp/go"])
        assert await found.communicate() == (b"after\n", b"")
    finally:
        await clone.stop()
