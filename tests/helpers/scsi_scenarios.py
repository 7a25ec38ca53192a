"""What the explorer tries: callers at the same time, each verb beside the others, and how much may go wrong."""

from __future__ import annotations

from typing import Final

from scsi_callers import (
    batch,
    busy,
    dead_storage,
    die,
    force_in_vain,
    holder,
    kept_by_the_guest,
    late,
    listen,
    make,
    move,
    remove,
    resize,
    still,
    take_over,
    use,
)
from scsi_orders import Scenario

SHARE: Final = 300  # orders of each, in the tests; `./dev explore` tries many more

SCENARIOS: Final[dict[str, Scenario]] = {
    "one caller": Scenario([use("a", "/1")], faults=6, cancels=1),
    "one mount shared by two": Scenario([use("a", "/1"), use("a", "/1")], faults=4, cancels=2),
    "one comes while one leaves": Scenario([use("a", "/1"), late(use("a", "/1"))], faults=3, cancels=1),
    "one comes with another path while one leaves": Scenario(
        [use("a", "/1"), late(use("a", "/2"))], faults=2, cancels=1
    ),
    "two mounts of one disk": Scenario([use("a", "/1"), use("a", "/2")], faults=3, cancels=2),
    "attached only beside mounted": Scenario([use("a", None), use("a", "/1")], faults=4, cancels=2),
    "two disks": Scenario([use("a", "/1"), use("b", "/2")], faults=1, cancels=2),
    "two disks, faults alone": Scenario([use("a", "/1"), use("b", "/2")], faults=3),
    "two disks for one path": Scenario([use("a", "/1"), use("b", "/1")], faults=3, cancels=2),
    "three share one mount": Scenario([use("a", "/1")] * 3, faults=2, cancels=3),
    "two share, one has another path": Scenario([use("a", "/1"), use("a", "/1"), use("a", "/2")], faults=1, cancels=2),
    "two share, one has another disk": Scenario([use("a", "/1"), use("a", "/1"), use("b", "/2")], faults=1, cancels=1),
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
        [kept_by_the_guest("a", "/1"), use("a", "/2")], faults=2, cancels=1
    ),
    "force where the guest knows none": Scenario([force_in_vain("a", "/1"), use("a", "/1")], faults=3, cancels=2),
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
    "held still beside a batch": Scenario([still(), batch("a", "b")], faults=3, cancels=2),
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
    "imported beside an add": Scenario([take_over(), use("a", "/1")], faults=3, cancels=2, before=[holder("b", "/2")]),
    "imported beside a removal": Scenario([take_over(), remove("a")], faults=3, cancels=2, before=[holder("a", "/1")]),
    "imported beside a resize": Scenario(
        [take_over(), resize("a", 4)], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
    "imported where nothing is attached": Scenario(
        [take_over(lost="disks")], faults=4, cancels=2, before=[holder("a", "/1")]
    ),
    "imported where nothing is attached, beside an add": Scenario(
        [take_over(lost="disks"), use("a", "/1")], faults=3, cancels=2, before=[holder("a", "/1"), holder("a", None)]
    ),
    "imported where nothing is mounted": Scenario(
        [take_over(lost="mounts"), use("a", "/1")], faults=3, cancels=2, before=[holder("a", "/1")]
    ),
}
