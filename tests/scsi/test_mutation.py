"""Every row of the state tables is needed: without it a test of the manager fails, the tables' own left aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utilityvm.scsi.transitions import DISK_TABLE, MOUNT_TABLE

HERE = Path(__file__).parent
ROWS = [
    f"{table} {state}/{event}"
    for table, rows in (("disk", DISK_TABLE), ("mount", MOUNT_TABLE))
    for state, event in rows
]


@pytest.mark.skipif("UTILITYVM_WITHOUT_ROW" in os.environ, reason="this is the run without a row")
@pytest.mark.parametrize("row", ROWS)
def test_without_the_row_the_manager_fails_a_test(row: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", HERE / "test_behaviours.py"],
        env={**os.environ, "UTILITYVM_WITHOUT_ROW": row},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1, f"no test of the manager needs the row {row}\n{done.stdout[-2000:]}"
