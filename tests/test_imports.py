"""The house's arrows go one way: a room imports only the rooms below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import utilityvm

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/utilityvm"

# What each room may import of the others. Loose modules are rooms of their own; those of EVERYBODY are everybody's.
EVERYBODY = {"errors", "log", "tasks", "text"}
MAY: dict[str, set[str]] = {
    "errors": {"scsi.slot"},  # for a type in a signature
    "log": set(),
    "text": set(),
    "tasks": set(),
    "machine": set(),
    "scsi": {"bridge"},  # the one rule of guest paths, which the agent has as well
    "bridge": set(),
    "files": set(),
    "agent": {"bridge", "files"},
    "diskimage": {"scsi"},
    "guestimage": {"machine"},
    "guests": {"bridge", "files", "scsi", "machine"},
    "hcs": {"hosts"},  # deprecated, gone in 0.2: the old name of hosts/hcs
    "hosts": {"scsi", "diskimage", "machine", "bridge"},
    "store": {"scsi", "machine"},
    "templates": {"scsi", "diskimage", "hosts", "store", "machine"},
    "vm": {"templates", "machine", "scsi", "hosts", "guests", "guestimage", "store", "diskimage"},
    "upkeep": {"vm", "templates", "scsi", "hosts", "guests", "guestimage", "store", "machine"},
    "server": {"vm", "store", "scsi", "machine", "guests"},
    "client": {"server", "vm", "store", "guests", "scsi", "machine"},  # of `server` what goes over the wire
    "cli": {"client", "machine", ""},
    "sync": {""},  # the public names, without `async`
    "testing": {"scsi", "machine", "hosts", "bridge", "agent", "guests"},
    "": {
        "templates",
        "vm",
        "scsi",
        "guests",
        "guestimage",
        "hosts",
        "store",
        "machine",
        "upkeep",
        "client",
        "server",
    },  # the public names
}
STANDARD_LIBRARY_ONLY = {"agent", "bridge", "files"}  # they run in the guest, which has nothing else


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            if node.module == "utilityvm":
                found |= {f"utilityvm.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    room = "" if parts == ("__init__",) else parts[0]
    for module in imports(path):
        top, _, inner = module.partition(".")
        if top != "utilityvm":
            assert room not in STANDARD_LIBRARY_ONLY or top in sys.stdlib_module_names, f"{path} imports {module}"
            continue
        target = room_of(inner)
        allowed = {room_of(one) for one in MAY[room]} | (set() if room in STANDARD_LIBRARY_ONLY else EVERYBODY) | {room}
        # The package itself gives its public names to those above it.
        known = {entry.stem for entry in SOURCE.iterdir()}
        assert (target if target in known else "") in allowed, f"{path} imports {module}"


PUBLIC = {"utilityvm", "utilityvm.errors"}
# What the command line has of the library besides its public names, each with the reason. It stays short.
NOT_PUBLIC = {
    "utilityvm.text",  # how foreign words, sizes and counts are written, in messages as in tables
    "utilityvm.client.command",  # how a command uses the server: with calls that block
    "utilityvm.machine.hostpath",  # what a path of this host leads to
}


@pytest.mark.parametrize("folder", ["src/utilityvm/cli", "examples"])
def test_the_command_line_and_the_examples_use_public_names_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for module in imports(path):
            if not module.startswith("utilityvm") or module.startswith("utilityvm.cli"):
                continue
            is_public = module in PUBLIC or module.removeprefix("utilityvm.") in utilityvm.__all__
            assert is_public or (module in NOT_PUBLIC and folder != "examples"), f"{path} imports {module}"


ON_THE_WIRE = {"utilityvm.server.types", "utilityvm.server.problems"}


def test_a_client_needs_of_the_server_only_what_goes_over_the_wire() -> None:
    of_the_server = {module for path in (SOURCE / "client").rglob("*.py") for module in imports(path)}
    of_the_server = {module for module in of_the_server if module.startswith("utilityvm.server")}
    assert of_the_server <= {*ON_THE_WIRE, "utilityvm.server"}


def test_the_library_alone_loads_no_server_and_no_client() -> None:
    code = (
        "import sys, utilityvm.vm.utility_vm, utilityvm.vm.pool, utilityvm.cli.commands\n"
        "ours = ('utilityvm.server', 'utilityvm.client', 'uvicorn', 'h11')\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_room_has_its_rules() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms <= set(MAY), "a new room: say in MAY what it may import"
