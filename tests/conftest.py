from __future__ import annotations

try:
    import fcntl  # noqa: F401
except ImportError:  # Windows: there is no real VM, and what is tested there needs none
    pytest_plugins: list[str] = []
else:
    pytest_plugins = ["real_vms"]
