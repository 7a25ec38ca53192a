"""The main job from the shell: each step a process of its own, the VM between them kept by nobody but the store."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from filesystem_images import add_hash_tree, blank
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths as places
from utilityvm.machine.processes import is_running, process_with
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store
from utilityvm.testing.images import ext4_image, read_file

Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real

COMMAND = [sys.executable, "-c", "from utilityvm.cli import main; main()"]


@pytest.fixture(scope="module")
def worker(booted: str) -> Iterator[str]:
    """A VM that a command made and left running."""
    subprocess.run([*COMMAND, "clone", booted, "worker"], check=True, capture_output=True)
    yield "worker"
    subprocess.run([*COMMAND, "stop", "worker", "--force"], check=True, capture_output=True)
    assert not places.vm_dir("worker").exists()


@pytest.fixture(autouse=True)
def without_disks(worker: str, uvm: Uvm) -> Iterator[None]:
    """Each test leaves the VM without disks, or is told."""
    yield
    rows = json.loads(uvm("ls", worker, "--json").stdout)
    for row in rows:
        for one in row["reservations"]:
            uvm("detach", worker, one["reservation"], "--force")
    assert not rows


def fields(done: CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_the_main_job(uvm: Uvm, worker: str, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "data.qcow2", {"in": "7\n"}, image_format=DiskFormat.QCOW2)
    ((first, slot, guest_path, references),) = fields(uvm("attach", worker, f"{image}:/data"))
    assert (slot, guest_path, references) == ("0:1", "/data", "1")
    ((second, *_, references),) = fields(uvm("attach", worker, f"{image}:/data", "--holder", "job-17"))
    assert references == "2"
    ((row),) = fields(uvm("ls", worker))
    assert row[:8] == ["0:1", str(image), "qcow2", "rw", "attached", "/data", "2", "cli,job-17"]
    assert fields(uvm("path", worker, image)) == [["/data"]]
    assert uvm("exec", worker, "--", "sh", "-c", "cat /data/in; echo 49 > /data/out").stdout == "7\n"
    assert uvm("detach", worker, second).returncode == 0
    assert uvm("detach", worker, image).returncode == 0
    assert uvm("detach", worker, image).returncode == 3
    assert uvm("detach", worker, first).returncode == 3
    assert read_file(image, "/out", image_format=DiskFormat.QCOW2) == "49\n"


def test_a_disk_that_grows(uvm: Uvm, worker: str, disk: Path) -> None:
    size = "stat -f -c '%b %S' /data"
    assert uvm("attach", worker, f"{disk}:/data").returncode == 0
    before = uvm("exec", worker, "--", "sh", "-c", size).stdout
    done = uvm("resize", worker, disk, "32M", "--json")
    assert json.loads(done.stdout)["size_bytes"] == disk.stat().st_size == 32 << 20, done.stderr
    assert int(uvm("exec", worker, "--", "sh", "-c", size).stdout.split()[0]) > int(before.split()[0])
    smaller = uvm("resize", worker, disk, "1M")
    assert (smaller.returncode, disk.stat().st_size) == (2, 32 << 20)
    assert "cannot shrink" in smaller.stderr
    assert uvm("detach", worker, disk).returncode == 0


def test_a_key_and_a_hash_tree_from_files(uvm: Uvm, worker: str, disk: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(64)))
    secret = blank(tmp_path / "secret.raw", 16)
    encrypted = ("attach", worker, f"{secret}:/secret", "--key-file")
    assert uvm(*encrypted, key, "--ensure-filesystem").returncode == 0
    assert uvm("detach", worker, secret).returncode == 0
    assert uvm(*encrypted, key).returncode == 0
    assert uvm("detach", worker, secret).returncode == 0
    key.write_bytes(bytes(65))
    assert uvm(*encrypted, key).returncode == 2
    root_hash, offset = add_hash_tree(disk, "--data-block-size", "1024", "--hash-block-size", "1024")
    checked = ("attach", worker, f"{disk}:/layer", "--read-only", "--verity-offset", str(offset), "--verity")
    assert uvm(*checked, root_hash.hex()).returncode == 0
    assert uvm("exec", worker, "--", "cat", "/layer/greeting").stdout == "hello\n"
    assert uvm("detach", worker, disk).returncode == 0
    assert uvm(*checked, bytes(32).hex()).returncode == 1


def test_exec_passes_on_input_output_and_the_exit_code(uvm: Uvm, worker: str) -> None:
    done = uvm("exec", worker, "--", "sh", "-c", "cat; echo problem >&2; exit 7", input="some\ninput\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "some\ninput\n", "problem\n")


def test_exec_of_a_killed_program_ends_as_a_shell_would(uvm: Uvm, worker: str) -> None:
    assert uvm("exec", worker, "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_exec_of_no_program_is_127(uvm: Uvm, worker: str) -> None:
    done = uvm("exec", worker, "--", "no-such-program")
    assert done.returncode == 127
    assert "no-such-program" in done.stderr


def test_exec_takes_a_folder_and_variables(uvm: Uvm, worker: str) -> None:
    words = ["exec", worker, "--cwd", "/tmp", "-e", "A=one two", "-e", "B=", "--", "sh", "-c", 'pwd; echo "$A" "[$B]"']
    assert uvm(*words).stdout == "/tmp\none two []\n"


def test_exec_moves_bytes_of_any_kind(worker: str) -> None:
    data = bytes(range(256)) * 2000
    done = subprocess.run([*COMMAND, "exec", worker, "--", "cat"], input=data, capture_output=True, check=True)
    assert done.stdout == data


def test_exec_as_json(uvm: Uvm, worker: str) -> None:
    done = uvm("exec", worker, "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert done.returncode == 3
    assert json.loads(done.stdout) == {"exit_code": 3, "stdout": "out\n", "stderr": "err\n"}


def test_ctrl_c_ends_the_program_and_frees_the_vm(uvm: Uvm, worker: str) -> None:
    command = [*COMMAND, "exec", worker, "--", "sh", "-c", "echo begun; exec sleep 1000"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read().strip() == b""
    assert uvm("exec", worker, "--wait", "0", "--", "sh", "-c", "ps -e -o args= | grep [s]leep").returncode == 1


def test_while_one_runs_others_do_too_and_one_that_is_killed_takes_its_program_along(uvm: Uvm, worker: str) -> None:
    command = [*COMMAND, "exec", worker, "--", "sh", "-c", "echo begun; exec sleep 1000"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        assert uvm("exec", worker, "--wait", "0", "--", "sh", "-c", "ps -e -o args= | grep [s]leep").returncode == 0
    finally:
        process.kill()
        process.communicate()
    gone = "while ps -e -o args= | grep '^[s]leep 1000'; do sleep 0.1; done"
    assert uvm("exec", worker, "--timeout", "60", "--", "sh", "-c", gone).returncode == 0


def test_without_the_server_a_command_that_is_killed_gives_the_vm_free(
    uvm: Uvm, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UTILITYVM_SERVER", "off")
    command = [*COMMAND, "exec", worker, "--", "sh", "-c", "echo begun; exec sleep 1000"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        ((owner,),) = [row[7:] for row in fields(uvm("ps")) if row[0] == worker]
        assert owner.startswith(f"{process.pid} ")
        refused = uvm("exec", worker, "--wait", "0", "--", "true")
        assert refused.returncode == 125
        assert f"belongs to process {process.pid}" in refused.stderr
        process.kill()
    assert uvm("exec", worker, "--", "true").returncode == 0


def test_commands_queue_for_the_vm(worker: str, tmp_path: Path, uvm: Uvm) -> None:
    image = ext4_image(tmp_path / "shared.raw", {})
    attach = [*COMMAND, "attach", worker, f"{image}:/shared", "--json"]
    running = [subprocess.Popen(attach, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
    results = [process.communicate() for process in running]
    counts = [json.loads(out)["references"] for out, _ in results]
    assert sorted(counts) == [1, 2, 3, 4, 5]
    for _ in range(5):
        assert uvm("detach", worker, image).returncode == 0


def test_what_cannot_be_changes_nothing(uvm: Uvm, worker: str, tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "data.raw", {})
    assert uvm("attach", worker, f"{image}:/data").returncode == 0
    (tmp_path / "empty").touch()
    (tmp_path / "cut.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(20))
    (tmp_path / "secret").write_bytes(b"x" * 4096)
    other = ext4_image(tmp_path / "other.raw", {})
    before = uvm("ls", worker, "--json").stdout
    for words, code in (
        ([tmp_path / "none"], 2),
        ([tmp_path], 2),
        ([tmp_path / "empty"], 8),
        ([tmp_path / "cut.qcow2"], 8),
        ([f"{other}:/data"], 4),
        ([f"{image}:/data", "--read-only"], 4),
        ([f"{other}:/x", "--format", "qcow2"], 4),
        ([other, "--physical"], 2),
        (["/dev/null"], 2),
    ):
        done = uvm("attach", worker, *words)
        assert done.returncode == code, (words, done.stderr)
        error, *hint = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert all(line.startswith("hint: ") for line in hint)
        assert len(hint) <= 1
    after = uvm("ls", worker, "--json").stdout
    assert [{**row, "age_s": 0} for row in json.loads(after)] == [{**row, "age_s": 0} for row in json.loads(before)]
    assert uvm("detach", worker, image).returncode == 0


def test_a_second_start_of_the_name_is_refused(uvm: Uvm, worker: str) -> None:
    done = uvm("start", worker)
    assert done.returncode == 4
    assert "runs already" in done.stderr


def test_log_shows_the_console(uvm: Uvm, worker: str) -> None:
    assert uvm("exec", worker, "--", "sh", "-c", "echo a line for the log > /dev/console").returncode == 0
    assert "a line for the log" in uvm("log", worker).stdout
    assert "a line for the log" in uvm("log", worker, "-n", "1").stdout
    assert "a line for the log" in "".join(json.loads(uvm("log", worker, "--json").stdout)["lines"])


async def test_without_keep_ctrl_c_ends_the_vm(guest_image: GuestImage) -> None:
    words = [*COMMAND, "start", "short", "--no-keep", "--json"]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    description = json.loads(await process.stdout.readline())
    assert description["name"] == "short"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    assert not places.vm_dir("short").exists()
    with Store.open() as store:
        assert store.find("short") is None


async def start_until_qemu_runs(name: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(*COMMAND, "--debug", "start", name, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    while b"started QEMU" not in (line := await process.stderr.readline()):
        assert line, "it ended before QEMU ran"
    return process


async def test_ctrl_c_while_it_boots_leaves_nothing(guest_image: GuestImage) -> None:
    process = await start_until_qemu_runs("early")
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130
    assert not places.vm_dir("early").exists()
    with Store.open() as store:
        assert store.find("early") is None


async def test_a_start_that_is_killed_can_be_done_again(guest_image: GuestImage, uvm: Uvm) -> None:
    process = await start_until_qemu_runs("cut")
    process.kill()
    await process.communicate()
    with Store.open() as store:
        first = store.get("cut")
        store.db.execute("UPDATE vms SET process = NULL WHERE id = ?", (first.id,))  # if it came to write that
    left = process_with("-uuid", first.uuid)
    assert left is not None
    assert [row[1] for row in fields(uvm("ps")) if row[0] == "cut"] == ["dead"]
    assert uvm("start", "cut").returncode == 0
    assert not is_running(*left)
    assert uvm("stop", "cut").returncode == 0


async def test_without_keep_a_killed_command_takes_the_vm_along(guest_image: GuestImage, uvm: Uvm) -> None:
    words = [*COMMAND, "start", "orphan", "--no-keep", "--json"]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    pid = json.loads(await process.stdout.readline())["pid"]
    watch = os.pidfd_open(pid)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(watch, ended.set_result, None)
    process.kill()
    await process.wait()
    await ended
    asyncio.get_running_loop().remove_reader(watch)
    os.close(watch)
    done = uvm("ls", "orphan")
    assert done.returncode == 7
    assert uvm("stop", "orphan").returncode == 0
    assert not places.vm_dir("orphan").exists()


def test_stop_of_a_guest_that_does_not_answer(uvm: Uvm, booted: str) -> None:
    assert uvm("clone", booted, "hung").returncode == 0
    with Store.open() as store:
        pid = store.get("hung").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert uvm("stop", "hung", "--force").returncode == 0
    assert not places.vm_dir("hung").exists()


def test_several_stops_at_once_end_it_once(uvm: Uvm, booted: str) -> None:
    assert uvm("clone", booted, "popular").returncode == 0
    stop = [*COMMAND, "stop", "popular"]
    running = [subprocess.Popen(stop, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert sorted(process.wait() for process in running) == [0, 3, 3, 3]
    assert not places.vm_dir("popular").exists()


def test_a_vm_of_another_runtime_folder_is_not_owned_from_here(
    uvm: Uvm, worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.environ["UTILITYVM_RUNTIME_DIR"]
    with monkeypatch.context() as patch:
        patch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path))
        for words in (["exec", worker, "--", "true"], ["stop", worker]):
            done = uvm(*words)
            assert done.returncode in (6, 125)
            assert f"set UTILITYVM_RUNTIME_DIR to {before}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_vm_says_so_and_takes_disks_again_when_one_is_gone(
    uvm: Uvm, guest_image: GuestImage, tmp_path: Path
) -> None:
    for number in range(64):
        with (tmp_path / f"{number}.raw").open("wb") as file:
            file.truncate(1 << 20)
    assert uvm("start", "small", "--controllers", "1").returncode == 0
    script = (
        "import asyncio, sys\nfrom utilityvm import DiskSpec, UtilityVM\n"
        "async def main():\n"
        "    async with UtilityVM.open('small') as vm:\n"
        "        disks = [DiskSpec(host_path=f'{sys.argv[1]}/{n}.raw') for n in range(63)]\n"
        "        await vm.add_scsi_many(disks, holder='many')\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    done = uvm("attach", "small", tmp_path / "63.raw")
    assert done.returncode == 4
    assert "no free slot (64 of 64 used)" in done.stderr
    assert len(json.loads(uvm("ls", "small", "--json").stdout)) == 63
    assert uvm("detach", "small", tmp_path / "7.raw").returncode == 0
    assert uvm("attach", "small", tmp_path / "63.raw").returncode == 0
    assert uvm("stop", "small").returncode == 0


def test_doctor_finds_no_fault(uvm: Uvm, guest_image: GuestImage) -> None:
    done = uvm("doctor")
    assert done.returncode == 0, done.stdout


def test_image_ls_marks_the_one_that_is_used(uvm: Uvm, guest_image: GuestImage) -> None:
    assert [row[0] for row in fields(uvm("image", "ls")) if row[1] == "*"] == [guest_image.key]
    assert fields(uvm("image", "build"))[0][0] == guest_image.key
