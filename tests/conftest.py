from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from points import Tell

try:
    import fcntl  # noqa: F401
except ImportError:  # Windows: there is no real VM, and what is tested there needs none
    pytest_plugins: list[str] = []
else:
    pytest_plugins = ["real_vms"]

# How fast an example is depends on what else the machine does, and is not what these tests are about.
settings.register_profile("utilityvm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("utilityvm")

_TOLD = "told"
_VMS_OF_THEIR_OWN = {
    f"tests/real/test_{name}.py" for name in ("crash_templates", "server", "soak", "start", "templates")
}
_HANG_S = 600  # no test takes so long: one that does hangs, and the stacks of all its threads are printed


@pytest.fixture(scope="session", autouse=True)
def _blocking_is_watched() -> Iterator[None]:
    if sys.platform == "win32":  # what is tested there has no files
        yield
        return
    import blocking

    watching = blocking.watch()
    yield
    watching.deactivate()


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop(_blocking_is_watched: None) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import blocking

    blocking.found.clear()
    yield
    assert not blocking.found, "\n".join(blocking.found[:3])


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Say how much a test tried; it is printed at the end, of a test that passed."""
    return lambda text: record_property(_TOLD, text)


@pytest.fixture(scope="session", autouse=True)
def own_cgroup() -> Generator[None]:
    """Programs that an agent of ours runs on this machine are in cgroups that go with the tests."""
    from utilityvm.agent import cgroups

    own = cgroups._own() if os.name == "posix" else None
    folder = f"{own}/uvm-test-{os.getpid()}"
    try:
        Path(folder).mkdir()
    except OSError:  # there is none, or we may not: such an agent tells them by their sessions
        yield
        return
    ours = cgroups.Cgroups(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroups, "here", lambda: ours)
        yield
    for path in [*cgroups._below(folder), folder]:
        cgroups._kill(path)
        cgroups._wait_until_empty(path, 20)
        with contextlib.suppress(OSError):
            Path(path).rmdir()


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("timeout") and not config.getoption("timeout", None):
        config.option.timeout = _HANG_S
    # What a shell starts in the background is deaf to Ctrl-C, and so are its children; tests send it to theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed: list[pytest.TestReport] = terminalreporter.stats.get("passed", [])
    told = [text for report in passed for name, text in report.user_properties if name == _TOLD]
    if told:
        terminalreporter.section("how much was tried")
    for text in told:
        terminalreporter.line(str(text))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Where several processes share the tests, two at most start real VMs: more would slow each other.

    One has the tests that share a VM, the other those that start their own. Of the rest, a file is for one process.
    """
    from xdist.scheduler import LoadScopeScheduling

    def scope(test: str) -> str:
        file = test.partition("::")[0]
        if file in _VMS_OF_THEIR_OWN:
            return "real, of their own"
        return "real" if file.startswith("tests/real/") or "[qemu" in test else file

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope
    return scheduler
