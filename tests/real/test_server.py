"""One VM, many processes at the same time: none waits for another, and the server between them may die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

import pytest
import pytest_asyncio

from utilityvm import UtilityVM, connect
from utilityvm.errors import OutcomeUnknown, VMNotRunning
from utilityvm.machine import paths as places
from utilityvm.store import Store
from utilityvm.store.ownership import owner_of

pytest.importorskip("uvicorn", reason="the extra [server]")
pytestmark = pytest.mark.real

Uvm = Callable[..., "CompletedProcess[str]"]

PROCESSES, PROGRAMS = 4, 16


@pytest_asyncio.fixture
async def served(booted: str) -> AsyncIterator[str]:
    """A VM that outlives its owner, and that nobody owns."""
    vm = await UtilityVM.clone(booted, "served", keep=True)
    await vm.close()
    yield "served"
    with Store.open() as store:
        there = store.find("served") is not None
    if there:
        await UtilityVM.remove("served", force=True)
    if (pid := server_pid()) is not None:
        await ended(pid)


def server_pid() -> int | None:
    owner = owner_of(places.server_dir())
    return None if owner is None else owner.pid


async def ended(pid: int) -> None:
    """Wait until the process has ended."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(watch, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(watch)
        os.close(watch)


async def run_and_wait(name: str, number: int) -> None:
    """In a process of its own: a program that ends when its input does."""

    async def given() -> AsyncIterator[bytes]:
        sys.stdout.write("asked\n")
        sys.stdout.flush()
        yield b"%d" % number
        await asyncio.to_thread(sys.stdin.read)

    out = bytearray()
    async with connect() as client:
        vm = await client.vm(name)
        code = await vm.run_streaming(["cat"], stdin=given(), stdout=out.extend, stderr=out.extend)
    sys.stdout.write(f"{code} {out.decode()}\n")


async def test_while_programs_run_disks_come_and_go_and_the_vm_can_be_stopped(served: str, disk: Path) -> None:
    code = "import asyncio, sys, test_server; asyncio.run(test_server.run_and_wait(sys.argv[1], int(sys.argv[2])))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", code, served]
    processes = [Popen([*words, str(number)], stdin=PIPE, stdout=PIPE, env=environment) for number in range(PROCESSES)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"asked\n"
        async with connect() as client, connect() as other:
            vm, same = await client.vm(served), await other.vm(served)
            others = [asyncio.create_task(same.run(["sleep", "1000"])) for _ in range(PROGRAMS)]
            made = await asyncio.gather(*(one.add_scsi(disk, "/data") for one in (vm, same, vm)))
            assert len({one.id for one in made}) == 3
            assert (await vm.run(["cat", "/data/greeting"])).stdout == b"hello\n"
            await asyncio.gather(*(one.release() for one in made))
            assert await same.scsi_slots() == []
            for number, process in enumerate(processes):
                out, _ = await asyncio.to_thread(process.communicate)
                assert (out, process.returncode) == (b"0 %d\n" % number, 0)
            server = server_pid()
            assert server is not None
            await vm.stop()
            for one in others:
                with pytest.raises(VMNotRunning, match="VM served was stopped"):
                    await one
        await ended(server)  # it ends with its last VM
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def test_a_server_that_is_killed_is_replaced_and_nothing_is_lost(served: str, disk: Path) -> None:
    async with connect() as client:
        vm = await client.vm(served)
        kept = await vm.add_scsi(disk, "/data", holder="job")
        running = asyncio.create_task(vm.run(["sleep", "1000"]))
        while (await vm.run(["sh", "-c", "ps -e -o args= | grep -q '^[s]leep 1000'"])).exit_code:
            pass
        first = server_pid()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(OutcomeUnknown, match="the program was killed"):
            await running
        (found,) = await vm.scsi_reservations()  # of the next server
        assert (found.id, found.holder) == (kept.id, "job")
        assert server_pid() != first
        assert (await vm.run(["cat", "/data/greeting"])).stdout == b"hello\n"
        await kept.release()
        assert await vm.scsi_slots() == []


async def test_commands_use_a_vm_at_the_same_time(served: str, disk: Path, uvm: Uvm) -> None:
    words = [sys.executable, "-c", "from utilityvm.cli import main; main()", "exec", served, "--", "cat"]
    processes = [Popen(words, stdin=PIPE, stdout=PIPE) for _ in range(PROCESSES)]
    try:
        for process in processes:  # each has begun, and waits for input
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"asked\n")
            process.stdin.flush()
            assert await asyncio.to_thread(process.stdout.readline) == b"asked\n"

        async def ok(*words: str | Path) -> str:
            done = await asyncio.to_thread(uvm, *words)
            assert (done.returncode, done.stderr) == (0, ""), words
            return done.stdout

        os.chdir(disk.parent)
        await ok("attach", served, f"{disk.name}:/data")
        assert await ok("exec", served, "-n", "cat", "/data/greeting") == "hello\n"
        number = (await ok("exec", served, "--detach", "sh", "-c", "echo kept; exec sleep 1000")).strip()
        assert (await ok("programs", served)).split("\t")[0] == number
        await ok("kill", served, number)
        assert await ok("logs", served, number) == "kept\n"
        await ok("detach", served, disk)
        for process in processes:
            assert (await asyncio.to_thread(process.communicate, b"more\n"))[0] == b"more\n"
            assert process.returncode == 0
        server = server_pid()
        assert server is not None
        await ok("stop", served)
        await ended(server)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def test_a_process_with_the_library_gets_the_vm_from_an_idle_server(served: str) -> None:
    async with connect() as client:
        vm = await client.vm(served)
        async with UtilityVM.open(served) as own:
            assert (await own.run(["true"])).exit_code == 0
        assert (await vm.run(["true"])).exit_code == 0


async def test_a_server_that_stands_still_keeps_no_vm_from_being_ended(served: str, uvm: Uvm) -> None:
    async with connect() as client:
        await client.vm(served)
    server = server_pid()
    assert server is not None
    os.kill(server, signal.SIGSTOP)
    try:
        done = await asyncio.to_thread(uvm, "detach", served, "/disk", "--wait", "1")
        assert done.returncode == 4
        assert "stands still" in done.stderr
        done = await asyncio.to_thread(uvm, "stop", served, "--force")
        assert (done.returncode, done.stderr.count("error")) == (0, 0)
        assert not places.vm_dir(served).exists()
    finally:
        os.kill(server, signal.SIGKILL)
