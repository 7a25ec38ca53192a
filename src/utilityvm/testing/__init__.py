"""Fakes that could be true, the contract that real backends share with them, and real images. For our tests and yours.

`FakeHost` keeps a bus and refuses what a bus refuses; `FakeGuest` keeps mounts and devices and refuses what a kernel
refuses; `MemoryJournal` forgets nothing. Each can be told to break its next step in one of the ways that real ones do.
"""

from utilityvm.testing.fakes import Break, FakeGuest, FakeHost, FakeWorld, MemoryJournal

__all__ = ["Break", "FakeGuest", "FakeHost", "FakeWorld", "MemoryJournal"]
