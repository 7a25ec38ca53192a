"""The wall clock is for people. Deadlines, waiting and identity go by clocks that nobody sets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src/utilityvm"
WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "CLOCK_REALTIME"}

# Where the wall clock is read, and what for: always a time that is told, and never one that something is decided by.
MAY = {
    "agent/identity.py": "a clone's clock is set to the host's",
    "agent/kept.py": "when a program was started, and when it ended",
    "cli/disk.py": "how long ago, in a table",
    "cli/image.py": "how long ago, in a table",
    "cli/listing.py": "how long ago, in a table",
    "cli/program.py": "how long ago, in a table",
    "cli/template.py": "how long ago, in a table",
    "guests/bridge_guest.py": "a clone's clock is set to the host's",
    "hosts/hcs/savedstate.py": "since when a record says what it says",
    "hosts/qemu/userids.py": "how long ago an id was used, by its file: a clock that was set changes its rest alone",
    "scsi/manager.py": "since when a record says what it says",
    "store/catalog.py": "when a VM was made",
    "store/database.py": "in the name of a damaged store that is kept; a number makes it unique",
    "store/ownership.py": "since when somebody owns a VM",
    "store/formats.py": "when an image was seen last: the rows of those seen longest ago are forgotten first",
    "templates/clone.py": "since when a record says what it says",
    "templates/save.py": "when a template was made",
}


def reads(path: Path) -> list[int]:
    """The lines that read the wall clock, by whatever name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found.append(node.lineno)  # under another name it would not be seen
        elif isinstance(node, ast.Import) and any(one.name == "datetime" or one.asname for one in node.names):
            found += [node.lineno for one in node.names if one.name in ("time", "datetime")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            found += [node.lineno] if node.attr in WALL else []
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_wall_clock_is_read_only_where_a_time_is_told(path: Path) -> None:
    if str(path.relative_to(SOURCE)) not in MAY:
        assert reads(path) == [], "use time.monotonic, or the loop's clock; what is told to people goes into MAY"


def test_who_may_read_it_does() -> None:
    assert [name for name in MAY if not reads(SOURCE / name)] == [], "strike it out in MAY"
