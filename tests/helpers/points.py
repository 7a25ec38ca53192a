"""How much a test tries: all of it in a long run (`./dev long`); else a few of many points, other ones each day.

And how it says so in the end: the fixture `tell`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

Tell = Callable[[str], None]

_VARIABLE = "UTILITYVM_CRASH"


def takes_all() -> bool:
    """Is this a long run?"""
    return os.environ.get(_VARIABLE) == "all"


def rounds(short: int, *, long: int) -> int:
    """How many rounds to go of something that is done again and again."""
    return long if takes_all() else short


def chosen(points: int, *, every: int) -> range:
    """The numbers of the points to take of so many, the first being 1: each `every`th; all with UTILITYVM_CRASH=all.

    Which is the first depends on the day, or on the number that UTILITYVM_CRASH is.
    """
    if takes_all():
        return range(1, points + 1)
    offset = int(os.environ.get(_VARIABLE) or datetime.date.today().toordinal())
    return range(1 + offset % min(every, points), points + 1, every) if points else range(0)
