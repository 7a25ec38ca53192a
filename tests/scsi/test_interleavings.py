"""Every order of the steps of up to three callers, two disks and two mounts; answered, refused, lost, or cancelled."""

from __future__ import annotations

import pytest

from points import Tell
from scsi_callers import use
from scsi_orders import Scenario, try_orders

SCENARIOS: dict[str, Scenario] = {
    "one caller": Scenario([use("a", "/1")], faults=6, cancels=1),
    "one mount shared by two": Scenario([use("a", "/1"), use("a", "/1")], faults=4, cancels=2),
    "two mounts of one disk": Scenario([use("a", "/1"), use("a", "/2")], faults=3, cancels=2),
    "attached only beside mounted": Scenario([use("a", None), use("a", "/1")], faults=4, cancels=2),
    "two disks": Scenario([use("a", "/1"), use("b", "/2")], faults=1, cancels=2),
    "two disks, faults alone": Scenario([use("a", "/1"), use("b", "/2")], faults=3),
    "two disks for one path": Scenario([use("a", "/1"), use("b", "/1")], faults=3, cancels=2),
    "three share one mount": Scenario([use("a", "/1")] * 3, faults=2, cancels=3),
    "two share, one has another path": Scenario([use("a", "/1"), use("a", "/1"), use("a", "/2")], faults=1, cancels=2),
    "two share, one has another disk": Scenario([use("a", "/1"), use("a", "/1"), use("b", "/2")], faults=1, cancels=1),
}
covered: dict[str, int] = {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_promises_hold_in_every_order(name: str, tell: Tell) -> None:
    covered[name] = try_orders(name, SCENARIOS[name], tell)


def test_enough_orders_were_tried(tell: Tell) -> None:
    if len(covered) == len(SCENARIOS):
        tell(f"{sum(covered.values())} orders in all")
        assert sum(covered.values()) >= 40_000
