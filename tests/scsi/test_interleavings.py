"""Orders of the steps of up to three callers; answered, refused, lost, cancelled. `./dev explore` tries more."""

from __future__ import annotations

import pytest

from points import Tell
from scsi_orders import try_orders
from scsi_scenarios import SCENARIOS, SHARE

covered: dict[str, int] = {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_promises_hold_in_every_order(name: str) -> None:
    covered[name] = try_orders(name, SCENARIOS[name], SHARE).orders


def test_enough_orders_were_tried(tell: Tell) -> None:
    if len(covered) == len(SCENARIOS):
        tell(f"{sum(covered.values())} orders in all")
        assert sum(covered.values()) >= len(SCENARIOS) * SHARE * 0.9
