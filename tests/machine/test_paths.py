"""Where things are, and which variable says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm.machine import paths

FOLDERS: list[tuple[Callable[[], Path], str, str, str]] = [
    (paths.cache_dir, "UTILITYVM_CACHE_DIR", "XDG_CACHE_HOME", "/home/me/.cache/utilityvm"),
    (paths.state_dir, "UTILITYVM_STATE_DIR", "XDG_STATE_HOME", "/home/me/.local/state/utilityvm"),
    (paths.runtime_dir, "UTILITYVM_RUNTIME_DIR", "XDG_RUNTIME_DIR", "/home/me/.local/state/utilityvm/run"),
]


@pytest.fixture(autouse=True)
def plain_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for _, own, xdg, _ in FOLDERS:
        monkeypatch.delenv(own, raising=False)
        monkeypatch.delenv(xdg, raising=False)


@pytest.mark.parametrize(("folder", "own", "xdg", "fallback"), FOLDERS)
def test_the_own_variable_comes_first_then_xdg_then_the_home(
    folder: Callable[[], Path], own: str, xdg: str, fallback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder() == Path(fallback)
    monkeypatch.setenv(xdg, "/xdg")
    assert folder() == Path("/xdg/utilityvm")
    monkeypatch.setenv(own, "/own")
    assert folder() == Path("/own")


def test_a_relative_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert paths.state_dir() == Path("/home/me/.local/state/utilityvm")


def test_root_s_sockets_are_in_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    assert paths.vm_dir("one") == Path("/run/utilityvm/vms/one")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_folder_that_is_made_is_writable_to_nobody_else(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        paths.make_folder(tmp_path / "run/vms/one")
        paths.make_folder(tmp_path / "run/vms/one")
    finally:
        os.umask(before)
    made = [tmp_path / "run", tmp_path / "run/vms", tmp_path / "run/vms/one"]
    assert [path.stat().st_mode & 0o022 for path in made] == [0, 0, 0]
    assert made[-1].stat().st_mode & 0o777 == 0o700
