from __future__ import annotations

from hypothesis import HealthCheck, settings

try:
    import fcntl  # noqa: F401
except ImportError:  # Windows: there is no real VM, and what is tested there needs none
    pytest_plugins: list[str] = []
else:
    pytest_plugins = ["real_vms"]

# How fast an example is depends on what else the machine does, and is not what these tests are about.
settings.register_profile("utilityvm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("utilityvm")
