"""What cannot be is told in one clear line with a documented code, and changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import Result

from utilityvm import errors
from utilityvm.cli import exitcodes
from utilityvm.machine.processes import own_start
from utilityvm.store import Store, VMState

from .conftest import Uvm

WRONG = [
    # what was typed, its code, what the error says, what the hint says
    ("ls nobody", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("path nobody disk.raw", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("log nobody", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("stop nobody", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("detach nobody disk.raw", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("attach nobody disk.raw", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("exec nobody -- true", 125, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("ls dead", 7, "VM dead is dead", "uvm log dead"),
    ("path dead disk.raw", 7, "VM dead is dead", "uvm log dead"),
    ("attach dead disk.raw", 7, "VM dead is dead", "uvm log dead"),
    ("attach dead disk.raw:/data", 7, "VM dead is dead", "uvm log dead"),
    ("detach dead disk.raw", 7, "VM dead is dead", "uvm log dead"),
    ("exec dead -- true", 125, "VM dead is dead", "uvm log dead"),
    ("path alive disk.raw", 3, "disk.raw is not attached", "uvm ls alive"),
    ("attach alive disk.raw:data", 2, "guest path 'data' is not absolute", "/mnt/data"),
    ("attach alive disk.raw:/a/../b", 2, "'/a/../b' has ..", "/mnt/data"),
    ("attach alive disk.raw:/", 2, "belongs to the guest's system", "/mnt/data"),
    ("attach alive disk.raw:/proc/x", 2, "belongs to the guest's system", "/mnt/data"),
    ("attach alive disk.raw:/sys", 2, "belongs to the guest's system", "/mnt/data"),
    ("attach alive disk.raw:/dev/shm", 2, "belongs to the guest's system", "/mnt/data"),
    ("attach alive disk.raw:/x --format floppy", 2, "'floppy'", "qcow2"),
    ("attach alive disk.raw:/x --access everybody", 2, "'everybody'", "--help"),
    ("attach alive disk.raw --partition 1", 2, "--partition 1 has no effect without a guest path", "give a guest path"),
    ("attach alive disk.raw:/x --partition -1", 2, "'-1' is not a whole number", "--help"),
    ("attach alive disk.raw:/x --reformat", 2, "--reformat without --ensure-filesystem", "leave one"),
    ("attach alive disk.raw:/x --read-only --ensure-filesystem", 2, "read-only", "leave one"),
    ("attach alive disk.raw:/x --mount", 2, "one is given", "--help"),
    ("attach alive", 2, "missing argument", "--help"),
    ("attach alive disk.raw:/x --key-file nowhere", 2, "'nowhere'", "--help"),
    ("attach alive disk.raw:/x --key-file disk.raw --encrypt-scratch", 2, "--key-file gives one", "--help"),
    ("attach alive disk.raw:/x --verity 00", 2, "--verity-offset", "--help"),
    ("attach alive disk.raw:/x --verity xyz --verity-offset 0", 2, "xyz", "--help"),
    ("resize alive disk.raw large", 2, "'large' is not a size", "--help"),
    ("resize alive disk.raw -1", 2, "-1", "--help"),
    ("resize nobody disk.raw 1G", 3, "there is no VM named 'nobody'", "the VMs: alive, dead"),
    ("attach alive disk.raw --timeout 0", 2, "--timeout", "--help"),
    ("exec alive -e novalue -- true", 2, "NAME=VALUE", "--help"),
    ("exec alive", 2, "missing argument", "--help"),
    ("attach alive disk.raw:", 2, "guest path '' is not absolute", "/mnt/data"),
    ("attach alive disk.raw:/x --guest-path /y", 2, "leave one of them out", "--help"),
    ("attach alive disk.raw:/x --read-only --partition x", 2, "'x' is not a whole number", "--help"),
    ("attach alive disk.raw:/x --key-file=", 2, "'' is not the path of a file", "--help"),
    ("attach alive disk.raw:/x --key-file long", 2, "more than 64 bytes", "--help"),
    ("attach alive disk.raw:/x --key-file disk.raw", 2, "it has 0 bytes", "--help"),
    ("exec alive --limit memory=1 true", 2, "--limit: the limit memory=1 is out of range", "--help"),
    ("exec alive --limit pids=5 --limit pids=6 true", 2, "pids is given twice", "--help"),
    ("start x --memory", 2, "option '--memory' requires an argument", "uvm start --help"),
    ("image build --kernel=", 2, "'' is not the name of a Debian package", "apt-cache search"),
    ("start ../x", 2, "'../x' cannot be a VM's name", "letters"),
    ("start x --memory 1", 2, "1 MiB of memory cannot boot", "96 MiB"),
    ("start x --memory 80M", 2, "80 MiB of memory cannot boot", "96 MiB"),
    ("start x --memory 2T", 2, "cannot have", "1 TiB"),
    ("start x --memory 64MB", 2, "'64MB' is not a size", "--help"),
    ("start x --cpus 0", 2, "write 1 to 255", "--help"),
    ("start x --controllers 5", 2, "write 1 to 4", "--help"),
    ("start x --controllers 0", 2, "write 1 to 4", "--help"),
    ("frobnicate", 2, "no such command", "--help"),
    ("image frobnicate", 2, "no such command", "--help"),
    ("completion tcsh", 2, "'tcsh'", "--help"),
]


@pytest.fixture
def vms(store: Store) -> Store:
    """One VM whose QEMU is gone, and one whose QEMU is this process."""
    gone = store.add("dead", uuid="u", config={})
    store.set_process(gone, {"pid": os.getpid(), "started": "1"})
    store.set_state(gone, VMState.RUNNING)
    alive = store.add("alive", uuid="u", config={})
    store.set_process(alive, {"pid": os.getpid(), "started": own_start()})
    store.set_state(alive, VMState.RUNNING)
    return store


def seen(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if not path.name.startswith("state.db")
    }


def error_lines(result: Result) -> list[str]:
    return result.stderr.splitlines()


@pytest.mark.parametrize(("typed", "code", "says", "hint"), WRONG, ids=[row[0] for row in WRONG])
def test_one_error_one_hint_and_nothing_changed(
    uvm: Uvm, vms: Store, folders: Path, typed: str, code: int, says: str, hint: str
) -> None:
    (folders / "disk.raw").touch()
    (folders / "long").write_bytes(bytes(65))
    before = seen(folders), [(vm.name, vm.process) for vm in vms.vms()]
    result = uvm(*typed.split())
    assert result.exit_code == code, result.output
    first, second = error_lines(result)
    assert first.startswith("error: ")
    assert says in first
    assert second.startswith("hint: ")
    assert hint in second
    assert result.stdout == ""
    assert (seen(folders), [(vm.name, vm.process) for vm in vms.vms()]) == before


def test_an_error_is_json_when_json_is_asked_for(uvm: Uvm) -> None:
    result = uvm("ls", "nobody", "--json")
    assert json.loads(result.stderr) == {
        "error": "VMNotFound",
        "message": "there is no VM named 'nobody'",
        "hint": "start one: uvm start NAME",
        "exit_code": 3,
    }


def test_the_program_s_own_json_option_is_not_ours(uvm: Uvm) -> None:
    assert uvm("exec", "nobody", "--", "prog", "--json").stderr.startswith("error: ")


def test_every_error_has_a_code_that_the_help_tells(uvm: Uvm) -> None:
    told = {int(line.split()[0]) for line in exitcodes.HELP.splitlines() if line.split() and line.split()[0].isdigit()}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {next(code for base, code in exitcodes.TABLE if issubclass(kind, base)) for kind in kinds}
    assert codes <= told
    assert "Exit codes:" in uvm("--help").output


def test_a_store_of_a_later_version_is_refused(uvm: Uvm, store: Store) -> None:
    store.db.execute("PRAGMA user_version = 99")
    store.close()
    result = uvm("ps")
    assert result.exit_code == 6
    assert "later utilityvm" in error_lines(result)[0]


def test_a_damaged_store_is_moved_aside_with_a_warning(uvm: Uvm, folders: Path) -> None:
    (folders / "state").mkdir()
    (folders / "state/state.db").write_bytes(b"not a database, and longer than a header " * 40)
    result = uvm("ps")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the store")
    assert len(list((folders / "state").glob("state.db.damaged-*"))) == 1


def test_debug_shows_what_is_sent(uvm: Uvm) -> None:
    assert uvm("--debug", "ps").exit_code == 0
