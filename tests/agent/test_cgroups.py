"""Programs in cgroups of their own: on this machine's cgroup v2, or, where it has none, in their sessions."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from utilityvm.agent import cgroups
from utilityvm.agent.cgroups import Cgroups, Family
from utilityvm.agent.processes import is_readable

FORKING = "setsid sh -c 'echo $$ > pid; exec sleep 1000' < /dev/null > /dev/null 2>&1 & until [ -s pid ]; do :; done; "


@pytest.fixture
def parent() -> Generator[Path]:
    """A cgroup in which the tests may do as they like."""
    own = cgroups._own()
    if own is None:
        pytest.skip("no cgroup v2")
    path = Path(own, f"uvm-test-{os.getpid()}-cgroups")
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no right to make cgroups: {error.strerror}")
    yield path
    for inner in [*cgroups._below(str(path)), str(path)]:
        cgroups._kill(inner)
        cgroups._wait_until_empty(inner, 20)
        Path(inner).rmdir()


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[[Family, str], subprocess.Popen[bytes]]]:
    """Start a script as the first of a family; `pid` in its folder is where it writes the number of another."""
    started = []

    def start(family: Family, script: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, preexec_fn=family.enter, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def pid_in(folder: Path) -> int:
    return int((folder / "pid").read_text())


def ends(pid: int) -> bool:
    """Wait for the end of a process, whoever its parent is. False: it goes on."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(fd):
        return is_readable(fd, 20)


def runs(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return state not in "ZX"


def test_what_left_its_session_and_its_parent_is_killed(
    parent: Path, start: Callable[[Family, str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    family = Cgroups(str(parent)).make()
    process = start(family, f"{FORKING} (sleep 1000 &) ; wait")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        pass
    family.kill(process.pid)
    assert process.wait(20) == -signal.SIGKILL
    assert ends(pid_in(tmp_path))
    family.wait_until_empty(20)
    family.leave()
    assert [*(parent / "utilityvm").glob("*/")] == []


def test_a_kernel_without_cgroup_kill_kills_one_by_one(
    parent: Path,
    start: Callable[[Family, str], subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cgroups, "_KILL", "cgroup.of-a-later-kernel")
    family = Cgroups(str(parent)).make()
    inner = parent / "utilityvm/1/inner"
    inner.mkdir()
    process = start(family, f"{FORKING} echo $$ > {inner}/cgroup.procs; while :; do (:); done")
    while str(process.pid) not in (inner / "cgroup.procs").read_text():
        pass
    family.kill(process.pid)
    assert process.wait(20) == -signal.SIGKILL
    assert ends(pid_in(tmp_path))
    family.wait_until_empty(20)
    family.leave()
    assert [*(parent / "utilityvm").glob("*/")] == []


def test_what_a_program_left_behind_goes_on_and_its_cgroup_goes_after_it(
    parent: Path, start: Callable[[Family, str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    ours = Cgroups(str(parent))
    family = ours.make()
    assert start(family, f"{FORKING} exit 0").wait(20) == 0
    family.leave()
    assert runs(pid_in(tmp_path))
    left = parent / "utilityvm/1"
    assert left.is_dir()
    os.kill(pid_in(tmp_path), signal.SIGKILL)
    cgroups._wait_until_empty(str(left), 20)
    ours.make().leave()
    assert not left.exists()


def test_an_agent_that_was_started_again_kills_what_ran_and_keeps_what_was_left(
    parent: Path, start: Callable[[Family, str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    before = Cgroups(str(parent))
    left, running = before.make(), before.make()
    assert start(left, f"{FORKING} exit 0").wait(20) == 0
    left.leave()
    process = start(running, "sleep 1000")
    after = Cgroups(str(parent))
    after.end_strays()
    assert process.wait(20) == -signal.SIGKILL
    assert runs(pid_in(tmp_path))
    family = after.make()  # takes no name that is taken
    assert start(family, "exit 3").wait(20) == 3
    give_up = time.monotonic() + 20
    while len([*(parent / "utilityvm").glob("*/")]) > 2:  # the kernel takes a moment to let go of what was killed
        assert time.monotonic() < give_up, "the cgroup of what was killed stays"
        after.make().leave()
    assert len([*(parent / "utilityvm").glob("*/")]) == 2, "what was left on purpose, and the last one"
    assert runs(pid_in(tmp_path))


def test_waiting_for_the_end_has_an_end(parent: Path, start: Callable[[Family, str], subprocess.Popen[bytes]]) -> None:
    family = Cgroups(str(parent)).make()
    process = start(family, "sleep 1000")
    family.wait_until_empty(0.01)
    assert process.poll() is None


@pytest.mark.parametrize("folder", [None, "empty", "missing/missing"])
def test_without_cgroups_the_session_is_killed(
    folder: str | None, start: Callable[[Family, str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    ours = Cgroups(None if folder is None else str(tmp_path / folder))
    ours.end_strays()
    family = ours.make()
    process = start(family, "sleep 1000 & echo $! > pid; wait")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        pass
    family.kill(process.pid)
    assert process.wait(20) == -signal.SIGKILL
    assert ends(pid_in(tmp_path))
    family.wait_until_empty(20)
    family.leave()
    assert [*tmp_path.glob("empty/utilityvm/*")] == []


def test_a_kernel_that_gives_no_more_cgroups_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Cgroups(str(tmp_path)).make()


def test_our_own_cgroup_is_found() -> None:
    own = cgroups._own()
    if own is None:
        pytest.skip("no cgroup v2")
    assert str(os.getpid()) in Path(own, "cgroup.procs").read_text().split()
