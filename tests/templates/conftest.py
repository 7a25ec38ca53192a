"""Folders of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UTILITYVM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path
