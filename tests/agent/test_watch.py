from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from utilityvm.agent.watch import Watch


@dataclass(eq=False)
class Item:
    deadline: float


class Expired:
    """What a watch called, and a way to wait for it."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._more = threading.Semaphore(0)

    def __call__(self, item: Item) -> None:
        self.items.append(item)
        self._more.release()

    def wait(self, count: int) -> list[Item]:
        for _ in range(count):
            assert self._more.acquire(timeout=20)
        return self.items


def test_what_is_late_is_called_in_the_order_of_deadlines() -> None:
    expired = Expired()
    watch = Watch(expired)
    now = time.monotonic()
    far, near, past = Item(now + 0.06), Item(now + 0.03), Item(now - 1)
    for item in (far, near, past):
        watch.add(item)
    assert expired.wait(3) == [past, near, far]
    assert time.monotonic() >= far.deadline


def test_what_was_removed_is_not_called() -> None:
    expired = Expired()
    watch = Watch(expired)
    now = time.monotonic()
    removed, kept = Item(now + 0.02), Item(now + 0.04)
    watch.add(removed)
    watch.add(kept)
    watch.remove(removed)
    watch.remove(removed)
    assert expired.wait(1) == [kept]


def test_a_watch_goes_on_after_it_had_nothing_to_do() -> None:
    expired = Expired()
    watch = Watch(expired)
    watch.add(Item(time.monotonic()))
    expired.wait(1)
    watch.add(Item(time.monotonic() + 0.01))
    assert len(expired.wait(1)) == 2
