from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from utilityvm.hosts.qemu import privileges
from utilityvm.hosts.qemu.privileges import Identity
from utilityvm.machine.programs import find_program

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
SETPRIV = find_program("setpriv", package="util-linux")
US = Identity(os.geteuid(), drops=False)


def output(who: Identity, *command: str, dies_with_us: bool = False) -> str:
    words = [*privileges.launcher(SETPRIV, who, dies_with_us=dies_with_us), *command]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout


def status_of(who: Identity, *, dies_with_us: bool = False) -> dict[str, str]:
    text = output(who, "cat", "/proc/self/status", dies_with_us=dies_with_us)
    return {key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("dies_with_us", [True, False])
def test_no_right_can_be_gained(dies_with_us: bool) -> None:
    status = status_of(US, dies_with_us=dies_with_us)
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapInh"], 16) == 0


def test_no_core_file_is_written() -> None:
    assert "0 0 bytes" in " ".join(output(US, "grep", "core", "/proc/self/limits").split())


@as_root
@pytest.mark.parametrize("groups", [(), (12345,)])
def test_another_user_has_its_own_group_and_no_capability(groups: tuple[int, ...]) -> None:
    status = status_of(Identity(70123, groups), dies_with_us=True)
    assert status["Uid"] == status["Gid"] == "70123 70123 70123 70123"
    assert status["Groups"] == " ".join(map(str, groups))
    assert all(int(status[name], 16) == 0 for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"))


def test_an_orphan_does_not_start(tmp_path: Path) -> None:
    """The owner's pid is another one than the parent's, as if the owner had died before the signal was set."""
    words = privileges.launcher(SETPRIV, US, dies_with_us=True)
    words[-1] = "1"
    done = subprocess.run([*words, "touch", tmp_path / "started"], check=False, timeout=10)
    assert done.returncode == 1
    assert not (tmp_path / "started").exists()
