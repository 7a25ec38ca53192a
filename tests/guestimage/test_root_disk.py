from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from utilityvm.guestimage import recipe, root_disk
from utilityvm.machine.programs import find_program, run

ANOTHER_USER = 65534
SOURCE = Path(__file__).parent.parent.parent / "src"


def tree(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc/shadow").write_text("secret\n")
    (root / "etc/shadow").chmod(0o600)
    (root / "with space").mkdir(mode=0o700)
    (root / "with space/file").write_text("x" * 5000)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "link").symlink_to("etc/shadow")
    for number in range(300):
        (root / f"etc/{number}").write_text("")
    return root


def debugfs(disk: Path, command: str) -> str:
    return run([find_program("debugfs", package="e2fsprogs"), "-R", command, disk]).decode()


def check(disk: Path) -> None:
    run([find_program("e2fsck", package="e2fsprogs"), "-fn", disk])
    for name in ("/", "/etc", "/etc/shadow", "/etc/299", '"/with space/file"', "/link"):
        said = debugfs(disk, f"stat {name}")
        assert re.search(r"User: +0 +Group: +0 ", said), said
        assert all(f"{recipe.TIME:#x}" in line for line in said.splitlines() if "mtime:" in line or "ctime:" in line)
    assert "Mode:  0600" in debugfs(disk, "stat /etc/shadow")
    assert "Mode:  01777" in debugfs(disk, "stat /tmp")
    assert debugfs(disk, "cat /etc/shadow") == "secret\n"


def test_everything_is_roots_and_as_it_was(tmp_path: Path) -> None:
    root_disk.write(tree(tmp_path / "root"), tmp_path / "disk", key="k")
    check(tmp_path / "disk")


def test_the_same_tree_makes_the_same_disk(tmp_path: Path) -> None:
    for name in ("a", "b"):
        root_disk.write(tree(tmp_path / f"root-{name}"), tmp_path / name, key="k")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_tree_makes_a_disk(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    root_disk.write(tmp_path / "root", tmp_path / "disk", key="k")
    run([find_program("e2fsck", package="e2fsprogs"), "-fn", tmp_path / "disk"])


@pytest.mark.skipif(os.geteuid() != 0, reason="a plain user already: the other tests are this one")
def test_a_plain_user_makes_the_same_disk() -> None:
    python = "/usr/bin/python3"  # ours may be in a home that others cannot enter; so may the sources
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["cp", "-r", SOURCE, folder / "src"], check=True)
        tree(folder / "root")
        subprocess.run(["chown", "-hR", f"{ANOTHER_USER}:{ANOTHER_USER}", folder], check=True)
        script = "import sys; from pathlib import Path; from utilityvm.guestimage import root_disk\n"
        script += "root_disk.write(Path(sys.argv[1]), Path(sys.argv[2]), key='k')"
        drop = ["setpriv", f"--reuid={ANOTHER_USER}", f"--regid={ANOTHER_USER}", "--clear-groups", "--no-new-privs"]
        env = {"PYTHONPATH": str(folder / "src"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        run([*drop, python, "-c", script, folder / "root", folder / "disk"], env=env)
        assert (folder / "disk").stat().st_uid == ANOTHER_USER
        check(folder / "disk")
