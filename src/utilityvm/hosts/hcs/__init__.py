"""Windows' host compute system (HCS), driven as hcsshim drives it.

`documents` are what is sent, `gob` and `clone` what templates are kept in and clones made from, `savedstate` what a VM
that moves takes along; these are pure. `host` and `guest` are the backends for the manager, `computecore` is the way to
Windows. All of it imports everywhere.

Nothing here has ever run on Windows: docs/coming-from-hcsshim.md says what was tested and how.
"""
