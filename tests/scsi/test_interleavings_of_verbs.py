"""Every order of each verb beside the others: force, removals, resizes, stillness, exports, batches, deaths."""

from __future__ import annotations

import pytest

from points import Tell
from scsi_callers import (
    batch,
    busy,
    dead_storage,
    die,
    holder,
    kept_by_the_guest,
    listen,
    make,
    move,
    remove,
    resize,
    still,
    use,
)
from scsi_orders import Scenario, try_orders

SCENARIOS: dict[str, Scenario] = {
    "in use": Scenario([use("a", "/1"), busy("/1")], faults=3, cancels=2),
    "in use beside another mount": Scenario([use("a", "/1"), use("a", "/2"), busy("/1")], faults=3, cancels=2),
    "by force beside one without": Scenario([use("a", "/1", force=True), use("a", "/1")], faults=3, cancels=2),
    "by force beside another mount": Scenario([use("a", "/1", force=True), use("a", "/2")], faults=3, cancels=2),
    "by force beside attached only": Scenario([use("a", "/1", force=True), use("a", None)], faults=3, cancels=2),
    "by force beside one without, in use": Scenario(
        [use("a", "/1", force=True), use("a", "/1"), busy("/1")], faults=3, cancels=2
    ),
    "two by force": Scenario([use("a", "/1", force=True), use("a", "/1", force=True), busy("/1")], faults=3, cancels=2),
    "dead storage": Scenario([dead_storage("a", "/1")], faults=3, cancels=2),
    "kept by the guest": Scenario([kept_by_the_guest("a", "/1")], faults=3, cancels=2),
    "kept by the guest beside the same mount": Scenario(
        [kept_by_the_guest("a", "/1"), use("a", "/1")], faults=2, cancels=1
    ),
    "kept by the guest beside another mount": Scenario(
        [kept_by_the_guest("a", "/1"), use("a", "/2")], faults=2, cancels=1, orders=2_000
    ),
    "made anew beside one that looks": Scenario([make("a", "/1", anew=True), make("a", "/1")], faults=3, cancels=2),
    "made anew beside another mount": Scenario([make("a", "/1", anew=True), make("a", "/2")], faults=3, cancels=2),
    "two removals": Scenario(
        [remove("a"), remove("a")], faults=3, cancels=2, before=[holder("a", "/1"), holder("a", "/2")]
    ),
    "two removals of one mount, in use": Scenario(
        [remove("a"), remove("a", force=True), busy("/1")],
        faults=1,
        cancels=1,
        before=[holder("a", "/1", force=True), holder("a", "/1", force=True)],
    ),
    "a removal beside an add": Scenario([remove("a"), use("a", "/1")], faults=3, cancels=2, before=[holder("a", "/1")]),
    "two resizes, the larger first": Scenario(
        [resize("a", 8), resize("a", 4)], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "two resizes, the smaller first": Scenario(
        [resize("a", 4), resize("a", 8)], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "a resize beside a removal": Scenario(
        [resize("a", 4), remove("a")], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "a resize beside an add": Scenario(
        [resize("a", 4), use("a", "/2")], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "held still beside an add": Scenario([still(), use("a", "/1")], faults=3, cancels=2),
    "held still beside a resize and a removal": Scenario(
        [resize("a", 4), remove("a"), still()], faults=3, cancels=2, before=[holder("a", "/1"), holder("a", "/2")]
    ),
    "exported beside an add": Scenario([move(), use("a", "/1")], faults=3, cancels=2, before=[holder("b", "/2")]),
    "exported beside a resize": Scenario([resize("a", 4), move()], faults=3, cancels=2, before=[holder("a", "/1")]),
    "a batch": Scenario([batch("a", "b")], faults=3, cancels=2),
    "a batch of which one is there": Scenario([batch("a", "b")], faults=3, cancels=2, before=[holder("a", None)]),
    "a batch beside one of its disks": Scenario([batch("a", "b"), use("a", None)], faults=2, cancels=2),
    "a journal that fails": Scenario([use("a", "/1")], faults=3, cancels=2, journal=True),
    "a journal that fails under two": Scenario([use("a", "/1"), use("a", "/1")], faults=3, cancels=2, journal=True),
    "the VM dies": Scenario([die(), use("a", "/1"), use("a", "/2")], faults=3, cancels=2),
    "the VM dies in a resize": Scenario([resize("a", 4), remove("a"), die()], faults=3, before=[holder("a", "/1")]),
    "events until the VM dies": Scenario([listen(), use("a", "/1"), use("b", None), die()], faults=3),
}
covered: dict[str, int] = {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_promises_hold_in_every_order(name: str, tell: Tell) -> None:
    covered[name] = try_orders(name, SCENARIOS[name], tell)


def test_enough_orders_were_tried(tell: Tell) -> None:
    if len(covered) == len(SCENARIOS):
        tell(f"{sum(covered.values())} orders in all")
        assert sum(covered.values()) >= 90_000
