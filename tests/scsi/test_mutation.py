"""Every row of the state tables is needed: without it the explorer finds a promise broken."""

from __future__ import annotations

from typing import Any

import pytest

from scsi_orders import try_orders
from scsi_scenarios import SCENARIOS, SHARE
from utilityvm.errors import WrongState
from utilityvm.scsi.transitions import DISK_TABLE, MOUNT_TABLE

ROWS = [(name, *row) for name, table in (("disk", DISK_TABLE), ("mount", MOUNT_TABLE)) for row in table]


def try_some() -> None:
    for name in ("one caller", "two resizes, the smaller first", "one comes while one leaves"):
        try_orders(name, SCENARIOS[name], SHARE)


@pytest.mark.parametrize(("name", "state", "event"), ROWS)
def test_without_the_row_a_promise_is_broken(
    name: str, state: Any, event: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem({"disk": DISK_TABLE, "mount": MOUNT_TABLE}[name], (state, event))  # type: ignore[arg-type]
    with pytest.raises((AssertionError, WrongState)):
        try_some()
