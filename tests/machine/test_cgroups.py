"""Where a VM gets a cgroup, on a tree of plain files; tests/real/test_cgroup.py has the kernel's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utilityvm.machine import cgroups

ENDED = 1 << 22  # no process has it: it is beyond the largest number


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with this process in `/ours.scope/leaf`, and nothing delegated."""
    monkeypatch.delenv(cgroups.VARIABLE, raising=False)
    monkeypatch.setattr(cgroups, "_mounted", lambda: tmp_path)
    monkeypatch.setattr(cgroups, "_own", lambda: "/ours.scope/leaf")
    for folder in (tmp_path, tmp_path / "ours.scope", tmp_path / "ours.scope/leaf", tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("memory pids\n")
    return tmp_path


def delegate(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(cgroups, "_is_delegated", lambda folder: folder in folders)


def test_where_nothing_is_delegated_nothing_is_made(tree: Path) -> None:
    with pytest.raises(cgroups.Unavailable, match="no cgroup is delegated to this process; name one with UTILITYVM_"):
        cgroups.put(os.getpid(), memory_bytes=1, threads=1)
    assert sorted(path.name for path in tree.iterdir()) == ["cgroup.subtree_control", "other", "ours.scope"]


def test_the_parent_of_ours_comes_first_for_no_process_is_in_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delegate(monkeypatch, tree / "ours.scope", tree / "ours.scope/leaf")
    assert cgroups.place() == tree / "ours.scope"
    delegate(monkeypatch, tree / "ours.scope/leaf")
    assert cgroups.place() == tree / "ours.scope/leaf"


@pytest.mark.parametrize("named", ["/other", "other", "{tree}/other"])
def test_one_that_is_named_is_taken(tree: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv(cgroups.VARIABLE, named.replace("{tree}", str(tree)))
    assert cgroups.place() == tree / "other"


def test_one_that_is_not_there_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cgroups.VARIABLE, "nowhere")
    with pytest.raises(cgroups.Unavailable, match="nowhere: No such file"):
        cgroups.place()


def test_controllers_that_are_missing_are_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "other/cgroup.subtree_control").write_text("cpu pids\n")
    monkeypatch.setenv(cgroups.VARIABLE, "other")
    assert cgroups.place() == tree / "other"
    assert (tree / "other/cgroup.subtree_control").read_text() == "+memory"


def test_what_is_put_has_its_bounds(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delegate(monkeypatch, tree / "ours.scope")
    folder = cgroups.put(4711, memory_bytes=1 << 30, threads=99)
    assert folder == tree / "ours.scope/utilityvm-4711"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "memory.max": str(1 << 30), "pids.max": "99", "cgroup.procs": "4711",
    }  # fmt: skip


def test_those_of_processes_that_ended_are_removed_by_the_next(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delegate(monkeypatch, tree / "ours.scope")
    left, running, others = (
        tree / "ours.scope" / name for name in (f"utilityvm-{ENDED}", f"utilityvm-{os.getpid()}", f"others-{ENDED}")
    )
    for folder in (left, running, others):
        folder.mkdir()
    cgroups.put(4711, memory_bytes=1, threads=1)
    assert (left.exists(), running.exists(), others.exists()) == (False, True, True)


def test_nothing_is_removed_that_we_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    cgroups.remove(tmp_path / "others")
    assert (tmp_path / "others").is_dir()
    cgroups.remove(tmp_path / "utilityvm-1")
