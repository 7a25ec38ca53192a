"""The rules of every host backend, on each of the VMs."""

from __future__ import annotations

from utilityvm.testing.contract import HOST_RULES

# A test for each rule, under its name.
globals().update({f"test_{name}": rule for name, rule in HOST_RULES.items()})
