"""Where things are, and which variable says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm import paths

FOLDERS: list[tuple[Callable[[], Path], str, str, str]] = [
    (paths.cache_dir, "UTILITYVM_CACHE_DIR", "XDG_CACHE_HOME", "/home/me/.cache/utilityvm"),
    (paths.state_dir, "UTILITYVM_STATE_DIR", "XDG_STATE_HOME", "/home/me/.local/state/utilityvm"),
    (paths.runtime_dir, "UTILITYVM_RUNTIME_DIR", "XDG_RUNTIME_DIR", "/tmp/utilityvm-1000"),
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
