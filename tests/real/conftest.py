from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_folders(own_folders: Path) -> Path:
    """Whatever VM a test here starts, by whatever means, is in folders of the session's own."""
    return own_folders
