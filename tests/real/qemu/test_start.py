"""A VM's beginning and its end: whose rights it has, what it leaves behind, and who outlives whom."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from descriptors import open_files, until_closed
from utilityvm.errors import DeadlineExceeded, SetupError, VMExists, VMGone
from utilityvm.hosts.qemu import QemuConfig, QemuHost, QemuProcess, launch
from utilityvm.hosts.qemu.confinement import Layer
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.machine import cgroups
from utilityvm.machine.processes import started_at
from utilityvm.scsi.ports import DiskRequest
from utilityvm.scsi.slot import Slot

T = 20.0
Start = Callable[..., Awaitable[QemuHost]]
Make = Callable[..., Path]

OWNER = """
import asyncio, json, sys
from pathlib import Path
from utilityvm.hosts.qemu import QemuConfig, QemuHost

async def main():
    config = QemuConfig(name="one", memory_mib=64, keep=sys.argv[2] == "keep")
    host = await QemuHost.start(config, folder=Path(sys.argv[1]))
    print(json.dumps(host.process.to_json()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in text.splitlines())}


def processes_of(folder: Path) -> list[int]:
    """Processes that still have something of the VM open, or in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


async def test_qemu_has_no_rights(vm: QemuHost) -> None:
    said = status(vm.process.pid)
    assert said["Seccomp"] == "2"
    assert said["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert said["Uid"] == " ".join([str(vm.process.uid)] * 4)
        assert vm.process.uid != 0
        assert said["Groups"] == ""
        assert all(int(said[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
    limits = Path(f"/proc/{vm.process.pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits


async def test_two_vms_are_two_users(start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give each VM a user")
    one, two = await asyncio.gather(start("one"), start("two"))
    assert one.process.uid != two.process.uid


async def test_qemu_inherits_what_it_was_given_and_nothing_else(runtime: Path) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(secret, True)
    host = await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one")
    opened = {str(file.readlink()) for file in Path(f"/proc/{host.process.pid}/fd").iterdir()}
    await host.stop()
    os.close(secret)
    assert not {name for name in opened if name.startswith("/") and "memfd" not in name} - {"/dev/null"}


async def test_nobody_else_reaches_the_sockets(vm: QemuHost) -> None:
    assert vm.process.folder.stat().st_mode & 0o077 == 0
    for file in vm.process.folder.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


async def test_the_record_says_what_runs(vm: QemuHost) -> None:
    process = vm.process
    assert process.is_running()
    assert process.uuid.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert process.machine.startswith("pc-q35-")
    assert process.qemu_version[0].isdecimal()
    assert process.accelerator in ("kvm", "tcg")
    assert process.accelerator_reason
    assert process.agent_socket.is_socket()


async def test_a_vm_runs_unless_it_is_to_wait(start: Start) -> None:
    assert await (await start("one")).status() == "running"
    waiting = await start("two", paused=True)
    assert await waiting.status() == "prelaunch"
    await waiting.resume()
    assert await waiting.status() == "running"
    await waiting.pause()
    await waiting.pause()
    assert await waiting.status() == "paused"


async def test_stop_leaves_nothing(runtime: Path) -> None:
    host = await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one")
    pids = [host.process.pid, host.process.log_pid]
    await host.stop()
    await host.stop()
    assert not (runtime / "one").exists()
    async with asyncio.timeout(T):  # no zombie stays either: a thread waits for each
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)
    assert isinstance(await host.gone, VMGone)


async def test_stop_can_keep_the_log(runtime: Path) -> None:
    host = await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one")
    await host.stop(keep_log=True)
    assert [file.name for file in (runtime / "one").iterdir()] == ["console.log"]
    assert host.console() == b""
    launch.clean(runtime / "one")


async def test_stop_ends_a_qemu_that_hangs(start: Start) -> None:
    vm = await start()
    os.kill(vm.process.pid, signal.SIGSTOP)
    await vm.stop(timeout_s=0.05)
    assert not vm.process.is_running()


async def test_the_death_of_qemu_is_told_at_once(start: Start, image: Make) -> None:
    vm = await start()
    disk = await vm.open(DiskRequest(host_path=str(image()), read_only=False))
    await vm.attach(Slot(0, 1), disk, attachment="a", timeout_s=T)
    os.kill(vm.process.pid, signal.SIGSTOP)
    detaching = asyncio.create_task(vm.detach(Slot(0, 1), attachment="a", timeout_s=T))
    attaching = asyncio.create_task(vm.attach(Slot(0, 2), disk, attachment="b", timeout_s=T))
    probing = asyncio.create_task(vm.probe(Slot(0, 1), attachment="a", timeout_s=T))
    attaching.add_done_callback(lambda _: disk.close())
    await asyncio.sleep(0)
    os.kill(vm.process.pid, signal.SIGKILL)
    assert isinstance(await vm.gone, VMGone)
    ends = await asyncio.gather(detaching, probing, return_exceptions=True)
    assert [type(end) for end in ends] == [VMGone, VMGone]
    with pytest.raises(Exception, match=r"hung up|is used|has it attached"):
        await attaching
    with pytest.raises(VMGone):
        await vm.status()


async def test_a_guest_that_resets_ends_its_vm_and_the_reason_is_told(vm: QemuHost) -> None:
    await vm._qmp.execute("system_reset", timeout_s=T)
    assert "host-qmp-system-reset" in str(await vm.gone)


async def test_a_kernel_and_a_root_that_only_we_can_read(start: Start, tmp_path: Path) -> None:
    """The kernel is no kernel, but QEMU reads it: it would not start otherwise."""
    kernel, initramfs, root = (tmp_path / name for name in ("kernel", "initramfs", "root"))
    header = bytearray(8192)
    header[0x1F1] = 1  # setup sectors
    header[0x1FE:0x200] = b"\x55\xaa"
    header[0x202:0x206] = b"HdrS"
    header[0x206:0x208] = (0x20C).to_bytes(2, "little")
    header[0x211] = 1  # loaded high
    header[0x22C:0x230] = (0x37FFFFFF).to_bytes(4, "little")  # how high an initramfs may be
    kernel.write_bytes(header)
    initramfs.write_bytes(bytes(4096))
    root.write_bytes(bytes(1 << 20))
    for file in (kernel, initramfs, root):
        file.chmod(0o600)
    vm = await start(kernel=kernel, initramfs=initramfs, root=root, cmdline="quiet")
    (block,) = await vm._qmp.execute("query-block", timeout_s=T)
    assert block["inserted"]["ro"]
    assert await vm.attachments() == [], "the root disk is not one of the manager's"
    loaded = await vm._qmp.execute("qom-get", {"path": "/machine", "property": "append"}, timeout_s=T)
    assert loaded.startswith("quiet utilityvm.scsi=0000:00:10.0,")


@pytest.mark.parametrize("missing", ["kernel", "initramfs", "root"])
async def test_a_file_that_is_missing_is_named_and_nothing_is_left(runtime: Path, tmp_path: Path, missing: str) -> None:
    files = {name: tmp_path / name for name in ("kernel", "initramfs", "root")}
    for name, file in files.items():
        if name != missing:
            file.write_bytes(bytes(4096))
    before = open_files()
    with pytest.raises(SetupError, match=f"cannot open {tmp_path / missing}"):
        await QemuHost.start(QemuConfig(name="one", **files), folder=runtime / "one")  # type: ignore[arg-type]
    assert not processes_of(runtime)
    await until_closed(before)


async def test_a_qemu_that_does_not_start_is_quoted_and_nothing_is_left(runtime: Path) -> None:
    before = open_files()
    with pytest.raises(SetupError, match=r"QEMU did not start VM one: .*invalid accelerator hvf") as caught:
        await QemuHost.start(QemuConfig(name="one", accelerator="hvf"), folder=runtime / "one")
    assert caught.value.remedy
    assert not (runtime / "one").exists()
    assert not processes_of(runtime)
    await until_closed(before)


async def test_a_start_that_is_cancelled_leaves_nothing(runtime: Path) -> None:
    starting = asyncio.create_task(QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one"))
    while not (runtime / "one" / "console.log").exists():
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not (runtime / "one").exists()
    async with asyncio.timeout(T):
        while processes_of(runtime):  # the log's writer ends by itself
            await asyncio.sleep(0)


async def test_a_runtime_folder_may_have_a_longer_path_than_a_socket(runtime: Path) -> None:
    folder = runtime / ("x" * 120) / "one"  # a socket's own path has 107 bytes at the most
    vm = await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=folder)
    process = vm.process
    await vm.close()
    vm = await QemuHost.connect(process)
    assert await vm.status() == "running"
    await vm.stop()
    assert not processes_of(runtime)
    folder.parent.rmdir()


async def test_a_start_without_time_leaves_nothing(runtime: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one", timeout_s=0.01)
    assert not (runtime / "one").exists()
    assert not processes_of(runtime)


async def test_a_vm_that_runs_keeps_its_folder(start: Start, runtime: Path) -> None:
    vm = await start("one")
    with pytest.raises(VMExists, match="a VM runs in"):
        await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=runtime / "one")
    assert await vm.status() == "running"
    assert vm.process.agent_socket.is_socket()


async def test_what_an_earlier_vm_left_is_no_hindrance(start: Start, runtime: Path) -> None:
    folder = runtime / "one"
    folder.mkdir()
    for name in ("qmp0.sock", "agent.sock", "console.log.1"):
        (folder / name).write_text("left behind")
    vm = await start("one")
    assert await vm.status() == "running"


AS_NOBODY = """
import asyncio, concurrent.futures.thread, ctypes, os, tempfile  # all of it now: Python may be where nobody may read
from pathlib import Path
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.scsi.ports import DiskFormat, DiskRequest
from utilityvm.scsi.slot import Slot

async def main(folder):
    host = await QemuHost.start(QemuConfig(name="one", memory_mib=64), folder=folder / "one")
    image = folder / "disk"
    image.write_bytes(bytes(1 << 20))
    disk = await host.open(DiskRequest(host_path=str(image), read_only=False, format=DiskFormat.RAW))
    await host.attach(Slot(0, 1), disk, attachment="a", timeout_s=20)
    disk.close()
    print(host.process.uid, Path(f"/proc/{host.process.pid}/status").read_text().split("Uid:")[1].split()[0])
    await host.detach(Slot(0, 1), attachment="a", timeout_s=20)
    await host.stop()
    assert [file.name for file in folder.iterdir()] == ["disk"], list(folder.iterdir())

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
"""


async def test_a_plain_user_starts_vms_too() -> None:
    if os.geteuid() != 0:
        pytest.skip("every other test here is run by a plain user already")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        AS_NOBODY,
        env={"PATH": os.environ["PATH"], "UTILITYVM_ACCEL": "tcg", "UTILITYVM_CACHE_DIR": "/nonexistent"},
        cwd="/",
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.split() == [b"65534", b"65534"]


class Owner:
    """Another process that starts a VM, and can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, record: QemuProcess) -> None:
        self.process = process
        self.record = record

    @classmethod
    async def start(cls, folder: Path, *, keep: bool) -> Owner:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OWNER, folder, "keep" if keep else "not", stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        return cls(process, QemuProcess.from_json(json.loads(await process.stdout.readline())))

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


async def test_a_vm_dies_with_its_owner(runtime: Path) -> None:
    owner = await Owner.start(runtime / "one", keep=False)
    qemu = Watch(owner.record.pid, owner.record.started)
    writer = Watch(owner.record.log_pid, owner.record.log_started)
    await owner.kill()
    assert await qemu.wait(timeout_s=T)
    assert await writer.wait(timeout_s=T)
    with pytest.raises(VMGone):
        await QemuHost.connect(owner.record)
    await launch.destroy(owner.record)


async def test_a_kept_vm_outlives_its_owner_with_its_disks(runtime: Path, image: Make) -> None:
    owner = await Owner.start(runtime / "one", keep=True)
    await owner.kill()
    vm = await QemuHost.connect(owner.record)
    path = image()
    disk = await vm.open(DiskRequest(host_path=str(path), read_only=False))
    await vm.attach(Slot(2, 7), disk, attachment="kept", timeout_s=T)
    disk.close()
    await vm.close()

    vm = await QemuHost.connect(QemuProcess.from_json(owner.record.to_json()))
    (found,) = await vm.attachments()
    assert (found.attachment, found.slot, found.whole) == ("kept", Slot(2, 7), True)
    assert await vm.probe(Slot(2, 7), attachment="kept", timeout_s=T)
    await vm.detach(Slot(2, 7), attachment="kept", timeout_s=T)
    disk = await vm.open(DiskRequest(host_path=str(path), read_only=False))
    await vm.attach(Slot(2, 7), disk, attachment="again", timeout_s=T)
    disk.close()
    await vm.stop()
    assert started_at(owner.record.pid) is None
    assert not processes_of(runtime)


async def test_a_half_made_attachment_is_found_and_finished_off_by_the_next_owner(runtime: Path, image: Make) -> None:
    owner = await Owner.start(runtime / "one", keep=True)
    await owner.kill()
    first = await QemuHost.connect(owner.record)
    disk = await first.open(DiskRequest(host_path=str(image()), read_only=False))
    await first.attach(Slot(0, 1), disk, attachment="half", timeout_s=T)
    disk.close()
    await first._qmp.execute("device_del", {"id": f"d{first._numbers['half']}"}, timeout_s=T)
    await first.close()

    second = await QemuHost.connect(owner.record)
    (found,) = await second.attachments()
    assert not found.whole
    assert not await second.probe(Slot(0, 1), attachment="half", timeout_s=T)
    assert await second.attachments() == []
    await second.stop()


async def test_a_vm_has_one_owner(vm: QemuHost) -> None:
    with pytest.raises(DeadlineExceeded, match="did not greet"):
        await QemuHost.connect(vm.process, timeout_s=0.05)
    assert await vm.status() == "running"


async def test_another_vm_at_the_same_place_is_not_taken_over(start: Start) -> None:
    vm = await start()
    record = replace(vm.process, uuid=str(uuid.uuid4()))
    await vm.close()
    with pytest.raises(SetupError, match="lead to VM"):
        await QemuHost.connect(record)


async def test_another_vms_process_is_not_killed(start: Start, tmp_path: Path) -> None:
    vm = await start()
    record = replace(vm.process, log_pid=os.getpid(), folder=tmp_path / "none")
    await launch.destroy(replace(record, started=f"1{vm.process.started}"))
    await launch.destroy(replace(record, uid=vm.process.uid + 1))
    assert await vm.status() == "running"


async def test_the_log_has_qemus_words_and_is_there_when_qemu_is_not(start: Start) -> None:
    vm = await start()
    writer = Watch(vm.process.log_pid, vm.process.log_started)
    os.kill(vm.process.pid, signal.SIGTERM)
    await vm.gone
    assert await writer.wait(timeout_s=T)
    assert b"terminating on signal 15" in vm.console()


def tree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup that VMs may use, of plain files."""
    monkeypatch.setattr(cgroups, "_mounted", lambda: folder)
    monkeypatch.setenv(cgroups.VARIABLE, "vms")
    (folder / "vms").mkdir()
    (folder / "vms/cgroup.subtree_control").write_text("memory pids")
    return folder / "vms"


async def test_a_vm_is_in_its_cgroup_before_its_guest_runs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(tmp_path, monkeypatch)
    vm = await start()
    folder = own / f"utilityvm-{vm.process.pid}"
    assert (vm.process.cgroup, Layer.CGROUP in vm.process.walls) == (str(folder), True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "memory.max": str((64 + 10240) << 20), "pids.max": "2048", "cgroup.procs": str(vm.process.pid),
    }  # fmt: skip
    for file in folder.iterdir():  # as the kernel does, whose files hold up no rmdir
        file.unlink()
    await vm.stop()
    assert not folder.exists()


async def test_a_cgroup_that_the_kernel_refuses_is_told_in_the_record(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(tmp_path, monkeypatch)
    monkeypatch.setattr(cgroups, "_NAME", "nowhere/")
    vm = await start()
    assert vm.process.cgroup == ""
    assert Layer.CGROUP not in vm.process.walls
    assert f"cannot put process {vm.process.pid} into {own}/nowhere" in vm.process.without[Layer.CGROUP]
