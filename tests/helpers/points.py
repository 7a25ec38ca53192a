"""Which of many points a test takes: all of them in a long run, a few of them, other ones each day, in a short one.

And how it says so in the end: the fixture `tell`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

Tell = Callable[[str], None]

_VARIABLE = "UTILITYVM_CRASH"


def takes_all() -> bool:
    return os.environ.get(_VARIABLE) == "all"


def chosen(points: int, *, every: int) -> range:
    """The numbers of the points to take of so many, the first being 1: each `every`th; all with UTILITYVM_CRASH=all.

    Which is the first depends on the day, or on the number that UTILITYVM_CRASH is.
    """
    if takes_all():
        return range(1, points + 1)
    offset = int(os.environ.get(_VARIABLE) or datetime.date.today().toordinal())
    return range(1 + offset % min(every, points), points + 1, every) if points else range(0)
