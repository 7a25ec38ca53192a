"""How a rule of the contract says that it does not hold, or cannot be tried. No test framework is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
from unittest import SkipTest

from utilityvm.errors import UtilityVMError

E = TypeVar("E", bound=UtilityVMError)


class NotTried(SkipTest):
    """The rule cannot be tried on these backends; says why. pytest and unittest show it as skipped."""


class Refused(Generic[E]):
    """What the block was refused with."""

    value: E


@contextmanager
def refused(*kinds: type[E]) -> Iterator[Refused[E]]:
    """The block must be refused with an error of one of these kinds.

    Raises:
        AssertionError: it was not.
    """
    found = Refused[E]()
    try:
        yield found
    except kinds as error:
        found.value = error
    else:
        raise AssertionError(f"this must be refused with {' or '.join(kind.__name__ for kind in kinds)}")
