"""The command line, and what is refused before anything is started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from utilityvm.errors import InvalidRequest, SetupError
from utilityvm.hosts.qemu import launch
from utilityvm.hosts.qemu.accelerator import Accelerator
from utilityvm.hosts.qemu.confinement import Inside
from utilityvm.hosts.qemu.emulator import Emulator
from utilityvm.hosts.qemu.launch import Descriptors, QemuConfig, QemuProcess
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.machine.processes import started_at

EMULATOR = Emulator(Path("/usr/bin/qemu-system-x86_64"), "7.2.22", "pc-q35-7.2")
FDS = Descriptors(
    qmp=(10, 11), agent=12, log=13, root=16, kernel=Inside(14, "/boot/kernel"), initramfs=Inside(15, "/boot/initramfs")
)
CONFIG = QemuConfig(name="one", kernel=Path("/k"), initramfs=Path("/i"), root=Path("/r"), cmdline="console=ttyS0")
PROCESS = QemuProcess(
    name="one",
    pid=1,
    started="2",
    uuid="3",
    folder=Path("/run/utilityvm/vms/one"),
    uid=70000,
    controllers=4,
    keep=True,
    accelerator="tcg",
    accelerator_reason="why",
    qemu_version="7.2.22",
    machine="pc-q35-7.2",
    log_pid=4,
    log_started="5",
)


def words(config: QemuConfig = CONFIG, fds: Descriptors = FDS) -> list[str]:
    return launch.command_line(config, EMULATOR, Accelerator("tcg", ""), vm_uuid="0-1", fds=fds)


def values(option: str, config: QemuConfig = CONFIG, fds: Descriptors = FDS) -> list[str]:
    line = words(config, fds)
    return [line[index + 1] for index, word in enumerate(line) if word == option]


def test_qemu_is_told_no_path_of_ours() -> None:
    paths = [word for word in words()[1:] if "/" in word]
    assert paths
    assert all("/dev/fdset/" in word or "/boot/" in word for word in paths)


def test_the_sandbox_denies_everything_it_can() -> None:
    (sandbox,) = values("-sandbox")
    assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_the_machine_is_a_versioned_one() -> None:
    assert values("-machine")[0].startswith("pc-q35-7.2,")


@pytest.mark.parametrize("count", range(5))
def test_controllers_are_where_the_guest_is_told(count: int) -> None:
    config = replace(CONFIG, controllers=count, root=None)
    devices = [device for device in values("-device", config) if device.startswith("virtio-scsi-pci")]
    assert devices == [f"virtio-scsi-pci,id=scsi{i},bus=pcie.0,addr={0x10 + i:#x}" for i in range(count)]
    listed = ",".join(f"0000:00:{0x10 + i:02x}.0" for i in range(count))
    assert values("-append", config) == [f"console=ttyS0 utilityvm.scsi={listed}"]


def test_the_root_disk_is_read_only_at_the_first_slot() -> None:
    root = next(device for device in values("-device") if device.startswith("scsi-hd"))
    assert {"bus=scsi0.0", "scsi-id=0", "lun=0", "serial=utilityvm-root"} <= set(root.split(","))
    (node,) = values("-blockdev")
    assert {"read-only=on", "file.read-only=on", "file.filename=/dev/fdset/0"} <= set(node.split(","))


def test_without_a_kernel_there_is_no_kernel_command_line() -> None:
    config = QemuConfig(name="one")
    fds = replace(FDS, kernel=None, initramfs=None, root=None)
    assert not {"-append", "-kernel", "-initrd"} & set(words(config, fds))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "../x"},
        {"name": "a,b"},
        {"name": "-x"},
        {"name": "x" * 64},
        {"memory_mib": 0},
        {"memory_mib": 1 << 21},
        {"cpus": 0},
        {"cpus": 256},
        {"controllers": 5},
        {"controllers": -1},
        {"controllers": 0},
        {"kernel": None},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        replace(CONFIG, **changes).check()  # type: ignore[arg-type]


async def test_a_folder_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(SetupError, match="others may write to"):
        await launch.start(QemuConfig(name="one"), folder=shared / "one")
    assert not (shared / "one").exists()


async def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "one").symlink_to("target")
    with pytest.raises(SetupError, match="not a folder of ours"):
        await launch.start(QemuConfig(name="one"), folder=tmp_path / "one")
    assert not list((tmp_path / "target").iterdir())


def test_a_record_survives_the_store() -> None:
    assert QemuProcess.from_json(PROCESS.to_json()) == PROCESS


def test_a_record_of_another_shape_is_refused() -> None:
    with pytest.raises((KeyError, TypeError)):
        QemuProcess.from_json({"pid": 1})


def test_a_pid_that_another_process_has_is_not_running() -> None:
    assert not replace(PROCESS, pid=os.getpid(), started="1").is_running()


async def test_what_is_not_that_qemu_is_not_killed() -> None:
    """This very process, with the right start time: it does not have the UUID on its command line."""
    started = started_at(os.getpid())
    assert started
    await launch.destroy(replace(PROCESS, pid=os.getpid(), started=started, folder=Path("/nonexistent/one")))


async def test_a_process_is_ended_by_what_it_cannot_change_and_not_by_what_it_says_of_itself() -> None:
    """A QEMU that its guest has taken over can write what it likes on its command line."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        process = replace(PROCESS, pid=other.pid, started=started_at(other.pid) or "", uid=os.geteuid())
        await launch.end(replace(process, uid=os.geteuid() + 1))  # another user's
        await launch.end(replace(process, started=f"1{process.started}"))  # an earlier one of that pid
        assert other.poll() is None
        await launch.end(process)
        assert other.wait(timeout=30) == -signal.SIGKILL


def test_ports_that_nobody_came_for_leave_no_writer_that_makes_a_file_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vms/one"
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path))
    launch._make_folder(folder, "one")
    ports = launch._open_ports(folder)
    ports.abandon()
    with pytest.raises(ProcessLookupError):  # a defunct one would be there
        os.kill(ports.log_pid, 0)
    launch.clean(folder)
    assert not folder.exists()


def test_a_port_listens_in_place_of_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)  # longer than the path of a socket may be
    folder.mkdir(mode=0o700)
    (folder / "qmp0.sock").write_text("of a VM before")
    with ExitStack() as opened:
        listening = launch._listen(folder / "qmp0.sock", opened)
        assert (folder / "qmp0.sock").stat().st_mode & 0o777 == 0o600
        with chdir(folder), socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(20)
            peer.connect("qmp0.sock")  # before QEMU takes connections
            with socket.socket(fileno=os.dup(listening)) as server:
                server.settimeout(20)
                server.accept()[0].close()
    with chdir(folder), socket.socket(socket.AF_UNIX) as peer, pytest.raises(ConnectionRefusedError):
        peer.connect("qmp0.sock")


async def test_the_children_of_a_start_that_failed_are_ended() -> None:
    children = launch._Children()
    await children.end()
    with subprocess.Popen(["sleep", "1000"]) as qemu:
        children.qemu = Watch.child(qemu.pid)
        await children.end()
        assert qemu.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize(("paused", "saved", "asked"), [
    (False, None, ["cont"]), (True, None, []), (False, "an incoming VM", []),
])  # fmt: skip
async def test_a_new_vm_runs_and_one_that_is_saved_or_to_be_paused_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, paused: bool, saved: Any, asked: list[str]
) -> None:
    did: list[str] = []

    async def execute(command: str, **_: object) -> None:
        did.append(command)

    def gives(value: object) -> Callable[..., Awaitable[object]]:
        async def give(*_: object, **__: object) -> object:
            return value

        return give

    monkeypatch.setattr("utilityvm.hosts.qemu.emulator.find", gives(EMULATOR))
    monkeypatch.setattr("utilityvm.hosts.qemu.accelerator.choose", gives(Accelerator("tcg", "")))
    monkeypatch.setattr("utilityvm.hosts.qemu.confinement.survey", gives(SimpleNamespace(on=(), off={})))
    monkeypatch.setattr(launch, "_spawn", gives(PROCESS))
    monkeypatch.setattr(launch.Qmp, "connect", gives(SimpleNamespace(execute=execute, close=None, version="7")))  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "_ram_of", lambda *_: None)
    process, _ = await launch.start(replace(CONFIG, paused=paused), folder=tmp_path / "one", saved=saved)
    assert process == PROCESS
    assert did == asked


@pytest.mark.parametrize("memory_mib", [16, 1 << 20])
def test_the_bounds_of_memory_are_allowed(memory_mib: int) -> None:
    replace(CONFIG, memory_mib=memory_mib).check()
    with pytest.raises(InvalidRequest, match="MiB of memory"):
        replace(CONFIG, memory_mib=15 if memory_mib == 16 else memory_mib + 1).check()
