"""The command in this process, with folders of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from utilityvm.cli.commands import uvm as command
from utilityvm.store import Store

Uvm = Callable[..., Result]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the machine's own VMs is seen or touched."""
    for what in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"UTILITYVM_{what}_DIR", str(tmp_path / what.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets up the library's logging for its process, which here is everybody's."""
    ours = logging.getLogger("utilityvm")
    before = ours.propagate, ours.level, ours.handlers[:]
    yield
    ours.propagate, ours.handlers[:] = before[0], before[2]
    ours.setLevel(before[1])


@pytest.fixture
def uvm() -> Uvm:
    def run(*words: str | Path, input: str | None = None) -> Result:
        return CliRunner().invoke(command, [os.fspath(word) for word in words], input=input, catch_exceptions=False)

    return run


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open() as store:
        yield store
