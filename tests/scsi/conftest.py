from __future__ import annotations

import os
from typing import Any

import pytest

from scsi_bench import Bench
from utilityvm.scsi import transitions


@pytest.fixture
def bench() -> Bench:
    return Bench()


def pytest_configure(config: pytest.Config) -> None:
    """With UTILITYVM_WITHOUT_ROW, as `test_mutation` sets it, the state tables lack that row."""
    if row := os.environ.get("UTILITYVM_WITHOUT_ROW"):
        name, _, key = row.partition(" ")
        state, event = key.split("/")
        table: Any = {"disk": transitions.DISK_TABLE, "mount": transitions.MOUNT_TABLE}[name]
        del table[state, event]
