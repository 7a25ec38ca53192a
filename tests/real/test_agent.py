"""The agent where it lives: in a VM, as its init, on a real virtio-serial port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from points import rounds
from raw_host import RawHost
from utilityvm import UtilityVM, VMGone
from utilityvm.errors import DeadlineExceeded, OutcomeUnknown
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.testing.images import ext4_image, read_file

Start = Callable[..., Awaitable[UtilityVM]]

pytestmark = pytest.mark.real


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def until_false(vm: UtilityVM, *command: str) -> None:
    """Ask until the command fails."""
    async with asyncio.timeout(20):
        while (await vm.run(command)).exit_code == 0:
            pass


async def test_the_system_is_one_to_run_programs_in(vm_booted: UtilityVM) -> None:
    for folder in ("/tmp", "/run", "/dev/shm", "/var/tmp", "/a/new/one"):
        await output(vm_booted, f"mkdir -p {folder} && echo > {folder}/file && rm {folder}/file")
    assert await output(vm_booted, "stat -c %a /tmp") == "1777\n"
    assert await output(vm_booted, "echo a | tee /dev/stderr /dev/fd/1 2>/dev/null") == "a\na\n"
    assert "cgroup2" in await output(vm_booted, "cat /proc/filesystems")
    assert (
        await vm_booted.run(["python3", "-c", "import socket; socket.create_server(('127.0.0.1', 0))"])
    ).exit_code == 0


async def test_orphans_are_reaped(vm_booted: UtilityVM) -> None:
    orphan = await output(vm_booted, "(setsid sh -c 'exit 0' & echo $!) 2>/dev/null")
    await until_false(vm_booted, "test", "-e", f"/proc/{orphan.strip()}")


async def test_a_run_that_is_out_of_time_leaves_no_daemon(vm_booted: UtilityVM) -> None:
    with pytest.raises(DeadlineExceeded, match="did not end within"):
        await vm_booted.run(["sh", "-c", "setsid sh -c 'sleep 7777; :' & sleep 7777"], timeout_s=3)
    await until_false(vm_booted, "pgrep", "-f", "sleep 7777")


async def test_a_program_that_ended_is_told_and_what_it_left_goes_on(vm_booted: UtilityVM) -> None:
    result = await vm_booted.run(["sh", "-c", "sleep 7778 & echo hi; exit 7"], timeout_s=20)
    assert (result.exit_code, result.stdout) == (7, b"hi\n")
    text = await output(vm_booted, "pkill -f '[s]leep 7778' && cat /proc/self/cgroup")
    assert text.startswith("0::/utilityvm/")


async def test_a_program_that_eats_the_memory_is_killed_and_not_the_agent(vm_booted: UtilityVM) -> None:
    agent = await output(vm_booted, "echo $PPID")
    assert (await vm_booted.run(["tail", "/dev/zero"])).exit_code == -signal.SIGKILL
    assert await output(vm_booted, "cat /proc/self/oom_score_adj; echo $PPID") == f"0\n{agent}"


async def test_five_megabytes_go_through_a_program_and_come_back(vm_booted: UtilityVM) -> None:
    data = os.urandom(5 << 20)
    assert (await vm_booted.run(["cat"], stdin=data)).stdout == data


async def test_an_agent_that_dies_is_started_again_and_knows_its_mounts(start: Start, disk: Path) -> None:
    vm = await start("agent-dies")
    mount = await vm.add_scsi(disk, "/data")
    with pytest.raises(OutcomeUnknown, match="started again"):
        await vm.run(["sh", "-c", "kill -9 $PPID; exec sleep 1000"])
    assert await output(vm, "cat /data/greeting") == "hello\n"
    assert "sleep" not in await output(vm, "cat /proc/[0-9]*/comm")
    await mount.release()
    assert not vm.scsi_slots()


async def test_a_client_that_knows_only_the_recordings_is_served(start: Start, disk: Path) -> None:
    vm = await start("plain-client")
    mount = await vm.add_scsi(disk)
    assert mount.slot == (0, 1)
    path = vm._host.process.agent_socket
    await vm.ping()  # nothing is under way to us any more, which that client would not understand
    client = vm._guest._client
    assert client
    await client.close()

    def serve() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            host = RawHost(connection)
            settings = {"MountPath": "/run/mounts/scsi/m0", "Lun": 1}
            assert host.negotiate()["Version"] == 4
            assert host.modify("Add", "MappedVirtualDisk", settings)["Result"] == 0
            assert host.modify("Add", "MappedVirtualDisk", settings)["Result"] != 0
            assert host.modify("Remove", "SCSIDevice", {"Lun": 1})["Result"] != 0
            assert host.modify("Remove", "MappedVirtualDisk", settings)["Result"] == 0

    await asyncio.to_thread(serve)
    assert await output(vm, "echo back") == "back\n"  # we connect again by ourselves
    await mount.release()


async def test_a_host_that_comes_and_goes_is_met_each_time(vm_booted: UtilityVM) -> None:
    for number in range(rounds(4, long=20)):
        client = vm_booted._guest._client
        assert client
        await client.close()
        assert await output(vm_booted, f"echo {number}") == f"{number}\n"


async def test_a_host_that_goes_in_the_middle_of_output_harms_nobody(vm_booted: UtilityVM) -> None:
    for _ in range(rounds(2, long=10)):
        chunks: asyncio.Queue[bytes] = asyncio.Queue()
        running = asyncio.create_task(
            vm_booted.run_streaming(["cat", "/dev/zero"], stdout=chunks.put_nowait, stderr=chunks.put_nowait)
        )
        await chunks.get()
        client = vm_booted._guest._client
        assert client
        client.end(VMGone("the test cut it"))
        with pytest.raises(VMGone):
            await running
        await until_false(vm_booted, "pgrep", "-f", "cat /dev/zer[o]")


async def test_a_vm_that_powers_off_leaves_its_disks_clean(start: Start, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "data.raw", {})
    vm = await start("powers-off")
    await vm.add_scsi(image, "/data")
    await output(
        vm, "echo written > /data/file; exec 3> /data/open; (exec 3>&3; trap '' TERM; sleep 1000) > /dev/null 2>&1 &"
    )
    with pytest.raises(VMGone):
        await vm.run(["sh", "-c", "kill -TERM 1; exec sleep 1000"])
    await vm.stop()
    assert read_file(image, "/file", image_format=DiskFormat.RAW) == "written\n"
    header = run([find_program("dumpe2fs", package="e2fsprogs"), "-h", image]).decode()
    assert "needs_recovery" not in header
    assert "clean" in header
