"""The rules of every guest backend, on each of the VMs."""

from __future__ import annotations

from utilityvm.testing.contract import GUEST_RULES

# A test for each rule, under its name.
globals().update({f"test_{name}": rule for name, rule in GUEST_RULES.items()})
