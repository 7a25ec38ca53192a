"""What `from utilityvm import ...` gives."""

from __future__ import annotations

import inspect

import pytest

import utilityvm


@pytest.mark.parametrize("name", utilityvm.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(utilityvm, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), f"{name} has no docstring"


def test_every_error_is_public() -> None:
    from utilityvm import errors

    kinds = {name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    assert kinds <= set(utilityvm.__all__)


def test_the_tree_at_the_top_of_errors_is_the_tree() -> None:
    from utilityvm import errors

    drawn = errors.__doc__ or ""
    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, Exception):
            assert f" {name} " in drawn.replace("─", " "), f"{name} is not in the tree"
