"""Tables for people, tabs for pipes, JSON for programs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utilityvm.cli import completion, output
from utilityvm.cli.commands import COMMANDS
from utilityvm.cli.commands import uvm as command
from utilityvm.machine.processes import own_start
from utilityvm.scsi.ports import (
    AttachmentType,
    DiskFormat,
    DiskRecord,
    Holder,
    MountConfig,
    MountRecord,
    Record,
    ReservationRecord,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, Store, VMState
from utilityvm.text import size

from .conftest import Uvm


@pytest.fixture
def vm(store: Store, folders: Path) -> Path:
    """A VM with one disk at /data, held twice; its QEMU is this process. Gives the disk."""
    from pathlib import PurePosixPath

    disk = folders / "disk.qcow2"
    disk.touch()
    record = store.add("worker", uuid="u", config={"memory_mib": 256, "cpus": 2, "keep": True})
    store.set_process(record, {"pid": os.getpid(), "started": own_start(), "accelerator": "tcg"})
    store.set_state(record, VMState.RUNNING)
    status, now = disk.stat(), time.time()
    records: list[Record] = [
        DiskRecord(
            attachment="a1",
            slot=Slot(0, 1),
            host_path=str(disk),
            identity=f"file:{status.st_dev}:{status.st_ino}",
            kind=AttachmentType.VIRTUAL_DISK,
            format=DiskFormat.QCOW2,
            access=VMAccess.INDIVIDUAL,
            read_only=True,
            size_bytes=1 << 30,
            state="attached",
            since=now,
        ),
        MountRecord(
            mount="m1",
            attachment="a1",
            guest_path=PurePosixPath("/data"),
            config=MountConfig(read_only=True),
            state="mounted",
            since=now,
        ),
        *(
            ReservationRecord(
                reservation=f"r{number}",
                attachment="a1",
                mount="m1",
                holder=Holder(name=name),
                state=state,
                since=now,
            )
            for number, (name, state) in enumerate([("cli", "held"), ("job-17", "held"), ("late", "pending")])
        ),
    ]
    asyncio.run(SqliteJournal(store, record).write(records))
    return disk


def test_ls_into_a_pipe_is_one_line_of_tabs_a_disk(uvm: Uvm, vm: Path) -> None:
    assert uvm("ls", "worker").stdout == f"0:1\t{vm}\tqcow2\tro\tattached\t/data\t2\tcli,job-17\t0s\n"


def test_ls_can_show_the_reservations(uvm: Uvm, vm: Path) -> None:
    lines = uvm("ls", "worker", "--reservations").stdout.splitlines()
    assert lines == [f"r0\t0:1\t{vm}\t/data\tcli\t0s", f"r1\t0:1\t{vm}\t/data\tjob-17\t0s"]


def test_ls_as_json_has_all_of_it(uvm: Uvm, vm: Path) -> None:
    (row,) = json.loads(uvm("ls", "worker", "--json").stdout)
    assert (row["slot"], row["host_path"], row["references"], row["size_bytes"]) == ("0:1", str(vm), 2, 1 << 30)
    assert [one["reservation"] for one in row["reservations"]] == ["r0", "r1"]


def test_path_finds_the_disk_by_any_spelling(uvm: Uvm, vm: Path) -> None:
    vm.with_name("link").symlink_to(vm)
    for spelling in (vm, vm.name, "link", f"./{vm.name}", f"../{vm.parent.name}/{vm.name}"):
        assert uvm("path", "worker", spelling).stdout == "/data\n"
    assert json.loads(uvm("path", "worker", vm, "--json").stdout)["guest_paths"] == ["/data"]


def test_path_of_a_file_that_is_gone_goes_by_its_name(uvm: Uvm, vm: Path) -> None:
    vm.unlink()
    assert uvm("path", "worker", vm).stdout == "/data\n"


def test_ps_shows_the_vm(uvm: Uvm, vm: Path) -> None:
    assert uvm("ps").stdout == f"worker\trunning\t{os.getpid()}\t256\t2\t1\t0s\t-\n"
    (row,) = json.loads(uvm("ps", "--json").stdout)
    assert (row["name"], row["state"], row["disks"], row["owner"]) == ("worker", "running", 1, None)


def test_ps_without_vms_prints_nothing(uvm: Uvm) -> None:
    assert uvm("ps").stdout == ""
    assert json.loads(uvm("ps", "--json").stdout) == []


def test_inspect_shows_the_vm_its_disks_and_who_holds_them(uvm: Uvm, vm: Path) -> None:
    lines = uvm("inspect", "worker").stdout.splitlines()
    assert lines[:5] == ["name\tworker", "state\trunning", "uuid\tu", f"pid\t{os.getpid()}", "memory\t256 MiB"]
    assert lines[-3:] == [
        f"disk\t0:1, {vm}, qcow2, ro, attached, at /data, 2 references",
        "held by\tcli since 0s",
        "held by\tjob-17 since 0s",
    ]
    document = json.loads(uvm("inspect", "worker", "--json").stdout)
    assert (document["name"], document["disks"][0]["references"]) == ("worker", 2)


def test_inspect_shows_a_vm_whose_journal_is_damaged(uvm: Uvm, vm: Path, store: Store) -> None:
    store.db.execute("UPDATE disks SET lun = 64")
    store.db.commit()
    assert "disks\tits journal cannot be read; see uvm repair" in uvm("inspect", "worker").stdout.splitlines()
    assert json.loads(uvm("inspect", "worker", "--json").stdout)["disks"] is None


def test_stop_takes_names_or_all(uvm: Uvm, store: Store) -> None:
    assert "give the names of VMs, or --all" in uvm("stop").stderr
    assert "--all takes no names" in uvm("stop", "worker", "--all").stderr
    assert json.loads(uvm("stop", "--all", "--json").stdout) == []
    for name in ("one", "two"):
        store.add(name, uuid=name, config={})
    stopped = json.loads(uvm("stop", "--all", "--json").stdout)
    assert stopped == [{"name": "one", "stopped": True}, {"name": "two", "stopped": True}]
    assert uvm("ps").stdout == ""


def test_a_table_on_a_terminal_has_aligned_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.print_table(("NAME", "N"), [("long name", 1), ("x", None)])
    heads, *rows = capsys.readouterr().out.splitlines()
    assert "NAME       N" in heads
    assert rows == ["long name  1", "x          -"]


def test_a_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("NAME",), [("a\x1b[2Jb\nc",)])
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172800, "2d"), (-5, "0s")]
)
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    assert output.age(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(uvm: Uvm, name: str) -> None:
    text = uvm(name, "--help").output
    assert "Usage: " in text
    groups = {"image": ["build", "ls"], "template": ["save", "ls", "show", "verify", "rm"]}
    inner = [f"{name} {word}" for word in groups[name]] if name in groups else [name]
    for words in inner:
        assert ("--json" in uvm(*words.split(), "--help").output) is (name not in ("completion", "shell"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(uvm: Uvm, shell: str) -> None:
    assert "_UVM_COMPLETE" in uvm("completion", shell).stdout


def test_vms_and_their_disks_are_completed(vm: Path) -> None:
    from click.shell_completion import ShellComplete

    complete = ShellComplete(command, {}, "uvm", "_UVM_COMPLETE")
    assert [item.value for item in complete.get_completions(["ls"], "wor")] == ["worker"]
    assert [item.value for item in complete.get_completions(["path", "worker"], "")] == [str(vm), "/data"]
    assert complete.get_completions(["path", "nobody"], "") == []


@pytest.mark.parametrize("words", [["ls", "worker"], ["ps"], ["path", "worker", "disk.qcow2"]], ids=" ".join)
def test_looking_at_the_store_loads_nothing_slow(vm: Path, words: list[str]) -> None:
    script = (
        "import sys\nfrom utilityvm.cli.commands import uvm\n"
        f"try:\n    uvm.main({words!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "slow = {'asyncio', 'rich', 'qemu', 'subprocess', 'utilityvm.vm.utility_vm'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NAMES = [
    "a b.raw",
    "it's.raw",
    'say "x".raw',
    "$HOME.raw",
    "back\\slash.raw",
    "a;b&c.raw",
    "ünï.raw",
    "*.raw",
    "(x)#!~.raw",
]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", ["", "'", '"'])
def test_bash_reads_what_was_completed_as_the_one_word_that_it_is(name: str, begun: str) -> None:
    word = begun + completion.quoted(name, opened_by=begun) + begun
    done = subprocess.run(["bash", "-c", f"set +H; printf %s {word}"], capture_output=True, text=True, check=True)
    assert done.stdout == name


def program(folders: Path, *, disk: str | None = None) -> Path:
    """`uvm`, as the shell finds it; `disk` is what is attached to every VM, in place of what is."""
    fake, told = folders / "uvm", ""
    if disk:
        row = {"host_path": disk, "slot": 1, "guest_paths": ("/in",)}
        told = f"import utilityvm\nutilityvm.list_disks = lambda _: [type('Row', (), {row})]\n"
    fake.write_text(f"#!{sys.executable}\n{told}from utilityvm.cli import main\nmain()\n")
    fake.chmod(0o755)
    return fake


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes_vms_and_disks_also_with_commas_in_their_names(
    uvm: Uvm, vm: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = folders / "script"
    script.write_text(uvm("completion", "fish").stdout)
    monkeypatch.setenv("PATH", str(program(folders, disk="/srv/a,b c:d.raw").parent), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(folders))

    def completed(line: str) -> list[str]:
        call = ["fish", "--no-config", "-c", f"source {script}; complete -C {shlex.quote(line)}"]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        return [one.partition("\t")[0] for one in said.splitlines()]

    assert completed("uvm sto") == ["stop"]
    assert completed("uvm stop w") == ["worker"]
    assert completed("uvm path worker ") == ["/in", "/srv/a,b c:d.raw"]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_vms_and_disks(uvm: Uvm, vm: Path, folders: Path) -> None:
    """The script itself, in a real bash, as readline would call it."""
    script = folders / "script"
    script.write_text(uvm("completion", "bash").stdout)
    fake = program(folders)

    def completed(*line: str) -> list[str]:
        words = " ".join(map(shlex.quote, line))
        call = (
            f"complete() {{ :; }}; compopt() {{ echo option $2; }}; . {script}; COMP_WORDS=({words}); "
            f"COMP_CWORD={len(line) - 1}; _uvm_completion {fake}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        return subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]

    assert completed("uvm", "sto") == ["stop"]
    assert completed("uvm", "stop", "w") == ["worker"]
    assert completed("uvm", "stop", "other", "w") == ["worker"]
    for command_name in ("detach", "path", "resize"):
        assert completed("uvm", command_name, "worker", "") == [str(vm), "/data"]
        assert completed("uvm", command_name, "worker", "dis") == [vm.name]
    assert completed("uvm", "attach", "worker", "")[0] == "option default"


def test_what_a_guest_wrote_to_its_console_steers_no_terminal(uvm: Uvm, monkeypatch: pytest.MonkeyPatch) -> None:
    console = "\x1b]0;owned\x07\x1b[2Jboot\r\n\x9b31m\x08\x7fdone\n"
    monkeypatch.setattr("utilityvm.read_console", lambda name: console)
    for words in ([], ["-n", "2"], ["--json"]):
        printed = uvm("log", "v", *words).stdout
        assert "boot" in printed
        assert "done" in printed
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)


def test_what_is_logged_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.log_to_stderr(debug=True)
    logging.getLogger("utilityvm.x").debug("<-- %s", "\x1b[2Jhello\x9b1m\x7f")
    said = capsys.readouterr().err
    assert "hello" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
