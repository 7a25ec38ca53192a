"""Programs on the command line: what is typed, and what is refused before a VM is looked for."""

from __future__ import annotations

import click
import pytest

from utilityvm.cli.program import which
from utilityvm.cli.values import limit, signal_number

from .conftest import Uvm


@pytest.mark.parametrize(("text", "number"), [("TERM", 15), ("SIGTERM", 15), ("usr1", 10), ("15", 15), ("64", 64)])
def test_signals_are_the_guests(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "-9", "NO", "SIG", "٣"])
def test_what_is_no_signal_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="--signal"):
        signal_number(text)


@pytest.mark.parametrize(
    ("text", "field"),
    [("memory=64M", ("memory_bytes", 64 << 20)), ("pids=100", ("pids", 100)), ("cpus=0.5", ("cpus", 0.5))],
)
def test_limits_are_fields_of_the_library(text: str, field: tuple[str, object]) -> None:
    assert limit(text) == field


@pytest.mark.parametrize(
    "text", ["memory", "memory=", "memory=lots", "pids=1.5", "pids=-1", "cpus=x", "disk=1", "=1", ""]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="--limit"):
        limit(text)


def test_a_program_is_meant_by_its_number_or_its_name() -> None:
    assert (which("12"), which("web"), which("12a")) == (12, "web", "12a")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("exec -d --timeout 3 v true", 2, "--timeout"),
        ("exec --name web v true", 2, "--name"),
        ("exec --limit pids v true", 2, "--limit"),
        ("exec -d v true", 125, "v"),
        ("programs v", 3, "v"),
        ("logs v 1", 3, "v"),
        ("kill v 1", 3, "v"),
        ("kill v 1 -s NO", 2, "--signal"),
    ],
)
def test_what_cannot_be_is_said(uvm: Uvm, words: str, code: int, text: str) -> None:
    done = uvm(*words.split())
    assert done.exit_code == code, done.stderr
    assert text in done.stderr
