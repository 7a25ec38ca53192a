from __future__ import annotations

import signal
from collections.abc import Callable

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


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Say how much a test tried; it is printed at the end, of a test that passed."""
    return lambda text: record_property(_TOLD, text)


def pytest_configure() -> None:
    """What a shell starts in the background is deaf to Ctrl-C, and so are its children; tests send it to theirs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed: list[pytest.TestReport] = terminalreporter.stats.get("passed", [])
    told = [text for report in passed for name, text in report.user_properties if name == _TOLD]
    if told:
        terminalreporter.section("how much was tried")
    for text in told:
        terminalreporter.line(str(text))


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, a file is for one of them, and so are all tests with real VMs."""
    for item in items:
        group = "real" if item.get_closest_marker("real") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
